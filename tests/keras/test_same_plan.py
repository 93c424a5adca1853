"""The same weights give the same scores and the same plan in PyTorch and in Keras, for every criterion they share."""

import functools

import keras
import numpy as np
import pytest
from keras import layers as kl

import secateur
from secateur import pruning

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
criteria = secateur.criteria
pytestmark = pytest.mark.slow

VOCAB, LENGTH, HEADS, DIM, FFN, LAYERS = 30, 8, 4, 16, 24, 2
PARTS = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "attention_output",
}


def in_torch():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=DIM,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=FFN,
        max_position_embeddings=40,
        initializer_range=0.3,
        layer_norm_eps=1e-6,
    )
    return transformers.BertForSequenceClassification(config).eval()


def in_keras():
    ids = keras.Input((LENGTH,), dtype="int32", name="ids")
    places = keras.Input((LENGTH,), dtype="int32", name="places")
    real = keras.Input((LENGTH,), dtype="bool", name="real")

    def norm(name):
        return kl.LayerNormalization(epsilon=1e-6, name=name)

    words = kl.Embedding(VOCAB, DIM, name="words")(ids)
    x = norm("norm")(kl.Add()([words, kl.Embedding(LENGTH, DIM, name="positions")(places)]))
    for i in range(LAYERS):
        y = kl.MultiHeadAttention(HEADS, DIM // HEADS, name=f"attention_{i}")(x, x, attention_mask=real[:, None, :])
        x = norm(f"norm1_{i}")(kl.Add()([x, y]))
        y = kl.Dense(DIM, name=f"down_{i}")(kl.Dense(FFN, activation="gelu", name=f"up_{i}")(x))
        x = norm(f"norm2_{i}")(kl.Add()([x, y]))
    x = kl.Dense(2, name="head")(kl.Dense(DIM, activation="tanh", name="pooler")(x[:, 0]))
    return keras.Model([ids, places, real], x)


def names():
    """Keras name -> (PyTorch name, PyTorch array -> Keras array) of every parameter but the token types."""
    table = {}

    def dense(mine, theirs):
        table[f"{mine}.kernel"] = (f"{theirs}.weight", lambda w: w.T)
        table[f"{mine}.bias"] = (f"{theirs}.bias", lambda w: w)

    def norm(mine, theirs):
        table[f"{mine}.gamma"] = (f"{theirs}.weight", lambda w: w)
        table[f"{mine}.beta"] = (f"{theirs}.bias", lambda w: w)

    table["words.embeddings"] = ("bert.embeddings.word_embeddings.weight", lambda w: w)
    table["positions.embeddings"] = ("bert.embeddings.position_embeddings.weight", lambda w: w[:LENGTH])
    norm("norm", "bert.embeddings.LayerNorm")
    for i in range(LAYERS):
        theirs = f"bert.encoder.layer.{i}"
        for source, part in PARTS.items():
            dense(f"attention_{i}.{part}", f"{theirs}.{source}")
        dense(f"up_{i}", f"{theirs}.intermediate.dense")
        dense(f"down_{i}", f"{theirs}.output.dense")
        norm(f"norm1_{i}", f"{theirs}.attention.output.LayerNorm")
        norm(f"norm2_{i}", f"{theirs}.output.LayerNorm")
    dense("pooler", "bert.pooler.dense")
    dense("head", "classifier")
    return table


@pytest.fixture(scope="module")
def hosts():
    """(PyTorch host, its batches, Keras host, its batches), with equal weights."""
    model = in_torch()
    there = secateur.open(model)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    here = secateur.open(in_keras(), loss=loss, token_mask=lambda x: x[2])
    state = {name: p.detach().numpy() for name, p in model.named_parameters()}
    for mine, (theirs, turned) in names().items():
        value = turned(state[theirs])
        if mine == "positions.embeddings":
            value = value + state["bert.embeddings.token_type_embeddings.weight"][:1]
        here.write(mine, value.reshape(here.layout.shape(mine)))
    rng = np.random.default_rng(0)
    ours, theirs = [], []
    for size in (4, 3, 5):
        ids = rng.integers(1, VOCAB, (size, LENGTH)).astype("int32")
        ids[0, 5:] = 0
        labels = rng.integers(0, 2, size)
        ours.append(([ids, np.tile(np.arange(LENGTH, dtype="int32"), (size, 1)), ids != 0], labels))
        mask = torch.from_numpy((ids != 0).astype("int64"))
        theirs.append(
            {"input_ids": torch.from_numpy(ids).long(), "attention_mask": mask, "labels": torch.from_numpy(labels)}
        )
    np.testing.assert_allclose(here.outputs(ours[0])[0], model(**theirs[0]).logits.detach().numpy(), atol=1e-5)
    return there, theirs, here, ours


def close(a, b, what):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1.0, float(np.abs(a).max())), err_msg=what)


ELEMENT = ("magnitude", "gradient", "taylor", "wanda", "brain_damage")
UNIT = {
    "head": ("magnitude", "gradient", "taylor", "fisher", "brain_damage", "attention_mass", "attention_output"),
    "ffn": ("magnitude", "gradient", "taylor", "fisher", "activation"),
}


@pytest.mark.parametrize("name", ELEMENT)
def test_weights(hosts, name):
    there, their_data, here, our_data = hosts
    criterion = getattr(criteria, name)
    table = {mine: pair for mine, pair in names().items() if mine.endswith("kernel") and mine[-8] in "0123456789"}
    table |= {mine: pair for mine, pair in names().items() if mine.startswith("attention_") and mine.endswith("kernel")}
    needs = [need for need in pruning.needs_of(criterion) if need != "weight"]
    ours = here.collect(needs, our_data) if needs else secateur.Stats()
    theirs = there.collect(needs, their_data) if needs else secateur.Stats()
    for mine, (other, turned) in table.items():
        a = pruning.weight_scores(here, criterion, mine, ours)
        close(a, turned(pruning.weight_scores(there, criterion, other, theirs)).reshape(a.shape), mine)
    for pattern, budget in ((secateur.Element(), secateur.Global(0.6)), (secateur.NM(2, 4), None)):
        a = secateur.prune(here, criterion, pattern, budget, stats=ours, weights=list(table))
        b = secateur.prune(there, criterion, pattern, budget, stats=theirs, weights=[o for o, _ in table.values()])
        for mine, (other, turned) in table.items():
            mask = a.masks[mine]
            np.testing.assert_array_equal(mask, turned(b.masks[other]).reshape(mask.shape), err_msg=mine)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in UNIT.items() for name in names])
def test_units(hosts, kind, name):
    there, their_data, here, our_data = hosts
    criterion = getattr(criteria, name)
    needs = [need for need in pruning.needs_of(criterion) if need != "weight"]
    ours = here.collect(needs, our_data) if needs else secateur.Stats()
    theirs = there.collect(needs, their_data) if needs else secateur.Stats()
    for axis in here.layout.of_kind(kind):
        if not axis.name.startswith("L") or axis.size not in (HEADS, FFN):
            continue
        other = there.layout.axis(axis.name)
        close(
            pruning.unit_scores(here, criterion, axis, ours), pruning.unit_scores(there, criterion, other, theirs), ""
        )
    axes = [f"L{i}.{kind}" for i in range(LAYERS)]
    a = secateur.prune(here, criterion, secateur.Unit(*axes), secateur.PerKind(0.5), stats=ours)
    b = secateur.prune(there, criterion, secateur.Unit(*axes), secateur.PerKind(0.5), stats=theirs)
    assert {k: v.tolist() for k, v in a.keep.items()} == {k: v.tolist() for k, v in b.keep.items()}


# A LayerNormalization gives a nearly singular gram: damped more, and solved further than float32 is by default.
REFIT = functools.partial(secateur.repair.least_squares, damp=1.0, tolerance=1e-6)


@pytest.mark.parametrize(
    ("method", "criterion", "pattern"),
    [
        (secateur.repair.sparsegpt, None, secateur.NM(2, 4)),
        (secateur.repair.sparsegpt, None, secateur.Block(2, 4)),
        (REFIT, criteria.magnitude, secateur.Element()),
    ],
)
def test_repair_of_attention_kernels(hosts, method, criterion, pattern):
    """Kernels of three dimensions are repaired as the matrices that they are in PyTorch."""
    there, their_data, here, our_data = hosts
    table = {mine: pair for mine, pair in names().items() if mine.startswith("attention_") and mine.endswith("kernel")}
    assert all(len(here.layout.shape(mine)) == 3 for mine in table)
    budget = None if isinstance(pattern, secateur.NM) else 0.5
    a = secateur.prune(here, criterion, pattern, budget, our_data, weights=list(table), repair=method)
    theirs = [other for other, _ in table.values()]
    b = secateur.prune(there, criterion, pattern, budget, their_data, weights=theirs, repair=method)
    for mine, (other, turned) in table.items():
        new = a.weights[mine]
        np.testing.assert_array_equal(a.masks[mine], turned(b.masks[other]).reshape(new.shape), err_msg=mine)
        np.testing.assert_allclose(turned(b.weights[other]).reshape(new.shape), new, rtol=0, atol=3e-5)
        assert np.abs(new - here.read(mine) * a.masks[mine]).max() > 1e-3
