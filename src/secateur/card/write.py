"""Writes the card of a model's folder, and leaves alone what people have added to it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.card.facts import facts_of
from secateur.card.front_matter import MOST_BYTES, split
from secateur.card.page import body, front_matter, joined
from secateur.files import write_text
from secateur.schemas.record import Record

NAME = "README.md"
MODELS = ("config.json", "secateur.json")
"""What the folder of a PyTorch model has one of."""
BEGIN = "<!-- secateur: from here to the end mark this text is written anew with every record -->"
END = "<!-- secateur: end mark; text below stays -->"


def write_card(record: Record, folder: Path, origin: Mapping[str, Any] | None = None) -> None:
    """Write `README.md` into the folder of a PyTorch model; other folders get none.

    origin: entries of the front matter of the dense model's card, of which licence, language and base model are taken.

    Of a card that is there already the text outside the marks stays, and so do entries of its front matter that
    secateur does not write. A card without the marks is somebody's own and stays as it is.

    Raises ModelError when the `config.json` or the plan of the folder is damaged.
    """
    path = folder / NAME
    if not any((folder / name).is_file() for name in MODELS):
        return
    front, above, below = dict(origin or {}), "", ""
    if path.is_file():
        if path.stat().st_size > MOST_BYTES:
            return
        earlier, text = split(path.read_text(encoding="utf-8", errors="replace"))
        above, begun, rest = text.partition(BEGIN)
        _, ended, below = rest.partition(END)
        if not (begun and ended):
            return
        front |= earlier
    facts = facts_of(folder)
    entries = front_matter(record, facts, front)
    written = f"{BEGIN}\n\n{body(record, facts, front)}\n{END}"
    write_text(path, joined(entries, f"{above.lstrip()}{written}{below.rstrip()}\n"))
