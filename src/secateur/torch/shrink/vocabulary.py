"""Removing tokens: token numbers in configurations follow, and so does the tokenizer.

Kept tokens are numbered anew in their old order. A shrunk tokenizer splits every text whose tokens are all kept as
before: WordPiece takes the longest token, Unigram the likeliest split, and byte-pair encoding the same merges, as long
as every token is kept together with the tokens that it is merged from (`closed` adds them).
"""

import copy
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from secateur.errors import ModelError
from secateur.files import write_json
from secateur.layout import Layout

ATTRIBUTE = "_secateur_tokens"
TABLE = "kept_tokens.json"
_LISTS = ("suppress_tokens", "begin_suppress_tokens")


def kept_tokens(layout: Layout, keep: Mapping[str, np.ndarray]) -> tuple[int, np.ndarray] | None:
    """Old size of the vocabulary and the tokens that are kept, when tokens are removed."""
    for name, units in keep.items():
        axis = layout.axis(name)
        if axis.kind == "vocab" and len(units) < axis.size:
            return axis.size, np.sort(np.asarray(units, dtype=np.int64))
    return None


def token_numbers(config: Any, size: int, kept: np.ndarray) -> dict[str, Any]:
    """New values of `eos_token_id` and its like in a configuration; ModelError when such a token would go."""
    new = {int(old): i for i, old in enumerate(kept)}
    changed: dict[str, Any] = {}
    for key, value in vars(config).items():
        numbers = value if isinstance(value, list | tuple) else [value]
        if not key.endswith("token_id") or not numbers or not all(type(n) is int and 0 <= n < size for n in numbers):
            if key in _LISTS and value:
                changed[key] = [new[n] for n in value if n in new]
            continue
        gone = next((n for n in numbers if n not in new), None)
        if gone is not None:
            raise ModelError(f"token {gone} is the {key} of {type(config).__name__}; keep it, or set another one first")
        mapped = [new[n] for n in numbers]
        if mapped != list(numbers):
            changed[key] = mapped if isinstance(value, list | tuple) else mapped[0]
    return changed


def follow(model: nn.Module, size: int, kept: np.ndarray, numbers: Mapping[str, Any]) -> None:
    """After removal: mend the generation config, and remember which of the original tokens remain."""
    for key, value in numbers.items():
        setattr(model.generation_config, key, value)
    before = vars(model).get(ATTRIBUTE)
    vars(model)[ATTRIBUTE] = kept if before is None else before[kept]


def save_tokenizer(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer beside a model, shrunk to the tokens that the model has kept; the table goes with it."""
    kept = vars(model).get(ATTRIBUTE)
    if kept is not None:
        write_json(folder / TABLE, {"kept": kept.tolist()})
        if hasattr(tokenizer, "get_vocab") and len(tokenizer) > len(kept):
            tokenizer = shrink(tokenizer, kept)
    tokenizer.save_pretrained(folder)


def closed(tokenizer: Any, tokens: Iterable[int]) -> np.ndarray:
    """The tokens together with special ones, single characters and whatever they are merged from, sorted."""
    data = _backend(tokenizer)
    vocabulary = tokenizer.get_vocab()
    keep = set(map(int, tokens)) | set(tokenizer.all_special_ids)
    keep |= {i for token, i in vocabulary.items() if len(token) == 1 or token == data["model"].get("unk_token")}
    parents: dict[int, list[int]] = {}
    for left, right in map(_pair, data["model"].get("merges") or ()):
        if left + right in vocabulary:
            parents.setdefault(vocabulary[left + right], []).extend((vocabulary[left], vocabulary[right]))
    stack = list(keep)
    while stack:
        for parent in parents.get(stack.pop(), ()):
            if parent not in keep:
                keep.add(parent)
                stack.append(parent)
    return np.array(sorted(keep))


def shrink(tokenizer: Any, kept: Iterable[int]) -> Any:
    """A copy of the tokenizer that knows the kept tokens only, numbered anew in their order.

    Raises ModelError for tokenizers that are not of the tokenizers library, when a special token would go, and
    when a kept token is merged from one that is not kept.
    """
    order = [int(i) for i in kept]
    new = {old: i for i, old in enumerate(order)}
    data = _backend(tokenizer)
    vocabulary = tokenizer.get_vocab()
    gone = next(
        (t for t, i in zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True) if i not in new), None
    )
    if gone is not None:
        raise ModelError(f"the special token {gone!r} ({vocabulary[gone]}) is not kept; see `vocabulary.closed`")
    missing = set(order) - set(closed(tokenizer, order).tolist())
    lost = set(closed(tokenizer, order).tolist()) - set(order)
    unmerged = next((t for t, i in vocabulary.items() if i in lost and len(t) > 1), None)
    if missing or unmerged is not None:
        raise ModelError(f"a kept token is merged from {unmerged!r}, which is not kept; see `vocabulary.closed`")
    model = data["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {t: new[i] for t, i in model["vocab"].items() if i in new}
    else:
        entries = [entry for i, entry in enumerate(model["vocab"]) if i in new]
        model["vocab"], model["unk_id"] = entries, new.get(model.get("unk_id"))
    if model.get("merges"):
        model["merges"] = [m for m in model["merges"] if {*_pair(m), "".join(_pair(m))} <= model["vocab"].keys()]
    added = [t for t in data.get("added_tokens") or () if t["id"] in new]
    data["added_tokens"] = [{**t, "id": new[t["id"]]} for t in added]
    data["post_processor"] = _renumbered(data.get("post_processor"), vocabulary, new)
    if data.get("padding"):
        data["padding"]["pad_id"] = new[data["padding"]["pad_id"]]
    from tokenizers import Tokenizer

    small = copy.deepcopy(tokenizer)
    small._tokenizer = Tokenizer.from_str(json.dumps(data))
    wrong = next((t for t, i in small.get_vocab().items() if new.get(vocabulary.get(t)) != i), None)
    if wrong is not None or len(small.get_vocab()) != len([i for i in vocabulary.values() if i in new]):
        raise ModelError(f"{type(tokenizer).__name__} cannot be numbered anew (token {wrong!r}); save without it")
    return small


def _backend(tokenizer: Any) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"{type(tokenizer).__name__} is not backed by the tokenizers library, so its vocabulary cannot shrink; "
            f"save without it and translate its numbers by {TABLE}"
        )
    data: dict[str, Any] = json.loads(backend.to_str())
    return data


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _renumbered(part: Any, vocabulary: Mapping[str, int], new: Mapping[int, int]) -> Any:
    """A post-processor with new numbers: pairs (token, number) and templates with `ids`, at any depth."""
    if isinstance(part, dict):
        done = {key: _renumbered(value, vocabulary, new) for key, value in part.items()}
        if isinstance(part.get("ids"), list):
            done["ids"] = [new[i] for i in part["ids"]]
        return done
    if isinstance(part, list):
        if len(part) == 2 and isinstance(part[0], str) and type(part[1]) is int and vocabulary.get(part[0]) == part[1]:
            return [part[0], new[part[1]]]
        return [_renumbered(value, vocabulary, new) for value in part]
    return part
