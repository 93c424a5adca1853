"""Tiny Keras models: functional, nested, subclassed, grouped attention, MLP."""

import keras
import numpy as np
from keras import layers as kl

VOCAB, LENGTH, CLASSES = 20, 7, 3


def transformer(blocks=2, heads=4, dim=8, ffn=12, grouped=False, length=LENGTH, dropout=0.1):
    """A text classifier whose padding (id 0) is masked by Keras masks."""
    ids = keras.Input((length,), dtype="int32", name="ids")
    x = kl.Embedding(VOCAB, dim, mask_zero=True, name="tokens")(ids)
    for i in range(blocks):
        attention = (
            kl.GroupQueryAttention(dim // heads, heads, heads // 2, name=f"block_{i}_attention", dropout=dropout)
            if grouped
            else kl.MultiHeadAttention(heads, dim // heads, name=f"block_{i}_attention", dropout=dropout)
        )
        x = kl.LayerNormalization(name=f"block_{i}_norm1")(kl.Add(name=f"block_{i}_add1")([x, attention(x, x)]))
        y = kl.Dense(ffn, activation="gelu", name=f"block_{i}_up")(x)
        y = kl.Dense(dim, name=f"block_{i}_down")(kl.Dropout(dropout, name=f"block_{i}_drop")(y))
        x = kl.LayerNormalization(name=f"block_{i}_norm2")(kl.Add(name=f"block_{i}_add2")([x, y]))
    x = kl.GlobalAveragePooling1D(name="pool")(x)
    return randomized(keras.Model(ids, kl.Dense(CLASSES, name="head")(x), name="transformer"))


def mlp():
    """Dense layers alone."""
    layers = [kl.Input((6,)), kl.Dense(10, activation="relu", name="one"), kl.Dense(8, activation="gelu", name="two")]
    return randomized(keras.Sequential([*layers, kl.Dense(CLASSES, name="head")], name="mlp"))


class Block(kl.Layer):
    """A pre-norm block that makes its parts itself and has no config of their sizes but its own."""

    def __init__(self, heads, dim, ffn, **options):
        super().__init__(**options)
        self.heads, self.dim, self.ffn = heads, dim, ffn
        self.attention = kl.MultiHeadAttention(heads, dim // heads, name="attention")
        self.norm1, self.norm2 = kl.LayerNormalization(name="norm1"), kl.LayerNormalization(name="norm2")
        self.up, self.down = kl.Dense(ffn, activation="gelu", name="up"), kl.Dense(dim, name="down")

    def call(self, x):
        y = self.norm1(x)
        x = x + self.attention(y, y)
        return x + self.down(self.up(self.norm2(x)))

    def get_config(self):
        return {**super().get_config(), "heads": self.heads, "dim": self.dim, "ffn": self.ffn}


@keras.saving.register_keras_serializable("tests")
class Position(kl.Layer):
    """A learned position: a weight of its own."""

    def build(self, shape):
        self.table = self.add_weight(shape=shape[1:], name="table")

    def call(self, x):
        return x + self.table


class Vision(keras.Model):
    """A subclassed ViT with a convolutional stem."""

    def __init__(self, **options):
        super().__init__(**options)
        self.stem, self.rows = kl.Conv2D(8, 4, strides=4, name="stem"), kl.Reshape((9, 8), name="rows")
        self.position = Position(name="position")
        self.blocks = [Block(4, 8, 12, name=f"block_{i}") for i in range(2)]
        self.norm, self.head = kl.LayerNormalization(name="norm"), kl.Dense(CLASSES, name="head")

    def call(self, images):
        x = self.position(self.rows(self.stem(images)))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def vision():
    """A built Vision model."""
    model = Vision(name="vision")
    model(np.zeros((2, 12, 12, 1), "float32"))
    return randomized(model)


def randomized(model, seed=0):
    """The same weights on every backend: biases and norms are not trivial."""
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        name = variable.path.rsplit("/", 1)[-1]
        if "float" in str(variable.dtype):
            centre = 1.0 if name == "gamma" else 0.0
            variable.assign(centre + rng.normal(0, 0.3, size=variable.shape).astype("float32"))
    return model


def compiled(model, **options):
    """Compiled with AdamW and cross-entropy from logits."""
    optimizer = keras.optimizers.AdamW(1e-2, weight_decay=0.1, **options)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    return model
