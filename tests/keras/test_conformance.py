"""The Keras host passes the suite of every host: functional, grouped, subclassed and Sequential models."""

import keras
import numpy as np
import pytest
from keras import ops

import secateur
from secateur.keras.naming import variables
from tests.conformance import Conformance
from tests.keras import models

SPARSE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


class KerasConformance(Conformance):
    down = "block_0_down.kernel"

    def model(self):
        raise NotImplementedError

    def make(self):
        return secateur.open(self.model(), self.batches()[0], loss=SPARSE)

    def inputs(self, rng, size):
        ids = rng.integers(1, models.VOCAB, (size, models.LENGTH)).astype("int32")
        ids[0, 5:] = 0
        return ids

    def batches(self):
        rng = np.random.default_rng(0)
        return [(self.inputs(rng, size), rng.integers(0, models.CLASSES, size)) for size in (4, 3)]

    def train(self, host, batches):
        models.compiled(host.model)
        for _ in range(2):
            for x, y in batches:
                host.model.train_on_batch(x, y)

    def load(self, folder, host):
        return secateur.open(str(folder), self.batches()[0])

    def shapes(self, host):
        return {name: tuple(v.shape) for name, v in variables(host.model).items()}

    def slow(self, host, batches):
        """What one FFN reads, from a model cut off before it; a gradient by central differences."""
        layer = host.model.get_layer(self.down.rpartition(".")[0])
        cut = keras.Model(host.model.inputs, layer.input)
        seen = []
        for x, _ in batches:
            rows = ops.convert_to_numpy(cut(x))
            seen.append(rows[x != 0] if rows.ndim == 3 else rows)
        tokens = np.concatenate(seen)
        weight = host.read(self.down)
        grad = np.zeros_like(weight)
        for place in [(0, 0), (3, 2), (7, 1)]:
            for step in (1e-2, -1e-2):
                moved = weight.copy()
                moved[place] += step
                host.write(self.down, moved)
                losses = [float(SPARSE(y, host.outputs(x)[0])) * len(y) for x, y in batches]
                grad[place] += sum(losses) / sum(len(y) for _, y in batches) / (2 * step)
        host.write(self.down, weight)
        found = host.collect(["grad"], batches).mean("grad", self.down)
        for place in [(0, 0), (3, 2), (7, 1)]:
            assert abs(found[place] - grad[place]) < 1e-3 * max(1.0, abs(grad[place]))
        axis = next(a for a in host.layout.axes if host.layout.owners(self.down, a)[0] is not None)
        return {
            "act_sq": {self.down: (tokens**2).mean(0)},
            "gram": {self.down: tokens.T @ tokens / len(tokens)},
            "unit_act": {axis: np.abs(tokens).mean(0)},
        }


@pytest.mark.slow
class TestTransformer(KerasConformance):
    def model(self):
        return models.transformer()

    def padded(self, batch):
        return batch  # its length is fixed; padding is tested on TestOpenLength


@pytest.mark.slow
class TestOpenLength(TestTransformer):
    def model(self):
        return models.transformer(blocks=1, length=None)

    def padded(self, batch):
        return np.pad(batch[0], ((0, 0), (0, 3))), batch[1]


@pytest.mark.slow
class TestGrouped(KerasConformance):
    def model(self):
        return models.transformer(grouped=True)


@pytest.mark.slow
class TestSubclassed(KerasConformance):
    def model(self):
        return models.vision()

    def inputs(self, rng, size):
        return rng.normal(size=(size, 12, 12, 1)).astype("float32")

    def slow(self, host, batches):
        return {}

    def load(self, folder, host):
        model = secateur.keras.load(folder, custom_objects={"Block": models.Block, "Vision": models.Vision})
        return secateur.open(model, self.batches()[0])


class TestSequential(KerasConformance):
    needs = ("grad", "grad_sq", "act_sq", "gram", "unit_act", "unit_grad_sq")
    down = "two.kernel"

    def model(self):
        return models.mlp()

    def inputs(self, rng, size):
        return rng.normal(size=(size, 6)).astype("float32")
