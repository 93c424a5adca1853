"""What a model folder claims, held against what its weight files hold: counts and sizes before a model is built, and
that no weight is left to chance after it is loaded.

Transformers draws weights that the files lack at random, leaves out those that the model lacks, and only logs both.
"""

import contextlib
import copy
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from secateur.errors import ModelError
from secateur.torch.base.expected_errors import EXPECTED
from secateur.torch.base.manifest import named_tensors
from secateur.torch.files.safetensors_header import Entry
from secateur.torch.files.zero_packing import BITS

NewHead = Callable[[Sequence[str]], None]
"""Gets the names of the tensors of an untrained head, in order; without one, an untrained head is an error."""

_COUNTS = re.compile(r"(layers?|depths?|blocks?|stages?|experts?|quantizers|codebooks|towers?)$")
"""Keys of configs for how often a module is repeated."""
_LABELS = ("num_labels", "_num_labels")
_FREE_COUNT, _FREE_ELEMENTS = 1024, 2**26
"""What a config may claim whatever its files hold: repetitions, and elements (256 MB in float32)."""
_SHOWN = 3
"""How many names an error lists."""


# -- before a model is built ------------------------------------------------------------------------------------------


def check_counts(source: object, config: Mapping[str, Any], entries: Mapping[str, Entry]) -> None:
    """Raise ModelError where a config repeats modules more often than its tensors allow, or has too many labels.

    config: what `config.json` holds. Each layer has a tensor, unless layers share their weights.
    """
    most = {"modules": 4 * len(entries) + _FREE_COUNT, "labels": _held(entries.values()) + _FREE_COUNT}
    for key, value in _numbers(config):
        what = "labels" if key in _LABELS else "modules" if _COUNTS.search(key) else ""
        if what and value > most[what]:
            raise ModelError(
                f"the config of {source} claims {key} {value}, but its files hold {len(entries)} tensors, which is too "
                "few for that; copy or save the model again"
            )


def check_elements(source: object, model: nn.Module, entries: Iterable[Entry]) -> None:
    """Raise ModelError when a model (on any device) has many more elements than the weight files hold."""
    size = sum({id(tensor): tensor.numel() for tensor in named_tensors(model).values()}.values())
    held = _held(entries)
    if size > 2 * held + _FREE_ELEMENTS:
        raise ModelError(
            f"the config of {source} describes a {type(model).__name__} of {size} elements, but its files hold {held}; "
            "copy or save the model again"
        )


def check_config(source: object, factory: Any, config: Any, entries: Mapping[str, Entry]) -> None:
    """`check_elements` of the model that a class builds from a config, before it takes memory."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = from_config(factory, config)
    except EXPECTED:  # loading will say it, in the words of transformers
        return
    check_elements(source, model, entries.values())


def from_config(factory: Any, config: Any, **options: Any) -> Any:
    """A model of a class, or of the class that an Auto class finds, from a config. No code of a config runs."""
    if hasattr(factory, "_from_config"):
        return factory._from_config(config, **options)
    return factory.from_config(config, trust_remote_code=False, **options)


def _held(entries: Iterable[Entry]) -> int:
    """How many elements of weights the entries may hold: 8 in an integer, for bits of packed and quantised weights."""
    return sum(math.prod(entry.shape) * (1 if entry.dtype.startswith(("F", "BF")) else 8) for entry in entries)


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, int]]:
    """Every whole number of JSON values with the key it stands under, lists included."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _numbers(item, str(name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item, key)
    elif type(value) is int:
        yield key, value


# -- after it is loaded -----------------------------------------------------------------------------------------------


def from_pretrained(factory: Any, source: Any, *, new_head: NewHead | None = None, **options: Any) -> Any:
    """`factory.from_pretrained`, but ModelError where transformers would leave weights to chance: see `check_report`.

    With `output_loading_info=True` among the options: the model and the report, as in transformers.
    """
    reported = options.pop("output_loading_info", False)
    with without_bars():
        model, report = factory.from_pretrained(source, output_loading_info=True, **options)
    check_report(source, model, report, new_head)
    return (model, report) if reported else model


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """A context in which transformers shows no bars, whose length in files and tensors says little."""
    import transformers  # optional: plain PyTorch modules do not need it

    shows = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shows:
            transformers.logging.enable_progress_bar()


def check_report(source: object, model: Any, report: Mapping[str, Any], new_head: NewHead | None = None) -> None:
    """Raise ModelError for weights that transformers drew at random, or left out although they belong to the model.

    report: of `from_pretrained(output_loading_info=True)`.
    new_head: gets the names of random weights of a head; without it, they are an error too.
    """
    missing = set(report["missing_keys"])
    missing -= computed(model, missing).keys()
    random = sorted({*missing, *(mismatch[0] for mismatch in report["mismatched_keys"])})
    head = set() if new_head is None else set(_of_head(model, random))
    check_missing(source, model, [name for name in random if name not in head])
    check_types(source, model)
    check_unexpected(source, model, report["unexpected_keys"])
    if new_head is not None and random:
        new_head(random)


def computed(model: Any, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Of these parameters those that the class computes (sinusoidal positions), so that no file has to hold them.

    The class never trains them, and gives them the same values whatever the random numbers are. Returns these values.
    """
    parameters = dict(model.named_parameters())
    found = {name: value for name in names if name in parameters for value in _computed(model, name)}
    if not found:
        return found
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            built = dict(type(model)(model.config).named_parameters())
    except EXPECTED:  # a class that cannot be built on the meta device
        return {}
    return {name: value for name, value in found.items() if name in built and not built[name].requires_grad}


def _computed(model: Any, name: str) -> list[torch.Tensor]:
    """The values of a parameter, if its class fills it twice with the same numbers that are not all one number."""
    path, _, own = name.rpartition(".")
    drawn = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for seed in (1, 2):
            torch.manual_seed(seed)
            module = copy.deepcopy(model.get_submodule(path)).to_empty(device="cpu", recurse=False)
            getattr(module, own).fill_(seed)
            model._init_weights(module)
            drawn.append(getattr(module, own).detach())
    first, second = drawn
    is_computed = torch.equal(first, second) and not bool((first == first.flatten()[0]).all())
    return [first] if is_computed else []


def check_missing(source: object, model: Any, missing: Iterable[str]) -> None:
    """Raise ModelError when there are missing weights: it names them."""
    if names := sorted(missing):
        head = "; for an untrained head, pass new_head=print" if len(_of_head(model, names)) == len(names) else ""
        raise ModelError(
            f"{source} lacks {_listed(names)} ({_tensors(names)} of {type(model).__name__}), which would be random; "
            f"copy or save the model again{head}"
        )


def check_unexpected(source: object, model: Any, unexpected: Iterable[str]) -> None:
    """Raise ModelError when a checkpoint holds tensors inside the model for which it has no place: it names them.

    Those are further elements of a list of modules, and tensors of a module without children, such as a bias. Heads
    and whole modules that the class does not have are not among them.
    """
    modules = dict(model.named_modules())
    if names := sorted(name for name in unexpected if _inside(modules, model.base_model_prefix, name)):
        raise ModelError(
            f"{source} holds {_tensors(names)} that {type(model).__name__}, as its config describes it, has no place "
            f"for: {_listed(names)}; copy or save the model again"
        )


def check_types(source: object, model: Any) -> None:
    """Raise ModelError when a file holds parameters as integers, unless another quantisation has made them so."""
    wrong = [name for name, p in model.named_parameters() if not (p.is_floating_point() or p.is_complex())]
    if wrong and not hasattr(model, "hf_quantizer"):
        raise ModelError(
            f"{source} holds {_tensors(wrong)} of {type(model).__name__} as integers: {_listed(sorted(wrong))}; "
            "copy or save the model again"
        )


def check_initialised(source: object, model: Any) -> None:
    """Raise ModelError for tensors that transformers' loader, which has just filled the model, made up."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    check_missing(
        source,
        model,
        (
            name
            for name, tensor in model.state_dict(keep_vars=True).items()
            if not (getattr(tensor, "_is_hf_initialized", False) or tensor.is_meta or name in tied)
            and not any(pattern.search(name) for pattern in ignored)
        ),
    )


def check_flag(source: object, names: Iterable[str], *, packed: bool) -> None:
    """Raise ModelError when a file holds packed weights and its config says that it holds none."""
    if not packed and (name := next((name for name in names if name.endswith(BITS)), None)):
        raise ModelError(
            f"{source} holds packed weights ({name}), but its config says that none are; copy or save the model again"
        )


def _of_head(model: Any, names: Iterable[str]) -> list[str]:
    """The names that belong to a head or a pooler, which a class may have and a checkpoint of another class lack.

    A class whose base model has another name than its prefix says has no head that could be told apart.
    """
    prefix = model.base_model_prefix
    if prefix and not isinstance(getattr(model, prefix, None), nn.Module):
        return [name for name in names if "pooler" in name.split(".")]
    return [name for name in names if not name.startswith(prefix + ".") or "pooler" in name.split(".")]


def _inside(modules: Mapping[str, nn.Module], prefix: str, name: str) -> bool:
    """Whether a tensor lies beyond the end of a list of modules, or in a module that has no others inside it."""
    for name_here in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
        path = name_here.rpartition(".")[0]
        below = name_here.rpartition(".")[2]
        while path and path not in modules:
            path, _, below = path.rpartition(".")
        if not path:
            continue
        module = modules[path]
        if isinstance(module, nn.ModuleList | nn.Sequential) and below.isdigit():
            return True
        if not any(True for _ in module.children()) and any(True for _ in module.parameters(recurse=False)):
            return True
    return False


def _tensors(names: Sequence[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
