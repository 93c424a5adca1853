"""secateur prune: decide, verify, fine-tune, shrink, save, reload and compare; or sweep a threshold first.

With --calibration or --recipe the model is a language model, which `secateur.cli.language` prunes block by block.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.cli import common

if TYPE_CHECKING:
    from secateur.budget import Budget
    from secateur.jobs.prune_model import Data
    from secateur.select import Pattern
    from secateur.torch.host import TorchHost

NAME = "prune"
EXAMPLES = (
    "secateur prune ./classifier --data reviews.csv --criterion magnitude --sparsity 0.8 --fine-tune 1 "
    "--output ./sparse",
    "secateur prune ./classifier --data reviews.csv --criterion taylor --pattern head,ffn --sparsity 0.5 "
    "--fine-tune 2 --output ./small",
    "secateur prune ./classifier --data reviews.csv --sweep 0.3,0.5,0.7,0.8,0.9 --output ./sweep",
    "secateur prune ./llm --criterion sparsegpt --pattern 2:4 --calibration text.txt --samples 128 --context "
    "512 --memory 4GiB --output ./sparse-llm",
    "secateur prune ./llm --sparsity 0.7 --sensitivity --distil --calibration text.txt --output ./sparser-llm",
)
CHOICE = "What to prune"
TUNING = common.TRAINING_PANEL
LANGUAGE = "Language models, block by block"


def command(
    context_: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(help="A model folder, a hub id such as org/name, a .keras or a .gguf file.", metavar="MODEL"),
    ] = None,
    *,
    output: Annotated[Path | None, typer.Option(help="Folder to write.", rich_help_panel=common.OUTPUT_PANEL)] = None,
    data: common.DataOption = None,
    text_column: common.TextColumnOption = None,
    label_column: common.LabelColumnOption = None,
    target_column: common.TargetColumnOption = None,
    image_column: common.ImageColumnOption = None,
    audio_column: common.AudioColumnOption = None,
    label_names: common.LabelNamesOption = None,
    split: common.SplitOption = None,
    eval_data: Annotated[
        str | None,
        typer.Option(
            help="Data to report on; default: a tenth of --data, held out.", rich_help_panel=common.DATA_PANEL
        ),
    ] = None,
    eval_split: Annotated[
        str | None, typer.Option(help="Split of --eval-data (or of --data).", rich_help_panel=common.DATA_PANEL)
    ] = None,
    calibration_samples: Annotated[
        int, typer.Option(help="Training rows used for scoring.", min=1, rich_help_panel=common.DATA_PANEL)
    ] = 512,
    criterion: Annotated[
        str,
        typer.Option(
            help="A function of secateur.criteria; with --calibration one of secateur.repair (default there: "
            "sparsegpt), or several: ria+swaps goes on from what ria keeps.",
            rich_help_panel=CHOICE,
        ),
    ] = "magnitude",
    pattern: Annotated[
        str,
        typer.Option(help="element, 2:4 (two of four stay), 4x1, or kinds such as head,ffn.", rich_help_panel=CHOICE),
    ] = "element",
    sparsity: Annotated[float | None, typer.Option(help="Share that goes, in [0, 1).", rich_help_panel=CHOICE)] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Everything that scores this or less goes.", rich_help_panel=CHOICE)
    ] = None,
    budget: Annotated[
        str, typer.Option(help="How --sparsity is spread: uniform, global or per-kind.", rich_help_panel=CHOICE)
    ] = "uniform",
    sweep: Annotated[
        str | None,
        typer.Option(help="Try several values, e.g. 0.5,0.7,0.9; writes a table and a plot.", rich_help_panel=CHOICE),
    ] = None,
    sweep_by: Annotated[
        str, typer.Option(help="What --sweep lists: sparsity or threshold.", rich_help_panel=CHOICE)
    ] = "sparsity",
    fine_tune: Annotated[float, typer.Option(help="Epochs after pruning.", min=0.0, rich_help_panel=TUNING)] = 0.0,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.", rich_help_panel=TUNING)] = 1e-4,
    distil: Annotated[
        bool,
        typer.Option(
            "--distil",
            help="Learn from the dense model (too); with --fine-tune or --calibration.",
            rich_help_panel=TUNING,
        ),
    ] = False,
    gradual: Annotated[
        bool,
        typer.Option(
            "--gradual", help="Prune along a cubic schedule while training (magnitude).", rich_help_panel=TUNING
        ),
    ] = False,
    train_args: common.TrainArgsOption = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="YAML with the options of this panel; options given here win.", rich_help_panel=LANGUAGE),
    ] = None,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(help="Text to calibrate on (.txt, or a table); several are mixed.", rich_help_panel=LANGUAGE),
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration windows.", min=1, rich_help_panel=LANGUAGE)] = 128,
    context: Annotated[int, typer.Option(help="Tokens in a window.", min=2, rich_help_panel=LANGUAGE)] = 512,
    memory: Annotated[
        str | None,
        typer.Option(help="The most to take, e.g. 4GiB; states go to disk for it.", rich_help_panel=LANGUAGE),
    ] = None,
    reconstruct: Annotated[
        bool,
        typer.Option("--reconstruct", help="Tune each block on the dense model's output.", rich_help_panel=LANGUAGE),
    ] = False,
    owl: Annotated[
        bool,
        typer.Option("--owl", help="Blocks with many outliers keep more (OWL).", rich_help_panel=LANGUAGE),
    ] = False,
    sensitivity: Annotated[
        bool,
        typer.Option(
            "--sensitivity",
            help="Each matrix loses what the loss bears; holds the whole model.",
            rich_help_panel=LANGUAGE,
        ),
    ] = False,
    option: Annotated[
        list[str] | None,
        typer.Option(help="An option of --criterion, such as damp=0.05; may be repeated.", rich_help_panel=LANGUAGE),
    ] = None,
    max_length: common.LengthOption = 128,
    batch_size: common.BatchOption = 32,
    seed: common.SeedOption = 0,
    uniform: Annotated[
        bool,
        typer.Option(
            "--uniform",
            help="Demand a stock checkpoint that loads without secateur.",
            rich_help_panel=common.OUTPUT_PANEL,
        ),
    ] = False,
    layout_file: common.LayoutFileOption = None,
    task: common.TaskOption = None,
    threads: common.ThreadsOption = None,
    trust_remote_code: common.RemoteCodeOption = False,
    overwrite: common.OverwriteOption = False,
    json: common.JsonOption = False,
) -> None:
    """Prune a model of any task (--data), or a language model block by block (--calibration or --recipe).

    The data of a `.keras` classifier is an .npz of x and y. A model is saved only if masked and shrunk agree and the
    reloaded model is equal. Block by block, a language model is written shard by shard: a run that was stopped goes on
    when the same command is given again. Data without labels is enough: the dense model's own answers take their place.
    """
    from secateur.cli import kinds, language, outcomes

    if calibration or recipe is not None:
        kinds.refuse(context_, "language")
        common.refuse_torchrun("a language model is pruned block by block")
        language.prune(language.recipe_of(context_), threads, overwrite=overwrite, json=json)
        return

    from secateur.errors import DataError, PlanError
    from secateur.find_host import is_keras_file

    if model is None or output is None:
        raise PlanError(f"{'a model' if model is None else '--output FOLDER'} is needed; see `secateur prune --help`")
    kinds.refuse(context_, kind_of(model, sweep, sweep_by))
    common.claim_output(output, overwrite=overwrite)
    arguments = common.train_arguments(context_)
    if sweep is not None:
        choice = make_sweep(criterion, pattern, sweep, sweep_by, budget)
    else:
        choice = make_choice(criterion, pattern, sparsity, threshold, budget)
    if eval_split is not None and eval_data is None and eval_split == split:
        raise DataError(f"--split and --eval-split are both {split!r}; report on rows that were not trained on")
    tuning: dict[str, Any] = {"epochs": fine_tune, "learning_rate": learning_rate, "seed": seed, "gradual": gradual}
    if is_keras_file(model):
        from secateur.cli import keras

        common.refuse_torchrun("a .keras file is trained")
        keras_outcome = keras.prune(
            model,
            output,
            choice,
            (data, eval_data),
            calibration_samples=calibration_samples,
            tuning={**tuning, "batch_size": batch_size},
            threads=threads,
            overwrite=overwrite,
        )
        outcomes.show(keras_outcome, json=json)
        return
    common.quiet_libraries()
    common.set_threads(threads)

    from secateur.jobs import ranks
    from secateur.jobs.open_task import look, open_host, prepare
    from secateur.jobs.prune_model import Stage, Tuning, follow, run

    opened = look(model, task, trust_remote_code=trust_remote_code)
    table = common.read_data(data, split)
    held_out = None
    if eval_data or eval_split:
        held_out = common.read_data(eval_data or data, eval_split)
    host, its_task = open_host(opened, common.task_options(context_.params), common.read_layout(layout_file))
    material = prepare(
        its_task,
        table,
        held_out,
        calibration_samples=calibration_samples,
        batch_size=batch_size,
        seed=seed,
        say=common.note,
    )
    if choice.sweep is not None:
        if ranks.is_first():
            try_all(host, choice, material, output, f"{criterion}, {pattern}", overwrite=overwrite, json=json)
        return
    stages = [Stage(choice.criterion, choice.pattern, choice.budget)]
    how = Tuning(**tuning, distil=distil, arguments=arguments)
    with ranks.together(), common.resumable(arguments):
        if not ranks.is_first():
            follow(host, stages, material, how)
            return
        outcome = run(
            output.name,
            host,
            stages,
            material,
            how,
            output,
            overwrite=overwrite,
            track=common.track,
            save_options={"uniform": uniform},
        )
    outcomes.show(outcome, json=json)


@dataclass(frozen=True)
class Choice:
    """What to prune.

    criterion: a function of `secateur.criteria`.
    budget: how much; None for N:M, and for a sweep.
    sweep: the budgets to try instead, or None.
    """

    criterion: Any
    pattern: "Pattern"
    budget: "Budget | None" = None
    sweep: "list[Budget] | None" = None


def make_sweep(criterion: str, pattern: str, sweep: str, sweep_by: str, budget: str) -> Choice:
    """The choice that --sweep, --sweep-by and --budget ask for."""
    from secateur.errors import PlanError
    from secateur.select import parse_pattern

    score, shape = find_criterion(criterion), parse_pattern(pattern)
    budgets = [make_budget(value, sweep_by, budget) for value in read_list(sweep)]
    if share_in_pattern(pattern):
        raise PlanError(f"pattern {pattern} says itself how much goes, so there is nothing to sweep")
    return Choice(score, shape, sweep=budgets)


def make_choice(criterion: str, pattern: str, sparsity: float | None, threshold: float | None, budget: str) -> Choice:
    """The choice that --sparsity, --threshold and --budget ask for."""
    from secateur.errors import PlanError
    from secateur.select import parse_pattern

    score, shape = find_criterion(criterion), parse_pattern(pattern)
    if sparsity is not None and threshold is not None:
        raise PlanError("--sparsity and --threshold exclude each other; pass one")
    if share_in_pattern(pattern):
        if sparsity is not None or threshold is not None:
            raise PlanError(f"pattern {pattern} says itself how much goes; leave out --sparsity and --threshold")
        return Choice(score, shape)
    if sparsity is not None:
        return Choice(score, shape, make_budget(sparsity, "sparsity", budget))
    if threshold is not None:
        return Choice(score, shape, make_budget(threshold, "threshold", budget))
    raise PlanError("how much? pass --sparsity 0.5, --threshold 0.02, or --sweep to see what they would do")


def try_all(
    host: "TorchHost", choice: Choice, material: "Data", output: Path, title: str, *, overwrite: bool, json: bool
) -> None:
    """Score the model pruned to each budget of a sweep; write and print the table."""
    from secateur.cli import outcomes
    from secateur.files import new_folder
    from secateur.jobs.sweep import sweep

    points = sweep(host, choice.criterion, choice.pattern, choice.sweep or [], material, common.track)
    with new_folder(output, overwrite=overwrite) as folder:
        outcomes.write_sweep(points, folder, title)
    outcomes.show_sweep(points, output, json=json)


def find_criterion(name: str) -> Any:
    """The function of that name in `secateur.criteria`."""
    from secateur import criteria
    from secateur.errors import PlanError

    known = [n for n in criteria.__all__ if n != "threshold"]
    if name not in known:
        raise PlanError(
            f"no criterion {name!r}; there is {', '.join(known)}, and for language models, with --calibration FILE, "
            "the methods of secateur.repair"
        )
    return getattr(criteria, name)


def make_budget(value: float, by: str, budget: str) -> "Budget":
    """A budget from a number, what it is (sparsity or threshold), and the name of --budget."""
    from secateur.budget import Global, PerKind, Threshold, Uniform, check_sparsity
    from secateur.errors import PlanError

    if by == "threshold":
        if not value >= 0:
            raise PlanError(f"threshold {value} is negative; scores are not")
        return Threshold(value)
    if by != "sparsity":
        raise PlanError(f"--sweep-by {by!r} is neither sparsity nor threshold")
    makers: dict[str, Callable[[float], Budget]] = {"uniform": Uniform, "global": Global, "per-kind": PerKind}
    if budget not in makers:
        raise PlanError(f"no budget {budget!r}; there is {', '.join(makers)}")
    return makers[budget](check_sparsity(value))


def kind_of(model: str, sweep: str | None, sweep_by: str) -> str:
    """The kind of run, by its name in `secateur.cli.kinds`, of a model that is not pruned block by block."""
    from secateur.find_host import is_keras_file

    if is_keras_file(model):
        return "keras"
    if sweep is None:
        return "classifier"
    return "thresholds" if sweep_by == "threshold" else "sweep"


def share_in_pattern(pattern: str) -> bool:
    """Whether a pattern itself says how much goes."""
    from secateur.select import NM, parse_pattern

    return isinstance(parse_pattern(pattern), NM)


def read_list(text: str) -> list[float]:
    """The numbers of a --sweep list."""
    from secateur.errors import PlanError

    try:
        values = [float(word) for word in text.split(",") if word.strip()]
    except ValueError:
        raise PlanError(f"--sweep {text!r} is not a list of numbers such as 0.5,0.7,0.9") from None
    if not values:
        raise PlanError("--sweep is empty; pass numbers such as 0.5,0.7,0.9")
    return values
