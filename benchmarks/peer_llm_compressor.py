"""SparseGPT of llm-compressor on windows of token ids, for benchmarks/llm_quality.py; it has an environment of its own.

    python3.11 -m venv VENV && VENV/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1
    VENV/bin/python benchmarks/peer_llm_compressor.py MODEL WINDOWS.safetensors OUTPUT --sparsity 0.5 [--pattern 2:4]

The pipeline is its sequential one, a block at a time. The output is a plain folder of float32 weights.
"""

import argparse
import shutil
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def main() -> None:
    """Prune and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("windows", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--sparsity", type=float, required=True)
    parser.add_argument("--pattern", default="0:0", help="kept:of as secateur writes it; 0:0 is unstructured")
    args = parser.parse_args()
    torch.set_num_threads(1)
    windows = load_file(args.windows)["windows"]
    rows = [{"input_ids": w.tolist(), "attention_mask": [1] * len(w)} for w in windows]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    keep, _, of = args.pattern.partition(":")
    structure = f"{int(of) - int(keep)}:{of}"
    oneshot(
        model=model,
        dataset=Dataset.from_list(rows),
        recipe=[SparseGPTModifier(sparsity=args.sparsity, mask_structure=structure, ignore=["re:.*lm_head"])],
        max_seq_length=windows.shape[1],
        num_calibration_samples=len(windows),
        shuffle_calibration_samples=False,
        pipeline="sequential",
    )
    args.output.mkdir()
    state = {n: p.detach().contiguous() for n, p in model.named_parameters()}
    save_file(state, args.output / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(args.model / "config.json", args.output / "config.json")


if __name__ == "__main__":
    main()
