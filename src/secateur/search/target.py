"""Target: what a user asks for, in speed or size and in quality, and the short texts in which it is written.

make_target(speed_up=2, on="onnx", max_drop=0.01)
make_target(limits=["params<=50%", "latency<=12ms@openvino"])
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from secateur.deploy.gguf import quantise
from secateur.deploy.jobs.bench import ALIASES, RUNTIMES
from secateur.deploy.target import GGUF
from secateur.errors import TargetError, meant, shown

QUANTITIES = ("params", "macs", "bytes", "memory", "latency")
TIMED = ("memory", "latency")
"""Quantities that depend on a runtime."""
LLAMA_CPP = "llama.cpp"
KNOWN = (*RUNTIMES, LLAMA_CPP)
"""The runtimes that a search can aim at, for people. A model that llama.cpp does not have is refused at the start."""
READERS = ("vllm", "sglang", "mlx", LLAMA_CPP)
"""The servers that a result can be for: what they do not read is not chosen."""
QUANTIZE = "q8_0"
"""How the weights are stored on llama.cpp where nothing is said."""
FAST_ZEROS = "secateur"
"""The runtime whose kernels leave single zeros out."""
_COUNTS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}
_BYTES = {"": 1.0, "b": 1.0} | {
    f"{letter}{middle}b": float(base**power)
    for power, letter in enumerate("kmgt", 1)
    for middle, base in (("", 1000), ("i", 1024))
}
_TIMES = {"us": 1e-3, "ms": 1.0, "s": 1e3}
_UNITS = {"params": _COUNTS, "macs": _COUNTS, "bytes": _BYTES, "memory": _BYTES, "latency": _TIMES}
"""Quantity -> unit, in small letters -> how much it is."""
_FORMS = {
    "params": "params<=50% or params<=10M",
    "macs": "macs<=40% or macs<=2G",
    "bytes": "bytes<=50% or bytes<=50MB",
    "memory": "memory<=50% or memory<=200MB",
    "latency": "latency<=0.5x or latency<=12ms",
}
"""Quantity -> how a limit on it may be written."""
_LIMIT = re.compile(r"\s*(?P<quantity>\w+)\s*<=?\s*(?P<bound>[^@]*?)\s*(?:@\s*(?P<runtime>.*?)\s*)?")
_BOUND = re.compile(r"(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)\s*(?P<unit>%|[a-z]*)", re.IGNORECASE)


@dataclass(frozen=True)
class Call:
    """What is timed: batch and length of a call, and the threads of its process. runtime: as `bench` names it.
    quantize: the format of the weights on llama.cpp; None elsewhere."""

    runtime: str
    batch: int = 1
    length: int = 128
    threads: int = 1
    quantize: str | None = None


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
    zeros: whether single zeros go beside units. The only limit is then a latency on a runtime that runs zeros fast;
        else TargetError.
    reader: the server that is to read the result, one of `READERS`; None for transformers alone.
    round: a layer that loses feed-forward neurons keeps a multiple of this number of them.
    """

    limits: tuple[Limit, ...] = ()
    max_drop: float | None = None
    by_divergence: bool = False
    confident: bool = False
    closest: bool = False
    call: Call | None = None
    zeros: bool = False
    reader: str | None = None
    round: int = 1

    def __post_init__(self) -> None:
        if self.zeros:
            _check_zeros(self.limits)
        if self.round < 1:
            raise TargetError(f"neurons are kept in multiples of at least 1, not of {self.round}")


def calls_of(target: Target) -> list[Call]:
    """The calls that the results of a target are timed with, each once."""
    named = [target.call, *(limit.call for limit in target.limits)]
    return list(dict.fromkeys(call for call in named if call is not None))


def parse_limit(text: str, call: Call | None = None) -> Limit:
    """The limit behind a text such as `params<=50%`, `bytes<=50MB`, `latency<=12ms@openvino` or `latency<=0.5x`.

    call: what is timed where the text names no runtime; a runtime that the text names is called alike.
    A number below one without a unit, a percentage and a number with x are shares of the dense model's cost.

    Raises TargetError for a text that cannot be read, a share that is no saving, and a runtime that is missing,
    unknown or out of place.
    """
    found = _LIMIT.fullmatch(text)
    if found is None:
        raise TargetError(f"the limit {shown(text)} cannot be read; write it like {', '.join(_FORMS.values())}")
    quantity = found["quantity"].lower()
    if quantity not in QUANTITIES:
        near = meant(quantity, QUANTITIES)
        raise TargetError(f"no quantity {found['quantity']!r} in {shown(text)}; there is {', '.join(QUANTITIES)}{near}")
    bound, relative = _bound_of(quantity, found["bound"], text)
    if quantity not in TIMED:
        if found["runtime"] is not None:
            raise TargetError(
                f"{quantity} is the same on every runtime; leave @{found['runtime']} out of {shown(text)}"
            )
        return Limit(quantity, bound, relative)
    if found["runtime"] is not None:
        call = replace(call or Call(""), runtime=runtime_of(found["runtime"]))
    if call is None:
        raise TargetError(
            f"{shown(text)} does not say on which runtime; add --on RUNTIME, or write {text.strip()}@onnx"
        )
    return Limit(quantity, bound, relative, call)


def _bound_of(quantity: str, text: str, limit: str) -> tuple[float, bool]:
    """The number behind a bound, and whether it is a share of the dense cost."""
    found = _BOUND.fullmatch(text)
    if found is None:
        raise TargetError(f"{shown(text)} in {shown(limit)} is no bound; write {_FORMS[quantity]}")
    number, unit = float(found["number"]), found["unit"].lower()
    if not (number > 0 and math.isfinite(number)):
        raise TargetError(f"the bound of {shown(limit)} is not positive; write {_FORMS[quantity]}")
    if unit in ("%", "x"):
        return _share(number / 100 if unit == "%" else number, limit), True
    if not unit and (number <= 1 or not number.is_integer()):
        return _share(number, limit), True
    if unit not in _UNITS[quantity]:
        reason = f"{found['unit']!r} is no unit of {quantity}" if unit else "it has no unit"
        raise TargetError(f"the bound of {shown(limit)} cannot be read, as {reason}; write {_FORMS[quantity]}")
    return number * _UNITS[quantity][unit], False


def _share(share: float, limit: str) -> float:
    """The share itself; TargetError where it asks for no saving."""
    if share >= 1:
        raise TargetError(f"{shown(limit)} allows {share:g} of what the dense model costs; ask for less than 1")
    return share


def runtime_of(name: str) -> str:
    """A runtime by one of its names; TargetError lists those that are known. It need not be installed."""
    found = ALIASES.get(name, name)
    if found not in (*RUNTIMES, GGUF):
        raise TargetError(f"no runtime {shown(name)}; there is {', '.join(KNOWN)}{meant(name, KNOWN)}")
    return found


def make_target(
    speed_up: float | None = None,
    on: str | None = None,
    limits: Sequence[str] = (),
    max_drop: float | None = None,
    kl: float | None = None,
    *,
    confident: bool = False,
    closest: bool = False,
    zeros: bool = False,
    frontier: Sequence[float] = (),
    batch: int = 1,
    length: int = 128,
    threads: int = 1,
    quantize: str | None = None,
    reader: str | None = None,
    round: int = 1,
) -> Target:
    """The target behind what a user writes.

    speed_up: how many times faster than the dense model the result has to be, on the runtime `on`.
    on: the runtime that results are timed on. batch, length, threads: of the calls that are timed.
    limits: texts that `parse_limit` reads.
    max_drop: the most that the main metric may drop. kl: the most divergence from the dense model, instead.
    frontier: speed-ups that `automatic` reaches one after the other, for which nothing else has to be asked.
    confident, closest, zeros, round: as `Target` says.
    quantize: the format of the weights on llama.cpp, by default `QUANTIZE`; on another runtime it contradicts.
    reader: the server that is to read the result, in any case.

    Raises TargetError when nothing is asked for, or what is asked for contradicts itself.
    """
    for name, size in (("batch", batch), ("length", length), ("threads", threads)):
        if size < 1:
            raise TargetError(f"{name} is at least 1, not {size}")
    call = None if on is None else Call(runtime_of(on), batch, length, threads)
    usual = Call("", batch, length, threads)
    read = [parse_limit(text, call or (usual if "@" in text else None)) for text in limits]
    if speed_up is not None:
        read.insert(0, _speed_limit(speed_up, call))
    drop = _drop_of(max_drop, kl, confident=confident)
    if not read and drop is None and not frontier:
        raise TargetError(
            "nothing is asked for; say how fast (--speed-up 2 --on onnx), or how small (--target 'params<=50%')"
        )
    read = [replace(limit, call=_stored(limit.call, quantize)) for limit in read]
    timed = [limit.call for limit in read if limit.call is not None]
    call = _stored(call, quantize) or (timed[0] if timed else None)
    if not read and call is None and drop is not None:
        raise TargetError(
            f"a drop of at most {drop:g} allows many results; add --on RUNTIME for the fastest, or limit a size "
            "(--target 'params<=50%')"
        )
    _check_once(read)
    if quantize is not None and GGUF not in {one.runtime for one in (call, *timed) if one is not None}:
        raise TargetError(
            f"{shown(quantize)} is a format of weights on llama.cpp, and nothing is asked for there; add --on "
            "llama.cpp, or leave --quantize out"
        )
    reader = _reader_of(reader, zeros=zeros)
    return Target(tuple(read), drop, kl is not None, confident, closest, call, zeros, reader, round)


def _speed_limit(speed_up: float, call: Call | None) -> Limit:
    """A speed-up as the share of the dense model's latency that it leaves."""
    if not (speed_up > 1 and math.isfinite(speed_up)):
        raise TargetError(f"a speed-up of {speed_up:g} makes nothing faster; ask for more than 1")
    if call is None:
        raise TargetError(f"a speed-up of {speed_up:g} depends on the runtime; add --on with one of {', '.join(KNOWN)}")
    return Limit("latency", 1 / speed_up, call=call)


def _stored(call: Call | None, quantize: str | None) -> Call | None:
    """The call with the format of the weights, where it is on llama.cpp; DeployError for an unknown format."""
    if call is None or call.runtime != GGUF:
        return call
    name = (quantize or QUANTIZE).lower()
    quantise.find(name)
    return replace(call, quantize=name)


def _reader_of(name: str | None, *, zeros: bool) -> str | None:
    """A server by its name; TargetError where there is none of that name, or zeros are asked for, which none skips."""
    if name is None:
        return None
    if name.lower() not in READERS:
        raise TargetError(f"no server {shown(name)}; there is {', '.join(READERS)}{meant(name.lower(), READERS)}")
    if zeros:
        raise TargetError(
            f"zeros are fast on {FAST_ZEROS} alone, and {name} multiplies them; leave --zeros or --for out"
        )
    return name.lower()


def _drop_of(max_drop: float | None, kl: float | None, *, confident: bool) -> float | None:
    """The most drop, of the metric or by divergence."""
    if max_drop is not None and kl is not None:
        raise TargetError(
            f"the drop is limited twice, by the metric ({max_drop:g}) and by the divergence ({kl:g}); leave one out"
        )
    drop = max_drop if kl is None else kl
    if drop is None and confident:
        raise TargetError("confident is about the interval of a drop, and none is limited; add --max-drop")
    if drop is not None and not (drop >= 0 and math.isfinite(drop)):
        raise TargetError(f"the drop is a number from 0 upwards, not {drop:g}")
    return drop


def _check_once(limits: Sequence[Limit]) -> None:
    """TargetError for two limits on one quantity at the same call."""
    seen = set()
    for limit in limits:
        if (limit.quantity, limit.call) in seen:
            where = f" on {limit.call.runtime}" if limit.call else ""
            raise TargetError(f"{limit.quantity}{where} is limited twice; keep the tighter limit")
        seen.add((limit.quantity, limit.call))


def _check_zeros(limits: Sequence[Limit]) -> None:
    """TargetError unless the only limit is a latency on the runtime that runs zeros fast."""
    if len(limits) > 1:
        raise TargetError(
            f"zeros are chosen for one latency, and {len(limits)} limits are given; keep the latency alone, or leave "
            "--zeros out"
        )
    if not limits or limits[0].quantity != "latency":
        raise TargetError(
            f"zeros are chosen for a latency, and none is limited; add --speed-up 2 --on {FAST_ZEROS} or --target "
            f"latency<=12ms@{FAST_ZEROS} as the only limit"
        )
    call = limits[0].call
    if call is None or call.runtime != FAST_ZEROS:
        where = "no runtime" if call is None else call.runtime
        raise TargetError(
            f"zeros are fast on {FAST_ZEROS}, and the latency is limited on {where}; add --on {FAST_ZEROS}, or leave "
            "--zeros out"
        )
