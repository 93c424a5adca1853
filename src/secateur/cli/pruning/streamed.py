"""secateur prune with a target and --memory: units of a language model block by block, and how the result is shown."""

from typing import TYPE_CHECKING, Any

from secateur.cli import common
from secateur.cli.pruning.reports import of_folder

if TYPE_CHECKING:
    from secateur.search.streamed.memory import UnitsPlan
    from secateur.search.streamed.result import UnitsReport
    from secateur.search.target import Target


def prune(params: dict[str, Any], target: "Target") -> None:
    """Prune units of the model that the options of `prune` name until its counted cost is within the target."""
    from secateur.errors import PlanError
    from secateur.recipe import read_bytes
    from secateur.search.streamed.run import check_target, prune_units
    from secateur.torch.stream.journal import earlier

    check_target(target)
    if not params["calibration"]:
        raise PlanError("a search within --memory reads text; pass --calibration FILE")
    output, memory = params["output"], read_bytes(params["memory"])
    earlier(output, overwrite=params["overwrite"])
    common.claim_report(params["report"], output, overwrite=params["overwrite"])
    common.quiet_libraries()
    common.set_threads(params["threads"])

    from secateur.cli.pruning import language

    shown = language.Progress()

    def began(plan: "UnitsPlan", resumed: int) -> None:
        shown.done, shown.begun = resumed, True
        shown.shown.say(
            f"one block and one window at a time, about {plan.expected / 2**30:.1f} GiB in all; states on disk, "
            f"{plan.disk / 2**30:.1f} GiB while it runs; whole layers and experts are not searched"
            + (f"; {language.counted(resumed, 'block')} done before" if resumed else "")
        )

    def progress(walk: str, step: int, steps: int) -> None:
        if walk == "block":
            shown.done, shown.total = step, steps
        shown.show(walk, step, steps)

    with language.source_of(params["model"], output) as folder:
        size = {name: params[name] for name in ("samples", "context", "seed")}
        windows = language.windows_of(folder, params["calibration"], params["text_column"] or "text", **size)
        with language.resumable(output, shown):
            done = prune_units(
                folder,
                output,
                windows,
                target,
                memory=memory,
                seed=params["seed"],
                calibration=params["calibration"],
                overwrite=params["overwrite"],
                began=began,
                progress=progress,
            )
    show(done, json=params["json"])
    common.write_report(of_folder(output), params["report"])


def show(report: "UnitsReport", *, json: bool) -> None:
    """Print what was asked and reached, and how many units of each kind stay."""
    if json:
        common.print_json(
            {
                "folder": str(report.folder),
                "parameters": report.sizes.parameters,
                "dense_parameters": report.sizes.dense_parameters,
                "asked": [one.model_dump() for one in report.asked],
                "kept": {one.axis: one.kept for one in report.units if one.kept < one.total},
                "needs": report.needs,
                "resumed": report.resumed,
                "notes": list(report.notes),
            }
        )
        return
    kinds: dict[str, list[Any]] = {}
    for one in report.units:
        if one.block is not None:
            kinds.setdefault(one.kind, []).append(one)
    common.print_table(
        f"{report.folder}: " + ", ".join(f"{one.what} {one.reached}, asked {one.asked}" for one in report.asked),
        ["units", "blocks", "kept", "fewest in a block", "most"],
        [
            (
                kind,
                str(len(found)),
                common.percent(sum(one.kept for one in found) / sum(one.total for one in found)),
                f"{min(one.kept for one in found):,} of {found[0].total:,}",
                f"{max(one.kept for one in found):,}",
            )
            for kind, found in kinds.items()
            if any(one.kept < one.total for one in found)
        ],
    )
    opens = (
        f"`from_pretrained` opens it after `import secateur`: {report.needs}" if report.needs else "a stock checkpoint"
    )
    common.say(f"{report.folder}: {opens}; the quality was not measured, `secateur eval --against` does that")
