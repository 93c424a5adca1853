"""Which encoders of transformers take a schedule of tokens: tiny random models of each family, nothing is trained.

    OMP_NUM_THREADS=1 python benchmarks/token_zoo.py [NAME ...] [--write]

A family works when blocks treat permuted tokens as they do the others, and when `exact` (the pooled token alone after
the last attention; for merging, nothing merged) gives the outputs of the dense model. It is refused with a sentence
otherwise. `--write` writes a dated Markdown under benchmarks/results/.
"""

import argparse
import datetime
import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

import secateur
from secateur import dynamic
from secateur.dynamic.tokens import sites_of
from secateur.errors import SecateurError

VOCABULARY = 99
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {**SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": 128}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CLS_SEP = {**SPECIAL, "cls_token_id": 1, "sep_token_id": 2}
IMAGE = {**SIZES, "image_size": 64, "patch_size": 8}
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4}
D_MODEL = {"d_model": 32, "encoder_layers": 3, "encoder_attention_heads": 4, "encoder_ffn_dim": 64}
DECODER = {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}
DISENTANGLED = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}
SPEECH = {
    "conv_dim": [32, 32],
    "conv_kernel": [10, 8],
    "conv_stride": [5, 4],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
LONGFORMER = {**TEXT, "attention_window": 16, "pad_token_id": 1}
FUNNEL = {"vocab_size": VOCABULARY, "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64, "block_sizes": [2, 2]}


def texts() -> dict[str, torch.Tensor]:
    """Three texts of 64, 30 and 9 tokens; each ends with token 2."""
    ids = torch.randint(3, VOCABULARY, (3, 64), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for row, length in enumerate((64, 30, 9)):
        ids[row, length - 1], ids[row, length:], mask[row, length:] = 2, 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def pictures(side: int = 64) -> dict[str, torch.Tensor]:
    """Three images of noise."""
    return {"pixel_values": torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))}


def spectrograms() -> dict[str, torch.Tensor]:
    """What AST reads: (sounds, frames, mels)."""
    return {"input_values": torch.randn(3, 64, 32, generator=torch.Generator().manual_seed(0))}


def mels() -> dict[str, torch.Tensor]:
    """What Whisper reads: (sounds, mels, frames)."""
    return {"input_features": torch.randn(3, 16, 128, generator=torch.Generator().manual_seed(0))}


def sounds() -> dict[str, torch.Tensor]:
    """What Wav2Vec2 reads: (sounds, samples)."""
    return {"input_values": torch.randn(3, 2000, generator=torch.Generator().manual_seed(0))}


@dataclass(frozen=True)
class Family:
    """A class of transformers, numbers of its config, and what it is called with."""

    cls: str
    config: Mapping[str, Any]
    inputs: Callable[[], dict[str, torch.Tensor]] = texts
    parts: Mapping[str, Any] = field(default_factory=dict)


CLASSIFIER = "ForSequenceClassification"
FAMILIES = {
    "BERT": Family(f"Bert{CLASSIFIER}", TEXT),
    "BERT, all states": Family("BertModel", TEXT),
    "BERT, tokens": Family("BertForTokenClassification", TEXT),
    "BERT, answers": Family("BertForQuestionAnswering", TEXT),
    "RoBERTa": Family(f"Roberta{CLASSIFIER}", {**TEXT, "pad_token_id": 0}),
    "XLM-RoBERTa": Family(f"XLMRoberta{CLASSIFIER}", {**TEXT, "pad_token_id": 0}),
    "CamemBERT": Family(f"Camembert{CLASSIFIER}", {**TEXT, "pad_token_id": 0}),
    "RoBERTa, pre-LN": Family(f"RobertaPreLayerNorm{CLASSIFIER}", {**TEXT, "pad_token_id": 0}),
    "DistilBERT": Family(
        f"DistilBert{CLASSIFIER}",
        {"vocab_size": VOCABULARY, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 64},
    ),
    "ELECTRA": Family(f"Electra{CLASSIFIER}", {**TEXT, "embedding_size": 32}),
    "ERNIE": Family(f"Ernie{CLASSIFIER}", TEXT),
    "Data2Vec, text": Family(f"Data2VecText{CLASSIFIER}", {**TEXT, "pad_token_id": 0}),
    "ConvBERT": Family(f"ConvBert{CLASSIFIER}", {**TEXT, "embedding_size": 32, "head_ratio": 2}),
    "MPNet": Family(f"MPNet{CLASSIFIER}", TEXT),
    "ALBERT": Family(f"Albert{CLASSIFIER}", {**TEXT, "embedding_size": 16}),
    "DeBERTa": Family(f"Deberta{CLASSIFIER}", {**TEXT, **DISENTANGLED}),
    "DeBERTa v2, v3": Family(f"DebertaV2{CLASSIFIER}", {**TEXT, **DISENTANGLED}),
    "ModernBERT": Family(f"ModernBert{CLASSIFIER}", {**TEXT, **CLS_SEP, "local_attention": 16}),
    "ModernBERT, mean": Family(
        f"ModernBert{CLASSIFIER}", {**TEXT, **CLS_SEP, "local_attention": 16, "classifier_pooling": "mean"}
    ),
    "NomicBERT": Family(f"NomicBert{CLASSIFIER}", TEXT),
    "RoFormer": Family(f"RoFormer{CLASSIFIER}", {**TEXT, "embedding_size": 32}),
    "XLNet": Family(
        f"XLNet{CLASSIFIER}", {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 3, "n_head": 4, "d_inner": 64}
    ),
    "FNet": Family(f"FNet{CLASSIFIER}", TEXT),
    "Longformer": Family(f"Longformer{CLASSIFIER}", LONGFORMER),
    "Funnel": Family(f"Funnel{CLASSIFIER}", FUNNEL),
    "T5 encoder": Family("T5EncoderModel", T5),
    "T5 classifier": Family(f"T5{CLASSIFIER}", {**T5, "eos_token_id": 2, "decoder_start_token_id": 0}),
    "BART classifier": Family(f"Bart{CLASSIFIER}", {**D_MODEL, **DECODER, **SPECIAL, "vocab_size": VOCABULARY}),
    "Llama classifier": Family(f"Llama{CLASSIFIER}", {**TEXT, **SPECIAL}),
    "GPT-2 classifier": Family(
        f"GPT2{CLASSIFIER}", {**SPECIAL, "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4}
    ),
    "ViT": Family("ViTForImageClassification", IMAGE, pictures),
    "DeiT": Family("DeiTForImageClassification", IMAGE, pictures),
    "DeiT, two heads": Family("DeiTForImageClassificationWithTeacher", IMAGE, pictures),
    "ViT-MSN": Family("ViTMSNForImageClassification", IMAGE, pictures),
    "DINOv2": Family("Dinov2ForImageClassification", IMAGE, pictures),
    "DINOv2, registers": Family("Dinov2WithRegistersForImageClassification", IMAGE, pictures),
    "DINOv3": Family("DINOv3ViTModel", IMAGE, pictures),
    "I-JEPA": Family("IJepaForImageClassification", IMAGE, pictures),
    "Data2Vec, images": Family("Data2VecVisionForImageClassification", IMAGE, pictures),
    "BEiT, shared positions": Family(
        "BeitForImageClassification", {**IMAGE, "use_shared_relative_position_bias": True}, pictures
    ),
    "BEiT": Family("BeitForImageClassification", {**IMAGE, "use_relative_position_bias": True}, pictures),
    "Swin": Family(
        "SwinForImageClassification",
        {"image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4},
        pictures,
    ),
    "PVT": Family("PvtForImageClassification", {"image_size": 64}, pictures),
    "CLIP, images": Family("CLIPVisionModel", IMAGE, pictures),
    "CLIP, texts": Family("CLIPTextModel", {**TEXT, **SPECIAL}),
    "SigLIP": Family("SiglipVisionModel", IMAGE, pictures),
    "SigLIP classifier": Family("SiglipForImageClassification", {}, pictures, {"vision_config": IMAGE}),
    "AST": Family("ASTForAudioClassification", {**SIZES, "max_length": 64, "num_mel_bins": 32}, spectrograms),
    "Wav2Vec2": Family("Wav2Vec2ForSequenceClassification", {**SIZES, **SPEECH}, sounds),
    "HuBERT": Family("HubertForSequenceClassification", {**SIZES, **SPEECH}, sounds),
    "Whisper encoder": Family(
        "WhisperForAudioClassification",
        {**D_MODEL, **DECODER, **SPECIAL, "vocab_size": VOCABULARY, "num_mel_bins": 16, "max_source_positions": 64},
        mels,
    ),
}


def built(family: Family) -> Any:
    """A random model, with noise on every parameter, since biases are born zero."""
    torch.manual_seed(0)
    cls = getattr(transformers, family.cls)
    model = cls(cls.config_class(**family.config, **family.parts)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def error(host: Any, other: Any, inputs: Mapping[str, torch.Tensor]) -> float:
    """The largest difference of any output, relative to the largest number where that exceeds 1."""
    pairs = zip(host.outputs(inputs), other.outputs(inputs), strict=True)
    return max(float(abs(a - b).max()) / max(1.0, float(abs(a).max())) for a, b in pairs if a.dtype.kind == "f")


def answer(give: Callable[[], Any], host: Any, inputs: Mapping[str, torch.Tensor]) -> str:
    """The error of a schedule that loses nothing, or the reason for which there is none."""
    try:
        found = error(host, give(), inputs)
    except SecateurError as refusal:
        return f"refused: {refusal}"
    return f"works, {found:.0e}" if found <= 1e-6 else f"WRONG, {found:.0e}"


def row(name: str) -> str:
    """One line of the table."""
    family = FAMILIES[name]
    inputs = family.inputs()
    try:
        host = secateur.open(built(family), example=inputs)
        found = sites_of(host)
    except SecateurError as refusal:
        return f"| {name} | `{family.cls}` | refused: {refusal} | the same | - |"
    except Exception as crash:  # a crash is a result, and a bug
        return f"| {name} | `{family.cls}` | CRASHED: {type(crash).__name__}: {line(crash)} | the same | - |"
    prune = answer(lambda: dynamic.prune_tokens(host, "exact", found=found), host, inputs)
    merge = answer(lambda: dynamic.merge_tokens(host, [100] * found.blocks, found=found), host, inputs)
    return f"| {name} | `{family.cls}` | {prune} | {merge} | {found.permutation_error:.0e} |"


def line(crash: Exception) -> str:
    """The first line of an error."""
    return (str(crash).splitlines() or [""])[0][:200]


def main() -> None:
    """Print the table, and write it when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(FAMILIES))
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    lines = ["| family | class | token pruning | token merging | permuted tokens |", "|---|---|---|---|---|"]
    for name in options.names or FAMILIES:
        lines.append(row(name))
        print(lines[-1], flush=True)
    if options.write:
        versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("torch", "transformers"))
        head = [
            "# Schedules of tokens by family",
            "",
            f"{datetime.date.today()}, `python benchmarks/token_zoo.py --write`, {versions}, float32.",
            "",
            "Tiny random models, three texts of 64, 30 and 9 tokens in a padded batch, or three images or sounds. "
            "`works` gives the largest error of a schedule that loses nothing against the dense model (pruning: the "
            "pooled token alone after the last attention; merging: nothing merged), relative to the largest output "
            "where that exceeds 1; `permuted tokens` that of a block whose tokens are permuted against the permuted "
            "output of the block.",
            "",
        ]
        target = Path(__file__).parent / "results" / f"{datetime.date.today()}-token-zoo.md"
        target.write_text("\n".join([*head, *lines]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
