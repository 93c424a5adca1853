"""The frontier picture of the README from what `secateur demo` measured, for light and for dark pages.

    python benchmarks/demo_picture.py [demo-out/demo.json] [--to docs/images]

Nothing is measured here: `make picture` runs the demo first.
"""

import argparse
import json
from pathlib import Path

from secateur.report.plots import plot_demo


def write(source: Path, folder: Path) -> list[Path]:
    """Write `frontier.png` and `frontier-dark.png` into a folder; returns their paths."""
    found = json.loads(source.read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "frontier.png", folder / "frontier-dark.png"]
    for path, is_dark in zip(paths, (False, True), strict=True):
        plot_demo(found, path, is_dark=is_dark)
    return paths


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", type=Path, default=Path("demo-out/demo.json"))
    parser.add_argument("--to", type=Path, default=Path("docs/images"))
    options = parser.parse_args()
    print(*write(options.source, options.to), sep="\n")


if __name__ == "__main__":
    main()
