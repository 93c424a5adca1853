"""Cases that a reader once got wrong, as small files: what differs from a whole case, and what is still wrong."""

import base64
import hashlib
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.fuzz.mutate import Case
from tests.fuzz.run import Find, Format

HERE = Path(__file__).parent / "corpus"
WHOLE = 8_000
"""Up to so many bytes (compressed) a changed file is kept whole, else as a difference."""


def files() -> list[Path]:
    """The kept cases."""
    return sorted(HERE.glob("*.json"))


def keep(form: Format, found: Find) -> Path:
    """Write a find as a kept case that is open."""
    seed = form.seeds()[found.origin]
    changed: dict[str, Any] = dict.fromkeys(seed.keys() - found.case.keys())
    for name, data in found.case.items():
        if data != seed.get(name):
            changed[name] = _difference(seed.get(name, b""), data)
    entry = {
        "format": found.format,
        "key": found.key,
        "seed": found.origin,
        "done": found.said[:300],
        "changed": changed,
    }
    entry |= {"open": f"{found.what} ({found.where})"[:300]}
    path = HERE / f"{found.format}-{hashlib.sha256(found.key.encode()).hexdigest()[:8]}.json"
    HERE.mkdir(exist_ok=True)
    path.write_text(json.dumps(entry, indent=1) + "\n", encoding="utf-8")
    return path


def read(path: Path) -> dict[str, Any]:
    """A kept case: format, key, seed, done, changed, and open where it is still wrong."""
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def case_of(entry: Mapping[str, Any], seeds: Mapping[str, Case]) -> Case:
    """The files of a kept case."""
    case = dict(seeds[entry["seed"]])
    for name, change in entry["changed"].items():
        if change is None:
            case.pop(name, None)
        elif "at" in change:
            old = case[name]
            case[name] = old[: change["at"]] + _bytes(change) + old[change["at"] + change["cut"] :]
        else:
            case[name] = _bytes(change)
    return case


def settle(path: Path, outcome: Any) -> None:
    """Note that a kept case is no longer wrong, or what is wrong with it now."""
    entry = read(path)
    if isinstance(outcome, str):
        del entry["open"]
    else:
        entry |= {"key": outcome["key"], "open": f"{outcome['what']} ({outcome['where']})"[:300]}
    path.write_text(json.dumps(entry, indent=1) + "\n", encoding="utf-8")


def _difference(old: bytes, new: bytes) -> dict[str, Any]:
    whole = _written(new)
    if len(json.dumps(whole)) <= WHOLE or not old:
        return whole
    least = min(len(old), len(new))
    head = next((i for i in range(least) if old[i] != new[i]), least)
    tail = next((i for i in range(least - head) if old[-1 - i] != new[-1 - i]), least - head)
    return {"at": head, "cut": len(old) - head - tail, **_written(new[head : len(new) - tail])}


def _written(data: bytes) -> dict[str, str]:
    """Bytes as text where they are short text, else compressed."""
    if len(data) < 2000:
        try:
            return {"text": data.decode("ascii")}
        except UnicodeDecodeError:
            pass
    return {"zlib": base64.b64encode(zlib.compress(data, 9)).decode()}


def _bytes(change: Mapping[str, Any]) -> bytes:
    if "text" in change:
        return str(change["text"]).encode()
    return zlib.decompress(base64.b64decode(change["zlib"]))
