"""Writes docs/format.md: every file that secateur writes or reads, from the schemas and from constants of the code.

python -m tests.schemas.write_format_page
"""

import importlib
import pkgutil
from pathlib import Path
from types import ModuleType

from secateur import plan, recipe, schemas
from secateur.kernels import format as packed
from secateur.schemas import page
from secateur.schemas.reading import MOST_BYTES, MOST_DEPTH

PAGE = Path(__file__).parents[2] / "docs" / "format.md"
HEAD = """\
# Files

Every file that secateur writes or reads: what it is for, its version, its fields, and who reads it. The page is made
by `python -m tests.schemas.write_format_page`; a test compares the two.

No file holds code: there are no pickles, and class names are looked up in a library, never imported from the file. A
file that does not fit raises a `SecateurError`, one sentence with the place and what to do. `python -m tests.fuzz`
damages each of them ([results](../benchmarks/results/2026-11-30-trust.md)).

JSON files have at most {most_bytes} bytes, nested at most {most_depth} deep, without NaN, infinities, numbers beyond 64
bits and double keys. Unless a table says otherwise, entries that it does not list are refused.
"""
OTHERS = (
    # file, what for, version, read by
    (
        f"`{plan.MASKS_NAME}`",
        "masks of a plan: uint8, one bit a weight, the first in the highest bit",
        "of the plan",
        "`secateur.plan`",
    ),
    (f"`{plan.WEIGHTS_NAME}`", "weights that repair has changed, whole", "of the plan", "`secateur.plan`"),
    (
        "`model.safetensors`, `model-*-of-*.safetensors`",
        "weights of a model folder; a packed weight is `NAME:secateur_bits` (uint8, one bit a weight) and "
        "`NAME:secateur_values`",
        "of `config.json` or `secateur.json`",
        "`secateur.torch.files`, transformers",
    ),
    (
        "`runtime.safetensors`",
        "tensors of a compiled model; packed weights as below",
        "of `runtime.json`",
        "`secateur.runtime.saving`",
    ),
    (
        "packed weight",
        f"flat uint8 array with a header of {packed.HEADER_BYTES} bytes: `native/src/blob.h`; formats "
        + ", ".join(packed.FORMATS),
        f"starts with `{packed.MAGIC.decode()}`; the tiled layout has number {packed.TILED_LAYOUT}",
        "`secateur.kernels`",
    ),
    (
        "table of steps",
        f"{packed.STEP_FIELDS} int64 numbers a step: `native/include/secateur/steps.h`",
        "none; made anew at load",
        "`secateur.kernels.steps`",
    ),
    (
        "`README.md`",
        "the model card of a folder; its front matter has the keys of the Hugging Face hub; text outside of the marks "
        "is kept; it has no entry in `secateur-hashes.json`, because people edit it",
        "none",
        "`secateur.card.write`, the hub",
    ),
    ("layout (text)", "axes, parameters, ties and products: `Layout.from_text`", "none", "`secateur.layout`"),
    (
        "`*.csv`, `*.tsv`, `*.jsonl`, `*.json`, `*.parquet`",
        "rows of text and labels",
        "none",
        "`secateur.data.read`",
    ),
    ("`model.keras`", "a Keras model; read with `safe_mode`", "Keras' own", "`secateur.keras.files`"),
    (
        "`*.onnx`, `*.xml`, `*.pte`, `*.tflite`",
        "an exported program; `artefact.json` lists it",
        "of `artefact.json`",
        "`secateur.deploy.runner`",
    ),
)


NO_FORMAT = ("page", "reading", "yaml_reading")


def formats() -> list[ModuleType]:
    """The modules of `secateur.schemas` that describe a file."""
    names = sorted(info.name for info in pkgutil.iter_modules(schemas.__path__))
    return [importlib.import_module(f"secateur.schemas.{name}") for name in names if name not in NO_FORMAT]


def render() -> str:
    """The page."""
    rows = ["| file | what for | version | read by |", "|---|---|---|---|"]
    rows += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in OTHERS]
    head = HEAD.format(most_bytes=f"{MOST_BYTES:,}", most_depth=MOST_DEPTH)
    models = [recipe.Recipe, *recipe.STAGES.values()]
    parts = [
        head,
        "## Files that are not JSON\n\n" + "\n".join(rows),
        page.section(recipe, models=models, readers=False),
        *map(page.section, formats()),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
