"""The language-model side of `secateur prune`: recipe, windows of text, progress, tables."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from secateur.cli import common, progress
from secateur.cli.kinds import given
from secateur.cli.pruning.reports import of_folder

if TYPE_CHECKING:
    from secateur.data.table import Table
    from secateur.recipe import Recipe
    from secateur.torch.stream.run import Done, RunReport


FROM_RECIPE = ("task", "criterion", "pattern", "sparsity", "calibration", "text_column", "samples", "context", "seed")
"""Options that have the same name in a recipe."""


def recipe_of(context: typer.Context) -> "Recipe":
    """The recipe of --recipe, in which options of the command line win; or the recipe of the command line alone."""
    from secateur.recipe import STAGES, make_recipe, read_option, read_recipe

    file = context.params["recipe"]
    names = [n for n in FROM_RECIPE if given(context, n)]
    names += [n for n in ("model", "output", "memory") if context.params[n] is not None]
    values = {name: context.params[name] for name in names}
    values |= {name: True for name in STAGES if context.params[name]}
    if context.params["option"]:
        values["options"] = dict(read_option(text) for text in context.params["option"])
    return make_recipe(**values) if file is None else read_recipe(file, **values)


def prune(recipe: "Recipe", threads: int | None, report: Path | None, *, overwrite: bool, json: bool) -> None:
    """Prune a language model block by block, print what was done, and write the page of --report."""
    from secateur.errors import PlanError

    if recipe.model is None or recipe.output is None:
        missing = "a model: pass MODEL" if recipe.model is None else "an output: pass --output FOLDER"
        raise PlanError(f"the recipe lacks {missing}, or write it into the recipe")

    from secateur.torch.stream.journal import earlier
    from secateur.torch.stream.run import prune_folder

    common.quiet_libraries()
    common.set_threads(threads)
    earlier(recipe.output, overwrite=overwrite)
    common.claim_report(report, recipe.output, overwrite=overwrite)
    shown = Progress()
    with source_of(recipe.model, recipe.output) as folder:
        windows = calibration(recipe, folder)
        with resumable(recipe.output, shown):
            done = prune_folder(
                folder,
                recipe.output,
                windows,
                recipe,
                shown.step,
                overwrite=overwrite,
                began=shown.began,
                survey=shown.survey,
                tuning=shown.tuning,
            )
    show(done, recipe, json=json)
    common.write_report(of_folder(recipe.output), report)


@contextlib.contextmanager
def resumable(output: Path, shown: "Progress") -> Iterator[None]:
    """While the context lasts, progress is shown, and an error says how to go on with a run that writes `output`."""
    from secateur.errors import Interrupted, SecateurError

    try:
        with shown:
            yield
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted {shown.where}; run the same command again to go on{_kept(output)}") from None
    except SecateurError as error:
        kept = _kept(output) if shown.begun else ""
        raise type(error)(f"{error}{f'{kept}; delete that to start over' if kept else ''}") from None
    except OSError as error:
        raise SecateurError(
            f"stopped {shown.where}: {(error.strerror or str(error)).lower()}"
            f"{f' ({error.filename})' if error.filename else ''}; make room or mend the cause, then run the same "
            f"command again to go on{_kept(output)}"
        ) from None


def _kept(output: Path) -> str:
    from secateur.torch.stream.journal import partial_folder

    folder = partial_folder(output.absolute())
    return f" (what is done lies in {folder})" if folder.exists() else ""


@contextlib.contextmanager
def source_of(model: str, output: Path) -> Iterator[Path]:
    """The folder of a model: MODEL itself, or that of a hub id, which is fetched, or that of a GGUF file, which is
    converted for the time of the context.
    """
    from secateur.torch.files.gguf import dequantised, fetch

    path = Path(model)
    if path.suffix.lower() == ".gguf":
        common.note(f"{path.name} is read whole and dequantised; --memory does not bound that part")
        with dequantised(path, output) as folder:
            yield folder
    else:
        yield path if path.is_dir() else fetch(model)


def calibration(recipe: "Recipe", folder: Path) -> Any:
    """Calibration windows (count, context), or None when the recipe names no text, or no stage of it reads text."""
    if not recipe.calibration:
        return None
    if not recipe.readers:
        common.note(f"{recipe.criterion} looks at weights only: the calibration text is not read, no error is measured")
        return None
    size = {"samples": recipe.samples, "context": recipe.context, "seed": recipe.seed}
    return windows_of(folder, recipe.calibration, recipe.text_column, **size)


def windows_of(folder: Path, texts: "list[Path]", text_column: str, *, samples: int, context: int, seed: int) -> Any:
    """Windows (count, context) of texts in tokens of the model in a folder; a note where they are fewer than asked."""
    from secateur.documents import read_documents
    from secateur.torch.data.text_rows import load_tokenizer
    from secateur.torch.data.token_windows import check_context, sample_windows
    from secateur.torch.files.saving import check_folder
    from secateur.torch.open import read_config

    sources = [(str(path), read_documents(path, text_column)) for path in texts]
    check_folder(folder)
    text = read_config(folder).get_text_config()
    check_context(getattr(text, "max_position_embeddings", None), context)
    windows = sample_windows(load_tokenizer(folder), sources, text.vocab_size, samples, context, seed)
    if len(windows) < samples:
        common.note(f"the text gives {len(windows)} windows of {context} tokens, not {samples}")
    return windows


def table_of(sources: "list[Path]") -> "Table":
    """Calibration texts as one table, in their order; a file whose kind is not known is read as plain text."""
    from secateur.data.read import READERS, read_table, read_text
    from secateur.data.table import joined

    tables = []
    for path in sources:
        is_text = path.is_file() and path.suffix.lower() not in READERS
        tables.append(read_text(path) if is_text else read_table(path))
    return joined(tables)


class Progress:
    """Progress of a run block by block: a bar on a terminal, else a line for a block now and then."""

    def __init__(self) -> None:
        self.shown = progress.current()
        self.bar: progress.Bar | None = None
        self.stage = ""
        self.done = self.total = 0
        self.begun = False

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()

    @property
    def where(self) -> str:
        """How far the run has come."""
        if not self.done:
            return "before the first block was done"
        return f"after {self.done} of {self.total} blocks" if self.total else f"after {counted(self.done, 'block')}"

    def began(self, choice: Any, resumed: int) -> None:
        """Print how states are kept, and where the run starts."""
        self.done, self.begun = resumed, True
        where = "on disk" if choice.on_disk else "in memory"
        windows = counted(choice.batch, "window")
        self.shown.say(
            f"states {where}, {windows} at a time, about {choice.expected / 2**30:.1f} GiB in all"
            + (f"; {counted(resumed, 'block')} done before" if resumed else "")
        )

    def survey(self, step: int, steps: int) -> None:
        """Show a step of the stage that spreads the sparsity over blocks or matrices."""
        self.show("dealing out the sparsity", step, steps)

    def step(self, done: "Done") -> None:
        """Show that a block is done."""
        self.done, self.total = done.number, done.total
        tuned = f", tuned {_number(done.tuned[0])} -> {_number(done.tuned[1])}" if done.tuned else ""
        for layer in done.layers:
            for text in layer.notes:
                self.shown.say(f"{layer.name}: {text}")
        result = f"{done.path}: error {_number(done.error)}{tuned}, {done.seconds:.1f} s"
        self.show("block", done.number, done.total, result)

    def tuning(self, step: int, steps: int, loss: float) -> None:
        """Show a step of distillation."""
        self.show("distilling", step, steps, f"loss {loss:.4f}")

    def show(self, stage: str, step: int, steps: int, result: str = "") -> None:
        """Show how far a stage is, in place of the last stage; a log gets a line at its end in any case."""
        if stage != self.stage or self.bar is None:
            if self.bar is not None:
                self.bar.close()
            self.stage, self.bar = stage, self.shown.bar(stage, steps, before=step - 1)
        self.bar.at(step, result, is_due=step == steps)


def counted(count: int, what: str) -> str:
    """A number of things in words."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _number(error: float | None) -> str:
    """An error as text; a dash where none was measured."""
    if error is None:
        return "-"
    return f"{error:.4f}" if error >= 1e-3 or error == 0 else f"{error:.1e}"


def _mean_and_worst(errors: list[float]) -> tuple[str, str]:
    return (_number(sum(errors) / len(errors)), _number(max(errors))) if errors else (_number(None), _number(None))


def show(report: "RunReport", recipe: "Recipe", *, json: bool) -> None:
    """Print what was pruned, by kind of weight, and which weights count."""
    if json:
        common.print_json(
            {
                "folder": report.folder,
                "weights": report.weights,
                "zeros": report.zeros,
                "sparsity": report.zeros / report.weights,
                "resumed": report.resumed,
                "distilled": report.distilled,
                "left_out": list(report.left_out),
                "unused": list(report.unused),
                "blocks": list(report.blocks),
            }
        )
        return
    kinds: dict[str, list[dict[str, Any]]] = {}
    for block in report.blocks:
        for layer in block["layers"]:
            kinds.setdefault(layer["name"].removeprefix(f"{block['path']}."), []).append(layer)
    common.print_table(
        f"{report.folder}: {recipe.criterion}, {recipe.pattern}",
        ["weight of a block", "blocks", "zeros", "relative error, mean", "worst"],
        [
            (
                kind,
                str(len(layers)),
                common.percent(sum(x["zeros"] for x in layers) / sum(x["weights"] for x in layers)),
                *_mean_and_worst([x["error"] for x in layers if x["error"] is not None]),
            )
            for kind, layers in kinds.items()
        ],
    )
    common.say(
        f"{report.zeros:,} of {report.weights:,} weights are zero ({100 * report.zeros / report.weights:.2f}%): what "
        f"counts are the {len(report.layers)} linear weights of the layers, not embeddings, norms, biases or heads"
    )
    if report.distilled:
        first, last = report.distilled
        common.say(f"distilled: loss {first:.4f} in the first pass, {last:.4f} in the last; errors are those before it")
    if report.unused:
        common.say(
            f"copied as they were: {counted(len(report.unused), 'tensor')} that the model does not use, such as "
            f"{report.unused[0]}"
        )
    if report.left_out:
        stacked = counted(len(report.left_out), "stacked weight")
        common.say(f"left as they were: {stacked} of the layers, such as {report.left_out[0]}")
