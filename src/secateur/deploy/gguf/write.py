"""Writes the GGUF file of a decoder, one tensor in memory at a time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from secateur.deploy.gguf import decoder as decoders
from secateur.deploy.gguf import quantise
from secateur.deploy.gguf.decoder import Decoder, Layer
from secateur.deploy.gguf.quantise import Format
from secateur.deploy.gguf.vocabulary import Vocabulary

QUANTISATION_VERSION = 2
"""Version of the blocks' layout, which llama.cpp demands of quantised files."""


def sizes_of(decoder: Decoder, form: Format) -> list[Layer]:
    """The sizes that are written: as those of the model, filled up where llama.cpp or the format wants it."""
    return quantise.filled_up(form, decoders.padded_heads(decoder))


def shapes_of(decoder: Decoder, layers: Sequence[Layer]) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors by name."""
    return {name: tuple(tensor.shape) for name, tensor in decoders.tensors(decoder, list(layers))}


def write(
    path: Path, name: str, decoder: Decoder, vocabulary: Vocabulary, form: Format, layers: Sequence[Layer]
) -> None:
    """Write a model as one file.

    name: what programs show for it. layers: sizes to write, as `sizes_of` gives them.
    """
    import gguf  # optional: the extra gguf

    shapes = shapes_of(decoder, layers)
    chosen = quantise.types(form, shapes)
    writer = gguf.GGUFWriter(path, decoder.architecture)
    try:
        writer.add_name(name)
        writer.add_file_type(form.file)
        if form.usual not in quantise.PLAIN:
            writer.add_quantization_version(QUANTISATION_VERSION)
        _add_sizes(writer, decoder, layers)
        _add_vocabulary(writer, vocabulary)
        for tensor, shape in shapes.items():
            kind = gguf.GGMLQuantizationType[chosen[tensor]]
            block, size = gguf.GGML_QUANT_SIZES[kind]
            count = shape[0] if len(shape) == 1 else shape[0] * shape[1]
            writer.add_tensor_info(tensor, shape, torch.zeros(0).numpy().dtype, count // block * size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, values in decoders.tensors(decoder, list(layers)):
            writer.write_tensor_data(quantise.quantised(values.detach().float().cpu().numpy(), chosen[tensor]))
    finally:
        writer.close()


def _add_sizes(writer: Any, decoder: Decoder, layers: Sequence[Layer]) -> None:
    def of(values: Sequence[int]) -> int | list[int]:
        """One number where the architecture takes only one."""
        return list(values) if decoder.architecture == decoders.UNEVEN else values[0]

    writer.add_context_length(decoder.context)
    writer.add_embedding_length(decoder.hidden)
    writer.add_block_count(len(layers))
    writer.add_head_count(of([layer.heads for layer in layers]))
    writer.add_head_count_kv(of([layer.kv for layer in layers]))
    writer.add_feed_forward_length(of([layer.ffn for layer in layers]))
    writer.add_key_length(decoder.key)
    writer.add_value_length(decoder.value)
    writer.add_rope_dimension_count(decoder.key)
    writer.add_rope_freq_base(decoder.theta)
    writer.add_layer_norm_rms_eps(decoder.epsilon)
    writer.add_vocab_size(decoder.vocabulary)


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.space)
    else:
        writer.add_token_merges(vocabulary.merges)
    for token, number in vocabulary.special.items():
        getattr(writer, f"add_{token}_token_id")(number)
    for token, wanted in vocabulary.adds.items():
        getattr(writer, f"add_add_{token}_token")(wanted)
    if vocabulary.template:
        writer.add_chat_template(vocabulary.template)


def summary(name: str, decoder: Decoder, form: Format) -> list[str]:
    """Sentences on what was padded and what sizes cost."""
    layers = sizes_of(decoder, form)
    before = decoders.padded_heads(decoder)
    added = sum(new.ffn - old.ffn for old, new in zip(before, layers, strict=True))
    sentences = list(decoder.notes)
    if any(not layer.ffn for layer in decoder.layers):
        sentences.append("layers without neurons get one of zeros, which llama.cpp wants")
    if not decoder.layers[0].heads:
        sentences.append("the first layer attends no more; it gets one head of zeros, which llama.cpp wants")
    return sentences + quantise.words(name, form, shapes_of(decoder, layers), added)
