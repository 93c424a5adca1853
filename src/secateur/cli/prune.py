"""secateur prune: decide, verify, fine-tune, shrink, save, reload and compare; or sweep a threshold first.

With --calibration or --recipe single weights of a language model are pruned block by block (`cli.pruning.language`).
With --calibration and units in --pattern, the text is the data of the usual run.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.cli import common, progress
from secateur.cli.shell import complete

NAME = "prune"
EXAMPLES = (
    "secateur prune ./classifier --data reviews.csv --speed-up 2 --on onnx --max-drop 0.01 --output ./small",
    'secateur prune ./classifier --data reviews.csv --target "params<=0.5" --output ./small',
    "secateur prune ./classifier --data reviews.csv --frontier 1.5,2,3 --on onnx --output ./frontier",
    "secateur prune ./classifier --data reviews.csv --criterion magnitude --sparsity 0.8 --fine-tune 1 "
    "--output ./sparse",
    "secateur prune ./classifier --data reviews.csv --criterion taylor --pattern head,ffn --sparsity 0.5 "
    "--fine-tune 2 --output ./small",
    "secateur prune ./classifier --tokens mid --output ./fewer-tokens",
    "secateur prune ./classifier --data reviews.csv --sweep 0.3,0.5,0.7,0.8,0.9 --output ./sweep",
    "secateur prune ./llm --criterion sparsegpt --pattern 2:4 --calibration text.txt --memory 4GiB --output ./sparse",
    "secateur prune ./llm --sparsity 0.7 --sensitivity --distil --calibration text.txt --output ./sparser-llm",
    'secateur prune ./llm --target "params<=0.75" --round 32 --calibration text.txt --memory 4GiB --output ./smaller',
    "secateur prune ./llm --criterion taylor --pattern ffn,kv --sparsity 0.3 --calibration text.txt --fine-tune 1 "
    "--distil --output ./smaller-llm",
)
NOTES = (
    "Criteria: magnitude, gradient, taylor, brain_damage, wanda and ria score any pattern; activation and fisher units "
    "but layers; attention_mass, attention_output, attention_confidence, attention_entropy and attention_softmax head "
    "and kv; routed_mass, routed_saliency and routing_frequency expert. Single weights with --calibration: one of "
    "secateur.repair (default there: sparsegpt), or several: ria+swaps goes on from what ria keeps.",
    "Patterns: single weights (element, 2:4, 4x1) become zeros; units, of the kinds that `secateur inspect` lists, "
    "make the model smaller: head, kv, ffn, layer, expert, hidden or vocab, several as head,ffn. Either goes at once "
    "or with training after it (--fine-tune).",
    "Fewer tokens (--tokens, --keep, --merge) come alone, without data, or after all of this.",
    "On text, single weights go block by block, shard by shard, and so do units for a --target within --memory; a run "
    "that was stopped goes on when the same command is given again. Other units go as with --data. The data of a "
    ".keras classifier is an .npz of x and y. Without labels the dense model's answers take their place.",
    "A model is saved only if masked and shrunk agree and the reloaded model is equal.",
)
MOST_USED = "Most used"
TARGET = common.TARGET_PANEL
CHOICE = "More on your own choice"
TUNING = common.TRAINING_PANEL
TOKENS = "Fewer tokens, after all other pruning"
LANGUAGE = "Language models"


def command(
    context_: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(help="A model folder, a hub id such as org/name, a .keras or a .gguf file.", metavar="MODEL"),
    ] = None,
    *,
    data: Annotated[str | None, typer.Option(help=common.DATA_HELP, rich_help_panel=MOST_USED)] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write.", rich_help_panel=MOST_USED)] = None,
    speed_up: Annotated[
        float | None,
        typer.Option(help="How many times as fast it has to be, on --on; secateur chooses.", rich_help_panel=MOST_USED),
    ] = None,
    on: Annotated[
        str | None,
        typer.Option(
            help="The runtime that counts: torch, secateur, onnx, openvino, executorch, litert or llama.cpp.",
            rich_help_panel=MOST_USED,
            autocompletion=complete.one_of((*complete.RUNTIMES, "llama.cpp")),
        ),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            help="The most that the task's main metric may drop, e.g. 0.01; alone: the fastest model within it.",
            rich_help_panel=MOST_USED,
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="A limit: params<=0.5, macs<=0.4, bytes<=50MB, memory<=200MB or latency<=12ms@openvino; several hold "
            "together.",
            rich_help_panel=MOST_USED,
        ),
    ] = None,
    criterion: Annotated[
        str,
        typer.Option(
            help="Without a target: what scores, e.g. magnitude, gradient, taylor, fisher or attention_output; single "
            "weights on text: sparsegpt.",
            rich_help_panel=MOST_USED,
            autocompletion=complete.some_of(complete.CRITERIA),
        ),
    ] = "magnitude",
    pattern: Annotated[
        str,
        typer.Option(
            help="Without a target: what goes. Single weights: element, 2:4 (two of four stay) or 4x1; units: kinds "
            "such as head,ffn.",
            rich_help_panel=MOST_USED,
            autocompletion=complete.some_of(complete.PATTERNS),
        ),
    ] = "element",
    sparsity: Annotated[
        float | None, typer.Option(help="Without a target: the share that goes, in [0, 1).", rich_help_panel=MOST_USED)
    ] = None,
    fine_tune: Annotated[
        float, typer.Option(help="Without a target: epochs after pruning.", min=0.0, rich_help_panel=MOST_USED)
    ] = 0.0,
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
    max_divergence: Annotated[
        float | None,
        typer.Option(help="The most divergence (KL) from the dense model instead.", rich_help_panel=TARGET),
    ] = None,
    batch: Annotated[int, typer.Option(help="Batch size of the timed calls.", min=1, rich_help_panel=TARGET)] = 1,
    length: Annotated[
        int, typer.Option(help="Length in tokens of the timed calls.", min=1, rich_help_panel=TARGET)
    ] = 128,
    quantize: common.QuantizeOption = None,
    reader: common.ReaderOption = None,
    round: common.RoundOption = 1,
    confident: Annotated[
        bool,
        typer.Option(
            "--confident", help="Demand that the upper end of the drop's interval is permitted.", rich_help_panel=TARGET
        ),
    ] = False,
    closest: Annotated[
        bool,
        typer.Option("--closest", help="Write the nearest model when the target is missed.", rich_help_panel=TARGET),
    ] = False,
    zeros: common.ZerosOption = False,
    frontier: Annotated[
        str | None,
        typer.Option(help="Speed-ups, e.g. 1.5,2,3,4: a model for each, a table and a plot.", rich_help_panel=TARGET),
    ] = None,
    heal_budget: Annotated[
        str,
        typer.Option(
            help="The most time for training with the dense model as teacher: 30min, 90s; 0 for none.",
            rich_help_panel=TARGET,
        ),
    ] = "30min",
    search_budget: Annotated[
        str, typer.Option(help="The most time for the local search.", rich_help_panel=TARGET)
    ] = "60s",
    threshold: Annotated[
        float | None, typer.Option(help="Everything that scores this or less goes.", rich_help_panel=CHOICE)
    ] = None,
    budget: Annotated[
        str,
        typer.Option(
            help="How --sparsity is spread: uniform, global or per-kind.",
            rich_help_panel=CHOICE,
            autocompletion=complete.one_of(complete.BUDGETS),
        ),
    ] = "uniform",
    sweep: Annotated[
        str | None,
        typer.Option(help="Try several values, e.g. 0.5,0.7,0.9; writes a table and a plot.", rich_help_panel=CHOICE),
    ] = None,
    sweep_by: Annotated[
        str, typer.Option(help="What --sweep lists: sparsity or threshold.", rich_help_panel=CHOICE)
    ] = "sparsity",
    tokens: Annotated[
        str | None,
        typer.Option(
            help="Leave out tokens that the pooled token hardly attends to: exact, mild, mid or fast.",
            rich_help_panel=TOKENS,
            autocompletion=complete.one_of(complete.SCHEDULES),
        ),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(
            help="The same with per cents of the tokens that go on after the blocks before the last one: 80,65,50,40.",
            rich_help_panel=TOKENS,
        ),
    ] = None,
    merge: Annotated[
        str | None,
        typer.Option(
            help="Merge tokens that are alike, for images: exact, mild, mid, fast or per cents.",
            rich_help_panel=TOKENS,
            autocompletion=complete.one_of(complete.SCHEDULES),
        ),
    ] = None,
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
        typer.Option(
            help="Text to calibrate on (.txt, or a table); several are mixed. Single weights are pruned block by "
            "block; units (--pattern ffn,kv) at once, with fine-tuning if asked for.",
            rich_help_panel=LANGUAGE,
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration windows.", min=1, rich_help_panel=LANGUAGE)] = 128,
    context: Annotated[int, typer.Option(help="Tokens in a window.", min=2, rich_help_panel=LANGUAGE)] = 512,
    memory: Annotated[
        str | None,
        typer.Option(
            help="The most to take, e.g. 4GiB: one block at a time, states on disk.", rich_help_panel=LANGUAGE
        ),
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
    new_tokens: common.NewTokensOption = 64,
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
    report: common.ReportOption = None,
    overwrite: common.OverwriteOption = False,
    json: common.JsonOption = False,
    quiet: common.QuietOption = False,
) -> None:
    """Prune a model of any task (--data), or a language model on text (--calibration or --recipe).

    With a target (--speed-up, --target or --max-drop) secateur chooses what each layer loses, trains the result if the
    drop asks for it, measures it on the runtime, and writes it only if the target is met (exit code 1 otherwise, with
    what is within reach). Without one you choose what goes, by --criterion, --pattern and --sparsity.
    """
    from secateur.cli import kinds
    from secateur.cli.pruning import language, outcomes, reports, targets
    from secateur.cli.pruning import tokens as schedules
    from secateur.cli.pruning.choice import check, has_units, kind_of, make_choice, make_sweep, needed

    if targets.is_asked(context_):
        targets.run(context_)
        return
    if recipe is not None or (calibration and not has_units(pattern)):
        schedules.refuse(context_, "pruning block by block")
        kinds.refuse(context_, "language")
        common.refuse_torchrun("a language model is pruned block by block")
        language.prune(language.recipe_of(context_), threads, report, overwrite=overwrite, json=json)
        return

    from secateur.errors import PlanError
    from secateur.find_host import is_keras_file

    if model is None or output is None:
        raise PlanError(needed("a model" if model is None else "--output FOLDER"))
    if schedules.did(context_):
        return
    kinds.refuse(context_, kind_of(model, sweep, sweep_by, has_text=bool(calibration)))
    common.claim_output(output, overwrite=overwrite)
    common.claim_report(report, output, overwrite=overwrite)
    wanted = schedules.wanted_of(context_.params)
    arguments = common.train_arguments(context_)
    if sweep is not None:
        choice = make_sweep(criterion, pattern, sweep, sweep_by, budget)
    else:
        choice = make_choice(criterion, pattern, sparsity, threshold, budget)
    common.check_splits(context_.params)
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
        common.write_report(reports.of_folder(output), report)
        return
    common.quiet_libraries()
    common.set_threads(threads)

    from secateur.jobs.open_task import look, open_host, prepare
    from secateur.jobs.prune_model import Stage, Tuning, follow, run
    from secateur.training import ranks

    opened = look(model, task, trust_remote_code=trust_remote_code)
    options = common.task_options(context_.params)
    if calibration:
        table, options = language.table_of(calibration), replace(options, max_length=context)
    else:
        table = common.read_data(data, split)
    held_out = common.held_out(context_.params)
    host, its_task = open_host(opened, options, common.read_layout(layout_file))
    check(choice, host)
    material = prepare(
        its_task,
        table,
        held_out,
        calibration_samples=samples if calibration else calibration_samples,
        batch_size=batch_size,
        seed=seed,
        say=common.note,
    )
    if choice.sweep is not None:
        if ranks.is_first():
            outcomes.try_all(host, choice, material, output, f"{criterion}, {pattern}", overwrite=overwrite, json=json)
        return
    stages = [Stage(choice.criterion, choice.pattern, choice.budget)]
    how = Tuning(**tuning, distil=distil, arguments=arguments)
    after = (*(("training", "evaluate") if fine_tune else ()), *(("evaluate",) if wanted else ()))
    progress.current().stages("dense model", *(s.title for s in stages), "evaluate", *after)
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
            tokens=wanted,
        )
    outcomes.show(outcome, json=json)
    common.write_report(reports.of_outcome(outcome, material), report)
