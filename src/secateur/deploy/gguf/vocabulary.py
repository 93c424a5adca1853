"""A tokenizer as the keys of a GGUF file: its tokens, merges, special tokens and chat template.

llama.cpp has two tokenizers for decoders. `gpt2` is byte-level byte-pair encoding; how it splits a text first is named
in `tokenizer.ggml.pre` and compiled into llama.cpp, so the tokenizer's rule must be one of those (`SPLITS`). `llama` is
SentencePiece's byte-pair encoding, which merges by the score of the token that comes out: here the negative rank of its
first merge. Whether texts become the same tokens is compared on every export.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from secateur.deploy.target import DeployError

NORMAL, UNKNOWN, CONTROL, GIVEN, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of tokens in a GGUF file. GIVEN: added by a user, matched in a text as it stands."""
_END = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
)
SPLITS: dict[tuple[str, ...], str] = {
    ("gpt2",): "gpt-2",
    ("digits", "gpt2"): "smollm",
    (_WORDS + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _END,): "llama-bpe",
    (_WORDS + r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _END,): "qwen2",
    (_CASED + r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _END,): "tekken",
}
"""How a text is split before merges -> llama.cpp's name of it. `gpt2` is the expression of GPT-2, `digits` splits every
digit off, the others are expressions."""
SPECIAL = ("bos", "eos", "unk", "pad")
SAMPLES = (
    "Hello, world!",
    "The 3 quick brown foxes didn't jump over 1234567890 lazy dogs; it's 10:45 p.m.",
    " two  spaces, a\ttab,\n\na new line and   \n trailing blanks  ",
    "def f(x):\n    return x**2 + 3.14e-10  # ok?",
    "Größe, naïve, façade, Ærø; Ελλάδα, Москва, שלום, العربية",
    "東京は日本の首都です。한국어 ไทย हिन्दी",
    "emoji 😀👍🏽 and symbols €£¥ → ∑ “quotes”…",
    "CamelCase snake_case UPPER lower I'LL we'Ve",
)
"""Texts on which llama.cpp's tokens are compared with those of transformers."""


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer in the terms of GGUF.

    model: gpt2 or llama. pre: llama.cpp's name for how a text is split first.
    kinds: of each token. merges: pairs with a blank between them, for gpt2. scores: of each token, for llama.
    special: bos, eos, unk, pad -> token. adds: bos, eos -> whether every text gets it. space: whether a text gets a
    blank in front, for llama.
    """

    model: str
    pre: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    scores: list[float]
    special: Mapping[str, int]
    adds: Mapping[str, bool]
    space: bool
    template: str | None


def vocabulary_of(tokenizer: Any, size: int) -> Vocabulary:
    """The tokenizer of a model with that many embeddings; tokens without a name are filled up as unused.

    Raises DeployError for a tokenizer that llama.cpp does not have.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refusal("it has no tokenizer.json; save it with a fast tokenizer of transformers")
    data: dict[str, Any] = json.loads(backend.to_str())
    model = data["model"]
    if model.get("type") != "BPE":
        raise _refusal(f"it is of the kind {model.get('type')}, and llama.cpp's decoders take byte-pair encoding")
    if model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise _refusal("its merges have a dropout, prefix or suffix, which llama.cpp does not have")
    tokens, kinds = _tokens(data, size)
    merges = [pair.split(" ", 1) if isinstance(pair, str) else list(pair) for pair in model["merges"]]
    special = {
        name: int(number) for name in SPECIAL if (number := getattr(tokenizer, f"{name}_token_id", None)) is not None
    }
    common: dict[str, Any] = {"tokens": tokens, "kinds": kinds, "special": special, "template": _template(tokenizer)}
    common["adds"] = _added(tokenizer, special)
    if model.get("byte_fallback"):
        _check_sentencepiece(data)
        return Vocabulary("llama", "default", merges=[], scores=_scores(tokens, merges), space=_space(data), **common)
    pre = _split_name(data)
    return Vocabulary("gpt2", pre, merges=[" ".join(pair) for pair in merges], scores=[], space=False, **common)


def _refusal(reason: str) -> DeployError:
    return DeployError(f"the tokenizer cannot be written as GGUF: {reason}")


def _tokens(data: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Texts and kinds of all tokens, by number."""
    model = data["model"]
    named: dict[int, tuple[str, int]] = {number: (token, NORMAL) for token, number in model["vocab"].items()}
    if model.get("byte_fallback"):
        named |= {n: (token, BYTE) for n, (token, _) in named.items() if len(token) == 6 and token.startswith("<0x")}
    for token in data.get("added_tokens", ()):
        named[token["id"]] = (token["content"], CONTROL if token["special"] else GIVEN)
    unknown = model.get("unk_token")
    if unknown in model["vocab"] and model.get("byte_fallback"):
        named[model["vocab"][unknown]] = (unknown, UNKNOWN)
    if named and max(named) >= size:
        raise _refusal(f"it has token {max(named)}, and the model has embeddings for {size}; save the model's own")
    filled = [named.get(number, (f"[PAD{number}]", UNUSED)) for number in range(size)]
    return [text for text, _ in filled], [kind for _, kind in filled]


def _split_name(data: Mapping[str, Any]) -> str:
    """llama.cpp's name for how the tokenizer splits a text before it merges."""
    normalizer = data.get("normalizer")
    if normalizer is not None and normalizer["type"] != "NFC":
        raise _refusal(f"it changes texts first ({normalizer['type']}), which llama.cpp does not")
    steps = _flat(data.get("pre_tokenizer"), "pretokenizers")
    rule: list[str] = []
    for step in steps:
        if step["type"] == "Digits" and step["individual_digits"]:
            rule.append("digits")
        elif step["type"] == "Split" and not step["invert"] and step["behavior"] in ("Isolated", "Removed"):
            rule.append(step["pattern"].get("Regex", ""))
        elif step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            rule += ["gpt2"] if step["use_regex"] else []
        else:
            rule.append(step["type"])
    if not steps or steps[-1]["type"] != "ByteLevel" or tuple(rule) not in SPLITS:
        known = ", ".join(SPLITS.values())
        raise _refusal(f"it splits texts by a rule that llama.cpp is not known to have; known are those of {known}")
    return SPLITS[tuple(rule)]


def _check_sentencepiece(data: Mapping[str, Any]) -> None:
    steps = _flat(data.get("normalizer"), "normalizers") + _flat(data.get("pre_tokenizer"), "pretokenizers")
    strange = next((step["type"] for step in steps if step["type"] not in ("Prepend", "Replace", "Metaspace")), None)
    if strange is not None:
        raise _refusal(f"it has the step {strange}, which llama.cpp's SentencePiece tokenizer does not have")


def _space(data: Mapping[str, Any]) -> bool:
    """Whether a text gets a blank in front."""
    steps = _flat(data.get("normalizer"), "normalizers") + _flat(data.get("pre_tokenizer"), "pretokenizers")
    return any(
        step["type"] == "Prepend" or (step["type"] == "Metaspace" and step.get("prepend_scheme") != "never")
        for step in steps
    )


def _flat(step: Any, inside: str) -> list[dict[str, Any]]:
    """The single steps of a sequence."""
    if step is None:
        return []
    return [one for part in step[inside] for one in _flat(part, inside)] if step["type"] == "Sequence" else [step]


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """A score for each token: earlier merges are better; tokens that come of no merge have 0."""
    rank: dict[str, int] = {}
    for i, (left, right) in enumerate(merges):
        rank.setdefault(left + right, i + 1)
    return [-float(rank.get(token, 0)) for token in tokens]


def _added(tokenizer: Any, special: Mapping[str, int]) -> dict[str, bool]:
    """Whether the tokenizer puts its first and its last special token around every text."""
    around = list(tokenizer("")["input_ids"])
    return {
        "bos": "bos" in special and bool(around) and around[0] == special["bos"],
        "eos": len(around) > 0 and "eos" in special and around[-1] == special["eos"] and around != [special.get("bos")],
    }


def _template(tokenizer: Any) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    return template.get("default") if isinstance(template, dict) else template
