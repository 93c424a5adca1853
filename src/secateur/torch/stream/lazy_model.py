"""A model without weights, of which one part at a time is filled from a checkpoint and emptied again.

Transformers' own loader decides which tensors of the files become which parameter: it renames them, and merges tensors
that are one parameter of the class, as `from_pretrained` does. Parameters are float32, whatever the type of the files.
"""

import contextlib
import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.errors import ModelError, PlanError
from secateur.layout import Layout
from secateur.torch.data.example import example_for
from secateur.torch.files.completeness import check_missing, check_unexpected, computed, from_config
from secateur.torch.files.safetensors_header import TYPES
from secateur.torch.files.safetensors_shards import Entry, entries_of, read_tensor
from secateur.torch.files.saving import check_claims
from secateur.torch.open import find_class, read_config
from secateur.torch.stats.linear_inputs import before_calls
from secateur.torch.trace.derive import trace

COMPUTE = torch.float32


class Skeleton:
    """A Hugging Face folder as a model on the meta device, with real buffers.

    Its construction is not thread-safe: see `parameters_on_meta`.

    entries: the tensors of the files, by name.
    sources: parameter or buffer -> the names of the tensors of which it is made.
    unused: names of tensors that belong to no parameter or buffer.
    """

    def __init__(self, folder: Path, task: str | None = None) -> None:
        import transformers  # optional
        from transformers.conversion_mapping import get_model_conversion_mapping

        self.folder = folder
        self.entries = entries_of(folder)
        self.config = read_config(folder)
        if getattr(self.config, "quantization_config", None) is not None:
            raise ModelError(
                f"the config of {folder} has a quantization_config: its weights are packed or quantised; save the "
                "model with plain weights and prune that"
            )
        self.factory = find_class(transformers, self.config, task)
        check_claims(folder, self.factory, self.config)
        self.model = self._build()
        self.conversions = get_model_conversion_mapping(self.model)
        self._aliases = _aliases(self.model)
        self.sources, self._merged = self._map_names()
        known = self.model.state_dict().keys() | self._aliases.keys()
        self.unused = [name for target, names in self.sources.items() if target not in known for name in names]
        absent = [n for n, _ in self.model.named_parameters() if not self._in_files(n)]
        self._computed = computed(self.model, absent)
        self._check_complete()

    def _in_files(self, name: str) -> bool:
        """Whether the files hold a parameter or buffer, under any of its names."""
        return any(alias in self.sources for alias in self._aliases.get(name, [name]))

    def _build(self) -> Any:
        """The model, with parameters on the meta device."""
        with torch.random.fork_rng(devices=[]), parameters_on_meta():
            return _from_config(self.factory, self.config)

    def twin(self, *, has_caches: bool = False) -> Any:
        """A copy of the model of which the buffers too are on the meta device. has_caches: as the config says."""
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return _from_config(self.factory, self.config, has_caches=has_caches)

    def layout(self) -> Layout:
        """The layout, traced on a `twin`."""
        twin = self.twin()
        return trace(twin, example_for(twin))

    def _map_names(self) -> tuple[dict[str, list[str]], set[str]]:
        """`sources`, and the parameters that are merged or converted when they are read."""
        from transformers.core_model_loading import (  # optional
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        renamings = [c for c in self.conversions if isinstance(c, WeightRenaming)]
        converters = [c for c in self.conversions if isinstance(c, WeightConverter)]
        state = self.model.state_dict()
        prefix = self.model.base_model_prefix
        sources: dict[str, list[str]] = {}
        merged = set()
        for name in sorted(self.entries, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, state)
            if target not in state and name in state:
                target, pattern = rename_source_key(name, [], [], prefix, state)
            sources.setdefault(target, []).append(name)
            if pattern is not None:
                merged.add(target)
        return sources, merged

    def _check_complete(self) -> None:
        """ModelError when the files lack a tensor of the model, or hold one inside it for which it has no place."""
        ignored = [re.compile(pattern) for pattern in self.model._keys_to_ignore_on_load_missing or ()]
        check_missing(
            self.folder,
            self.model,
            (
                name
                for name in self.model.state_dict()
                if not self._in_files(name)
                and name not in self._computed
                and not any(pattern.search(name) for pattern in ignored)
            ),
        )
        patterns = [re.compile(pattern) for pattern in self.model._keys_to_ignore_on_load_unexpected or ()]
        unused = [name for name in self.unused if not any(pattern.search(name) for pattern in patterns)]
        check_unexpected(self.folder, self.model, unused)

    def source(self, parameter: str) -> str | None:
        """The name in the files of a parameter that is one tensor there, or None."""
        names = self.sources.get(parameter, [])
        return names[0] if len(names) == 1 and parameter not in self._merged else None

    def written_name(self, parameter: str) -> str:
        """`source`; PlanError for a parameter that is not one tensor of the files."""
        source = self.source(parameter)
        if source is None:
            raise PlanError(
                f"{parameter} is made of several tensors of the files, so it cannot be pruned block by block"
            )
        return source

    def stored_type(self, parameter: str) -> torch.dtype:
        """The type that a parameter has in the files; PlanError where it is not one tensor there."""
        return TYPES[self.entries[self.written_name(parameter)].dtype]

    def names_under(self, path: str) -> list[str]:
        """Names in the files of all parameters and buffers under a module."""
        return [name for target, names in self.sources.items() if target.startswith(f"{path}.") for name in names]

    def check(self, paths: Iterable[str]) -> None:
        """ModelError unless the files contain every parameter of these modules, in its shape and as floating point.

        Parameters that are merged are checked when they are read.
        """
        inside = tuple(f"{path}." for path in paths)
        for name, parameter in self.model.named_parameters():
            names = self._aliases.get(name, [name])
            if (
                name in self._computed
                or not name.startswith(inside)
                or any(len(self.sources.get(n, [])) > 1 or n in self._merged for n in names)
            ):
                continue
            source = next((source for source in map(self.source, names) if source is not None), None)
            if source is None:
                raise ModelError(f"{self.folder} lacks {name}; save or copy the model again")
            entry = self.entries[source]
            if not (entry.dtype in TYPES and TYPES[entry.dtype].is_floating_point):
                raise ModelError(
                    f"{entry.file} holds {source} as {entry.dtype}; convert the model to float32 or bfloat16"
                )
            self._check_shape(name, entry.shape, parameter.shape)

    def _check_shape(self, name: str, shape: Sequence[int], wanted: Sequence[int]) -> None:
        """ModelError when a tensor of the files has another shape than its parameter."""
        if tuple(shape) != tuple(wanted):
            raise ModelError(
                f"{name} has shape {tuple(shape)} in {self.folder}, where the config says {tuple(wanted)}; copy the "
                "model again"
            )

    def load(self, path: str, *, replaced: Mapping[str, Entry] | None = None, deep: bool = True) -> None:
        """Fill the parameters under a module (with `deep` False: those of the module itself).

        replaced: parameters that are read from other files than the checkpoint.
        """
        module = self.model.get_submodule(path)
        merged: dict[str, Any] = {}
        wanted = [f"{path}.{n}" if path else n for n, _ in module.named_parameters(recurse=deep)]
        persistent = module.state_dict().keys()
        wanted += [f"{path}.{n}" for n, _ in module.named_buffers(recurse=deep) if n in persistent]
        for name in wanted:
            if replaced and name in replaced:
                self.put(name, read_tensor(replaced[name]))
            elif name in self._merged:
                merged.update({n: read_tensor(self.entries[n]) for n in self.sources[name]})
            else:
                self._fill(name)
        if merged:
            self._convert(merged)
        missing = [n for n, p in module.named_parameters(recurse=deep) if p.is_meta]
        if missing:
            raise ModelError(f"{self.folder} lacks {path}.{missing[0]}; save or copy the model again")

    def _fill(self, name: str) -> None:
        """Read a parameter or buffer that is one tensor of the files, under any of its names; or compute it."""
        for alias in self._aliases.get(name, [name]):
            source = self.source(alias)
            if source is not None:
                self.put(name, read_tensor(self.entries[source]))
                return
        if name in self._computed:
            self.put(name, self._computed[name])

    def put(self, name: str, value: torch.Tensor) -> None:
        """Set a parameter or buffer, in the type of computation."""
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        self._check_shape(name, value.shape, getattr(module, leaf).shape)
        value = value.to(COMPUTE) if value.is_floating_point() else value
        if leaf in module._buffers:
            module._buffers[leaf] = value
        else:
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)

    def _convert(self, tensors: dict[str, torch.Tensor]) -> None:
        """Fill the parameters that are made of these tensors of the files, by transformers' own conversions."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model  # optional
        from transformers.modeling_utils import LoadStateDictConfig

        with _no_progress():
            config = LoadStateDictConfig(weight_mapping=self.conversions, dtype=COMPUTE)
            convert_and_load_state_dict_in_model(self.model, tensors, config)

    def release(self, path: str) -> None:
        """Empty every parameter under a module."""
        for module in self.model.get_submodule(path).modules():
            for leaf, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[leaf] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    @contextlib.contextmanager
    def filled_on_demand(self, paths: list[str]) -> Iterator[None]:
        """While the context lasts, modules outside `paths` read their own parameters when they are first called."""

        def fill(path: str) -> Any:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
                if any(p is not None and p.is_meta for p in module._parameters.values()):
                    self.load(path, deep=False)

            return hook

        hooks = []
        for path, module in self.model.named_modules():
            inside = any(path == p or path.startswith(f"{p}.") for p in paths)
            if not inside and any(p is not None for p in module._parameters.values()):
                hooks.append((module, fill(path)))
        with before_calls(hooks):
            yield


def _from_config(factory: Any, config: Any, *, has_caches: bool = False) -> Any:
    """A model of a class with untrained parameters, in evaluation, without gradients and (else) without caches."""
    config = copy.deepcopy(config)
    model = from_config(factory, config, dtype=COMPUTE).eval()
    for module in model.modules():
        module_config: Any = getattr(module, "config", None)
        if not has_caches and hasattr(module_config, "use_cache"):
            module_config.use_cache = False
    return model.requires_grad_(requires_grad=False)


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """Name of a shared parameter -> all its names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: group for group in names.values() if len(group) > 1 for name in group}


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules that are built in this context get parameters on the meta device, and buffers with their values.

    Not thread-safe: `nn.Module.register_parameter` is replaced for the whole process while the context lasts.
    """
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param)
        if param is not None and not param.is_meta:
            module._parameters[name] = type(param)(param.to("meta"), requires_grad=param.requires_grad)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


@contextlib.contextmanager
def _no_progress() -> Iterator[None]:
    """No progress bars of transformers."""
    from transformers.utils import logging  # optional

    active = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if active:
            logging.enable_progress_bar()
