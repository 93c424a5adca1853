"""export: a model, or a saved folder, as an artefact that a runtime opens; nothing is left behind unless it agrees with
PyTorch there.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.data.table import Table
from secateur.deploy import runner
from secateur.deploy.jobs import cascade as cascades
from secateur.deploy.jobs import generation, material, parity
from secateur.deploy.jobs.results import TOLERANCE, Artefact, Parity
from secateur.deploy.onnx_graph import int8 as onnx_int8
from secateur.deploy.onnx_graph.sparse import rewrite
from secateur.deploy.target import DeployError, ExportUnit, Port, Target, Written, find, local_folder, writing
from secateur.deploy.targets.inputs import SYMBOLS, TRAVELS, as_json, fitted, from_data, inputs_of, ports_of, tensors
from secateur.errors import ModelError
from secateur.files import check_output, new_folder, write_json
from secateur.kernels.format import VALUES, check_activations
from secateur.tasks.base.batches import Batches
from secateur.tasks.base.task import Options
from secateur.tasks.find import auto_class
from secateur.torch.base.batches import by_name, evaluating, without_labels
from secateur.torch.data.text_rows import has_tokenizer, load_tokenizer
from secateur.torch.open import load_model
from secateur.torch.shrink.vocabulary import save_tokenizer

VERSIONS = ("torch", "transformers")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportOptions:
    """The options of `export` that describe an artefact."""

    batch: int | None = None
    length: int | None = None
    generate: bool = False
    int8: bool = False
    sparse: bool = False
    tokens: int = 128
    value: str = "float32"
    activations: str = "float32"
    tolerance: float | None = None

    def check(self, target: Target) -> None:
        """DeployError for what the target does not do, and for numbers and types that cannot be."""
        if self.generate and not target.generates:
            raise DeployError(
                f"{target.name} runs no generation with a cache here; use onnx or openvino, or leave it out"
            )
        if self.int8 and not target.int8:
            raise DeployError(f"{target.name} gets no 8-bit weights here; use onnx or openvino")
        if self.sparse and not target.sparse:
            raise DeployError(f"{target.name} takes none of secateur's kernels; use onnx")
        if self.tokens < 1:
            raise DeployError(f"tokens must be positive, not {self.tokens}")
        if self.value not in VALUES:
            raise DeployError(f"value must be one of {', '.join(VALUES)}, not {self.value}")
        try:
            check_activations(self.value, self.activations)
        except ValueError as error:
            raise DeployError(str(error)) from error
        if not self.permitted >= 0:
            raise DeployError(f"tolerance {self.tolerance} is no number from 0 upwards")

    @property
    def rounded(self) -> bool:
        """Whether weights are stored in fewer bits than PyTorch's."""
        return self.int8 or (self.sparse and self.value != "float32")

    @property
    def permitted(self) -> float:
        """Largest permitted relative error."""
        if self.tolerance is not None:
            return self.tolerance
        return parity.INT8_TOLERANCE if self.rounded else TOLERANCE


@dataclass(frozen=True)
class ExportJob:
    """One model on its way to one target.

    source_folder: where the model was read from, if it was a folder on this machine.
    processor: tokenizer, image processor or feature extractor of a model in memory, or the tokenizer of a folder.
    inputs: example inputs of the model, by name.
    ports: its inputs as the target can hold them.
    data: what to compare on; None for made-up inputs.
    cascade: when the full pass, or the rest of the model, answers; None for a model of one pass.
    """

    target: Target
    model: nn.Module
    source_folder: Path | None
    processor: Any
    options: ExportOptions
    inputs: Mapping[str, torch.Tensor]
    ports: list[Port]
    data: material.Material | None
    cascade: cascades.Decision | None = None


def export(
    source: nn.Module | Path | str,
    to: str,
    output: Path | str,
    *,
    processor: Any = None,
    data: Table | Batches | Iterable[Any] | None = None,
    example: Any = None,
    task: str | None = None,
    task_options: Options | None = None,
    batch: int | None = None,
    length: int | None = None,
    generate: bool = False,
    int8: bool = False,
    sparse: bool = False,
    tokens: int = 128,
    value: str = "float32",
    activations: str = "float32",
    tolerance: float | None = None,
    cascade: float | cascades.Decision | None = None,
    calibration: Table | Batches | Iterable[Any] | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> Artefact:
    """Write a model for a runtime, run it there, and compare.

    source: a module (exported in evaluation mode, and left in its own), or a folder or hub id (its tokenizer, image
    processor or feature extractor then travels along; float32).
    to: onnx, openvino, executorch or litert.
    processor: of a module, for rows of a table.
    data: what to compare on: a Table (`secateur.tasks.read_table`), Batches of a task, or batches of tensors; made up
    when left out. Labels are left out.
    example: a batch of inputs, where neither data nor the model's own description gives them.
    task: what the model is for, where its config does not say it. task_options: such as the columns of a table.
    batch, length: the largest that ExecuTorch takes, the only ones that LiteRT takes.
    generate: with a key-value cache, for `secateur.deploy.generate`.
    int8: 8-bit weights on top; with `sparse` of the layers that are not packed.
    sparse: sparse linear layers on secateur's kernels (onnx), chosen for `tokens` tokens in a call and stored as
    `value`, with `activations`, all as for `secateur.runtime.compile`. Such a program needs
    `secateur.runtime.onnx_library`.
    tolerance: largest permitted relative error, by default `results.TOLERANCE` (or `parity.INT8_TOLERANCE`).
    cascade: of a model that prunes tokens, the agreement with its full pass that is to be certified; or a
    `secateur.dynamic.Cascade` or `EarlyExit`. The artefact then has two graphs, for `secateur.deploy.cascade`.
    calibration: rows that certify it, in the forms of `data`, which they are by default.
    say: gets a sentence for what was found out, such as which column of a table is which.
    options: for loading a folder, as `secateur.open` takes them.

    Raises SecateurError in one sentence: unknown target, missing runtime, shapes that cannot be, an operation that the
    target lacks (named), an output that exists or does not fit the disk, a program that differs from PyTorch.
    """
    target, output = find(to), Path(output)
    check_output(output, overwrite=overwrite)
    wanted = ExportOptions(
        batch=batch,
        length=length,
        generate=generate,
        int8=int8,
        sparse=sparse,
        tokens=tokens,
        value=value,
        activations=activations,
        tolerance=tolerance,
    )
    wanted.check(target)
    if cascade is not None:
        cascades.check(target, wanted)
    source_folder = local_folder(source)
    model = source if isinstance(source, nn.Module) else load_for(source, task, **{"dtype": torch.float32, **options})
    check_model(model, output)
    read = functools.partial(
        material.read,
        model,
        source=None if isinstance(source, nn.Module) else source,
        processor=processor,
        task=task,
        options=task_options,
        length=length,
        generate=generate,
        loading=of_config(options),
    )
    rows = read(data=data)
    for sentence in rows.notes if rows is not None else ():
        say(sentence)
    if processor is None and not isinstance(source, nn.Module):
        processor = tokenizer_of(source, trust_remote_code=bool(options.get("trust_remote_code")))
    with evaluating(model):
        inputs = _example(model, example, rows, processor, source_folder)
        ports = fitted(target, model, ports_of(model, inputs), batch, length)
        decision = None
        if cascade is not None:
            certifying = read(data=data if calibration is None else calibration)
            decision = cascades.decided(model, cascade, certifying, target, ports)
            say(str(decision))
        job = ExportJob(target, model, source_folder, processor, wanted, inputs, ports, rows, decision)
        with new_folder(output, overwrite=overwrite) as folder:
            info = _write(job, folder)
            write_json(folder / runner.MANIFEST, info)  # the comparison reads it
            result = _compare(job, folder)
            if isinstance(result, Parity):
                info["parity"] = {**asdict(result), "made_up": data is None}
            else:
                info["generation"]["parity"] = result
            write_json(folder / runner.MANIFEST, info)
            for sentence in generation.write_genai(model, info, folder):
                say(sentence)
    forward, generated = (result, None) if isinstance(result, Parity) else (None, result)
    return Artefact(output, target.name, info["bytes"], info["parameters"], info["zeros"], forward, generated)


def load_for(source: Path | str, task: str | None = None, **options: Any) -> nn.Module:
    """A model folder or hub id, loaded for a task (or an Auto class) that its config need not name."""
    return load_model(source, task=auto_class(str(source), task, **of_config(options)), **options)


def of_config(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options of `from_pretrained` that configs and processors take too."""
    return {k: v for k, v in options.items() if k in ("revision", "trust_remote_code", "token", "cache_dir")}


def _example(
    model: nn.Module, example: Any, data: material.Material | None, processor: Any, source_folder: Path | None
) -> dict[str, torch.Tensor]:
    """Example inputs: the user's; else made up from the model's description, with the names and sizes of the data."""
    if example is not None:
        return dict(without_labels(by_name(model, example)))
    try:
        made_up = inputs_of(model, processor, source_folder)
    except ModelError:
        if data is None:
            raise
        made_up = None
    return dict(made_up or {}) if data is None else from_data(model, made_up, data.first)


def _write(job: ExportJob, folder: Path) -> dict[str, Any]:
    """Write the programs of a job and what travels with them; returns what `artefact.json` says."""
    target, model, options = job.target, job.model, job.options
    packing = None
    with writing(target.name, model), on_disk(folder):
        if options.generate:
            graphs = generation.graphs_of(model, job.inputs)
        elif job.cascade is not None:
            graphs = cascades.graphs_of(model, job.cascade, tensors(job.ports, SYMBOLS), job.ports)
        else:
            graphs = {"model": ExportUnit(model, tensors(job.ports, SYMBOLS), job.ports)}
        written = target.write(graphs, folder, int8=options.int8 and not options.sparse)
        if job.cascade is not None:
            written = cascades.stored_once(target, written, folder)
        if options.sparse:
            packing = rewrite(
                written, folder, tokens=options.tokens, value=options.value, activations=options.activations
            )
            if options.int8:
                for program in written.values():
                    onnx_int8.quantise(folder / program.files[0])
    travel(model, job.source_folder, job.processor, folder)
    info = {
        **describe(target, model, graphs, written, folder),
        "int8": options.int8,
        "levels": onnx_int8.levels() if options.int8 and target.name == "onnx" else 0,
        "versions": {p: importlib.metadata.version(p) for p in (*VERSIONS, *distributions(target))},
    }
    if packing is not None:
        info["sparse"] = packing
        for graph in info["graphs"].values():
            graph["operators"] = runner.OPERATORS
    if options.generate:
        info["generation"] = generation.rule_of(model)
    if job.cascade is not None:
        info["cascade"] = cascades.described(job.cascade)
    return info


def _compare(job: ExportJob, folder: Path) -> Parity | dict[str, Any]:
    """The result of a comparison with PyTorch: of one forward pass, or of generation."""
    model, options = job.model, job.options
    if options.generate:
        prompts = generation.prompts_of(model, job.data, job.inputs)
        return generation.compare(model, folder, prompts, options.permitted, rounded=options.rounded)
    batches = list(parity.batches(model, job.data, job.target, job.ports))
    if job.cascade is not None:
        return cascades.compare(model, job.cascade, job.target, folder, batches, job.ports, options.permitted)
    return parity.compare(model, job.target.load(folder), batches, options.permitted)


def check_model(model: nn.Module, output: Path) -> None:
    """DeployError for weights that are no float32 numbers, or that the disk has no room for."""
    weights = [p for p in model.parameters() if p.is_floating_point()]
    if any(p.is_meta for p in weights):
        raise DeployError("the model has weights on the meta device, which hold no numbers; load them first")
    other = next((p.dtype for p in weights if p.dtype != torch.float32), None)
    if other is not None:
        raise DeployError(
            f"the model has weights of {other}; export float32 (model.float()), runtimes convert on their own"
        )
    parent = next(p for p in output.absolute().parents if p.is_dir())
    needed, free = sum(p.numel() * 4 for p in weights), shutil.disk_usage(parent).free
    if free < needed:
        raise DeployError(
            f"{output} needs about {needed / 1e6:.0f} MB, and {parent} has {free / 1e6:.0f} MB left; make room or "
            "choose another output"
        )


@contextlib.contextmanager
def on_disk(folder: Path) -> Iterator[None]:
    """What an exporter says when the disk is full, in one sentence; other errors pass."""
    try:
        yield
    except Exception as error:  # exporters report a full disk in many ways
        if shutil.disk_usage(folder).free < 1_000_000:
            raise DeployError(
                f"no space is left beside {folder.parent / folder.name.split('.')[1]}; make room"
            ) from error
        raise


def tokenizer_of(source: Path | str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder or hub id, or None where there is none; ModelError for a folder's that is damaged."""
    if Path(source).is_dir():
        return load_tokenizer(source, trust_remote_code=trust_remote_code) if has_tokenizer(source) else None
    try:
        return load_tokenizer(source, trust_remote_code=trust_remote_code)
    except ModelError as error:  # models of images and audio have none, and nobody knows before asking
        logger.info("%s is exported without a tokenizer (%s)", source, error)
        return None


def travel(model: nn.Module, source_folder: Path | None, processor: Any, folder: Path) -> None:
    """Put tokenizer and processors beside the program."""
    if source_folder is not None:
        for pattern in TRAVELS:
            for file in source_folder.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, folder / file.name)
    elif hasattr(processor, "get_vocab"):
        save_tokenizer(model, processor, folder)
    elif processor is not None:
        processor.save_pretrained(folder)


def describe(
    target: Target, model: nn.Module, graphs: Mapping[str, ExportUnit], written: Mapping[str, Written], folder: Path
) -> dict[str, Any]:
    """What `artefact.json` says of the model and of the files."""
    sizes = {file: (folder / file).stat().st_size for graph in written.values() for file in graph.files}
    count, zeros = zero_share(model)
    return {
        "format": runner.FORMAT,
        "target": target.name,
        "class": type(model).__name__,
        "graphs": {
            name: describe_graph(graph.files, graphs[name].ports, graph.outputs) for name, graph in written.items()
        },
        "parameters": count,
        "zeros": zeros,
        "bytes": sum(sizes.values()),
        "sizes": sizes,
        "sha256": {file: runner.digest(folder / file) for file in sizes},
    }


def describe_graph(files: Sequence[str], ports: Sequence[Port], outputs: Sequence[str]) -> dict[str, Any]:
    """What `artefact.json` says of one graph."""
    return {"files": list(files), "inputs": [as_json(port) for port in ports], "outputs": list(outputs)}


def distributions(target: Target) -> list[str]:
    """Names of the installed distributions of a target's packages."""
    names = [package.replace("_", "-") for package in target.packages]
    return [n for n in names if importlib.util.find_spec(n.replace("-", "_")) is not None]


def zero_share(model: nn.Module) -> tuple[int, float]:
    """Number of parameters, and the share of zeros among those in matrices."""
    count = sum(p.numel() for p in model.parameters())
    matrices = [p for p in model.parameters() if p.dim() > 1]
    size = sum(p.numel() for p in matrices)
    nonzero = sum(int(torch.count_nonzero(p.detach())) for p in matrices)
    return count, 1.0 - nonzero / size if size else 0.0
