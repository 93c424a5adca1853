"""Which sizes a search may choose so that a server reads the result: for `prune --for`.

vLLM, SGLang and mlx-lm read a decoder with other sizes in each layer as DeciLM (`secateur.deploy.decilm`): widths
are multiples of 256, and all layers have one number of query heads; heads that go from one come back as zeros. So
neurons go in blocks of 256, whole layers go, and heads stay. llama.cpp takes any of them (`secateur.deploy.gguf`).
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from secateur.deploy.decilm.blocks import MULTIPLE
from secateur.deploy.decilm.export import check_decilm
from secateur.deploy.gguf.decoder import decoder_of
from secateur.layout import Layout
from secateur.search.costs import Cost
from secateur.search.target import LLAMA_CPP


def check_reader(model: nn.Module, reader: str | None) -> None:
    """DeployError, in one sentence, for a model that a server does not read. None reads all."""
    if reader == LLAMA_CPP:
        decoder_of(model)
    elif reader is not None:
        check_decilm(model, reader)


def readable(costs: Sequence[Cost], layout: Layout, reader: str | None) -> tuple[Cost, ...]:
    """The costs with only those numbers of units that a server reads without zeros between. None reads all."""
    if reader is None or reader == LLAMA_CPP:
        return tuple(costs)

    def of(cost: Cost) -> Cost:
        allowed = {}
        for axis, counts in cost.allowed.items():
            is_whole = counts == layout.axis(axis).size
            is_kept = is_whole | (counts % MULTIPLE == 0) if layout.axis(axis).kind == "ffn" else is_whole
            allowed[axis] = counts[is_kept]
        return replace(cost, allowed=allowed)

    return tuple(of(cost) for cost in costs)
