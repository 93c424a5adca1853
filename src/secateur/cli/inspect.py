"""secateur inspect: the named axes of a model, what they cost, and what is frozen and why."""

from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.cli import common

NAME = "inspect"
EXAMPLES = (
    "Examples:  secateur inspect ./my-model   |   secateur inspect ./my-model --layout > my-model.layout   |   "
    "secateur inspect model.keras"
)


def command(
    model: common.ModelArgument,
    layout: Annotated[
        bool, typer.Option("--layout", help="Print the whole layout as text, to read or to edit.")
    ] = False,
    layout_file: common.LayoutFileOption = None,
    task: common.TaskOption = None,
    trust_remote_code: common.RemoteCodeOption = False,
    json: common.JsonOption = False,
) -> None:
    """Show axes, sizes, parameters, multiply-accumulates, and what is frozen and why."""
    from secateur.cost import macs, parameters, unit_parameters
    from secateur.opening import is_keras_file

    if is_keras_file(model):
        from secateur.cli import keras

        keras.refuse({"--task": task, "--trust-remote-code": trust_remote_code})
        host, shapes = keras.inspect(model, layout_file)
        if layout:
            typer.echo(str(host.layout))
            return
    else:
        common.quiet_libraries()
        if layout:
            typer.echo(_layout_text(model, task, trust_remote_code, layout_file))
            return
        host = common.open_model(model, task, trust_remote_code, layout_file)
        shapes = {k: list(v.shape) for k, v in host.example.items()}
    count = parameters(host.layout)
    work = macs(host.layout)
    axes = [
        {
            "axis": axis.name,
            "kind": axis.kind,
            "size": axis.size,
            "parameters_per_unit": unit_parameters(host.layout, axis.name),
            "frozen": axis.frozen,
        }
        for axis in host.layout.axes.values()
    ]
    if json:
        common.print_json({"model": model, "parameters": count.total, "macs": work, "example": shapes, "axes": axes})
        return
    common.print_table(
        f"{model}: {common.millions(count.total)} parameters, {work / 1e9:.3f} GMAC on {_shape_text(shapes)}",
        ["axis", "kind", "frozen because", "size", "parameters a unit"],
        [
            (name, kind, frozen or "", str(size), f"{per_unit:,.0f}")
            for name, kind, size, per_unit, frozen in grouped(axes)
        ],
        left=3,
    )


def _layout_text(model: str, task: str | None, trust_remote_code: bool, layout_file: Path | None) -> str:
    """The layout as text; of a model that cannot be exported its parameters with their sizes, to be named by hand."""
    from secateur.errors import ModelError
    from secateur.torch.open import load_model, open_module
    from secateur.torch.trace import blank

    loaded = load_model(model, task=task, **({"trust_remote_code": True} if trust_remote_code else {}))
    try:
        return str(open_module(loaded, layout=common.read_layout(layout_file)).layout)
    except ModelError as error:
        if layout_file is not None:
            raise
        common.note(f"{error}. Printed instead: every parameter with its sizes; put names of axes in their place.")
        return str(blank(loaded))


def grouped(axes: list[dict[str, Any]]) -> list[tuple[str, str, int, float, str | None]]:
    """Axes that differ only in the number of their layer become one row: `L0.ffn .. L5.ffn`."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for axis in axes:
        word = axis["axis"].rpartition(".")[2]
        key = (word, axis["kind"], axis["size"], axis["parameters_per_unit"], axis["frozen"])
        groups.setdefault(key, []).append(axis["axis"])
    rows = []
    for (_, kind, size, per_unit, frozen), names in groups.items():
        name = names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]} ({len(names)})"
        rows.append((name, kind, size, per_unit, frozen))
    return rows


def _shape_text(shapes: dict[str, list[int]]) -> str:
    return ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())
