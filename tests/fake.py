"""A two-layer network in numpy as a Host, so that the core can be tested without a framework."""

import numpy as np

from secateur.layout import Layout
from secateur.stats import Tally

TEXT = """
axes
  L0.kv    2 kv
  L0.group 2 group
  L0.head  4 head = L0.kv L0.group
  L0.v     3 v
  L0.ffn   8 ffn
  hidden   4 hidden frozen: residual stream
  layers   1 layer @ layers
parameters
  layers.0.v.weight   : (L0.kv L0.v) hidden < x0 1
  layers.0.o.weight   : hidden (L0.kv L0.group L0.v) < x1 1
  layers.0.up.weight  : L0.ffn hidden < x2 1
  layers.0.up.bias    : L0.ffn
  layers.0.down.weight : hidden L0.ffn < x3 1
  head.weight         : 2 hidden < x4 1
products
  10 layers.0.up.weight : L0.ffn hidden
  10 layers.0.o.weight : hidden (L0.kv L0.group L0.v)
  7 - : (L0.kv L0.group)
"""


class FakeHost:
    """Reads and collects only; weights and statistics are drawn with a seed."""

    def __init__(self, seed=0):
        self.layout = Layout.from_text(TEXT)
        rng = np.random.default_rng(seed)
        self.arrays = {p: rng.normal(size=self.layout.shape(p)) for p in self.layout.params}
        self.collected = []

    def read(self, param):
        return self.arrays[param]

    def collect(self, needs, data, axes=None, weights=None):
        self.collected.append(sorted(needs))
        tally = Tally()
        for batch in data:
            rng = np.random.default_rng(batch)
            for need in needs:
                if need.startswith(("unit_", "attn_")):
                    for axis in axes:
                        tally.add(need, axis, rng.random(self.layout.axis(axis).size), 1)
                elif need == "gram":
                    for param in dict.fromkeys(self.layout.readers(weights).values()):
                        x = rng.normal(size=(50, self.layout.shape(param)[self.layout.linears[param].in_dim]))
                        tally.add(need, param, x.T @ x, len(x))
                else:
                    for param in self.layout.params:
                        tally.add(need, param, rng.normal(size=self.layout.shape(param)), 1)
        return tally.stats()
