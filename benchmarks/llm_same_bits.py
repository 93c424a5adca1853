"""Compares SmolLM2-135M pruned from its folder, one block in memory at a time, with SmolLM2-135M pruned in memory.

Run: OMP_NUM_THREADS=1 python benchmarks/llm_same_bits.py [--criterion sparsegpt] [--samples 2] [--context 256]
"""

import argparse
import os
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402


def main() -> None:
    """Prune twice, compare every tensor, print and write the result."""
    from models import smollm2_folder

    from secateur.recipe import make_recipe
    from secateur.torch.open import load_model
    from secateur.torch.stream import run
    from secateur.torch.stream.memory_plan import MemoryPlan

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--criterion", default="sparsegpt")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--write", action="store_true", help="write a dated Markdown")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = smollm2_folder()
    windows = torch.randint(49152, (args.samples, args.context), generator=torch.Generator().manual_seed(0))
    recipe = make_recipe(criterion=args.criterion, pattern="2:4", samples=args.samples, context=args.context)
    loaded: torch.nn.Module = load_model(folder)
    run.prune_loaded(loaded, windows, recipe)
    choose = run.choose
    run.choose = lambda *a, **k: MemoryPlan(choose(*a, **k).batch, on_disk=True, expected=0)
    with tempfile.TemporaryDirectory() as place:
        run.prune_folder(folder, Path(place) / "out", windows, recipe)
        streamed = load_model(Path(place) / "out").state_dict()
    in_memory = loaded.state_dict()
    equal = [name for name, value in in_memory.items() if torch.equal(value, streamed[name])]
    zeros = sum(int((value == 0).sum()) for name, value in in_memory.items() if "_proj" in name)
    line = (
        f"{len(equal)} of {len(in_memory)} tensors of SmolLM2-135M are equal bit for bit ({zeros:,} zeros), pruned 2:4 "
        f"by {args.criterion} on {args.samples} x {args.context} tokens from the folder, states on disk, and in memory."
    )
    print(line)
    if args.write:
        day = f"{datetime.now(UTC):%Y-%m-%d}"
        command = f"--criterion {args.criterion} --samples {args.samples} --context {args.context} --write"
        text = f"# From a folder and in memory\n\n`python benchmarks/llm_same_bits.py {command}`, {day}, torch "
        text += f"{torch.__version__}, one thread.\n\n{line}\n"
        (ROOT / "benchmarks" / "results" / f"{day}-llm-same-bits.md").write_text(text)
    sys.exit(len(equal) != len(in_memory))


if __name__ == "__main__":
    main()
