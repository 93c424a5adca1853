"""Open a module, a folder or a hub id as a TorchHost."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils import prune

from secateur.arrays import to_numpy
from secateur.errors import ModelError, SecateurError
from secateur.layout import Layout
from secateur.plan import Plan
from secateur.torch.base import remote_code
from secateur.torch.base.manifest import changes_of
from secateur.torch.data.example import example_for
from secateur.torch.files.completeness import NewHead, from_pretrained
from secateur.torch.files.hub_files import cached_folder
from secateur.torch.files.safetensors_header import WEIGHTS
from secateur.torch.files.saving import PICKLED, check_claims, check_folder, first_sentence, model_class
from secateur.torch.host import TorchHost
from secateur.torch.stats.collect import Loss

PLACE = ("revision", "token", "cache_dir", "local_files_only")
"""Options of `from_pretrained` that say where files come from."""


def open_module(
    model: nn.Module, example: Any = None, *, layout: Layout | None = None, loss: Loss | None = None
) -> TorchHost:
    """A Host of a module; masks of `torch.nn.utils.prune` are made permanent and become `host.plan`."""
    plan = _take_masks(model)
    if example is None:
        example = example_for(model)
    return TorchHost(model, example, layout=layout, loss=loss, plan=plan, changes=changes_of(model))


def open_folder(
    source: str | Path,
    example: Any = None,
    *,
    layout: Layout | None = None,
    loss: Loss | None = None,
    task: str | None = None,
    new_head: NewHead | None = None,
    **options: Any,
) -> TorchHost:
    """Load a Hugging Face folder or hub id with the class that its config names, and open it.

    task: the name of an Auto class without `AutoModelFor` (`SequenceClassification`, `CausalLM`), to load a checkpoint
        for another task than the task that it was saved for.
    new_head: see `load_model`.
    options: passed to `from_pretrained`.
    """
    model = load_model(source, task=task, new_head=new_head, **options)
    host = open_module(model, example, layout=layout, loss=loss)
    revision = options.get("revision")
    host.source = str(source) if revision is None else f"{source}@{revision}"
    return host


def load_model(
    source: str | Path, *, task: str | None = None, new_head: NewHead | None = None, **options: Any
) -> nn.Module:
    """Load a Hugging Face model from a folder, or from the hub or its cache.

    new_head: is called with the names of tensors that the files lack, when these are an untrained head (and pooler) for
        another task than that of the checkpoint. Without it they are an error, as is any other tensor that is missing.

    Raises:
        ModelError: with one sentence, when the source is no model, is damaged, has pickled weights only, or lacks
            weights, or needs Python code of its own without `trust_remote_code=True` among the options.
    """
    import transformers  # optional: plain PyTorch modules do not need it

    local = _is_folder(source)
    options["trust_remote_code"] = remote_code.stated(options.get("trust_remote_code"))
    try:
        folder = Path(source) if local else cached_folder(str(source), _options_of(options, PLACE))
        if folder is not None:
            check_folder(folder)
        config = transformers.AutoConfig.from_pretrained(source, **_options_of(options, (*PLACE, "trust_remote_code")))
        factory = find_class(transformers, config, task)
        weights_file = str(getattr(config, "transformers_weights", None) or "")
        if weights_file.endswith(".bin"):
            raise ModelError(PICKLED.format(source=source, file=weights_file))
        if folder is not None and not options["trust_remote_code"]:
            check_claims(folder, factory, config)
        model = from_pretrained(factory, source, new_head=new_head, **{**options, "use_safetensors": True})
    except SecateurError:
        raise
    except Exception as error:  # a damaged folder breaks transformers in many ways
        remote_code.check(source, error)
        if not local and isinstance(error, OSError) and "use_safetensors" in str(error):
            raise ModelError(PICKLED.format(source=source, file=f"no {WEIGHTS}")) from error
        raise _not_opened(source, error, "cannot be loaded", local=local) from error
    return model.eval()


def _not_opened(source: Any, error: Exception, what: str, *, local: bool) -> ModelError:
    """The sentence for a source that transformers could not read."""
    if not local and isinstance(error, OSError):
        return ModelError(
            f"{source} is no folder, and no model of that name could be loaded from the hub or its cache; pass a "
            f"folder, or check the name and the connection ({first_sentence(error)})"
        )
    return ModelError(f"{source} {what}: {first_sentence(error)}")


def read_config(source: str | Path, **options: Any) -> Any:
    """The configuration of a model folder or hub id; ModelError when transformers cannot read it."""
    import transformers  # optional: plain PyTorch modules do not need it

    local = _is_folder(source)
    options["trust_remote_code"] = remote_code.stated(options.get("trust_remote_code"))
    try:
        if local:
            check_folder(Path(source))
        return transformers.AutoConfig.from_pretrained(source, **_options_of(options, (*PLACE, "trust_remote_code")))
    except SecateurError:
        raise
    except Exception as error:  # a damaged config breaks transformers in many ways
        remote_code.check(source, error)
        raise _not_opened(source, error, "has a config that cannot be read", local=local) from None


def _is_folder(source: str | Path) -> bool:
    path = Path(source)
    if path.exists():
        return True
    if isinstance(source, Path) or str(source).startswith((".", "/", "~")) or str(source).count("/") > 1:
        raise ModelError(f"{source} does not exist; pass a model folder or a hub id such as org/name")
    return False


def _options_of(options: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: options[name] for name in names if name in options}


def find_class(transformers: Any, config: Any, task: str | None) -> Any:
    """The class that a config names, or the Auto class of a task."""
    if task is not None:
        factory = getattr(transformers, f"AutoModelFor{task}", None) or getattr(transformers, task, None)
        is_model = isinstance(factory, type) and issubclass(factory, transformers.PreTrainedModel)
        if not is_model and not hasattr(factory, "_model_mapping"):  # which every Auto class of models has
            raise ModelError(f"transformers has no AutoModelFor{task}; use a name such as SequenceClassification")
        return factory
    names = getattr(config, "architectures", None) or ()
    name = next((name for name in names if not isinstance(name, str) or hasattr(transformers, name)), None)
    return transformers.AutoModel if name is None else model_class("the config", name)


def _take_masks(model: nn.Module) -> Plan | None:
    """Turn `weight_orig` and `weight_mask` of torch.nn.utils.prune into plain weights and a Plan."""
    masks: dict[str, np.ndarray] = {}
    for path, module in model.named_modules():
        for name in [n.removesuffix("_mask") for n, _ in module.named_buffers(recurse=False) if n.endswith("_mask")]:
            if f"{name}_orig" in module._parameters:
                masks[f"{path}.{name}" if path else name] = to_numpy(getattr(module, f"{name}_mask")).astype(bool)
                try:
                    with torch.no_grad():
                        prune.remove(module, name)
                except ValueError:
                    raise ModelError(
                        f"{path}.{name} has a mask but no hook of torch.nn.utils.prune that applies it; call "
                        "prune.custom_from_mask again, or multiply the mask in"
                    ) from None
    return Plan(masks=masks, provenance={"criterion": "torch.nn.utils.prune", "pattern": "element"}) if masks else None
