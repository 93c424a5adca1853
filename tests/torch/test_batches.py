"""A batch in every form that people hold: a tensor, a tuple, a list, a mapping, with labels or without."""

import numpy as np
import pytest
import torch
from torch import nn

import secateur
from secateur import criteria
from secateur.deploy import target
from secateur.deploy.jobs import export as exporting
from secateur.errors import DataError
from secateur.select import Element
from secateur.torch.base.batches import arguments, by_name, run
from tests import zoo

X, Y = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), torch.arange(5) % 3
FORMS = {
    "tensor": X,
    "tuple": (X,),
    "list": [X],
    "tuple with labels": (X, Y),
    "list with labels": [X, Y],
    "mapping": {"x": X},
    "mapping with labels": {"x": X, "labels": Y},
    "mapping with notes of a task": {"x": X, "_note": Y},
    "mapping with positions and labels": {"0": X, "labels": Y},
}


class Net(nn.Module):
    """A model of one input."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x):
        return self.down(self.up(x).relu())


def loss(net, batch):
    """Cross-entropy with the labels of the batch where it has any: the batch is whole here."""
    outputs = run(net, batch)
    labels = batch.get("labels") if isinstance(batch, dict) else batch[1] if len(batch) > 1 else None
    return nn.functional.cross_entropy(outputs, outputs.argmax(-1) if labels is None else labels)


@pytest.fixture
def pretend(monkeypatch):
    """A target that runs the model itself; it takes what the program is fed."""

    class Pretend(target.Target):
        def load(self, folder, graph="model", threads=1):
            return self.write.program

    def write(graphs, folder, *, int8):
        (folder / "model.bin").write_bytes(b"model")
        unit = graphs["model"]
        assert unit.inputs.keys() == {"x"}

        def program(feed):
            fed.append(feed)
            with torch.no_grad():
                return {"output": unit.module(**{name: torch.tensor(value) for name, value in feed.items()}).numpy()}

        write.program = program
        return {"model": target.Written(["model.bin"], ["output"])}

    fed = []
    monkeypatch.setattr(exporting, "find", lambda name: Pretend("onnx", (), "any", write))
    return fed


@pytest.mark.parametrize("name", FORMS)
def test_every_form_in_open_prune_verify_collect_and_export(name, pretend, tmp_path):
    batch, usual = FORMS[name], {"x": X, **({"labels": Y} if "labels" in name else {})}
    host, plain = secateur.open(Net(), example=batch, loss=loss), secateur.open(Net(), example={"x": X}, loss=loss)
    assert str(host.layout) == str(plain.layout)
    stats, expected = host.collect(["act_sq", "grad"], [batch]), plain.collect(["act_sq", "grad"], [usual])
    for need in ("act_sq", "grad"):
        assert np.array_equal(stats.mean(need, "down.weight"), expected.mean(need, "down.weight"))
    plan = secateur.prune(host, criteria.wanda, Element(), 0.5, [batch])
    wanted = secateur.prune(plain, criteria.wanda, Element(), 0.5, [{"x": X}])
    assert all(np.array_equal(mask, wanted.masks[weight]) for weight, mask in plan.masks.items())
    (axis,) = (axis for axis in host.layout.axes.values() if not axis.frozen)
    assert secateur.verify(host, secateur.Plan({axis.name: np.arange(5)}), [batch]).difference < 1e-6
    made = exporting.export(host.model, "onnx", tmp_path / "data", data=iter([batch, batch]))
    assert made.parity.examples == 2 * len(X)
    assert made.parity.relative_error == 0.0
    assert all(set(feed) == {"x"} and np.array_equal(feed["x"], X.numpy()) for feed in pretend)
    exporting.export(host.model, "onnx", tmp_path / "example", example=batch)
    assert pretend[-1]["x"].shape[1:] == (8,)


def test_tokens_that_go_in_every_form():
    ids, labels = torch.randint(2, 60, (4, 7), generator=torch.Generator().manual_seed(0)), torch.full((4,), 99)
    host = secateur.open(zoo.Sentence().eval(), example=ids)
    (vocabulary,) = host.layout.of_kind("vocab")
    plan = secateur.Plan({vocabulary.name: np.arange(40)})
    for batch in (ids, (ids,), [ids, labels], {"ids": ids}):
        assert secateur.verify(host, plan, [batch]).difference < 1e-6
    host.resize(plan)
    assert isinstance(host.example, tuple)
    assert host.outputs((ids.clamp_max(39), labels))[0].shape == (4, 3)


def test_labels_in_the_place_of_an_input_are_a_loss_of_the_model():
    model = zoo.vit()
    pixels, labels = zoo.inputs(model)["pixel_values"], torch.tensor([0, 2])
    host = secateur.open(model, example=pixels)
    name = next(iter(host.layout.linears))
    stats = [
        host.collect(["grad"], [batch]).mean("grad", name)
        for batch in ((pixels, labels), {"pixel_values": pixels, "labels": labels})
    ]
    assert np.array_equal(*stats)
    assert by_name(model, (pixels, labels)).keys() == {"pixel_values", "labels"}


class Any(nn.Module):
    def forward(self, *parts):
        return parts[0]


def test_what_is_no_batch():
    with pytest.raises(DataError, match=r"a batch has 3 parts, but Net takes x; pass these, and labels at most"):
        arguments(Net(), (X, Y, Y))
    with pytest.raises(DataError, match=r"'x' is no batch; pass a list of batches, each of tensors"):
        secateur.open(Net(), example=(X,)).collect(["act_sq"], {"x": X})
    assert arguments(Any(), (X, Y)) == arguments(Any(), {"0": X, "1": Y, "labels": Y}) == (X, Y)
    with pytest.raises(DataError, match="Any names no inputs; pass batches with names"):
        by_name(Any(), X)
    with pytest.raises(DataError, match="gradients need a loss: pass labels in each batch, or loss=callable"):
        secateur.open(Net(), example=X).collect(["grad"], [(X, Y)])
