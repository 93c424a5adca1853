"""Keras: train, set every weight with |w| <= 0.1 to zero, then compile and fit as usual; the zeros stay."""

import argparse
from pathlib import Path

import keras
import numpy as np
from keras import layers

import secateur

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--output", required=True, type=Path, help="folder to write")
parser.add_argument("--rows", type=int, default=2000, help="training rows")
args = parser.parse_args()
keras.utils.set_random_seed(0)

# Which of two tokens occurs more often in a sequence?
x = np.random.default_rng(0).integers(0, 4, (args.rows, 12)).astype("int32")
y = ((x == 1).sum(1) > (x == 2).sum(1)).astype("int64")

mlp = keras.Sequential(
    [
        layers.Input((12,), dtype="int32"),
        layers.Embedding(4, 8),
        layers.Flatten(),
        layers.Dense(64, activation="relu"),
        layers.Dense(32, activation="relu"),
        layers.Dense(2, activation="softmax"),
    ],
    name="mlp",
)

inputs = keras.Input((12,), dtype="int32")
h = layers.Embedding(4, 32)(inputs)
h = layers.LayerNormalization()(layers.Add()([h, layers.MultiHeadAttention(4, 8)(h, h)]))
h = layers.LayerNormalization()(layers.Add()([h, layers.Dense(32)(layers.Dense(64, activation="gelu")(h))]))
outputs = layers.Dense(2, activation="softmax")(layers.GlobalAveragePooling1D()(h))
transformer = keras.Model(inputs, outputs, name="transformer")

args.output.mkdir(parents=True)
for model in (mlp, transformer):
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(x, y, epochs=4, verbose=0)
    dense = model.evaluate(x, y, verbose=0)[1]

    model = secateur.keras.prune(model, threshold=0.1)
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(x, y, epochs=2, verbose=0)

    tuned = model.evaluate(x, y, verbose=0)[1]
    kernels = [keras.ops.convert_to_numpy(w) for w in model.trainable_weights if w.path.endswith("kernel")]
    zeros = sum(int((k == 0).sum()) for k in kernels) / sum(k.size for k in kernels)
    if zeros <= 0.1:
        raise SystemExit(f"only {zeros:.1%} of the weights of {model.name} are zero")
    model.save(args.output / f"{model.name}.keras")
    again = keras.saving.load_model(args.output / f"{model.name}.keras")
    np.testing.assert_array_equal(again.predict(x[:64], verbose=0), model.predict(x[:64], verbose=0))
    print(f"{model.name:<12} dense {dense:.4f}  fine-tuned {tuned:.4f}  zeros {zeros:.1%}", flush=True)
