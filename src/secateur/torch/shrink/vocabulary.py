"""Removing tokens: new token numbers for configurations, and a tokenizer with the kept tokens only.

Kept tokens are renumbered in their old order. A shrunk tokenizer splits a text whose tokens are all kept exactly as the
full tokenizer does: WordPiece takes the longest token, Unigram the likeliest split, and byte-pair encoding the same
merges, if each token is kept together with the tokens that it is merged from (`closed` adds them).
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
"""Attribute of a model: which of the original tokens it has kept."""
TABLE = "kept_tokens.json"
"""File beside a saved model: which of the original tokens it has kept."""
_LISTS = ("suppress_tokens", "begin_suppress_tokens")
"""Keys of a configuration with lists of tokens, from which removed tokens are dropped."""


def kept_tokens(layout: Layout, keep: Mapping[str, np.ndarray]) -> tuple[int, np.ndarray] | None:
    """Old size of the vocabulary and the tokens that are kept; None when no tokens are removed."""
    for name, units in keep.items():
        axis = layout.axis(name)
        if axis.kind == "vocab" and len(units) < axis.size:
            return axis.size, np.sort(np.asarray(units, dtype=np.int64))
    return None


def token_numbers(config: Any, size: int, kept: np.ndarray) -> dict[str, Any]:
    """New values of the keys of a configuration that name tokens, such as `eos_token_id`.

    Raises:
        ModelError: when a token that a `..._token_id` names is removed.
    """
    new_numbers = {int(old): new for new, old in enumerate(kept)}
    changed: dict[str, Any] = {}
    for key, value in vars(config).items():
        tokens = value if isinstance(value, list | tuple) else [value]
        if key in _LISTS and value:
            changed[key] = [new_numbers[token] for token in value if token in new_numbers]
        elif key.endswith("token_id") and all(type(token) is int and 0 <= token < size for token in tokens):
            renumbered = [_new_number(token, new_numbers, key, config) for token in tokens]
            if renumbered != list(tokens):
                changed[key] = renumbered if isinstance(value, list | tuple) else renumbered[0]
    return changed


def _new_number(token: int, new_numbers: Mapping[int, int], key: str, config: Any) -> int:
    if token not in new_numbers:
        raise ModelError(f"token {token} is the {key} of {type(config).__name__}; keep it, or set another one first")
    return new_numbers[token]


def follow(model: nn.Module, kept: np.ndarray, numbers: Mapping[str, Any]) -> None:
    """After removal: set the new token numbers of the generation config, and store which original tokens remain."""
    for key, value in numbers.items():
        setattr(model.generation_config, key, value)
    before = vars(model).get(ATTRIBUTE)
    vars(model)[ATTRIBUTE] = kept if before is None else before[kept]


# -- the tokenizer ----------------------------------------------------------------------------------------------------


def has_fewer_tokens(model: nn.Module) -> bool:
    """Whether tokens were removed from the model since it was opened, so that its tokenizer must follow."""
    return vars(model).get(ATTRIBUTE) is not None


def save_tokenizer(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer beside a model, shrunk to the tokens that the model has kept, with the table of kept tokens."""
    kept = vars(model).get(ATTRIBUTE)
    if kept is not None:
        write_json(folder / TABLE, {"kept": kept.tolist()})
        if hasattr(tokenizer, "get_vocab") and len(tokenizer) > len(kept):
            tokenizer = shrink(tokenizer, kept)
    tokenizer.save_pretrained(folder)


def closed(tokenizer: Any, tokens: Iterable[int]) -> np.ndarray:
    """The tokens, the special tokens, the single characters, and all tokens that they are merged from, sorted."""
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
    """A copy of the tokenizer that has the kept tokens only, renumbered in their order.

    Raises:
        ModelError: for tokenizers that are not of the tokenizers library, when a special token is removed, and when a
            kept token is merged from a token that is not kept.
    """
    order = [int(token) for token in kept]
    new_numbers = {old: new for new, old in enumerate(order)}
    data = _backend(tokenizer)
    vocabulary = tokenizer.get_vocab()
    _check_closed(tokenizer, vocabulary, order)
    _shrink_model(data["model"], new_numbers)
    added = [token for token in data.get("added_tokens") or () if token["id"] in new_numbers]
    data["added_tokens"] = [{**token, "id": new_numbers[token["id"]]} for token in added]
    data["post_processor"] = _renumbered(data.get("post_processor"), vocabulary, new_numbers)
    if data.get("padding"):
        data["padding"]["pad_id"] = new_numbers[data["padding"]["pad_id"]]
    small = _with_backend(tokenizer, data)
    wrong = next((t for t, i in small.get_vocab().items() if new_numbers.get(vocabulary.get(t)) != i), None)
    if wrong is not None or len(small.get_vocab()) != len([i for i in vocabulary.values() if i in new_numbers]):
        raise ModelError(f"{type(tokenizer).__name__} cannot be numbered anew (token {wrong!r}); save without it")
    return small


def _check_closed(tokenizer: Any, vocabulary: Mapping[str, int], kept: list[int]) -> None:
    """ModelError when a special token, or a token that a kept token is merged from, is not kept."""
    special = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    removed = next((token for token, number in special if number not in set(kept)), None)
    if removed is not None:
        raise ModelError(f"the special token {removed!r} ({vocabulary[removed]}) is not kept; see `vocabulary.closed`")
    lost = set(closed(tokenizer, kept).tolist()) - set(kept)
    unmerged = next((token for token, number in vocabulary.items() if number in lost and len(token) > 1), None)
    if unmerged is not None:
        raise ModelError(f"a kept token is merged from {unmerged!r}, which is not kept; see `vocabulary.closed`")


def _shrink_model(model: Any, new_numbers: Mapping[int, int]) -> None:
    """Remove tokens, and the merges that need them, from the model in a tokenizer's JSON, in place."""
    if isinstance(model["vocab"], dict):
        model["vocab"] = {token: new_numbers[i] for token, i in model["vocab"].items() if i in new_numbers}
    else:
        entries = [entry for i, entry in enumerate(model["vocab"]) if i in new_numbers]
        model["vocab"], model["unk_id"] = entries, new_numbers.get(model.get("unk_id"))
    if model.get("merges"):
        model["merges"] = [m for m in model["merges"] if {*_pair(m), "".join(_pair(m))} <= model["vocab"].keys()]


def _backend(tokenizer: Any) -> dict[str, Any]:
    """The JSON of a tokenizer of the tokenizers library."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"{type(tokenizer).__name__} is not backed by the tokenizers library, so its vocabulary cannot shrink; "
            f"save without it and translate its numbers by {TABLE}"
        )
    data: dict[str, Any] = json.loads(backend.to_str())
    return data


def _with_backend(tokenizer: Any, data: Mapping[str, Any]) -> Any:
    """A copy of the tokenizer with the backend that this JSON describes."""
    from tokenizers import Tokenizer  # optional: installed with transformers

    twin = copy.deepcopy(tokenizer)
    twin._tokenizer = Tokenizer.from_str(json.dumps(data))
    return twin


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _renumbered(part: Any, vocabulary: Mapping[str, int], new: Mapping[int, int]) -> Any:
    """Part of a post-processor with new numbers: pairs (token, number) and templates with `ids`, at any depth."""
    if isinstance(part, dict):
        entries = {key: _renumbered(value, vocabulary, new) for key, value in part.items()}
        if isinstance(part.get("ids"), list):
            entries["ids"] = [new[i] for i in part["ids"]]
        return entries
    if isinstance(part, list):
        if len(part) == 2 and isinstance(part[0], str) and type(part[1]) is int and vocabulary.get(part[0]) == part[1]:
            return [part[0], new[part[1]]]
        return [_renumbered(value, vocabulary, new) for value in part]
    return part
