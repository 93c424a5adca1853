"""Layouts of the zoo's models, each traced once in a run, and units of them that stay."""

from secateur.layout import Layout
from secateur.torch.host import TorchHost
from secateur.torch.trace.derive import trace
from tests import zoo
from tests.torch.exact import randomize

HOSTS: dict[str, TorchHost] = {}
LAYOUTS: dict[tuple[type, str], Layout] = {}


# Tracing freezes the stacks of T5, whose first layers own the position biases; they may go where those layers stay.
FROZEN = " frozen: layer 0 hands on more than the residual stream"


def layout_of(model):
    """The layout of a model of the zoo: models of one class and config share it."""
    key = (type(model), model.config.to_json_string(use_diff=False))
    if key not in LAYOUTS:
        LAYOUTS[key] = Layout.from_text(str(trace(model, zoo.inputs(model))).replace(FROZEN, ""))
    return LAYOUTS[key]


def host_of(name, **config):
    """A host of its own with random weights, of a model that is traced once in a run; config: numbers to be changed."""
    key = f"{name} {config}"
    if key not in HOSTS:
        model, example = zoo.structure(name, **config)
        HOSTS[key] = TorchHost(randomize(model), example)
    return HOSTS[key].copy()


# units that stay of some axes, another number in each layer
UNEVEN = {
    "bert": {"L0.head": [0, 2, 3], "L1.head": [1], "L0.ffn": range(0, 48, 2), "L2.ffn": range(10)},
    "llama": {
        "L0.head": [0, 1, 4, 5],
        "L0.kv": [0, 2],
        "L1.head": [0, 2, 4, 6],
        "L2.kv": [1, 2, 3],
        "L0.ffn": range(0, 48, 2),
        "L2.ffn": range(10),
    },
    "vit": {"L0.head": [0, 2, 3], "L1.head": [1], "L0.ffn": range(0, 48, 2), "L2.ffn": range(10)},
    "gpt2": {"L0.head": [0, 2, 3], "L1.head": [1], "L0.ffn": range(0, 48, 2), "L2.ffn": range(10)},
    "t5": {
        "encoder.head": [0, 2, 3],
        "decoder.head": [1],
        "decoder.EncDecAttention.head": [1, 2],
        "encoder.L0.ffn": range(0, 48, 2),
        "decoder.L1.ffn": range(10),
    },
    "mixtral": {"L0.head": [0, 1], "L0.kv": [0], "L0.ffn": range(8, 24), "L1.ffn": range(8), "L1.head": [0, 2]},
}
