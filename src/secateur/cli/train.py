"""secateur train: fine-tune a model of any task, so that there is a dense model to start from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.cli import common

NAME = "train"
EXAMPLES = ("secateur train ./encoder --data train.csv --output ./classifier --epochs 1",)


def command(
    context_: typer.Context,
    model: common.ModelArgument,
    *,
    output: Annotated[Path, typer.Option(help="Folder to write.", rich_help_panel=common.OUTPUT_PANEL)],
    data: common.DataOption = None,
    text_column: common.TextColumnOption = None,
    label_column: common.LabelColumnOption = None,
    target_column: common.TargetColumnOption = None,
    image_column: common.ImageColumnOption = None,
    audio_column: common.AudioColumnOption = None,
    label_names: common.LabelNamesOption = None,
    split: common.SplitOption = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data.", min=0.0)] = 1.0,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 1e-4,
    train_args: common.TrainArgsOption = None,
    max_length: common.LengthOption = 128,
    batch_size: common.BatchOption = 32,
    seed: common.SeedOption = 0,
    task: common.TaskOption = None,
    threads: common.ThreadsOption = None,
    trust_remote_code: common.RemoteCodeOption = False,
    overwrite: common.OverwriteOption = False,
    json: common.JsonOption = False,
    quiet: common.QuietOption = False,
) -> None:
    """Train a model of any task; a checkpoint of another task gets a new head for the labels of the data.

    Zeros of a pruned model stay zero. Several processes: `torchrun --nproc-per-node 2 -m secateur train ...`, each with
    its own part of every step's rows.
    """
    from secateur.find_host import is_keras_file

    if is_keras_file(model):
        from secateur.cli import keras

        keras.refuse_training(model)
    common.claim_output(output, overwrite=overwrite)
    arguments = common.train_arguments(context_)
    table = common.read_data(data, split)

    from secateur.jobs.open_task import open_to_train
    from secateur.pruning import earlier_zeros
    from secateur.torch.files.saving import save
    from secateur.torch.host import TorchHost
    from secateur.torch.open import open_module
    from secateur.training import ranks
    from secateur.training.fine_tune import fine_tune

    common.quiet_libraries()
    common.set_threads(threads)
    options = common.task_options(context_.params)
    its_task = open_to_train(model, task, table, options, trust_remote_code=trust_remote_code, new_head=_note_new)
    network = its_task.model
    host = TorchHost.untraced(network)
    if earlier_zeros({name: p.detach() for name, p in network.named_parameters() if p.dim() > 1}) is not None:
        host = open_module(network)  # it knows which of the zeros were pruned, and holds them
    examples = its_task.encode(table)
    for sentence in its_task.notes:
        common.note(sentence)
    how: dict[str, Any] = {"epochs": epochs, "learning_rate": learning_rate, "batch_size": batch_size, "seed": seed}
    with ranks.together(), common.resumable(arguments):
        loss = fine_tune(host, its_task, examples, **how, arguments=arguments, progress=common.track)
    if not ranks.is_first():
        return
    save(network, output, plan=host.plan, overwrite=overwrite, **its_task.companions)
    if json:
        common.print_json(
            {"output": str(output), "task": its_task.name, "examples": len(table), "epochs": epochs, "loss": loss}
        )
        return
    common.say(f"{output}: trained on {len(table)} rows, {its_task.name}, mean loss {loss:.4f}")


def _note_new(names: Sequence[str]) -> None:
    common.note(f"new, to be trained: {', '.join(names)}")
