"""genai_config.json: what ONNX Runtime GenAI has to know of a decoder that was exported for ONNX with its cache.

The file says how the inputs and outputs of the program are called, how many tokens it takes, and where a text ends.
GenAI reads the shapes of the cache, which may differ by layer, from the program itself (onnxruntime-genai, pull request
2214), so the file has the largest of them. https://onnxruntime.ai/docs/genai/reference/config.html
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.deploy.targets.inputs import positions_of
from secateur.files import write_json

FILE = "genai_config.json"
TYPE = "decoder"
"""GenAI's name for a decoder of any family."""
GRAPH = "decode"
TAKES = ("input_ids", "attention_mask", "position_ids")
"""What GenAI gives to a decoder beside its cache."""
SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
"""What a generation config says of the choice of a token that GenAI has too."""
_LAYER = re.compile(r"(?P<before>.*?\.)(?P<layer>\d+)(?P<after>\..*)")


def write_config(model: Any, info: Mapping[str, Any], folder: Path, cache: tuple[str, str]) -> str:
    """Write the file for an artefact that is complete but for its comparison.

    info: its description, as `artefact.json` holds it, with where a text ends. cache: what the names of the cache
    among the inputs and among the outputs begin with.

    Returns a sentence on why there is none, or on a context that is cut; '' where there is nothing to say.
    """
    graphs = info["graphs"]
    reason = _unfit(model, info, cache[0]) if GRAPH in graphs and len(graphs) == 1 else "it runs decoders alone"
    if reason:
        return f"no {FILE} is written for ONNX Runtime GenAI: {reason}"
    write_json(folder / FILE, config_of(model, graphs[GRAPH], info["generation"], cache))
    most, context = positions_of(model), context_of(model)
    if context == most:
        return ""
    return (
        f"{FILE} cuts the context from {most} to {context} tokens: beyond, the model attends in a sliding window, for "
        "which ONNX Runtime GenAI gets no cache here"
    )


def context_of(model: Any) -> int | None:
    """Most tokens on GenAI, which wants a cache of all of them: that of a sliding window ends one token before it.

    None where the config does not say it.
    """
    config, most = model.config.get_text_config(), positions_of(model)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return most if most is None or not window else min(most, int(window) - 1)


def _unfit(model: Any, info: Mapping[str, Any], past: str) -> str:
    """Why GenAI does not run a decoder, in words; '' where it does."""
    graph = info["graphs"][GRAPH]
    if graph.get("operators"):
        return "it does not know secateur's operators; export without sparse layers"
    if positions_of(model) is None:
        return "it wants to know how many tokens the model takes, and the config does not say it"
    strange = next((p["name"] for p in graph["inputs"] if not p["name"].startswith((*TAKES, past))), None)
    if strange is not None:
        return f"it has no {strange} for a decoder"
    ports = {port["name"]: port for port in graph["inputs"] if port["name"].startswith(past)}
    if not _are_pairs(ports):
        return "it takes keys and values of each layer, and this cache has other parts"
    for key, value in _pairs(list(ports)):
        if ports[key]["shape"] != ports[value]["shape"]:
            heads, size = ports[value]["shape"][1::2]
            return (
                f"it takes keys and values of one size, and {value} has {heads} heads of {size} numbers where {key} "
                f"has {' of '.join(map(str, ports[key]['shape'][1::2]))}; prune whole heads"
            )
    return ""


def config_of(model: Any, graph: Mapping[str, Any], rule: Mapping[str, Any], cache: tuple[str, str]) -> dict[str, Any]:
    """What the file says.

    graph: of the decoder, as `artefact.json` describes it. rule: where a text ends. cache: as `write_config` takes it.
    """
    past, present = cache
    ports = {port["name"]: port for port in graph["inputs"]}
    names = [name for name in ports if name.startswith(past)]
    key, value = (_pattern(name) for name in _pairs(names)[0])
    shapes = [ports[one]["shape"] for one, _ in _pairs(names)]
    rows, hidden = model.get_input_embeddings().weight.shape
    generation, context = model.generation_config, context_of(model)
    bos = generation.bos_token_id
    return {
        "model": {
            "type": TYPE,
            "vocab_size": rows,
            "context_length": context,
            **({"bos_token_id": bos} if isinstance(bos, int) else {}),
            **({"eos_token_id": list(rule["end"])} if rule["end"] else {}),
            "pad_token_id": rule["pad"],
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": graph["files"][0],
                "hidden_size": hidden,
                "head_size": max(shape[3] for shape in shapes),
                "num_key_value_heads": max(shape[1] for shape in shapes),
                "num_hidden_layers": len(shapes),
                "inputs": {
                    **{name: name for name in TAKES if name in ports},
                    "past_key_names": key,
                    "past_value_names": value,
                },
                "outputs": {
                    "logits": next(name for name in graph["outputs"] if not name.startswith(present)),
                    "present_key_names": present + key.removeprefix(past),
                    "present_value_names": present + value.removeprefix(past),
                },
            },
        },
        "search": {
            "max_length": context,
            "past_present_share_buffer": False,
            **{name: found for name in SAMPLING if (found := getattr(generation, name, None)) is not None},
        },
    }


def _are_pairs(ports: Mapping[str, Any]) -> bool:
    """Whether the parts of a cache are keys and values (batch, heads, length, size), of one pattern of names each."""
    patterns = {_pattern(name) if _LAYER.fullmatch(name) else "" for name in ports}
    keys = [name for name in ports if _is_key(name)]
    sizes = [n for port in ports.values() for n in port["shape"][1::2]]
    fit = all(len(port["shape"]) == 4 for port in ports.values()) and all(isinstance(n, int) and n for n in sizes)
    return bool(ports) and "" not in patterns and len(patterns) == 2 and 2 * len(keys) == len(ports) and fit


def _is_key(name: str) -> bool:
    return "key" in name.rsplit(".", 1)[-1]


def _pattern(name: str) -> str:
    """The name of a part of the cache with %d in place of its layer."""
    return _LAYER.sub(r"\g<before>%d\g<after>", name, count=1)


def _pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """The names of the keys and of the values, for each layer in turn."""
    keys, values = ([name for name in names if _is_key(name) == wanted] for wanted in (True, False))
    return list(zip(keys, values, strict=True))
