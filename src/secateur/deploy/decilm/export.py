"""export_decilm: a decoder as a model folder with `block_configs`, kept only when reading it back gives its logits."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from secateur import agreement
from secateur.deploy.decilm import blocks
from secateur.deploy.decilm.config import config_of
from secateur.deploy.decilm.read import CONFIG, WEIGHTS, logits_of
from secateur.deploy.gguf.decoder import decoder_of
from secateur.deploy.jobs.export import check_model, load_for, tokenizer_of, travel, zero_share
from secateur.deploy.jobs.results import Artefact, Parity
from secateur.deploy.target import DECILM, DeployError, local_folder
from secateur.files import check_output, new_folder, write_json
from secateur.torch.base.batches import evaluating

TOLERANCE = 1e-5
"""Largest permitted relative error of logits: the same computation on the same library, with zeros between."""
LENGTH = 64
"""Most tokens of the comparison."""


def export_decilm(
    source: nn.Module | Path | str,
    output: Path | str,
    *,
    exact_widths: bool = False,
    tokenizer: Any = None,
    tolerance: float | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> Artefact:
    """Write a (pruned) Llama or Mistral as a DeciLM folder, which holds no code, read it back, and compare.

    source: a model of transformers, or a folder or hub id.
    exact_widths: say widths by `intermediate_size`, which vLLM alone reads, instead of filling them up to multiples of
    256, which `ffn_mult` says.
    tokenizer: of a model in memory.
    tolerance: largest permitted relative error of logits, by default `TOLERANCE`.
    say: gets a sentence for what is filled up or not taken everywhere.
    options: for loading a folder, as `secateur.open` takes them.

    Weights are written in bfloat16 or float16 where that changes none of them, else in float32. The comparison shows
    that the folder says what the model is, by the published rules; no server runs.

    Raises DeployError, in one sentence: a model that DeciLM does not have, sizes that it cannot say, a folder that
    differs.
    """
    output = Path(output)
    check_output(output, overwrite=overwrite)
    model: Any = source if isinstance(source, nn.Module) else load_for(source, **{"dtype": torch.float32, **options})
    check_model(model, output)
    decoder = decoder_of(model, blocks.FORM)
    blocks.check(model, decoder)
    layers = blocks.fitted(decoder, exact=exact_widths)
    for sentence in blocks.words(decoder, layers):
        say(sentence)
    if tokenizer is None and not isinstance(source, nn.Module):
        tokenizer = tokenizer_of(source, trust_remote_code=bool(options.get("trust_remote_code")))
    if tokenizer is None:
        say("there is no tokenizer to write; servers want one beside the model")
    count, zeros = zero_share(model)
    with new_folder(output, overwrite=overwrite) as folder:
        dtype = narrowest(decoder.parameters.values())
        values = {name: stored(tensor, dtype) for name, tensor in blocks.tensors(decoder, layers)}
        save_file(values, folder / WEIGHTS, metadata={"format": "pt"})
        del values
        name = str(dtype).removeprefix("torch.")
        write_json(folder / CONFIG, config_of(model.config, decoder, layers, name, exact=exact_widths))
        travel(model, local_folder(source), tokenizer, folder)
        parity = compare(model, folder, decoder.context, TOLERANCE if tolerance is None else tolerance)
        size = (folder / WEIGHTS).stat().st_size
    return Artefact(output, DECILM, size, count, zeros, parity, None)


def check_decilm(model: nn.Module, reader: str) -> None:
    """DeployError, in one sentence, for a model that DeciLM does not have, and for sizes that a reader of it refuses.

    reader: vllm, sglang or mlx.
    """
    decoder = decoder_of(model, blocks.FORM)
    blocks.check(model, decoder)
    name, layers = type(model).__name__, blocks.fitted(decoder)
    if reader == "sglang" and len({layer.kv for layer in layers if layer.kv}) > 1:
        raise blocks.FORM.refusal(name, "the number of key-value heads differs by layer, which SGLang does not take")
    width = layers[0].heads * decoder.key
    if reader == "mlx" and width != decoder.hidden:
        raise blocks.FORM.refusal(
            name,
            f"{layers[0].heads} heads of {decoder.key} numbers are not the {decoder.hidden} of the residual stream, "
            "which mlx-lm's DeciLM wants",
        )


def narrowest(tensors: Iterable[torch.Tensor]) -> torch.dtype:
    """The 16-bit type in which all of the numbers stay what they are, or float32."""
    fits = [torch.bfloat16, torch.float16]
    for tensor in tensors:
        fits = [dtype for dtype in fits if torch.equal(tensor.detach().to(dtype).float(), tensor.detach())]
        if not fits:
            return torch.float32
    return fits[0]


def stored(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor as the file holds it."""
    return tensor.detach().to("cpu", dtype).contiguous()


def compare(model: Any, folder: Path, context: int, permitted: float) -> Parity:
    """How far the logits of a folder are from the model's, on random tokens; DeployError beyond what is permitted."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (2, min(context, LENGTH)), generator=generator)
    with evaluating(model), torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    got = logits_of(folder, ids)
    found = agreement.compare({"logits": expected.numpy()}, {"logits": got.numpy()})
    if not found.error <= permitted:
        raise DeployError(
            f"the folder read back differs from PyTorch by {found.error:.1e} of the logits (permitted: "
            f"{permitted:.0e}); nothing was written; permit more (tolerance) if the model is large"
        )
    same = float((expected.argmax(-1) == got.argmax(-1)).float().mean())
    shape = f"{ids.shape[0]} x {ids.shape[1]}"
    return Parity(found.error, found.gap, same, ids.shape[0], [shape], permitted, made_up=True)
