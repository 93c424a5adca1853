"""How `from_pretrained` opens a folder that secateur saved: the plug-in that transformers calls while loading.

The manifest in config.json (`quantization_config`, method `secateur`) says the changes; the skeleton is resized on
the meta device before its weights load, and packed weights are unpacked on the way. Afterwards the model is an
ordinary one: it trains, casts and saves as any other, and `save_pretrained` writes the manifest again.
"""

from collections.abc import Mapping
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from secateur.errors import ModelError
from secateur.torch.base import manifest as C
from secateur.torch.base.manifest import Changes
from secateur.torch.files import zero_packing as packed
from secateur.torch.files.safetensors_header import read_entries
from secateur.torch.shrink.size_attributes import is_size

METHOD = "secateur"
FORMAT = 1
NOTE = "This checkpoint was pruned by secateur: `pip install secateur`, then `import secateur` before from_pretrained"


class SecateurConfig(QuantizationConfigMixin):
    """The manifest as transformers keeps it in a config.

    changes: `Changes.to_json()`. packed: whether the weight files hold packed tensors.
    """

    def __init__(self, changes: Any = None, packed: bool = False, format: int = FORMAT, **unknown: Any) -> None:
        unknown.pop("quant_method", None)
        unknown.pop("note", None)
        if format != FORMAT:
            raise ModelError(f"the manifest has format {format!r}; this version of secateur reads {FORMAT}")
        if unknown:
            raise ModelError(f"the manifest has the unknown entry {sorted(unknown)[0]!r}; a newer secateur may read it")
        self.quant_method = METHOD
        self.format = FORMAT
        self.note = NOTE
        self.packed = bool(packed)
        self.changes = Changes.from_json(changes or {}).to_json()

    def get(self, key: str, default: Any = None) -> Any:
        """Entries as of a dict, which transformers takes this for when a live model's config is given to load with."""
        return getattr(self, key, default)


class Unpack(ConversionOps):
    """Turns bits and values back into the weight, while loading."""

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The unpacked tensor under the full name of its parameter."""
        name, model = kwargs["full_layer_name"], kwargs["model"]
        (bits,), (values,) = input_dict[packed.BITS], input_dict[packed.VALUES]
        shape = tuple(model.get_parameter_or_buffer(name).shape)
        return {name: packed.unpack(bits, values, shape)}


class SecateurQuantizer(HfQuantizer):
    """The hooks of `from_pretrained`; nothing here quantizes."""

    requires_calibration = False
    fitted: Changes

    def update_attn_implementation(self, config: Any) -> Any:
        """Give the config the numbers that build the stock skeleton, before the model is built."""
        return start_config(config, self._changes())

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        strict = type(model).__name__ in (getattr(model.config, "architectures", None) or ())
        self.fitted = self._changes().fit(model, model.base_model_prefix, strict)
        C.apply(model, self.fitted, is_size)
        check_files(model, kwargs.get("checkpoint_files"), self.fitted.shapes)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Asked by the loader when a weight has another shape than the model: never a reason for random weights."""
        shape = tuple(model.get_parameter_or_buffer(param_name).shape)
        raise ModelError(
            f"{param_name} has another shape in the checkpoint than {shape}, which its manifest and class give; "
            "`ignore_mismatched_sizes` would fill it with random numbers, so load it as saved and change it after"
        )

    def get_weight_conversions(self) -> list[Any]:
        """The conversion of packed weights."""
        if not self.quantization_config.packed:
            return []
        return [WeightConverter([packed.BITS, packed.VALUES], "", [Unpack()])]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        C.take_buffers(model, self.fitted)
        C.set_configs(model, self.fitted)
        for name in ("hf_quantizer", "quantization_method", "is_quantized"):
            vars(model).pop(name, None)
        for module in model.modules():
            config = vars(module).get("config")
            if config is not None:
                vars(config).pop("_is_quantized", None)
        conversions = getattr(model, "_weight_conversions", None)
        if conversions is not None:
            model._weight_conversions = [c for c in conversions if not _unpacks(c)]
        vars(model)[C.ATTRIBUTE] = self.fitted
        attach(model, self.fitted)
        return model

    def is_serializable(self) -> bool:
        """Models saved from here can be saved again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Pruned models train as any other."""
        return True

    def _changes(self) -> Changes:
        return Changes.from_json(self.quantization_config.changes)


def start_config(config: Any, changes: Changes) -> Any:
    """A config as it was read, given the numbers that build the stock skeleton; in place."""
    vars(config).pop("transformers_weights", None)
    for path, values in changes.base.items():
        place = config
        for name in path.split(".") if path else ():
            place = getattr(place, name, None)
        C.set_config(place, values, path)
    return config


def _unpacks(conversion: Any) -> bool:
    return any(isinstance(op, Unpack) for op in getattr(conversion, "operations", ()))


def attach(model: Any, changes: Changes) -> None:
    """Put the manifest into the model's config, so that whatever saves the model saves it."""
    if changes:
        model.config.quantization_config = SecateurConfig(changes.to_json())
    else:
        vars(model.config).pop("quantization_config", None)


def check_files(model: Any, files: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ModelError for weight files that are pickles, are damaged, or hold other sizes than the manifest says."""
    prefix = model.base_model_prefix + "."
    for path in files or ():
        if not str(path).endswith(".safetensors"):
            raise ModelError(f"{path} is no safetensors file; secateur never opens pickled weights")
        for name, entry in read_entries(path).items():
            plain = name.removesuffix(packed.BITS)
            expected = next(
                (shapes[n] for n in (plain, prefix + plain, plain.removeprefix(prefix)) if n in shapes), None
            )
            if expected is None:
                continue
            count = int(torch.Size(expected).numel())
            bits = entry.shape == (-(-count // 8),) and entry.dtype == "U8"
            fits = bits if name != plain else entry.shape == expected
            if not fits:
                raise ModelError(f"{path} holds {name} as {entry.shape}, but its manifest says {plain} is {expected}")


def register() -> None:
    """Make `quant_method: secateur` known to transformers; doing so again changes nothing."""
    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(METHOD)(SecateurQuantizer)
    if METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(METHOD)(SecateurConfig)


register()
