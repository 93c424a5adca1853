"""Damages the files of a case: JSON and YAML by structure, safetensors by header, packed weights by word, all by bytes.

Every function takes a `random.Random` and returns the damaged bytes and a few words about what was done.
"""

import json
import struct
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

import yaml

Case = Mapping[str, bytes]
"""The files of a folder: name (may hold slashes) -> contents."""
Damaged = tuple[bytes, str]
NUMBERS = (0, 1, -1, 2, 3, 7, 64, 127, 128, 255, 256, 4096, 65535, 65536, 2**20, 2**31 - 1, 2**31, 2**32, 2**53, 2**62)
NUMBERS += (2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, -(2**31), -(2**63), -(2**63) - 1)
WORDS = (
    "",
    "x",
    ".",
    "..",
    "/",
    "a\0b",
    "\n",
    "\u2028",
    "é",
    "\ud800",
    "%s{0}",
    "__class__",
    "forward",
    "None",
    "true",
)
WORDS += ("../canary/model.safetensors", "../canary", "/etc/passwd", "canary.bin", "a.b.c", "x" * 300, "x" * 100_000)
DEPTHS = (10, 70, 990, 5_000, 100_000)


class Pairs(list[list[Any]]):
    """A JSON object as [key, value] pairs, so that a key can stand twice."""


class Raw(str):
    """Text that goes into a JSON file as it is."""


# -- JSON -------------------------------------------------------------------------------------------------------------


def parse(text: str) -> Any:
    """JSON as lists, `Pairs` and scalars."""
    return json.loads(text, object_pairs_hook=lambda pairs: Pairs([key, value] for key, value in pairs))


def dump(value: Any) -> str:
    """The text of what `parse` gives, with `Raw` text as it is."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{dump(key)}: {dump(item)}" for key, item in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(dump, value)) + "]"
    return json.dumps(value)


def damage_json(data: bytes, rng: Random) -> Damaged:
    """Change one place of a JSON document; bytes that are no JSON are damaged as bytes."""
    try:
        root: list[Any] = [parse(data.decode())]
    except (ValueError, RecursionError):
        return damage_bytes(data, rng)
    places = list(_places(root))
    holder, key, path = rng.choice(places[: max(2, len(places) // 8)] if rng.random() < 0.3 else places)
    change = rng.choice(JSON_CHANGES)
    said = change(holder, key, rng, places)
    text = dump(root[0]) if root else ""
    return text.encode("utf-8", "surrogatepass"), f"{path or 'the whole'}: {said}"


def _places(root: list[Any]) -> Any:
    """(list that holds it, its index, its path) of every value; the value of a pair is at index 1 of the pair."""
    stack: list[tuple[list[Any], int, str]] = [(root, 0, "")]
    while stack:
        holder, key, path = stack.pop()
        yield holder, key, path
        value = holder[key]
        if isinstance(value, Pairs):
            stack += [(pair, 1, f"{path}.{pair[0]}".strip(".")[:120]) for pair in reversed(value)]
        elif isinstance(value, list):
            chosen = range(len(value)) if len(value) < 40 else range(0, len(value), len(value) // 20)
            stack += [(value, i, f"{path}.{i}".strip(".")[:120]) for i in reversed(chosen)]


def _of_another_type(holder: list[Any], key: int, rng: Random, places: Any) -> str:
    holder[key] = rng.choice(
        [None, True, False, 0, 1, -1, 1.5, "", "x", [], [[]], [None], ["x"], [0], Pairs(), Pairs([["a", 1]])]
    )
    return f"is {dump(holder[key])}"


def _number(holder: list[Any], key: int, rng: Random, places: Any) -> str:
    value = holder[key]
    if isinstance(value, int) and rng.random() < 0.4:
        holder[key] = rng.choice([value + 1, value - 1, -value, value * 2, float(value), str(value), value + 0.5])
    elif rng.random() < 0.3:
        holder[key] = Raw(rng.choice(["NaN", "Infinity", "-Infinity", "1e400", "1e308", "-0.0", "1e-320", "9" * 5000]))
    else:
        holder[key] = rng.choice(NUMBERS)
    return f"is {dump(holder[key])[:40]}"


def _word(holder: list[Any], key: int, rng: Random, places: Any) -> str:
    value = holder[key]
    holder[key] = rng.choice(WORDS)
    if isinstance(value, str) and rng.random() < 0.4:
        holder[key] = rng.choice(
            [value + holder[key][:50], value[:-1], value.upper(), "../" + value, "../canary/" + value]
        )
    return f"is {holder[key][:40]!r}"


def _deep(holder: list[Any], key: int, rng: Random, places: Any) -> str:
    depth = rng.choice(DEPTHS)
    holder[key] = Raw("[" * depth + "]" * depth if rng.random() < 0.5 else '{"a":' * depth + "1" + "}" * depth)
    return f"is nested {depth} deep"


def _long(holder: list[Any], key: int, rng: Random, places: Any) -> str:
    count, item = rng.choice([100, 10_000, 100_000]), rng.choice([0, 1, "x", Raw("[]")])
    holder[key] = Raw("[" + ", ".join([dump(item)] * count) + "]")
    return f"is a list of {count} times {item}"


def _deleted(holder: list[Any], key: int, rng: Random, places: Any) -> str:
    inside = [
        (parent, i) for parent, i, _ in places if isinstance(parent[i], list) and any(x is holder for x in parent[i])
    ]
    if inside:  # a pair of an object
        pairs = inside[0][0][inside[0][1]]
        pairs[:] = [pair for pair in pairs if pair is not holder]
    else:
        del holder[key]
    return "is gone"


def _twice(holder: list[Any], key: int, rng: Random, places: Any) -> str:
    value = holder[key]
    if isinstance(value, list) and value:
        again = rng.choice(value)
        if isinstance(value, Pairs):
            again = [again[0], again[1] if rng.random() < 0.5 else rng.choice([None, 0, "x", []])]
        value.insert(rng.randrange(len(value) + 1), again)
        return "has an entry twice"
    return _of_another_type(holder, key, rng, places)


def _another_place(holder: list[Any], key: int, rng: Random, places: Any) -> str:
    other, index, path = rng.choice(places)
    if rng.random() < 0.5 and path:
        inside = dump(other[index]), dump(holder[key])
        if any(len(text) > 2000 for text in inside):
            return _number(holder, key, rng, places)
        other[index], holder[key] = (Raw(text) for text in reversed(inside))
        return f"is swapped with {path}"
    holder[key] = Raw(dump(other[index])[:100_000])
    return f"is what {path or 'the whole'} is"


def _another_key(holder: list[Any], key: int, rng: Random, places: Any) -> str:
    value = holder[key]
    if not isinstance(value, Pairs) or not value:
        return _number(holder, key, rng, places)
    names = [pair[0] for parent, i, _ in places if isinstance(parent[i], Pairs) for pair in parent[i]]
    pair, name = rng.choice(value), rng.choice([*WORDS[:-2], *names])
    if rng.random() < 0.4:
        value.append([name, rng.choice([None, 0, "x", [], pair[1]])])
        return f"also has the key {name[:40]!r}"
    said = f"has {pair[0][:40]!r} under the key {name[:40]!r}"
    pair[0] = name
    return said


JSON_CHANGES = (
    *(_of_another_type, _of_another_type, _number, _number, _number, _word, _word, _deep, _long, _deleted, _deleted),
    *(_twice, _another_place, _another_place, _another_key, _another_key),
)


def damage_yaml(data: bytes, rng: Random) -> Damaged:
    """Change one place of a YAML document by structure (JSON is YAML), by line, or by what only YAML has."""
    kind = rng.randrange(4)
    try:
        text = data.decode()
        if kind == 0 and "&" not in text:  # anchors can stand for more than fits memory
            value = yaml.safe_load(text)
            return damage_json(json.dumps(value).encode(), rng)
    except (ValueError, TypeError, yaml.YAMLError, RecursionError):
        return damage_bytes(data, rng)
    if kind == 1:
        return damage_lines(data, rng)
    if kind == 2:
        return damage_bytes(data, rng)
    extra = rng.choice(
        [
            "a: &a [x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a]\nc: &c [*b, *b, *b, *b, *b, *b, *b, *b]\n"
            "d: &d [*c, *c, *c, *c, *c, *c, *c, *c]\ne: &e [*d, *d, *d, *d, *d, *d, *d, *d]\n"
            "f: [*e, *e, *e, *e, *e, *e]\n",
            "self: &s [*s]\n",
            "options: &o {damp: *o}\n",
            "model: !!python/object/apply:os.system ['true']\n",
            "model: !!binary aGFsbG8=\n",
            "? [a, b]\n: 1\n",
            "seed: 1__0\n",
            "seed: 0x1_\n",
            "sparsity: .nan\n",
            "sparsity: .inf\n",
            "samples: 12345678901234567890123\n",
            "seed: " + "9" * 5000 + "\n",
            "date: 2001-99-99\n",
            "model: 2001-01-01\n",
            "calibration: {a: 1}\n",
            "calibration: [1, null]\n",
            "output: [a]\n",
            "<<: *none\n",
            "<<: 3\n",
            "---\na: 1\n",
            "x: " + "[" * 3000 + "\n",
            "x: " + "{a: " * 3000 + "\n",
            "\tx: 1\n",
            "%YAML 9.9\n---\n",
            '"\\ud800": 1\n',
            "model: 'a\0b'\n",
        ]
    )
    lines = text.splitlines(keepends=True)
    lines.insert(rng.randrange(len(lines) + 1), extra)
    return "".join(lines).encode("utf-8", "surrogatepass"), f"with {extra[:40]!r}"


# -- text and bytes ---------------------------------------------------------------------------------------------------


def damage_lines(data: bytes, rng: Random) -> Damaged:
    """Move, repeat, cut or exchange lines and words of a text."""
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    kind = rng.randrange(6)
    if kind == 0:
        gone = lines.pop(at)
        return b"\n".join(lines), f"without line {at + 1} {gone[:40]!r}"
    if kind == 1:
        lines.insert(rng.randrange(len(lines)), lines[at])
        return b"\n".join(lines), f"with line {at + 1} {lines[at][:40]!r} twice"
    words = lines[at].split(b" ")
    index = rng.randrange(len(words))
    if kind == 2:
        words[index] = rng.choice(rng.choice(lines).split(b" "))
    elif kind == 3:
        words[index] = str(rng.choice(NUMBERS)).encode()
    elif kind == 4:
        words[index] = rng.choice(WORDS).encode("utf-8", "surrogatepass")
    else:
        mark = rng.choice([b"(", b")", b"=", b":", b"<", b"+", b",", b'"', b"'", b"#", b"@", b"-", b"{", b"[", b"\t"])
        words[index] = words[index] * rng.choice([0, 1, 2]) + mark * rng.choice([1, 2, 3000])
    lines[at] = b" ".join(words)
    return b"\n".join(lines), f"line {at + 1} is {lines[at][:60]!r}"


def damage_bytes(data: bytes, rng: Random) -> Damaged:
    """Flip, set, cut, insert, repeat or clear bytes."""
    change = rng.choice(BYTE_CHANGES) if data else _inserted
    return change(bytearray(data), rng)


def _flipped(data: bytearray, rng: Random) -> Damaged:
    at = rng.randrange(len(data))
    data[at] ^= 1 << rng.randrange(8)
    return bytes(data), f"byte {at} flipped to {data[at]}"


def _set(data: bytearray, rng: Random) -> Damaged:
    at, value = rng.randrange(len(data)), rng.choice([0, 1, 127, 128, 255, 34, 92, 123, rng.randrange(256)])
    data[at] = value
    return bytes(data), f"byte {at} set to {value}"


def _cut(data: bytearray, rng: Random) -> Damaged:
    length = rng.choice([0, 1, 7, 8, len(data) - 1, len(data) // 2, rng.randrange(len(data))])
    return bytes(data[: max(0, length)]), f"cut to {length} of {len(data)} bytes"


def _inserted(data: bytearray, rng: Random) -> Damaged:
    at, count = rng.randrange(len(data) + 1), rng.choice([1, 2, 8, 64])
    new = rng.choice([rng.randbytes(count), bytes(count), b"\xff" * count, b"\xef\xbb\xbf", b"\xc3\x28", b" " * count])
    return bytes(data[:at] + new + data[at:]), f"{len(new)} bytes inserted at {at}"


def _repeated(data: bytearray, rng: Random) -> Damaged:
    at, count = rng.randrange(len(data)), rng.choice([1, 4, 8, 32, 128])
    part = data[at : at + count]
    return bytes(data[:at] + part * rng.choice([2, 3, 50]) + data[at + count :]), f"{len(part)} bytes at {at} repeated"


def _removed(data: bytearray, rng: Random) -> Damaged:
    at, count = rng.randrange(len(data)), rng.choice([1, 4, 8, 32, 128])
    return bytes(data[:at] + data[at + count :]), f"{count} bytes at {at} removed"


def _cleared(data: bytearray, rng: Random) -> Damaged:
    at, count, value = rng.randrange(len(data)), rng.choice([4, 8, 32]), rng.choice([b"\0", b"\xff"])
    return bytes((data[:at] + value * count + data[at + count :])[: len(data)]), f"{count} bytes at {at} cleared"


BYTE_CHANGES = (_flipped, _flipped, _set, _set, _cut, _inserted, _repeated, _removed, _cleared)


# -- binary formats ---------------------------------------------------------------------------------------------------


def damage_safetensors(data: bytes, rng: Random) -> Damaged:
    """Change the header (its length or its JSON) or the tensors of a safetensors file."""
    if len(data) < 10:
        return damage_bytes(data, rng)
    (length,) = struct.unpack("<Q", data[:8])
    head, body = data[8 : 8 + length], data[8 + length :]
    kind = rng.random()
    if kind < 0.5:
        new, said = _damage_header(head, len(body), rng)
        return struct.pack("<Q", len(new)) + new + body, f"header: {said}"
    if kind < 0.65:
        said = rng.choice(
            [0, 1, 2, length - 1, length + 1, len(data) - 8, len(data), 100_000_000, 2**32, 2**63, 2**64 - 1]
        )
        return struct.pack("<Q", said % 2**64) + data[8:], f"header length {said}"
    if kind < 0.75:
        return data[:-1] if rng.random() < 0.5 else data + b"\0", "one byte less or more"
    if kind < 0.9:
        new, said = damage_bytes(body, rng)
        return data[: 8 + length] + new, f"tensors: {said}"
    return damage_bytes(data, rng)


def _damage_header(head: bytes, size: int, rng: Random) -> Damaged:
    """Change the JSON of a safetensors header; often a type, a shape or a range, so that the rest stays right."""
    try:
        data = json.loads(head)
        names = [
            name for name, entry in data.items() if isinstance(entry, dict) and len(entry.get("data_offsets", "")) == 2
        ]
        names = [name for name in names if isinstance(data[name].get("shape"), list)]
    except (ValueError, TypeError, AttributeError, RecursionError):
        return damage_bytes(head, rng)
    if not names or rng.random() < 0.4:
        return damage_json(head, rng)
    name, other = rng.choice(names), rng.choice(names)
    entry, kind = data[name], rng.randrange(6)
    if kind == 0:
        entry["dtype"] = rng.choice(
            ["F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "C64", "X", "U64"]
        )
    elif kind == 1:
        entry["shape"] = rng.choice(
            [[], [0], [*entry["shape"], 1], entry["shape"][::-1], [2**32, 2**32], [-1], [2**63]]
        )
    elif kind == 2:
        begin, end = entry["data_offsets"]
        entry["data_offsets"] = rng.choice(
            [[begin + 1, end], [begin, end + 1], [end, begin], [0, size], [begin, 2**64]]
        )
    elif kind == 3:
        data[name], data[other] = data[other], data[name]
    elif kind == 4:
        data[name + rng.choice([".weight", "x", "\0", "secateur"])] = data.pop(name)
    else:
        del data[name]
    return json.dumps(data).encode(), f"{name}: {['type', 'shape', 'range', 'swapped', 'renamed', 'gone'][kind]}"


def damage_packed(data: bytes, rng: Random) -> Damaged:
    """Change a packed weight word by word; the length in its header mostly goes with the bytes."""
    blob = bytearray(data)
    kind = rng.random()
    if len(blob) < 128 or kind < 0.1:
        return damage_bytes(data, rng)
    if kind < 0.45:  # a number of the header
        at, width = rng.choice(
            [(8, 4), (12, 4), (16, 4), (20, 4), (24, 8), (32, 8), *((p, 4) for p in range(40, 128, 4))]
        )
    else:
        width = rng.choice([1, 2, 2, 4, 4, 8])
        at = rng.randrange(128, max(129, len(blob) - width)) // width * width
    if kind < 0.85:
        old = int.from_bytes(blob[at : at + width], "little")
        value = rng.choice([0, 1, old + 1, old - 1, old * 2, old ^ (1 << rng.randrange(8 * width)), *NUMBERS])
        value %= 1 << 8 * width
        blob[at : at + width] = value.to_bytes(width, "little")
        return bytes(blob), f"{width} bytes at {at}: {old} -> {value}"
    if kind < 0.93:
        other = rng.randrange(128, max(129, len(blob) - 16)) // 4 * 4
        blob[at : at + width], blob[other : other + width] = blob[other : other + width], blob[at : at + width]
        return bytes(blob[: len(data)]), f"{width} bytes at {at} and {other} swapped"
    new, said = rng.choice([_cut, _inserted, _repeated, _removed])(blob, rng)
    if len(new) >= 40:
        new = new[:32] + len(new).to_bytes(8, "little") + new[40:]
    return new, f"{said}, with the length in the header"


def damage_table(data: bytes, rng: Random) -> Damaged:
    """Change one 64-bit number of a table, or its bytes."""
    if rng.random() < 0.05 or len(data) < 16:
        return damage_bytes(data, rng)
    at = rng.randrange(len(data) // 8) * 8
    (old,) = struct.unpack_from("<q", data, at)
    value = rng.choice([-1, -2, 0, 1, 2, 3, 4, 5, 6, 8, 16, old + 1, old - 1, old * 2, -old, *NUMBERS])
    value = (value + 2**63) % 2**64 - 2**63
    return data[:at] + struct.pack("<q", value) + data[at + 8 :], f"number {at // 8}: {old} -> {value}"


BY_SUFFIX: dict[str, tuple[Callable[[bytes, Random], Damaged], ...]] = {
    ".json": (damage_json, damage_json, damage_json, damage_bytes),
    ".yaml": (damage_yaml,),
    ".safetensors": (damage_safetensors,),
    ".packed": (damage_packed,),
    ".table": (damage_table,),
    ".txt": (damage_lines, damage_lines, damage_bytes),
    ".csv": (damage_lines, damage_bytes),
    ".tsv": (damage_lines, damage_bytes),
    ".jsonl": (damage_lines, damage_bytes),
}


def damage(case: Case, targets: tuple[str, ...], rng: Random) -> tuple[Case, str]:
    """A case with one file damaged; rarely a file is gone, or two files are exchanged."""
    names = sorted(name for name in case if name in targets)
    if not names:
        return case, "nothing is left to damage"
    name, kind = rng.choice(names), rng.random()
    if kind < 0.01:
        return {other: data for other, data in case.items() if other != name}, f"{name} is gone"
    if kind < 0.02:
        other = rng.choice(names)
        return {**case, name: case[other], other: case[name]}, f"{name} and {other} are exchanged"
    suffix = name[name.rfind(".") :]
    data, said = rng.choice(BY_SUFFIX.get(suffix, (damage_bytes,)))(case[name], rng)
    return {**case, name: data}, f"{name}: {said}"
