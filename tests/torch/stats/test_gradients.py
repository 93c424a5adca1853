"""What a backward pass collects, against autograd on the whole data and against gates."""

import numpy as np
import pytest
import torch
import transformers

import secateur
from secateur import Unit, criteria
from secateur.errors import DataError
from secateur.pruning import unit_scores
from tests import zoo


def batches(model, sizes=(4, 4, 1), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "input_ids": torch.randint(3, 50, (size, 6), generator=generator),
            "attention_mask": torch.ones(size, 6, dtype=torch.long),
            "labels": torch.randint(0, 2, (size,), generator=generator),
        }
        for size in sizes
    ]


@pytest.fixture
def host():
    return secateur.open(zoo.bert(num_hidden_layers=1))


def test_grad_is_that_of_the_mean_loss_over_all_rows(host):
    data = batches(host.model)
    stats = host.collect(["grad"], data)
    whole = {key: torch.cat([batch[key] for batch in data]) for key in data[0]}
    names = [name for name in host.parameters() if host.parameters()[name].requires_grad]
    wanted = torch.autograd.grad(host.model(**whole).loss, [host.parameters()[n] for n in names], allow_unused=True)
    checked = 0
    for name, gradient in zip(names, wanted, strict=True):
        if gradient is not None:
            torch.testing.assert_close(stats.mean("grad", name), gradient, rtol=1e-4, atol=1e-7)
            checked += 1
    assert checked > 15


def masked_bert():
    config = zoo.bert(num_hidden_layers=1).config
    return transformers.BertForMaskedLM(config).eval()


def labelled_tokens(first_counts):
    """Two rows with 1 and 8 labels that count, the first of each row among them or not."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 50, (2, 9), generator=generator)
    labels = torch.full_like(ids, -100)
    labels[0, 5] = ids[0, 5]
    labels[1, 1:] = ids[1, 1:]
    if first_counts:
        labels[:, 0] = ids[:, 0]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.mark.parametrize("first_counts", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: zoo.llama(num_hidden_layers=1), id="causal"),
        pytest.param(masked_bert, id="masked", marks=pytest.mark.slow),
        pytest.param(lambda: zoo.t5(num_layers=1, num_decoder_layers=1), id="seq2seq", marks=pytest.mark.slow),
    ],
)
def test_grad_of_token_labels_is_the_same_however_rows_are_batched(make, first_counts):
    """The mean goes over labels: of unequally many in two rows, and in causal models never over the first of a row."""
    host = secateur.open(make())
    whole = labelled_tokens(first_counts)
    rows = [{key: value[i : i + 1] for key, value in whole.items()} for i in range(2)]
    together, apart = host.collect(["grad"], [whole]), host.collect(["grad"], rows)
    names = [name for name, p in host.parameters().items() if p.requires_grad and together.has("grad", name)]
    wanted = torch.autograd.grad(host.model(**whole).loss, [host.parameters()[n] for n in names])
    assert len(names) > 10
    for name, gradient in zip(names, wanted, strict=True):
        for stats in (together, apart):
            torch.testing.assert_close(stats.mean("grad", name), gradient, rtol=1e-4, atol=1e-6)


def test_rows_without_a_label_have_no_part_in_the_mean(host):
    data = batches(host.model, (3, 2))
    data[0]["labels"][1:] = -100
    stats = host.collect(["grad"], data)
    assert set(stats.counts["grad"].values()) == {3}
    whole = {key: torch.cat([batch[key] for batch in data]) for key in data[0]}
    weight = host.model.classifier.weight
    wanted = torch.autograd.grad(host.model(**whole).loss, weight)[0]
    torch.testing.assert_close(stats.mean("grad", "classifier.weight"), wanted, rtol=1e-4, atol=1e-7)
    data[1]["labels"][:] = -100
    with pytest.raises(DataError, match="no label of a batch counts: all are -100"):
        host.collect(["grad"], data)


def gated_loss(host, batch, path, unit, value):
    """The loss when one input column of a linear layer is scaled."""

    def scale(module, args):
        one = torch.nn.functional.one_hot(torch.tensor(unit), args[0].shape[-1])
        x = args[0] * (1 + one * (value - 1))
        return (x,)

    handle = host.model.get_submodule(path).register_forward_pre_hook(scale)
    loss = host.model(**batch).loss
    handle.remove()
    return loss


def test_fisher_is_the_squared_gradient_of_a_gate(host):
    data = batches(host.model)
    stats = host.collect(["unit_grad_sq"], data, ["L0.ffn"])
    for unit in (0, 7, 47):
        wanted = []
        for batch in data:
            gate = torch.ones((), requires_grad=True)
            loss = gated_loss(host, batch, "bert.encoder.layer.0.output.dense", unit, gate)
            wanted.append(float(torch.autograd.grad(loss, gate)[0]) ** 2)
        assert stats.mean("unit_grad_sq", "L0.ffn")[unit] == pytest.approx(np.mean(wanted), rel=1e-3)


def test_taylor_of_a_unit_is_the_slope_of_the_loss(host):
    """d loss / d t at t = 1, where t scales every weight of the unit: in, bias and out."""
    host.model.double()
    data = batches(host.model, (5,))
    stats = host.collect(["grad"], data)
    axis = host.layout.axis("L0.ffn")
    scores = unit_scores(host, criteria.taylor, axis, stats)
    names = list(host.layout.members("L0.ffn"))
    for unit in (0, 11):
        losses = []
        for t in (1 + 1e-5, 1 - 1e-5):
            other = host.copy()
            for name in names:
                w = other.read(name)
                index = [slice(None)] * w.dim()
                index[next(i for i, o in enumerate(host.layout.owners(name, "L0.ffn")) if o is not None)] = unit
                w[tuple(index)] *= t
            losses.append(float(other.model(**data[0]).loss.detach()))
        assert scores[unit] == pytest.approx(abs(losses[0] - losses[1]) / 2e-5, rel=1e-3, abs=1e-8)


def test_flags_and_gradients_come_back(host):
    model, data = host.model, batches(host.model)
    frozen = model.get_parameter("bert.encoder.layer.0.output.dense.weight").requires_grad_(requires_grad=False)
    own = model.classifier.weight
    own.grad = torch.full_like(own, 3.0)
    model.train()
    model.bert.encoder.eval()
    flags = {name: module.training for name, module in model.named_modules()}
    stats = host.collect(["grad"], data)
    assert stats.has("grad", "bert.encoder.layer.0.output.dense.weight")
    assert not frozen.requires_grad
    assert frozen.grad is None
    assert torch.equal(own.grad, torch.full_like(own, 3.0))
    with pytest.raises(DataError, match="gradients need a loss: pass labels"):
        host.collect(["grad"], [{k: v for k, v in data[0].items() if k != "labels"}])
    assert torch.equal(own.grad, torch.full_like(own, 3.0))
    assert flags == {name: module.training for name, module in model.named_modules()}


def test_a_loss_that_is_no_number(host):
    with torch.no_grad():
        host.model.classifier.weight.fill_(float("inf"))
    with pytest.raises(DataError, match="the loss is nan on this data"):
        host.collect(["grad"], batches(host.model))


def test_bfloat16():
    host = secateur.open(zoo.bert(num_hidden_layers=1).to(torch.bfloat16))
    data = batches(host.model)
    for criterion in (criteria.taylor, criteria.fisher, criteria.activation, criteria.attention_mass):
        kind = "head" if criterion is criteria.attention_mass else "ffn"
        plan = secateur.prune(host, criterion, Unit(kind), 0.5, data)
        assert len(plan.keep[f"L0.{kind}"]) == host.layout.axis(f"L0.{kind}").size // 2
    assert host.model.dtype == torch.bfloat16
