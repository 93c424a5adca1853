"""A pruned model learns from the dense one: what is computed once, what is refused."""

import copy

import pytest
import torch
import transformers

from secateur.errors import DataError, PlanError
from secateur.recipe import Distillation
from secateur.torch.stream import distil_whole
from secateur.torch.stream.run import prune_folder, prune_loaded
from tests import zoo
from tests.text_models import write_model
from tests.torch.language import recipe, windows

pytestmark = pytest.mark.usefixtures("traced_once")


def tuned(make, options, whole):
    """The state of a model without half of its weights after learning, and how often the dense model ran; `whole`
    hides its output layer."""
    torch.manual_seed(0)
    dense = make().eval().requires_grad_(requires_grad=False)
    model = copy.deepcopy(dense)
    names = [name for name, p in model.named_parameters() if p.dim() == 2 and "mlp" in name]
    for name in names:
        model.get_parameter(name).data[:, ::2] = 0
    calls = []
    dense.register_forward_hook(lambda *_: calls.append(1))
    if whole:
        dense.get_output_embeddings = lambda: None
    batches = [{"input_ids": window[None]} for window in windows(4)]
    losses = distil_whole.retrain(model, dense, names, batches, options, low_precision=False)
    assert all(bool((model.get_parameter(name)[:, ::2] == 0).all()) for name in names)
    return model.state_dict(), losses, len(calls)


@pytest.mark.parametrize(("hidden", "passes", "calls"), [(0.0, 2.5, 4), (0.0, 1.0, 4), (1.0, 1.5, 6)])
def test_a_second_pass_runs_the_output_layer_alone_and_gives_the_same_bits(hidden, passes, calls):
    options = Distillation(passes=passes, hidden=hidden)
    once, losses, ran = tuned(zoo.llama, options, whole=False)
    again, whole_losses, ran_whole = tuned(zoo.llama, options, whole=True)
    assert ran == calls
    assert ran_whole == round(4 * passes)
    assert losses == whole_losses
    assert all(torch.equal(value, again[name]) for name, value in once.items())


def test_logits_that_the_output_layer_does_not_give_are_computed_anew():
    class Scaled(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 2
            return output

    assert tuned(lambda: Scaled(zoo.llama().config), Distillation(passes=2.0), whole=False)[2] == 8


@pytest.mark.slow
def test_distillation_that_cannot_be(tmp_path, monkeypatch):
    write_model(tmp_path / "in")
    with pytest.raises(PlanError, match=r"distillation holds .* more than 0.0 GiB; .* use reconstruct, which"):
        prune_folder(tmp_path / "in", tmp_path / "out", windows(), recipe(distil=True, memory=10**5))
    losses = iter([3.0, float("nan")])
    monkeypatch.setattr(distil_whole, "_accumulate", lambda *a, **k: next(losses))
    with pytest.raises(DataError, match="distillation diverged at step 2; lower its rate"):
        prune_loaded(zoo.llama(), windows(), recipe(distil=True))
    with pytest.raises(PlanError, match="distil needs calibration text"):
        prune_folder(tmp_path / "in", tmp_path / "other", None, recipe(criterion="magnitude", distil=True))
