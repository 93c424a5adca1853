"""The results of a streamed run: the record of each block, the last files of its folder, and the report."""

import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from secateur import record
from secateur._version import __version__
from secateur.card import write as card
from secateur.files import write_json
from secateur.layout import Layout
from secateur.recipe import Recipe
from secateur.record import write_record
from secateur.records.model import model_type_of
from secateur.torch.blockwise.prune_block import left_out
from secateur.torch.blockwise.walk import Done
from secateur.torch.files import describe
from secateur.torch.files.hashes import write_hashes
from secateur.torch.files.safetensors_header import INDEX, read_entries
from secateur.torch.files.safetensors_shards import write_shard
from secateur.torch.stream.journal import Workspace
from secateur.torch.stream.lazy_model import Skeleton
from secateur.torch.stream.model_record import model_record

RECORD = "pruned.json"


@dataclass(frozen=True)
class RunReport:
    """What a run did.

    folder: the output; None for a model in memory.
    blocks: the record of each block (see `record_of`).
    left_out: linear weights of the layers that are not pruned.
    resumed: how many blocks an interrupted run had finished.
    distilled: mean loss of the first and the last pass of distillation; None where the recipe asks for none. The errors
        of the layers are those before distillation.
    unused: tensors of the files that the model does not use; they are copied unchanged.
    """

    folder: str | None
    blocks: tuple[dict[str, Any], ...]
    left_out: tuple[str, ...]
    resumed: int = 0
    distilled: tuple[float, float] | None = None
    unused: tuple[str, ...] = ()

    @property
    def layers(self) -> list[dict[str, Any]]:
        """Every pruned weight: name, weights, zeros, error, notes."""
        return [layer for block in self.blocks for layer in block["layers"]]

    @property
    def weights(self) -> int:
        """Number of weights in all pruned layers, the denominator of the sparsity."""
        return sum(layer["weights"] for layer in self.layers)

    @property
    def zeros(self) -> int:
        """Number of these weights that are zero."""
        return sum(layer["zeros"] for layer in self.layers)


def record_of(done: Done, file: str) -> dict[str, Any]:
    """The record of a block, as JSON values. file: the shard that contains it."""
    return {
        "path": done.path,
        "file": file,
        "error": done.error,
        "tuned": list(done.tuned) if done.tuned else None,
        "layers": [{**asdict(layer), "notes": list(layer.notes)} for layer in done.layers],
    }


def shard_name(number: int, total: int) -> str:
    """The shard of block `number`, from 1, of `total`; a last shard contains what belongs to no block."""
    return f"model-{number:05d}-of-{total + 1:05d}.safetensors"


def finish(
    work: Workspace, layout: Layout, skeleton: Skeleton, paths: Sequence[str], recipe: Recipe, resumed: int
) -> RunReport:
    """Write what belongs to no block, the index, the config and the records; then give the folder its name."""
    blocks = work.journal.blocks
    distilled = work.journal.distilled
    report = RunReport(
        str(work.output),
        tuple({k: v for k, v in block.items() if k not in ("sha256", "seconds")} for block in blocks),
        tuple(left_out(layout, skeleton.model, paths)),
        resumed,
        (distilled[0], distilled[1]) if distilled else None,
        tuple(skeleton.unused),
    )
    if not work.journal.finished:
        rest = write_rest(work, skeleton, paths)
        write_json(
            work.result / RECORD,
            {
                "recipe": work.journal.identity["recipe"],
                "secateur": __version__,
                "counted": {"tensors": len(report.layers), "weights": report.weights, "zeros": report.zeros},
                "left_out": list(report.left_out),
                "unused": list(report.unused),
                "distilled": distilled,
                "blocks": list(report.blocks),
            },
        )
        shapes = [entry.shape for entry in skeleton.entries.values()]
        zeros = report.zeros
        describe.write(work.result, skeleton.folder, type(skeleton.model).__name__, map(math.prod, shapes), zeros=zeros)
        measured = model_record(
            blocks,
            layout,
            recipe,
            title=work.output.name,
            model_type=model_type_of(skeleton.model),
            source=skeleton.folder,
            folder=work.result,
            distilled=distilled,
        )
        write_record(measured, work.result)
        write_hashes(work.result, {**{block["file"]: block["sha256"] for block in blocks}, **rest})
    work.finish()
    return report


def write_rest(work: Workspace, skeleton: Skeleton, paths: Sequence[str]) -> dict[str, str]:
    """Write the last shard, the index of all shards, and copies of the other files of the source.

    Returns the name of the last shard with its SHA-256.
    """
    inside = {name for path in paths for name in skeleton.names_under(path)}
    rest = {name: entry for name, entry in skeleton.entries.items() if name not in inside}
    blocks = work.journal.blocks
    file = shard_name(len(blocks) + 1, len(blocks))
    digest = write_shard(work.result / file, rest, work.folder)
    index, size = dict.fromkeys(rest, file), sum(entry.bytes for entry in rest.values())
    for block in blocks:
        entries = read_entries(work.result / block["file"])
        index |= dict.fromkeys(entries, block["file"])
        size += sum(entry.bytes for entry in entries.values())
    write_json(work.result / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(index.items()))})
    _copy_others(skeleton.folder, work.result)
    return {file: digest}


def _copy_others(source: Path, folder: Path) -> None:
    """Copy the files that contain no weights: config, tokenizer and so on, but not what describes the dense model."""
    weights = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
    own = (INDEX, card.NAME, record.NAME)
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.startswith(".") and path.suffix not in weights and path.name not in own:
            shutil.copyfile(path, folder / path.name)
