"""TokenSites: where the tokens of a model can be taken away, as data that a saved folder holds."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from secateur.errors import ModelError, shown

_PATH = re.compile(r"[A-Za-z0-9_.]*")


@dataclass(frozen=True)
class TokenSites:
    """Where tokens are taken away.

    stack: path of the module list that holds the blocks.
    inner: path in a block of the module whose output only kept tokens leave (an attention with its residual and norm);
        empty where tokens leave at the end of a block.
    feed_forward: path in a block of a token-wise module that only kept tokens enter; empty for none.
    arguments: each tensor that a block is called with -> its dimensions that count tokens. Names are those of
        `torch.utils._pytree.keystr` for (args, kwargs).
    """

    stack: str
    inner: str
    feed_forward: str
    arguments: Mapping[str, tuple[int, ...]]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, read by `from_json`."""
        arguments = {name: list(dims) for name, dims in self.arguments.items()}
        return {
            "stack": self.stack,
            "inner": self.inner,
            "feed_forward": self.feed_forward,
            "arguments": arguments,
        }

    @staticmethod
    def from_json(data: Any) -> "TokenSites":
        """The sites that `to_json` wrote; ModelError for anything else."""
        if not isinstance(data, dict) or set(data) != {"stack", "inner", "feed_forward", "arguments"}:
            raise ModelError(f"the sites of a schedule of tokens are {shown(data)}; save the model again")
        paths = (data["stack"], data["inner"], data["feed_forward"])
        if any(not isinstance(path, str) or not _PATH.fullmatch(path) for path in paths) or not data["stack"]:
            raise ModelError(f"the sites of a schedule of tokens name {shown(list(paths))}; save the model again")
        arguments = data["arguments"]
        entries = arguments.values() if isinstance(arguments, dict) else [None]
        for dims in entries:
            if not isinstance(dims, list) or any(type(d) is not int or not 0 <= d < 8 for d in dims):
                raise ModelError(f"the sites of a schedule of tokens have the dimensions {shown(dims)}; save it again")
        return TokenSites(*paths, {name: tuple(dims) for name, dims in arguments.items()})
