"""Target: what a user asks for, in speed or size and in quality."""

from dataclasses import dataclass

QUANTITIES = ("params", "macs", "bytes", "memory", "latency")


@dataclass(frozen=True)
class Call:
    """What is timed: batch and length of a call, and the threads of its process. runtime: as `bench` names it."""

    runtime: str
    batch: int = 1
    length: int = 128
    threads: int = 1


@dataclass(frozen=True)
class Limit:
    """The most that a result may cost.

    quantity: one of `QUANTITIES`.
    bound: share of the dense model's cost where `relative`, else parameters, multiply-accumulates, bytes or ms.
    call: what is timed, for latency and memory.
    """

    quantity: str
    bound: float
    relative: bool = True
    call: Call | None = None


@dataclass(frozen=True)
class Target:
    """What is asked for.

    limits: all of them hold. Empty: as fast as `max_drop` permits, on `call`.
    max_drop: the most that the main metric may drop, absolute, on test rows; the divergence where `by_divergence`.
    confident: whether the upper end of the drop's interval has to be within `max_drop`.
    closest: whether the nearest result is written when the target is missed.
    call: the runtime that results are timed on; None where only sizes are asked for.
    """

    limits: tuple[Limit, ...] = ()
    max_drop: float | None = None
    by_divergence: bool = False
    confident: bool = False
    closest: bool = False
    call: Call | None = None
