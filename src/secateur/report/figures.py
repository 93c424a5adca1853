"""Numbers as a reader of a report wants them: few digits, a unit, and a true minus sign."""

from collections.abc import Sequence
from datetime import datetime

from secateur.schemas.record import Form, Quality, Speed

MINUS = "−"


def number(value: float, digits: int = 4) -> str:
    """A number with `digits` significant digits and thousands marked: 0.8613, 1,234, 3.2e-06."""
    if value == int(value) and abs(value) < 1e15:
        text = f"{int(value):,}"
    elif abs(value) >= 10**digits:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.{digits}g}"
    return text.replace("-", MINUS, 1) if value < 0 else text


def signed(value: float) -> str:
    """A number with its sign, four decimals where it is below 10: +0.0013."""
    text = f"{value:+.4f}" if abs(value) < 10 else f"{value:+,.1f}"
    return text.replace("-", MINUS)


def score(value: float) -> str:
    """A value of a metric: four decimals below 10, two above."""
    return (f"{value:.4f}" if abs(value) < 10 else f"{value:,.2f}").replace("-", MINUS)


def share(value: float) -> str:
    """A share as per cent: 58%, 3.1%, 0.42%."""
    hundredth = 100 * value
    return f"{hundredth:.0f}%" if hundredth >= 10 or hundredth == 0 else f"{hundredth:.2g}%"


def size(count: float, unit: str = "") -> str:
    """A count or a number of bytes with a prefix: 22.7 M, 1.3 GB."""
    for factor, prefix in ((1e9, "B" if not unit else "G"), (1e6, "M"), (1e3, "k")):
        if count >= factor:
            return f"{count / factor:.3g} {prefix}{unit}"
    return f"{count:g} {unit}".strip()


def milliseconds(value: float) -> str:
    """A time: 24.7 ms."""
    return f"{value:,.0f} ms" if value >= 1000 else f"{value:.3g} ms"


def seconds(value: float) -> str:
    """A duration: 42 s, 8 min 10 s, 3 h 5 min."""
    whole = round(value)
    if whole < 60:
        return f"{value:.2g} s" if whole < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def shape(sizes: Sequence[int]) -> str:
    """384 × 1536."""
    return " × ".join(str(count) for count in sizes)


def date(text: str) -> str:
    """2026-11-30 12:00 UTC from an ISO 8601 date with its time; other texts stay as they are."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return text
    return found.strftime("%Y-%m-%d %H:%M %Z").strip() if len(text) > len("2026-11-30") else text


def times(speed: Speed) -> float | None:
    """How many times as fast as the dense model; None where that was not timed."""
    return None if speed.dense_ms is None else speed.dense_ms / speed.ms


def setting(speed: Speed) -> str:
    """Where and with what was timed: onnx, prompt, 1 × 128 tokens."""
    return ", ".join([speed.runtime, *([] if speed.what == "forward" else [speed.what]), inputs(speed)])


def inputs(speed: Speed) -> str:
    """1 × 128 tokens; batch of 8."""
    return f"{speed.batch} × {speed.length} tokens" if speed.length else f"batch of {speed.batch}"


def threads(speed: Speed) -> str:
    """1 thread, 4 threads."""
    return f"{speed.threads} thread{'s' if speed.threads > 1 else ''}"


def interval(quality: Quality | Form) -> str:
    """The 95% interval of the drop; empty where there is none."""
    if quality.interval is None:
        return ""
    low, high = quality.interval
    return f"{signed(low)} to {signed(high)}"
