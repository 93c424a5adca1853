"""Class labels of data as class numbers of a model's head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from secateur.data.columns import number
from secateur.data.table import Table
from secateur.errors import DataError, listed, shown


def is_generic(id2label: Mapping[Any, str] | None) -> bool:
    """Whether a head names no classes: transformers then calls them LABEL_0, LABEL_1, ..."""
    return all(str(name) == f"LABEL_{index}" for index, name in (id2label or {}).items())


def head_for(labels: Sequence[Any], class_names: Sequence[str] | None = None) -> dict[str, Any]:
    """Options of `from_pretrained` for a head with a class for each different label, sorted.

    class_names: all classes, in the order of the head.

    Raises DataError for fewer than two.
    """
    names = list(class_names) if class_names else sorted_labels(labels)
    if len(names) < 2:
        raise DataError(f"a classifier needs at least two labels; the data has {listed(names) or 'none'}")
    return {
        "num_labels": len(names),
        "label2id": {name: i for i, name in enumerate(names)},
        "id2label": dict(enumerate(names)),
    }


def sorted_labels(labels: Sequence[Any], first: str | None = None) -> list[str]:
    """The different labels as words: `first` (where it is among them), numbers by value, then words by the alphabet."""
    return sorted({str(label) for label in labels if label is not None}, key=_after(first))


def _after(first: str | None) -> Callable[[str], tuple[bool, float, str]]:
    def key(label: str) -> tuple[bool, float, str]:
        value = number(label)
        return label != first, float("inf") if value is None else value, label

    return key


class LabelMap:
    """The classes of a head by the labels of the data.

    config: of the model; its `id2label` names the classes.
    names: names that the user gives, in the order of the head.
    notes: gets a sentence where names are guessed. A head without names takes the names that are found.
    """

    def __init__(self, config: Any, names: Sequence[str], notes: list[str]) -> None:
        self.config, self.given, self.notes = config, list(names), notes
        self.classes = int(config.num_labels)
        if names and len(names) != self.classes:
            raise DataError(f"--label-names has {len(names)} names, the model's head {self.classes} classes")
        if names:
            self._learn(names)

    def ids(self, table: Table, name: str) -> list[int]:
        """The class number of each cell; DataError, with the row, for a label outside the head."""
        cells = table.column(name)
        self.prepare(cells, table.class_names.get(name))
        return [self.id(table, name, row, cell) for row, cell in enumerate(cells)]

    def prepare(self, cells: Sequence[Any], class_names: Sequence[str] | None, first: str | None = None) -> None:
        """Name the classes of a head that names none, where the data has names: sorted, or in the data's own order.

        first: a label that stands before the others in a sorted order.
        """
        if not is_generic(self.config.id2label):
            return
        words = sorted({cell for cell in cells if isinstance(cell, str) and number(cell) is None}, key=_after(first))
        words = [word for word in words if word not in self.config.label2id]
        order = list(class_names or words)
        if len(order) == self.classes and (words or class_names):
            self._learn(order)
            order_of = (
                "as the data numbers them"
                if class_names
                else f"in the order of the alphabet{f', {first} first' if first in words else ''}"
            )
            self.notes.append(
                f"the model's head names no classes; they are taken {order_of}: {listed(order)} "
                "(--label-names gives another order)"
            )

    def _learn(self, names: Sequence[str]) -> None:
        self.config.id2label = dict(enumerate(names))
        self.config.label2id = {name: i for i, name in enumerate(names)}

    def id(self, table: Table, name: str, row: int, cell: Any) -> int:
        """The class number of one cell."""
        if cell is None or cell == "":
            raise DataError(f"{table.where(row)}: column {name!r} is empty; fill it or remove the row")
        known = self.config.label2id or {}
        names = table.class_names.get(name)
        if names is not None and isinstance(cell, int) and 0 <= cell < len(names) and names[cell] in known:
            return int(known[names[cell]])
        if isinstance(cell, str | int) and str(cell) in known:
            return int(known[str(cell)])
        value = number(cell)
        if value is None or value % 1 != 0:
            raise DataError(
                f"{table.where(row)}: label {shown(cell)} is no class of the model; it knows {listed(known)}"
            )
        if not 0 <= value < self.classes:
            raise DataError(
                f"{table.where(row)}: label {shown(cell)} is outside the {self.classes} classes of the model's head "
                f"(0..{self.classes - 1})"
            )
        return int(value)
