"""secateur inspect: the named axes of a model, what they cost, and what is frozen and why."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.cli import common

if TYPE_CHECKING:
    from secateur.torch.host import TorchHost

NAME = "inspect"
EXAMPLES = (
    "secateur inspect ./my-model",
    "secateur inspect ./my-model --layout > my-model.layout",
    "secateur inspect model.keras",
    "secateur inspect ./small --levels",
)


def command(
    context_: typer.Context,
    model: common.ModelArgument,
    *,
    layout: Annotated[
        bool, typer.Option("--layout", help="Print the whole layout as text, to read or to edit.")
    ] = False,
    levels: Annotated[
        bool,
        typer.Option("--levels", help="Print what a search expected of each axis: a saved folder, or its levels file."),
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="PNG of the curves of --levels to write.")] = None,
    layout_file: common.LayoutFileOption = None,
    task: common.TaskOption = None,
    check: common.CheckOption = False,
    trust_remote_code: common.RemoteCodeOption = False,
    json: common.JsonOption = False,
) -> None:
    """Show axes, sizes, parameters, multiply-accumulates, and what is frozen and why."""
    from secateur.cli import kinds
    from secateur.cost import macs, parameters, unit_parameters
    from secateur.find_host import is_keras_file

    kinds.refuse(context_, "keras" if is_keras_file(model) else "torch")
    if levels:
        _show_levels(Path(model), plot, as_json=json)
        return
    if check:
        common.check_unchanged(model)
    if is_keras_file(model):
        from secateur.cli import keras

        host, shapes = keras.inspect(model, layout_file)
        if layout:
            common.say(str(host.layout))
            return
    else:
        common.quiet_libraries()
        if layout:
            common.say(_layout_text(model, task, layout_file, trust_remote_code=trust_remote_code))
            return
        host = _open(model, task, layout_file, trust_remote_code=trust_remote_code)
        shapes = {k: list(v.shape) for k, v in host.example.items()}
    schedule = None
    if not is_keras_file(model):
        from secateur.torch.tokens.install import schedule_on

        schedule = schedule_on(host.model)
    count = parameters(host.layout)
    work = macs(host.layout)
    axes = [
        {
            "axis": axis.name,
            "kind": axis.kind,
            "size": axis.size,
            "parameters_per_unit": unit_parameters(host.layout, axis.name),
            "frozen": axis.frozen,
            "multiple": axis.multiple,
        }
        for axis in host.layout.axes.values()
    ]
    if json:
        kept = None if schedule is None else schedule.to_json()
        numbers = {"parameters": count.total, "macs": work or None, "tokens": kept}
        common.print_json({"model": model, **numbers, "example": shapes, "axes": axes})
        return
    amount = (
        f"{work / 1e9:.3f} GMAC on {_shape_text(shapes)}" if work else "MACs unknown (the layout lists no products)"
    )
    common.print_table(
        f"{model}: {common.millions(count.total)} parameters, {amount}",
        ["axis", "kind", "frozen because", "size", "parameters a unit"],
        [
            (name, kind, _short(frozen or ""), f"{size} (by {by})" if by > 1 else str(size), f"{per_unit:,.0f}")
            for name, kind, size, per_unit, frozen, by in grouped(axes)
        ],
        left=3,
    )
    if schedule is not None:
        common.say(f"{model} {schedule}; the MACs are those of all tokens")


def _show_levels(path: Path, plot: Path | None, *, as_json: bool) -> None:
    """The expected divergence when a quarter, half and three quarters of the units of each axis are gone."""
    import numpy as np

    from secateur.files import check_output, new_file
    from secateur.search.stored import load

    found = load(path)
    if plot is not None:
        from secateur.report.plots import plot_levels

        check_output(plot, overwrite=False)
        with new_file(plot) as temporary:
            plot_levels(found, temporary, str(path))
    gone = (0.25, 0.5, 0.75)
    axes: list[dict[str, Any]] = []
    for axis in found.axes.values():
        losses = [float(axis.losses[int(share * axis.size)]) for share in gone]
        shown = [loss if np.isfinite(loss) else None for loss in losses]
        axes.append({"axis": axis.axis, "kind": axis.kind, "size": axis.size, "losses": shown})
    layers = {name: losses.tolist() for name, losses in found.layers.items()}
    if as_json:
        common.print_json({"method": found.method, "gone": gone, "axes": axes, "layers": layers, "notes": found.notes})
        return
    common.print_table(
        f"{path}: expected divergence when units are gone, ordered by {found.method}",
        ["axis", "kind", "size", *(f"{share:.0%} gone" for share in gone)],
        [
            (axis["axis"], axis["kind"], str(axis["size"]), *("-" if x is None else f"{x:.3g}" for x in axis["losses"]))
            for axis in axes
        ],
        left=2,
    )


def _layout_text(model: str, task: str | None, layout_file: Path | None, *, trust_remote_code: bool) -> str:
    """The layout as text; for a model that cannot be exported its parameters with their sizes, to be named by hand."""
    from secateur.errors import ModelError
    from secateur.tasks.find import auto_class
    from secateur.torch.open import load_model, open_module
    from secateur.torch.trace.derive import blank

    options: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    loaded = load_model(model, task=auto_class(model, task, **options), **options)
    try:
        return str(open_module(loaded, layout=common.read_layout(layout_file)).layout)
    except ModelError as error:
        if layout_file is not None:
            raise
        common.note(f"{error}. Printed instead: every parameter with its sizes; put names of axes in their place.")
        return str(blank(loaded))


def _open(model: str, task: str | None, layout_file: Path | None, *, trust_remote_code: bool) -> "TorchHost":
    """Load a model and trace it, or take its layout from a file, which is checked against the shapes of the model."""
    from secateur.tasks.find import auto_class
    from secateur.torch.open import open_folder

    options: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    loads = auto_class(model, task, **options)
    return open_folder(model, task=loads, layout=common.read_layout(layout_file), **options)


def _short(reason: str, limit: int = 160) -> str:
    """A reason cut to one line; `--json` and `--layout` print it whole."""
    first = (reason.splitlines() or [""])[0]
    return first if len(first) <= limit else first[: limit - 3].rstrip() + "..."


def grouped(axes: list[dict[str, Any]]) -> list[tuple[str, str, int, float, str | None, int]]:
    """Axes that differ only in the number of their layer become one row: `L0.ffn .. L5.ffn`.

    A row: name, kind, size, parameters of a unit, why it is frozen, and the number whose multiples it must keep.
    """
    groups: dict[tuple[Any, ...], list[str]] = {}
    for axis in axes:
        word = axis["axis"].rpartition(".")[2]
        key = (word, axis["kind"], axis["size"], axis["parameters_per_unit"], axis["frozen"], axis["multiple"])
        groups.setdefault(key, []).append(axis["axis"])
    rows = []
    for (_, kind, size, per_unit, frozen, by), names in groups.items():
        name = names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]} ({len(names)})"
        rows.append((name, kind, size, per_unit, frozen, by))
    return rows


def _shape_text(shapes: dict[str, list[int]]) -> str:
    return ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())
