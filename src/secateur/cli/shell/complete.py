"""What the shell completes after an option. The names are written down here, so that no framework is imported while a
person waits for the Tab key; a test compares them with their owners.
"""

from collections.abc import Callable

from secateur.token_schedule import PRESETS

RUNTIMES = ("torch", "secateur", "onnx", "openvino", "executorch", "litert")
FORMATS = (*RUNTIMES[2:], "gguf", "decilm", "savedmodel", "tflite")
READERS = ("vllm", "sglang", "mlx", "llama.cpp")
CRITERIA = (
    "magnitude",
    "gradient",
    "taylor",
    "brain_damage",
    "wanda",
    "ria",
    "activation",
    "fisher",
    "attention_mass",
    "attention_output",
    "attention_confidence",
    "attention_entropy",
    "attention_softmax",
    "routed_mass",
    "routed_saliency",
    "routing_frequency",
    "sparsegpt",
    "alps",
)
PATTERNS = ("element", "2:4", "4:8", "4x1", "head", "kv", "ffn", "head,ffn", "layer", "expert", "hidden", "vocab")
TASKS = (
    "text-classification",
    "token-classification",
    "question-answering",
    "image-classification",
    "audio-classification",
    "automatic-speech-recognition",
    "text2text-generation",
    "text-generation",
    "fill-mask",
    "feature-extraction",
)
BUDGETS = ("uniform", "global", "per-kind")
SCHEDULES = tuple(PRESETS)
Completer = Callable[[str], list[str]]


def one_of(names: tuple[str, ...]) -> Completer:
    """Completes one of the names."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return complete


def some_of(names: tuple[str, ...]) -> Completer:
    """Completes the last of several names with commas between them."""

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        given = before.split(",")
        return [f"{before}{comma}{name}" for name in names if name.startswith(last) and name not in given]

    return complete
