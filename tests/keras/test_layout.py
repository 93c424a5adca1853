"""Layouts of Keras models: printed, frozen where nothing is known, and one for shared and nested layers."""

import re

import keras
import numpy as np
import pytest
from keras import layers as kl
from keras import ops

import secateur
from tests.keras import models

GROUPED = """\
axes
  vocab         20 vocab frozen: rows of tokens are looked up by number
  hidden         8 hidden frozen: LayerNormalization takes its statistics over it
  L0.kv          2 kv
  L0.group       2 group frozen: query heads are pruned, equally in each group
  L0.qk          2 qk frozen: block_0_attention has one size for query, key and value
  L0.v           2 v frozen: block_0_attention has one size for query, key and value
  L0.ffn        12 ffn
  classes        3 classes frozen: an output of the model
  L0.head        4 head = L0.kv L0.group
parameters
  tokens.embeddings                         : vocab hidden
  block_0_attention.query.kernel            : hidden (L0.kv L0.group) L0.qk < x0 0
  block_0_attention.query.bias              : (L0.kv L0.group) L0.qk
  block_0_attention.key.kernel              : hidden L0.kv L0.qk < x0 0
  block_0_attention.key.bias                : L0.kv L0.qk
  block_0_attention.value.kernel            : hidden L0.kv L0.v < x0 0
  block_0_attention.value.bias              : L0.kv L0.v
  block_0_attention.attention_output.kernel : (L0.kv L0.group) L0.v hidden < x1 0,1
  block_0_attention.attention_output.bias   : hidden
  block_0_norm1.gamma                       : hidden
  block_0_norm1.beta                        : hidden
  block_0_up.kernel                         : hidden L0.ffn < x2 0
  block_0_up.bias                           : L0.ffn
  block_0_down.kernel                       : L0.ffn hidden < x3 0
  block_0_down.bias                         : hidden
  block_0_norm2.gamma                       : hidden
  block_0_norm2.beta                        : hidden
  head.kernel                               : hidden classes < x4 0
  head.bias                                 : classes
products
"""


def axes_of(layout, name):
    return str(layout).split(f"{name} ", 1)[1].splitlines()[0].split(":")[1].split("<")[0].strip()


def test_grouped_attention_prints_as_expected_and_reads_back():
    layout = secateur.open(models.transformer(blocks=1, grouped=True)).layout
    assert str(layout).split("products")[0] + "products\n" == GROUPED
    assert str(secateur.Layout.from_text(str(layout))) == str(layout)


def test_macs_are_those_of_a_hand_count():
    from secateur.cost import macs

    host = secateur.open(models.mlp(), (np.zeros((5, 6), "float32"), None))
    assert macs(host.layout) == 5 * (6 * 10 + 10 * 8 + 8 * 3)
    host = secateur.open(models.transformer(blocks=1), (np.zeros((2, 7), "int32"), None))
    linear = 14 * (4 * 8 * 8 + 2 * 8 * 12) + 2 * 8 * 3
    assert macs(host.layout) == linear + 2 * (2 * 7 * 7 * 8)


def test_a_subclassed_model_is_followed_into_its_blocks():
    host = secateur.open(models.vision(), np.zeros((2, 12, 12, 1), "float32"))
    layout = host.layout
    assert axes_of(layout, "block_1.attention.value.kernel") == "hidden L1.head L1.v"
    assert axes_of(layout, "stem.kernel") == "4 4 1 hidden"
    assert axes_of(layout, "position.table") == "position hidden"
    assert [a.size for a in layout.of_kind("ffn")] == [12, 12]
    assert "outside of a layer that is known" in layout.axes["hidden"].frozen
    inner = [host.model.blocks[0].up, host.model.blocks[0].attention]
    assert all(not layer._inbound_nodes for layer in inner)


def test_nested_and_shared_layers_are_one():
    parts = [kl.Input((6,)), kl.Dense(10, activation="relu", name="a"), kl.Dense(6, name="b")]
    inside = keras.Sequential(parts, name="inside")
    x = keras.Input((6,))
    model = keras.Model(x, kl.Dense(2, name="head")(inside(kl.Add()([x, inside(x)]))), name="outer")
    host = secateur.open(model, np.ones((2, 6), "float32"))
    assert axes_of(host.layout, "inside.a.kernel") == "L0.ffn L1.ffn"
    assert host.layout.axes["L0.ffn"].frozen  # it is added to the input of the model
    plan = secateur.Plan(keep={"L1.ffn": np.array([1, 4, 5])})
    assert secateur.verify(host, plan, [np.ones((2, 6), "float32")]).difference <= 1e-6
    host.resize(plan)
    assert host.model.count_params() == 6 * 3 + 3 + 3 * 6 + 6 + 6 * 2 + 2


class Rolled(kl.Layer):
    """Mixes positions of its units, by an operation without a rule."""

    def call(self, x):
        return ops.roll(x, 1, axis=-1)


class Eager(kl.Layer):
    """Cannot be called on symbolic tensors."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), name="scale")

    def call(self, x):
        return x * self.scale if float(ops.convert_to_numpy(x).sum()) > 1e9 else x * 2 * self.scale

    def compute_output_spec(self, x):
        return keras.KerasTensor(x.shape, x.dtype)


@pytest.mark.parametrize(("layer", "reason"), [(Rolled(), "roll"), (Eager(name="eager"), r"eager \(Eager\) cannot be")])
def test_what_cannot_be_described_is_frozen_with_the_reason(layer, reason):
    x = keras.Input((5,))
    model = keras.Model(x, kl.Dense(2)(layer(kl.Dense(8, name="up")(x))))
    layout = secateur.open(model).layout
    assert layout.axes["L0.ffn"].frozen
    assert re.search(reason, layout.axes["L0.ffn"].frozen)
    with pytest.raises(ValueError, match="is frozen"):
        secateur.prune(secateur.open(model), secateur.criteria.magnitude, secateur.Unit("ffn"), 0.5)


def test_softmax_and_split_axes_are_frozen():
    x = keras.Input((5,))
    y = kl.Dense(8, activation="softmax", name="gate")(x)
    z = kl.Reshape((2, 4))(kl.Dense(8, name="split")(x))
    layout = secateur.open(keras.Model(x, [kl.Dense(2)(y), kl.Dense(2)(z)])).layout
    reasons = [axis.frozen for axis in layout.of_kind("ffn", prunable=False)]
    assert any("softmax in gate" in reason for reason in reasons)
    assert any("reshape splits it" in reason for reason in reasons)


def test_constants_freeze_what_they_meet():
    x = keras.Input((5,))
    y = kl.Dense(4, name="up")(x) * np.arange(4.0, dtype="float32")
    layout = secateur.open(keras.Model(x, kl.Dense(2)(y))).layout
    assert "what has no axis" in layout.axes["L0.ffn"].frozen


@pytest.mark.parametrize("equation", ["abc,cde->abde", "...c,cd->...d"])
def test_einsum_dense_is_resized(equation):
    rng = np.random.default_rng(0)
    x = keras.Input((3, 5))
    if "e" in equation:
        y = kl.EinsumDense(equation, (None, 4, 6), bias_axes="de", name="in")(x)
        y = kl.EinsumDense("abde,dec->abc", (None, 5), bias_axes="c", name="out")(y)
    else:
        y = kl.EinsumDense(equation, (6,), bias_axes="d", activation="relu", name="in")(x)
        y = kl.EinsumDense("abc,cd->abd", (None, 5), name="out")(y)
    host = secateur.open(models.randomized(keras.Model(x, y)))
    axes = host.layout.of_kind("ffn")
    keep = {axis.name: np.sort(rng.choice(axis.size, axis.size // 2, replace=False)) for axis in axes}
    data = [rng.normal(size=(2, 3, 5)).astype("float32")]
    assert secateur.verify(host, secateur.Plan(keep=keep), data).difference <= 1e-5


def test_query_and_value_sizes_go_with_the_scale_mended():
    host = secateur.open(models.transformer(heads=2))
    plan = secateur.Plan(keep={"L0.qk": np.array([0, 3]), "L0.v": np.array([1]), "L1.v": np.array([0, 1, 2])})
    ids = np.random.default_rng(0).integers(1, models.VOCAB, (3, models.LENGTH)).astype("int32")
    assert secateur.verify(host, plan, [ids]).difference <= 1e-5
    host.resize(plan)
    assert host.model.get_layer("block_0_attention").key_dim == 2


def test_convolutions_pooling_and_batch_normalization():
    x = keras.Input((8, 8, 1))
    y = kl.BatchNormalization(name="bn")(kl.Conv2D(6, 3, padding="same", name="one")(x))
    y = kl.MaxPooling2D()(kl.ReLU()(y))
    y = kl.Flatten()(kl.Conv2D(4, 3, name="two")(y))
    host = secateur.open(models.randomized(keras.Model(x, kl.Dense(2, name="head")(y))))
    assert axes_of(host.layout, "head.kernel") == "(2 2 channel_2) classes"
    host.write("bn.moving_variance", np.full(6, 0.5, "float32"))
    plan = secateur.Plan(keep={"channel": np.array([0, 5]), "channel_2": np.array([1, 2, 3])})
    data = [np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype("float32")]
    assert secateur.verify(host, plan, data).difference <= 1e-5
