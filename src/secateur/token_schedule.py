"""TokenSchedule: the share of a text's or an image's tokens that goes on after each block of a model, as data."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from secateur.errors import ModelError, shown

METHODS = ("prune", "merge", "random")

DEPTHS = (1 / 3, 1 / 2, 2 / 3, 5 / 6)
"""Shares of a model's blocks after which a preset says how many tokens are left."""
PRESETS: Mapping[str, tuple[int, ...]] = {
    "exact": (100, 100, 100, 100),
    "mild": (90, 80, 70, 60),
    "mid": (80, 65, 50, 40),
    "fast": (70, 50, 35, 25),
}
"""Per cents of the input at `DEPTHS`, in between they fall evenly. `exact` removes tokens after the last attention
alone, where nothing but the pooled token is read.
"""
DEFAULT = "mid"


@dataclass(frozen=True)
class TokenSchedule:
    """Which share of the tokens goes on.

    keep: for each block, the per cent of the input's tokens that go on after it; it never rises.
    method: "prune" leaves out the tokens that the pooled token attends to least; "merge" averages like ones (Bolya et
        al., 2023); "random" leaves out any, which is what the others are compared with.
    pooled: whether nothing but the pooled token goes on after the attention of the last block.
    """

    keep: tuple[int, ...]
    method: str = "prune"
    pooled: bool = True

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ModelError(f"a schedule of tokens has the method {shown(self.method)}; use prune, merge or random")
        if not self.keep or any(type(percent) is not int or not 1 <= percent <= 100 for percent in self.keep):
            raise ModelError(f"a schedule keeps {shown(list(self.keep))} per cent; give whole numbers from 1 to 100")
        if any(a < b for a, b in pairwise(self.keep)):
            raise ModelError(
                f"a schedule keeps {shown(list(self.keep))} per cent; tokens that are gone do not come back"
            )

    def __str__(self) -> str:
        verb = {"prune": "keeps", "merge": "merges to", "random": "keeps at random"}[self.method]
        last = ", and the pooled token alone after the last attention" if self.pooled else ""
        return f"{verb} {', '.join(map(str, self.keep))} % of the tokens after blocks 1 to {len(self.keep)}{last}"

    def count(self, block: int, length: Any) -> Any:
        """How many of `length` tokens go on after a block, at least one; a symbolic length gives a symbolic count."""
        return (length * self.keep[block] + 99) // 100

    def reduces(self, block: int) -> bool:
        """Whether fewer tokens leave a block than enter it."""
        return self.keep[block] < (self.keep[block - 1] if block else 100)

    def work(self, length: int = 256) -> float:
        """The mean share of the tokens that a block works on: of its attention before, of the rest after removal."""
        total = 0.0
        for block in range(len(self.keep)):
            entering = self.keep[block - 1] / 100 if block else 1.0
            is_last = self.pooled and block == len(self.keep) - 1
            total += (entering + 2 * (1 / length if is_last else self.keep[block] / 100)) / 3
        return total / len(self.keep)

    def without(self, kept: Sequence[int]) -> "TokenSchedule":
        """The schedule of a model of which only the blocks `kept` are left."""
        return TokenSchedule(tuple(self.keep[block] for block in kept), self.method, self.pooled)

    def passing_by(self, blocks: Collection[int]) -> "TokenSchedule":
        """The schedule by which the model, while it passes `blocks` by, gives what it gives without them.

        The last block, passed by, cannot work on the pooled token alone; what is left of the others is not read.
        """
        keep: list[int] = []
        for block, percent in enumerate(self.keep):
            keep.append((keep[-1] if keep else 100) if block in blocks else percent)
        return TokenSchedule(tuple(keep), self.method, self.pooled and len(keep) - 1 not in blocks)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, read by `from_json`."""
        return {"keep": list(self.keep), "method": self.method, "pooled": self.pooled}

    def summary(self) -> dict[str, Any]:
        """What the JSON of a command says: the schedule, and the share of the tokens that a block works on."""
        return {"tokens": self.to_json(), "token_work": self.work()}

    @staticmethod
    def from_json(data: Any) -> "TokenSchedule":
        """The schedule that `to_json` wrote; ModelError for anything else."""
        if not isinstance(data, dict) or set(data) != {"keep", "method", "pooled"}:
            raise ModelError(f"the schedule of tokens is {shown(data)}; expected keep, method and pooled")
        if not isinstance(data["keep"], list) or type(data["pooled"]) is not bool:
            raise ModelError(f"the schedule of tokens is {shown(data)}; keep is a list, pooled is true or false")
        return TokenSchedule(tuple(data["keep"]), data["method"], data["pooled"])


def schedule_of(
    wanted: "str | Sequence[int] | TokenSchedule", blocks: int, *, method: str = "prune", pooled: bool = True
) -> TokenSchedule:
    """The schedule of a model with that many blocks.

    wanted: the name of a preset; or per cents for the blocks before the last one, so that "80,65,50,40" ends one block
        before the model does; or per cents for each block; or a schedule.

    Raises ModelError for an unknown name, and for more numbers than there are blocks.
    """
    if isinstance(wanted, TokenSchedule):
        if len(wanted.keep) != blocks:
            raise ModelError(f"the schedule has {len(wanted.keep)} blocks, and the model {blocks}; give {blocks}")
        return wanted
    if isinstance(wanted, str) and wanted in PRESETS:
        return TokenSchedule(tuple(_preset(PRESETS[wanted], block, blocks) for block in range(blocks)), method, pooled)
    percents = _numbers(wanted)
    if len(percents) > blocks:
        raise ModelError(f"{len(percents)} per cents are given for {blocks} blocks; give at most {blocks}")
    if len(percents) < blocks:
        percents = [100] * (blocks - 1 - len(percents)) + percents + percents[-1:]
    return TokenSchedule(tuple(percents), method, pooled)


def _numbers(wanted: str | Sequence[int]) -> list[int]:
    parts = wanted.split(",") if isinstance(wanted, str) else list(wanted)
    try:
        found = [int(part) for part in parts]
    except (TypeError, ValueError):
        found = []
    if not found:
        raise ModelError(f"{shown(wanted)} is no schedule of tokens; use {', '.join(PRESETS)}, or per cents: 80,65,50")
    return found


def _preset(percents: Sequence[int], block: int, blocks: int) -> int:
    """The per cent after a block: the preset's line, read at the block's depth; the last block removes no more."""
    depth = min((block + 1) / blocks, DEPTHS[-1])
    points = [(DEPTHS[0] - 1 / 6, 100), *zip(DEPTHS, percents, strict=True)]
    for (x0, y0), (x1, y1) in pairwise(points):
        if depth <= x1:
            return round(y0 + (y1 - y0) * max(0.0, depth - x0) / (x1 - x0))
    return percents[-1]
