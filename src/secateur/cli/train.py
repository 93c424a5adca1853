"""secateur train: fine-tune a text classifier, so that there is a dense model to start from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from secateur.cli import common

NAME = "train"
EXAMPLES = ("secateur train ./encoder --data train.csv --output ./classifier --epochs 1",)


def command(
    model: common.ModelArgument,
    *,
    output: Annotated[Path, typer.Option(help="Folder to write.", rich_help_panel=common.OUTPUT_PANEL)],
    data: common.DataOption = None,
    text_column: common.TextColumnOption = "text",
    label_column: common.LabelColumnOption = "label",
    split: common.SplitOption = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data.", min=0.0)] = 1.0,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 1e-4,
    max_length: common.LengthOption = 128,
    batch_size: common.BatchOption = 32,
    seed: common.SeedOption = 0,
    threads: common.ThreadsOption = None,
    trust_remote_code: common.RemoteCodeOption = False,
    overwrite: common.OverwriteOption = False,
    json: common.JsonOption = False,
) -> None:
    """Train a sequence classifier on labelled texts; a missing head is made for the labels of the data.

    Zeros of a pruned model stay zero.
    """
    from secateur.files import check_output
    from secateur.find_host import is_keras_file

    if is_keras_file(model):
        from secateur.cli import keras

        keras.refuse_training(model)
    check_output(output, overwrite=overwrite)
    rows = common.read_data(data, text_column, label_column, split)

    from secateur.jobs.train import classifier_options, fine_tune
    from secateur.pruning import earlier_zeros
    from secateur.torch.data.text_rows import encode, load_tokenizer
    from secateur.torch.files.saving import save
    from secateur.torch.host import TorchHost
    from secateur.torch.open import load_model, open_module

    common.quiet_libraries()
    common.set_threads(threads)
    options = {"trust_remote_code": True} if trust_remote_code else {}
    tokenizer = load_tokenizer(model, **options)
    loading = {**classifier_options(model, rows, seed, **options), **options}
    network = load_model(model, task="SequenceClassification", new_head=_note_new, **loading)
    host = TorchHost.untraced(network)
    if earlier_zeros({name: p.detach() for name, p in network.named_parameters() if p.dim() > 1}) is not None:
        host = open_module(network)  # it knows which of the zeros were pruned, and holds them
    features = encode(network, tokenizer, rows, max_length)
    loss = fine_tune(
        host, features, tokenizer, epochs=epochs, learning_rate=learning_rate, batch_size=batch_size, seed=seed
    )
    save(network, output, plan=host.plan, tokenizer=tokenizer, overwrite=overwrite)
    if json:
        common.print_json({"output": str(output), "examples": len(rows), "epochs": epochs, "loss": loss})
        return
    common.say(f"{output}: trained on {len(rows)} texts, mean loss {loss:.4f}")


def _note_new(names: Sequence[str]) -> None:
    common.note(f"new, to be trained: {', '.join(names)}")
