"""What the Keras host refuses, in one sentence each."""

import keras
import numpy as np
import pytest
from keras import layers as kl

import secateur
from secateur.errors import DataError, ModelError, PlanError
from secateur.keras.export import export
from tests.keras import models

IDS = np.ones((2, models.LENGTH), "int32")


def refused(error, match, call):
    with pytest.raises(error, match=match) as found:
        call()
    assert "\n" not in str(found.value)


def test_an_unbuilt_model():
    model = keras.Sequential([kl.Dense(3)])
    refused(ModelError, "is not built", lambda: secateur.open(model))
    assert secateur.open(model, np.ones((2, 4), "float32")).layout.axes


def test_what_is_no_keras_3_model():
    refused(ModelError, "builtins.dict is no Keras 3 model", lambda: secateur.keras.prune({}, threshold=0.1))


def test_a_subclassed_model_needs_an_example():
    refused(ModelError, "inputs of a subclassed model are not known", lambda: secateur.open(models.vision()))


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "bfloat16"])
def test_half_precision(policy):
    x = keras.Input((4,))
    model = keras.Model(x, kl.Dense(2)(kl.Dense(8, dtype=policy, name="half")(x)))
    refused(ModelError, f"half has the policy {policy}", lambda: secateur.open(model))


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="strategies are TensorFlow's")
def test_a_distribution_strategy():
    import tensorflow as tf

    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        model = models.compiled(keras.Sequential([kl.Input((4,)), kl.Dense(3)]))
    refused(ModelError, "distribution strategy", lambda: secateur.open(model))


def test_gradients_need_a_loss_and_labels():
    host = secateur.open(models.transformer(blocks=1))
    refused(DataError, "gradients need a loss", lambda: host.collect(["grad"], [(IDS, np.zeros(2))]))
    host.loss = "sparse_categorical_crossentropy"
    refused(DataError, "gradients need labels", lambda: host.collect(["grad"], [IDS]))
    host.loss = lambda y, outputs: keras.ops.sum(outputs) * float("nan")
    refused(DataError, "the loss is nan", lambda: host.collect(["grad"], [(IDS, np.zeros(2))]))
    refused(DataError, "cannot collect 'hessian'", lambda: host.collect(["hessian"], [IDS]))


def test_batches_that_do_not_fit():
    host = secateur.open(models.mlp())
    refused(DataError, "does not fit the model", lambda: host.collect(["act_sq"], [np.ones((2, 9), "float32")]))


def test_how_much():
    refused(PlanError, "how much", lambda: secateur.keras.prune(models.mlp()))
    refused(PlanError, "how much", lambda: secateur.keras.prune(models.mlp(), threshold=0.1, sparsity=0.5))
    two = secateur.NM(2, 4)
    refused(PlanError, "says itself how much", lambda: secateur.keras.prune(models.mlp(), threshold=0.1, pattern=two))
    refused(PlanError, "would empty", lambda: secateur.keras.prune(models.mlp(), threshold=9.0))


def test_nan_weights():
    model = models.mlp()
    model.get_layer("two").kernel.assign(np.full((10, 8), np.nan))
    refused(ModelError, "NaN", lambda: secateur.keras.prune(model, threshold=0.1))


def test_files_that_are_no_models(tmp_path):
    refused(ModelError, "no Keras model", lambda: secateur.open(tmp_path / "none.keras"))
    (tmp_path / "bad.keras").write_bytes(b"PK not a model")
    refused(ModelError, "cannot be loaded", lambda: secateur.open(tmp_path / "bad.keras"))


def test_a_lambda_in_a_file_is_not_run(tmp_path):
    x = keras.Input((4,))
    model = keras.Model(x, kl.Dense(2)(kl.Lambda(lambda v: v * 2, output_shape=(4,))(x)))
    model.save(tmp_path / "unsafe.keras")
    refused(ModelError, "cannot be loaded", lambda: secateur.open(tmp_path / "unsafe.keras"))


def test_exports_that_cannot_be(tmp_path):
    model, x = models.mlp(), np.ones((2, 6), "float32")
    refused(ModelError, "no target 'coreml'", lambda: export(model, tmp_path / "m", "coreml", x))
    refused(ModelError, "must end in .onnx", lambda: export(model, tmp_path / "m.tflite", "onnx", x))
    refused(ModelError, "sparse weight format", lambda: export(model, tmp_path / "m.onnx", "onnx", x, sparse=True))
    (tmp_path / "m.onnx").write_text("")
    refused(ValueError, "exists", lambda: export(model, tmp_path / "m.onnx", "onnx", x))
    if keras.backend.backend() == "torch":
        refused(ModelError, "on the torch backend", lambda: export(model, tmp_path / "m.tflite", "litert", x))


def test_a_layout_by_hand_masks_but_cannot_resize():
    host = secateur.open(models.mlp(), layout=str(secateur.open(models.mlp()).layout))
    plan = secateur.Plan(keep={"L0.ffn": np.array([0, 1])})
    with host.masked(plan):
        assert not host.read("one.kernel")[:, 2:].any()
    refused(ModelError, "written by hand", lambda: host.resize(plan))


class Stubborn(keras.Model):
    """A model whose config does not make it."""

    def __init__(self, width):
        super().__init__(name="stubborn")
        self.one, self.head = kl.Dense(width, name="one"), kl.Dense(2, name="head")

    def call(self, x):
        return self.head(self.one(x))


class Broken(Stubborn):
    """A model whose config is not enough."""

    def get_config(self):
        return {}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        return cls(config["width"])


@pytest.mark.parametrize(("make", "reason"), [(Stubborn, "it has no get_config"), (Broken, "'width'")])
def test_a_copy_that_is_not_of_its_class_says_why(make, reason):
    model, x = make(4), np.ones((2, 3), "float32")
    host = secateur.open(model, x)
    sentence = rf"stubborn \({make.__name__}\) cannot be made from its config \({reason}\)"
    with pytest.warns(UserWarning, match=sentence):
        other = host.copy()
    np.testing.assert_array_equal(other.outputs(x)[0], host.outputs(x)[0])
    assert other.layout.params == host.layout.params


class Rude(kl.Dense):
    """A layer whose config does not make it."""

    @classmethod
    def from_config(cls, config):
        raise TypeError("no such option")


def test_a_layer_that_cannot_be_made_anew_is_named():
    x = keras.Input((4,), name="x")
    host = secateur.open(keras.Model(x, kl.Dense(2, name="head")(Rude(6, name="rude")(x)), name="m"))
    plan = secateur.Plan(keep={"L0.ffn": np.array([0, 1])})
    refused(ModelError, r"rude \(Rude\) cannot be made from its config: no such option", lambda: host.resize(plan))


def test_a_matrix_for_each_unit_has_no_statistics():
    x = keras.Input((4, 6), name="x")
    y = kl.EinsumDense("bec,ecf->bef", (4, 3), name="experts")(x)
    host = secateur.open(keras.Model(x, kl.Dense(2, name="head")(kl.Flatten()(y))))
    data = [np.ones((2, 4, 6), "float32")]
    assert "one matrix for each unit" in host.layout.axis("L0.ffn").frozen
    wanda = secateur.criteria.wanda
    refused(
        DataError,
        "no act_sq was collected for experts.kernel",
        lambda: secateur.prune(host, wanda, secateur.Element(), 0.5, data, weights=["experts.kernel"]),
    )
    plan = secateur.prune(host, secateur.criteria.magnitude, secateur.Element(), 0.5, weights=["experts.kernel"])
    assert (~plan.masks["experts.kernel"]).sum() == 36
