"""export_gguf: a decoder as a folder with one GGUF file, kept only when llama.cpp computes what PyTorch computes."""

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.deploy import runner
from secateur.deploy.gguf import quantise
from secateur.deploy.gguf.compare import Difference, compare
from secateur.deploy.gguf.decoder import Decoder, decoder_of
from secateur.deploy.gguf.vocabulary import Vocabulary, vocabulary_of
from secateur.deploy.gguf.write import sizes_of, summary, write
from secateur.deploy.jobs.export import check_model, describe_graph, load_for, tokenizer_of, travel, zero_share
from secateur.deploy.jobs.results import WORTH_A_WORD, Artefact, Parity
from secateur.deploy.target import GGUF, DeployError, Port, local_folder
from secateur.files import check_output, new_folder, write_json

PACKAGES = ("gguf", "xllamacpp")
VERSIONS = ("torch", "transformers", *PACKAGES)
FILE = "model.gguf"
EXACT, LAYOUT = "f32", 1e-3
"""The format in which every model is compared first, and the largest relative error permitted there to a model that is
then rounded: float32 sums of large models leave up to some 1e-4, a wrong order of rows leaves 1e-2 and more."""


def export_gguf(
    source: nn.Module | Path | str,
    output: Path | str,
    *,
    quantize: str = "f16",
    tokenizer: Any = None,
    tolerance: float | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> Artefact:
    """Write a (pruned) Llama, Mistral or Qwen2 as a GGUF file, run it on llama.cpp, and compare.

    source: a model of transformers, or a folder or hub id.
    quantize: f32, f16, bf16, q8_0, q6_k, q5_k_m, q4_k_m or q4_0.
    tokenizer: of a model in memory.
    tolerance: largest permitted relative error of log probabilities; by default that of the format
    (`quantise.FORMATS`), of which those below 8 bits have none: their difference is reported.
    say: gets a sentence for what is padded, cut or larger than it could be.
    options: for loading a folder, as `secateur.open` takes them.

    Whatever the format, the model is first written in float32 and must agree with PyTorch to `LAYOUT`, which shows that
    the file says what the model is; the rest of a difference is then rounding.

    Raises DeployError, in one sentence: a model or tokenizer that llama.cpp does not have, a file that differs.
    """
    require()
    form, name, output = quantise.find(quantize), quantize.lower(), Path(output)
    check_output(output, overwrite=overwrite)
    model: Any = source if isinstance(source, nn.Module) else load_for(source, **{"dtype": torch.float32, **options})
    check_model(model, output)
    decoder = decoder_of(model)
    if tokenizer is None and not isinstance(source, nn.Module):
        tokenizer = tokenizer_of(source, trust_remote_code=bool(options.get("trust_remote_code")))
    vocabulary = _vocabulary(tokenizer, decoder)
    count, zeros = zero_share(model)
    for sentence in [*summary(name, decoder, form), *zeros_in_words(zeros)]:
        say(sentence)
    permitted = form.tolerance if tolerance is None else tolerance
    title = type(model).__name__ if isinstance(source, nn.Module) else Path(source).name
    with new_folder(output, overwrite=overwrite) as folder:
        file, layers = folder / FILE, sizes_of(decoder, form)  # zeros that the format wants are compared too
        write(file, title, decoder, vocabulary, quantise.FORMATS[EXACT], layers)
        found = compare(file, model, tokenizer, decoder.context)
        check_difference(found, permitted if name == EXACT else LAYOUT, EXACT)
        if name != EXACT:
            write(file, title, decoder, vocabulary, form, layers)
            found = compare(file, model, tokenizer, decoder.context)
            check_difference(found, permitted, name)
        say(
            f"{name}: a KL divergence of {found.divergence:.2g} nats from PyTorch; {100 * found.agreement:.0f}% of the "
            "likeliest tokens are equal"
        )
        if found.chat:
            say(found.chat)
        travel(model, local_folder(source), tokenizer, folder)
        parity = parity_of(found, permitted)
        info = described(model, decoder, folder, name)
        info["gguf"]["divergence"] = found.divergence
        info |= {"parameters": count, "zeros": zeros, "parity": {**vars(replace(parity, made_up=True))}}
        write_json(folder / runner.MANIFEST, info)
    return Artefact(output, GGUF, info["bytes"], count, zeros, parity, None)


def check_gguf(model: nn.Module, tokenizer: Any, length: int = 1) -> None:
    """DeployError, in one sentence, for a model or tokenizer that cannot be written as GGUF, a missing package, and a
    context that is too short for calls of `length` tokens."""
    require()
    decoder = decoder_of(model)
    _vocabulary(tokenizer, decoder)
    if length >= decoder.context:
        raise DeployError(
            f"calls of {length} tokens and the one that llama.cpp writes then do not fit the model, which takes "
            f"{decoder.context}; ask for a smaller length"
        )


def write_for_times(model: nn.Module, tokenizer: Any, output: Path, *, quantize: str) -> Path:
    """Write a model as the artefact that `export_gguf` would write, but compare nothing: only its times may be used.

    Raises DeployError as `export_gguf` does for what GGUF does not have.
    """
    form, decoder = quantise.find(quantize), decoder_of(model)
    vocabulary = _vocabulary(tokenizer, decoder)
    with new_folder(output) as folder:
        write(folder / FILE, output.name, decoder, vocabulary, form, sizes_of(decoder, form))
        write_json(folder / runner.MANIFEST, described(model, decoder, folder, quantize.lower()))
    return output


def _vocabulary(tokenizer: Any, decoder: Decoder) -> Vocabulary:
    """The tokenizer as a GGUF file holds it; DeployError where there is none."""
    if tokenizer is None:
        raise DeployError("a GGUF file holds the tokenizer, and there is none; save one beside the model, or pass it")
    return vocabulary_of(tokenizer, decoder.vocabulary)


def require() -> None:
    """DeployError, which names the extra, when a package is missing."""
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise DeployError(f"{package} is not installed; `pip install 'secateur[gguf]'`")


def zeros_in_words(zeros: float) -> list[str]:
    """A sentence on zeros, which llama.cpp multiplies like other numbers."""
    if zeros < WORTH_A_WORD:
        return []
    return [
        f"{100 * zeros:.0f}% of the weights are zeros, which bring nothing in llama.cpp: they are stored and "
        "multiplied like other numbers; remove heads and neurons instead"
    ]


def check_difference(found: Difference, permitted: float | None, name: str) -> None:
    """DeployError when llama.cpp is further from PyTorch than permitted; None permits any numbers."""
    if permitted is not None and not found.relative_error <= permitted:
        other = "" if name == EXACT else "; take a format with more bits, or permit more (tolerance)"
        raise DeployError(
            f"llama.cpp differs from PyTorch by {found.relative_error:.1e} of the log probabilities with {name} "
            f"(permitted: {permitted:.0e}); nothing was written{other}"
        )


def parity_of(found: Difference, permitted: float | None) -> Parity:
    """The difference in the terms of other exports; where any is permitted, the one found is."""
    allowed = found.relative_error if permitted is None else permitted
    return Parity(found.relative_error, found.gap, found.agreement, found.steps, [f"1 x {found.steps}"], allowed)


def described(model: Any, decoder: Decoder, folder: Path, name: str) -> dict[str, Any]:
    """What `artefact.json` says of the file, without what was compared."""
    size = (folder / FILE).stat().st_size
    ids = Port("input_ids", "int64", ("batch", "length"), "ids", 0, decoder.vocabulary, {1: decoder.context - 1})
    return {
        "format": runner.FORMAT,
        "target": GGUF,
        "class": type(model).__name__,
        "graphs": {"model": describe_graph([FILE], [ids], [runner.NEXT])},
        "bytes": size,
        "sizes": {FILE: size},
        "sha256": {FILE: runner.digest(folder / FILE)},
        "versions": {package: importlib.metadata.version(package) for package in VERSIONS},
        "gguf": {"architecture": decoder.architecture, "type": name},
    }
