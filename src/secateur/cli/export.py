"""secateur export: a saved model as an artefact for a runtime, compared with PyTorch there."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.cli import common
from secateur.cli.shell import complete

if TYPE_CHECKING:
    from secateur.deploy.jobs.results import Artefact

NAME = "export"
EXAMPLES = (
    "secateur export ./small --to onnx --data test.csv --output ./small-onnx",
    "secateur export ./tagger --to openvino --data sentences.jsonl --output ./tagger-ov",
    "secateur export ./small --to litert --batch 1 --length 64 --output ./small-litert",
    "secateur export ./fewer-tokens --to onnx --cascade 0.99 --data rows.csv --output ./cascade-onnx",
    "secateur export ./decoder --to openvino --generate --output ./decoder-ov",
    "secateur export ./decoder --to gguf --quantize q8_0 --output ./decoder-gguf",
    "secateur export ./decoder --to decilm --output ./decoder-decilm",
    "secateur export model.keras --to litert --batch 1 --output ./small-litert",
)


def command(
    context_: typer.Context,
    model: common.ModelArgument,
    *,
    to: Annotated[
        str,
        typer.Option(
            help="onnx, openvino, executorch, litert, gguf (llama.cpp) or decilm (a model folder with sizes by layer); "
            "of a .keras file also savedmodel or tflite.",
            autocompletion=complete.one_of(complete.FORMATS),
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder to write.", rich_help_panel=common.OUTPUT_PANEL)],
    data: common.DataOption = None,
    text_column: common.TextColumnOption = None,
    image_column: common.ImageColumnOption = None,
    audio_column: common.AudioColumnOption = None,
    split: common.SplitOption = None,
    samples: Annotated[
        int, typer.Option(help="Rows of --data to compare on.", min=1, rich_help_panel=common.DATA_PANEL)
    ] = 200,
    batch: Annotated[int | None, typer.Option(help="ExecuTorch: the largest. LiteRT: the only one.")] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens, or samples of a sound. ExecuTorch: the most. LiteRT: all.")
    ] = None,
    generate: Annotated[
        bool, typer.Option("--generate", help="With a key-value cache, for generation (onnx, openvino).")
    ] = False,
    int8: Annotated[
        bool,
        typer.Option("--int8", help="8-bit weights on top (onnx, openvino); with --sparse: of what is not packed."),
    ] = False,
    sparse: Annotated[
        bool,
        typer.Option("--sparse", help="Sparse layers on secateur's kernels (onnx); .keras: LiteRT's sparse weights."),
    ] = False,
    tokens: Annotated[int, typer.Option(help="--sparse: tokens in a typical call, batch times length.")] = 128,
    value: Annotated[
        str, typer.Option(help="--sparse: float32, bfloat16, or for blocks float16 and int8.")
    ] = "float32",
    activations: Annotated[
        str, typer.Option(help="--sparse: float32, or int8 for 1x4 blocks (with --value int8).")
    ] = "float32",
    tolerance: Annotated[
        float | None, typer.Option(help="Largest relative error; default: 1e-4, or 0.25 with --int8.")
    ] = None,
    cascade: Annotated[
        float | None,
        typer.Option(
            help="Of a model that prunes tokens: full pass where unsure, so that this share of the answers is that of "
            "the full pass (0.99); certified on all rows of --data (onnx, openvino)."
        ),
    ] = None,
    quantize: Annotated[str, typer.Option(help="GGUF: f32, f16, bf16, q8_0, q6_k, q5_k_m, q4_k_m or q4_0.")] = "f16",
    exact_widths: Annotated[
        bool, typer.Option("--exact-widths", help="DeciLM: widths that are no multiples of 256, for vLLM only.")
    ] = False,
    task: common.TaskOption = None,
    threads: common.ThreadsOption = None,
    trust_remote_code: common.RemoteCodeOption = False,
    overwrite: common.OverwriteOption = False,
    json: common.JsonOption = False,
) -> None:
    """Write a model for a runtime, run it there, and refuse to keep it when it differs from PyTorch (or Keras).

    The data of a `.keras` file is an .npz of x and y.
    """
    from secateur.cli import kinds
    from secateur.files import check_output
    from secateur.find_host import is_keras_file

    kinds.refuse(context_, "keras" if is_keras_file(model) else to if to in ("gguf", "decilm") else "torch")
    check_output(output, overwrite=overwrite)
    if is_keras_file(model):
        from secateur.cli import keras

        limits = {"batch": batch, "length": length, "tolerance": tolerance}
        made = keras.export(model, to, output, data, samples, sparse=sparse, overwrite=overwrite, **limits)
        show(made, "Keras", json=json, made_up=data is None)
        return
    remote: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    if to == "gguf":
        from secateur.deploy.gguf.export import export_gguf

        common.quiet_libraries()
        common.set_threads(threads)
        file = export_gguf(
            model, output, quantize=quantize, tolerance=tolerance, overwrite=overwrite, say=common.note, **remote
        )
        show(file, "PyTorch", json=json, made_up=False)
        return
    if to == "decilm":
        from secateur.deploy.decilm.export import export_decilm

        common.quiet_libraries()
        common.set_threads(threads)
        wanted: dict[str, Any] = {"exact_widths": exact_widths, "tolerance": tolerance, "overwrite": overwrite}
        show(export_decilm(model, output, say=common.note, **wanted, **remote), "PyTorch", json=json, made_up=False)
        return
    rows = certifying = None
    if data is not None:
        certifying = common.read_data(data, split)
        rows = certifying.take(range(min(samples, len(certifying))))

    from secateur.deploy.jobs.export import export

    common.quiet_libraries()
    common.set_threads(threads)
    made = export(
        model,
        to,
        output,
        data=rows,
        task=task,
        task_options=common.task_options(context_.params),
        batch=batch,
        length=length,
        generate=generate,
        int8=int8,
        sparse=sparse,
        tokens=tokens,
        value=value,
        activations=activations,
        tolerance=tolerance,
        cascade=cascade,
        calibration=certifying,
        overwrite=overwrite,
        say=common.note,
        **remote,
    )
    show(made, "PyTorch", json=json, made_up=rows is None)


def show(made: "Artefact", framework: str, *, json: bool, made_up: bool) -> None:
    """Print what was written, and how far its outputs are from the framework's."""
    if json:
        common.print_json(made.as_json())
        return
    columns, row = ["target", "parameters", "MB"], [made.target, common.millions(made.parameters)]
    row.append(common.megabytes(made.bytes))
    if made.parity is not None:
        columns += ["examples", "shapes", "relative error", "worst logit", "agreement"]
        row += [str(made.parity.examples), str(len(made.parity.shapes)), f"{made.parity.relative_error:.1e}"]
        row.append(f"{made.parity.worst_logit:.1e}")
        row.append("-" if made.parity.agreement is None else common.percent(made.parity.agreement))
    if made.generation is not None:
        columns += ["tokens", "relative error"]
        agreement = made.generation["agreement"]
        same = "equal" if made.generation["equal"] else f"{common.percent(agreement)} equal"
        row += [f"{made.generation['tokens']} {same}", f"{made.generation['relative_error']:.1e}"]
    common.print_table(f"Exported to {made.folder}, against {framework}", columns, [row])
    if made_up:
        common.say("compared on made-up inputs; pass --data to compare on yours")
