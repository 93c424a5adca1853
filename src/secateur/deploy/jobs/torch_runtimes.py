"""PyTorch and secateur's own kernels as runtimes, so that they are timed beside the exported ones: an artefact here is
a description that points at the model folder. It is loaded only by who wrote it (`ours` of `runner.load`), and with
options that the caller gives: no file says whether code of the model folder may run.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur import runtime
from secateur.deploy import runner
from secateur.deploy.jobs.export import check_model, describe_graph, load_for, tokenizer_of, zero_share
from secateur.deploy.targets.inputs import inputs_of, named_outputs, ports_of
from secateur.files import write_json
from secateur.plan import MASKS_NAME
from secateur.torch.stats.linear_inputs import rows_read
from secateur.torch.tokens.install import remove


def write(
    model: nn.Module,
    source: Path,
    target: str,
    folder: Path,
    *,
    every_token: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Describe a model folder as an artefact for `torch` or `secateur`; returns the description.

    every_token: the model runs without the schedule of tokens that the folder remembers.
    """
    check_model(model, folder)
    tokenizer = tokenizer_of(source, trust_remote_code=trust_remote_code)
    ports = ports_of(model, inputs_of(model, tokenizer, source))
    count, zeros = zero_share(model)
    info = {
        "format": runner.FORMAT,
        "target": target,
        "source": str(source.resolve()),
        "class": type(model).__name__,
        "graphs": {"model": describe_graph([], ports, [])},
        "parameters": count,
        "zeros": zeros,
        "bytes": sum(file.stat().st_size for file in source.glob("*.safetensors") if file.name != MASKS_NAME),
        "int8": False,
        "every_token": every_token,
    }
    folder.mkdir()
    write_json(folder / runner.MANIFEST, info)
    return info


def load(folder: Path, graph: Mapping[str, Any], threads: int, options: Mapping[str, Any]) -> runner.Program:
    """The model in evaluation mode under `torch.inference_mode`.

    options: for opening the model folder, as `secateur.open` takes them.
    """
    model = _open_source(folder, threads, options)
    return _program(lambda feed: model)


def load_sparse(folder: Path, graph: Mapping[str, Any], threads: int, options: Mapping[str, Any]) -> runner.Program:
    """The model with its sparse layers on secateur's kernels, chosen by measurement at the first input's size, with
    what follows them fused and blocks of an encoder as one call.
    """
    model = _open_source(folder, threads, options)
    compiled: list[nn.Module] = []

    def compile_once(feed: runner.Feed) -> nn.Module:
        if not compiled:
            batch = _tensors(feed)
            compiled.append(runtime.compile(model, tokens=rows_read(model, batch), example=batch))
        return compiled[0]

    return _program(compile_once)


def _open_source(folder: Path, threads: int, options: Mapping[str, Any]) -> nn.Module:
    torch.set_num_threads(threads)
    info = runner.read(folder)
    model = load_for(Path(info["source"]), **{"trust_remote_code": False, **options, "dtype": torch.float32})
    if info.get("every_token"):
        remove(model)
    return model


def _program(model: Callable[[runner.Feed], nn.Module]) -> runner.Program:
    def run(feed: runner.Feed) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            return {k: v.numpy() for k, v in named_outputs(model(feed), _tensors(feed)).items()}

    return run


def _tensors(feed: runner.Feed) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.asarray(value)) for name, value in feed.items()}
