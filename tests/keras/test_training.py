"""Zeros stay zero in `fit`: the textbook lines, any optimizer, moving averages, a schedule, and user's constraints."""

import keras
import numpy as np
import pytest

import secateur
from secateur import schedule
from secateur.keras.hold import Keep
from secateur.keras.naming import variables
from tests.keras import models

SPARSE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def data(rows=24):
    rng = np.random.default_rng(0)
    return rng.normal(size=(rows, 6)).astype("float32"), rng.integers(0, models.CLASSES, rows)


def values(model):
    return {name: np.array(keras.ops.convert_to_numpy(v)) for name, v in variables(model).items()}


def test_the_textbook_lines():
    model = models.mlp()
    before = values(model)
    pruned = secateur.keras.prune(model, threshold=0.1)
    assert pruned is model
    kernels = [name for name in before if name.endswith("kernel")]
    for name in kernels:
        np.testing.assert_array_equal(values(model)[name], np.where(np.abs(before[name]) > 0.1, before[name], 0))
    model.compile("adam", SPARSE)
    model.fit(*data(), epochs=2, verbose=0)
    after = values(model)
    for name in kernels:
        small = np.abs(before[name]) <= 0.1
        assert small.any()
        assert not after[name][small].any()
        assert (after[name][~small] != before[name][~small]).all()


def test_zeros_that_a_model_came_with_are_held_through_resize():
    model = secateur.keras.release(secateur.keras.prune(models.mlp(), sparsity=0.6))
    host = secateur.open(model)
    counted = sum(int((value == 0).sum()) for name, value in values(model).items() if name.endswith("kernel"))
    assert host.plan.provenance["found"] == {"tensors": 3, "zeros": counted}
    axis = next(iter(host.layout.of_kind("ffn") or host.layout.of_kind("dense"))).name
    host.resize(secateur.Plan(keep={axis: np.arange(4)}))
    before = values(host.model)
    models.compiled(host.model)
    with host.hold(secateur.Plan()):
        host.model.fit(*data(), verbose=0)
    for name, value in values(host.model).items():
        if name.endswith("kernel"):
            assert (before[name] == 0).any(), name
            np.testing.assert_array_equal(value == 0, before[name] == 0)
            assert (value != before[name]).any()


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="tf.keras is Keras on TensorFlow")
def test_the_same_lines_on_tf_keras():
    import tensorflow as tf

    layers = [tf.keras.Input((6,)), tf.keras.layers.Dense(16, activation="relu"), tf.keras.layers.Dense(3)]
    model = tf.keras.Sequential(layers)
    model = secateur.keras.prune(model, threshold=0.1)
    gone = [np.array(layer.kernel) == 0 for layer in model.layers]
    assert all(mask.any() and not mask.all() for mask in gone)
    model.compile("adam", tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(*data(), verbose=0)
    for layer, mask in zip(model.layers, gone, strict=True):
        assert not np.array(layer.kernel)[mask].any()


@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(
            lambda: keras.optimizers.AdamW(1e-2, weight_decay=0.5, use_ema=True, ema_momentum=0.5),
            marks=pytest.mark.slow,
        ),
        pytest.param(lambda: keras.optimizers.SGD(1e-2, momentum=0.9, nesterov=True), marks=pytest.mark.slow),
        pytest.param(
            lambda: keras.optimizers.Lion(1e-2, use_ema=True, ema_overwrite_frequency=2), marks=pytest.mark.slow
        ),
    ],
)
def test_no_optimizer_revives_a_weight(optimizer):
    model = models.mlp()
    model.compile(optimizer(), SPARSE)
    model.fit(*data(), epochs=1, verbose=0)  # momentum and averages of weights that go afterwards
    secateur.keras.prune(model, sparsity=0.6)
    gone = {name: value == 0 for name, value in values(model).items() if name.endswith("kernel")}
    assert sum(int(g.sum()) for g in gone.values()) == round(0.6 * sum(g.size for g in gone.values()))
    model.fit(*data(), epochs=2, batch_size=8, verbose=0)
    for name, mask in gone.items():
        assert not values(model)[name][mask].any(), name


@pytest.mark.slow
def test_a_hold_ends_and_can_be_released():
    host = secateur.open(models.compiled(models.mlp()))
    plan = secateur.prune(host, secateur.criteria.magnitude, secateur.Element(), 0.5)
    with host.hold(plan):
        host.model.fit(*data(), verbose=0)
    masks = host.masks(plan)
    assert not any(isinstance(v.constraint, Keep) for v in variables(host.model).values())
    host.model.fit(*data(), verbose=0)
    assert any(values(host.model)[name][~mask].any() for name, mask in masks.items())
    secateur.keras.prune(host.model, sparsity=0.5)
    gone = values(host.model)["two.kernel"] == 0
    secateur.keras.release(host.model).fit(*data(), verbose=0)
    assert values(host.model)["two.kernel"][gone].any()


@pytest.mark.slow
def test_the_user_s_constraint_holds_too():
    x = keras.Input((6,))
    layer = keras.layers.Dense(8, kernel_constraint=keras.constraints.NonNeg(), name="up")
    model = models.randomized(keras.Model(x, keras.layers.Dense(models.CLASSES, name="head")(layer(x))))
    secateur.keras.prune(model, sparsity=0.5)
    gone = values(model)["up.kernel"] == 0
    models.compiled(model).fit(*data(), verbose=0)
    kernel = values(model)["up.kernel"]
    assert (kernel >= 0).all()
    assert not kernel[gone].any()


@pytest.mark.slow
def test_gradual_pruning_follows_the_schedule():
    seen = []

    def steps(step):
        seen.append(step)
        return schedule.cubic(0.8, steps=8)(step)

    model = models.compiled(models.mlp())
    model.fit(*data(), epochs=1, verbose=0)  # the training step is compiled before
    callback = secateur.keras.GradualPruning(schedule=steps, every=2)
    model.fit(*data(), batch_size=8, epochs=4, verbose=0, callbacks=[callback])
    kernels = {name: value for name, value in values(model).items() if name.endswith("kernel")}
    assert seen == [0, 2, 4, 6, 8, 10, 12]
    assert sum(int((k == 0).sum()) for k in kernels.values()) == round(0.8 * sum(k.size for k in kernels.values()))
    for name, mask in callback.plan.masks.items():
        assert not kernels[name][~mask].any()
    model.fit(*data(), verbose=0)
    for name, mask in callback.plan.masks.items():
        assert not values(model)[name][~mask].any()


@pytest.mark.slow
def test_a_resized_model_trains_and_is_reloaded_by_keras_alone(tmp_path):
    model = models.transformer()
    host = secateur.open(model, loss=SPARSE)
    keep = {"L0.head": [1], "L1.head": [0, 2, 3], "L0.ffn": [0, 5, 7], "L1.ffn": range(9)}
    host.resize(secateur.Plan(keep={name: np.array(list(units)) for name, units in keep.items()}))
    assert [host.model.get_layer(f"block_{i}_attention").num_heads for i in (0, 1)] == [1, 3]
    ids = np.random.default_rng(0).integers(1, models.VOCAB, (8, models.LENGTH)).astype("int32")
    models.compiled(host.model).fit(ids, np.zeros(8, "int64"), verbose=0)
    host.model.save(tmp_path / "small.keras")
    again = keras.saving.load_model(tmp_path / "small.keras", safe_mode=True)
    np.testing.assert_array_equal(host.outputs(ids)[0], keras.ops.convert_to_numpy(again(ids)))


def test_repaired_weights_reach_the_model():
    host = secateur.open(models.mlp())
    batches = [data(64)]
    before, dense = values(host.model), host.outputs(batches[0])[0]
    plan = secateur.prune(host, repair=secateur.repair.sparsegpt, pattern=secateur.NM(1, 2), data=batches)
    plain = secateur.prune(host, secateur.criteria.magnitude, secateur.NM(1, 2))
    assert set(plan.weights) == set(plan.masks) == set(plain.masks)
    with host.masked(plan):
        repaired = host.outputs(batches[0])[0]
    with host.masked(plain):
        assert ((repaired - dense) ** 2).sum() < ((host.outputs(batches[0])[0] - dense) ** 2).sum()
    for name, value in values(host.model).items():
        np.testing.assert_array_equal(value, before[name])
    assert secateur.verify(host, plan, batches, batches=1).difference <= 1e-6
    host.apply(plan)
    np.testing.assert_array_equal(host.outputs(batches[0])[0], repaired)
    for name, value in plan.weights.items():
        np.testing.assert_array_equal(host.read(name), value)
    with host.hold(plan):
        host.model.compile("adam", SPARSE)
        host.model.fit(*batches[0], verbose=0)
    tuned = values(host.model)
    host.resize(plan)
    for name, mask in plan.masks.items():
        assert not tuned[name][~mask].any()
        np.testing.assert_array_equal(host.read(name), tuned[name])
        assert (tuned[name] != plan.weights[name])[mask].any()
