"""Grams of what linear layers read, summed while a model or a part of it runs."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from secateur.stats import Tally
from secateur.torch.stats.linear_inputs import InputHook, before_calls, input_of, real_rows
from secateur.torch.stats.padding import TokenMask, no_padding


@contextlib.contextmanager
def watch_grams(
    modules: Mapping[str, Mapping[str, nn.Module]],
    readers: Mapping[str, str],
    tally: Tally,
    token_mask: TokenMask = no_padding,
) -> Iterator[None]:
    """While the context lasts, every forward pass adds "gram" to `tally`: the sum of x x^T over tokens, in float32.

    modules: linear weight -> its modules by path (see `linear_modules`), of a whole model or of one block.
    readers: linear weight -> the weight whose gram it shares (see `Layout.readers`); only that weight is watched, so
        the gram of a weight is `tally.stats().mean("gram", readers[weight])`.
    token_mask: which tokens are real.

    A weight of more than two dimensions has a matrix for each expert or group, and no gram.
    """
    hooks = [
        (module, _gram_hook(param, path, tally, token_mask))
        for param in dict.fromkeys(readers.values())
        for path, module in modules.get(param, {}).items()
        if module.weight.dim() == 2
    ]
    with before_calls(hooks):
        yield


def _gram_hook(param: str, path: str, tally: Tally, token_mask: TokenMask) -> InputHook:
    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows = real_rows(path, input_of(module, args, kwargs), None, token_mask)
        if rows is not None:
            tally.add("gram", param, rows.T @ rows, rows.shape[0])

    return look
