"""What the loss of a Keras model goes over (sample weights, masks), and whether a classifier gives logits."""

import keras
import numpy as np
import pytest

import secateur
from secateur import Plan
from secateur.errors import DataError, ModelError
from secateur.keras import workflow
from secateur.keras.workflow import Arrays, KerasStage, KerasTuning, logits, run

Sparse = keras.losses.SparseCategoricalCrossentropy
X = np.random.default_rng(0).normal(size=(12, 6)).astype("float32")
Y = np.arange(12) % 2


def classifier(compiled=None, end=None):
    inputs = keras.Input((6,))
    x = keras.layers.Dense(8, "gelu", name="a")(inputs)
    x = keras.layers.Dense(2, name="b", activation="softmax" if end == "activation" else None)(x)
    if end == "layer":
        x = keras.layers.Softmax()(x)
    if end == "operation":
        x = keras.ops.softmax(x)
    model = keras.Model(inputs, x)
    if compiled is not None:
        model.compile("sgd", compiled)
    return model


def tagger():
    """Scores of three tags for each token that is not 0."""
    inputs = keras.Input((5,), dtype="int32")
    x = keras.layers.Embedding(9, 4, mask_zero=True)(inputs)
    return keras.Model(inputs, keras.layers.Dense(3, name="tags")(x))


def per_example(y, outputs):
    return keras.losses.sparse_categorical_crossentropy(y, outputs, from_logits=True)


def hosts():
    """A host for each way in which a loss reaches it."""
    compiled = secateur.open(classifier(Sparse(from_logits=True)))
    resized = secateur.open(classifier(Sparse(from_logits=True)))
    resized.resize(Plan({next(name for name, axis in resized.layout.axes.items() if not axis.frozen): np.arange(5)}))
    return {
        "compiled": compiled,
        "copied": compiled.copy(),
        "resized": resized,
        "object": secateur.open(classifier(), loss=Sparse(from_logits=True)),
        "function": secateur.open(classifier(), loss=per_example),
        "copied function": secateur.open(classifier(per_example)).copy(),
    }


def test_sample_weights_reach_every_loss():
    """Weights of 0 and 1 leave the sum over some rows, which Keras divides by all of them."""
    weight = (Y == 0).astype("float32")
    chosen = weight > 0
    for way, host in hosts().items():
        weighted = host.collect(["grad"], [(X, Y, weight)]).mean("grad", "a.kernel")
        part = host.collect(["grad"], [(X[chosen], Y[chosen])]).mean("grad", "a.kernel")
        np.testing.assert_allclose(weighted, part * chosen.sum() / len(Y), rtol=1e-4, atol=1e-7, err_msg=way)
        assert not np.allclose(weighted, host.collect(["grad"], [(X, Y)]).mean("grad", "a.kernel")), way


def test_one_number_for_a_batch_cannot_be_weighted():
    host = secateur.open(classifier(), loss=lambda y, outputs: keras.ops.mean(per_example(y, outputs)))
    assert host.collect(["grad"], [(X, Y)]).counts["grad"]["a.kernel"] == 12
    with pytest.raises(DataError, match="one number for a batch, which sample weights cannot reach"):
        host.collect(["grad"], [(X, Y, np.ones(12))])


@pytest.mark.parametrize(
    ("loss", "weighted", "count"),
    [
        (Sparse(from_logits=True), False, 7),
        (per_example, False, 7),
        (Sparse(from_logits=True), True, 7),
        (Sparse(from_logits=True, reduction="mean_with_sample_weight"), True, 2 + 5 * 3),
        (Sparse(from_logits=True, reduction="sum"), False, 7),
    ],
)
def test_the_gradient_is_the_same_however_rows_are_batched(loss, weighted, count):
    """Two rows of 2 and 5 tokens: the mean goes over tokens, as one batch and as two."""
    keras.utils.set_random_seed(0)
    ids = np.array([[3, 4, 0, 0, 0], [1, 2, 3, 4, 5]])
    tags = np.array([[0, 1, 0, 0, 0], [2, 2, 1, 0, 1]])
    weight = np.repeat([[1.0], [3.0]], 5, axis=1).astype("float32")
    batch = (ids, tags, weight) if weighted else (ids, tags)
    host = secateur.open(tagger(), loss=loss)
    whole = host.collect(["grad"], [batch])
    apart = host.collect(["grad"], [tuple(part[i : i + 1] for part in batch) for i in range(2)])
    assert whole.counts["grad"]["tags.kernel"] == apart.counts["grad"]["tags.kernel"] == count
    np.testing.assert_allclose(
        whole.mean("grad", "tags.kernel"), apart.mean("grad", "tags.kernel"), rtol=1e-4, atol=1e-7
    )


def test_a_model_that_gives_nan_after_training_is_not_saved(tmp_path, monkeypatch):
    """One of two classes: the model in memory and the reloaded one say NaN at the same places."""

    def diverged(small, layout, stage, plan, *rest):
        bias = small.model.get_layer("b").bias
        bias.assign([0.0, float("nan")])
        return plan

    monkeypatch.setattr(workflow, "_tune", diverged)
    stage = KerasStage(secateur.criteria.magnitude, secateur.Element(), secateur.budget.Global(0.5))
    data = Arrays(X, Y)
    with pytest.raises(ModelError, match="answers NaN or infinity"):
        run(secateur.open(classifier()), stage, data, data, KerasTuning(epochs=1), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("end", ["layer", "operation", "activation", None])
def test_probabilities_are_not_softmaxed_again(end, tmp_path):
    keras.utils.set_random_seed(0)
    model = classifier(end=end)
    scores = logits(model, Arrays(X, Y), 5)
    wanted = float(Sparse(from_logits=end is None)(Y, model.predict(X, verbose=0)))
    exact = np.exp(scores - scores.max(-1, keepdims=True))
    exact /= exact.sum(-1, keepdims=True)
    assert -np.log(exact[np.arange(12), Y]).mean() == pytest.approx(wanted, rel=1e-5)
    host, data = secateur.open(model), Arrays(X, Y)
    stage = KerasStage(secateur.criteria.taylor, secateur.Element(), secateur.budget.Global(0.5))
    outcome = run(host, stage, data, data, KerasTuning(), tmp_path / "out")
    assert outcome.dense.loss == pytest.approx(wanted, rel=1e-5)
    assert host.loss.get_config()["from_logits"] == (end is None)
