"""How `from_pretrained` opens a folder that secateur saved: the plug-in that transformers calls while loading.

The manifest in config.json (`quantization_config`, method `secateur`) lists the changes; the skeleton is resized on
the meta device before its weights load, and packed weights are unpacked as they load. Then the model gets the schedule
of tokens that it was saved with. Afterwards it is an ordinary model: it trains, casts and saves as any other, and
`save_pretrained` writes the manifest again.
"""

import math
from collections.abc import Mapping
from typing import Any

from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from secateur.errors import ModelError
from secateur.torch.base import manifest
from secateur.torch.base.manifest import Changes
from secateur.torch.files import zero_packing
from secateur.torch.files.completeness import check_elements, check_flag, check_initialised, check_types
from secateur.torch.files.safetensors_header import Entry, read_entries
from secateur.torch.shrink.size_attributes import is_size
from secateur.torch.tokens.entry import entry_of, install_entry, read_entry

METHOD = "secateur"
FORMAT = 1
NOTE = "This checkpoint was pruned by secateur: `pip install secateur`, then `import secateur` before from_pretrained"


class SecateurConfig(QuantizationConfigMixin):
    """The manifest as transformers keeps it in a config.

    changes: `Changes.to_json()`.
    packed: whether the weight files hold packed tensors.
    format: the format of the manifest; ModelError for any but `FORMAT`.
    checksum: of the changes and of `tokens`, as it was written; checked once the model is loaded.
    tokens: the schedule of tokens that the model runs with, see `secateur.torch.tokens.entry`; None for none.
    """

    def __init__(
        self,
        changes: Any = None,
        *,
        packed: bool = False,
        format: int = FORMAT,
        checksum: str | None = None,
        tokens: Any = None,
        **unknown: Any,
    ) -> None:
        unknown.pop("quant_method", None)
        unknown.pop("note", None)
        if type(format) is not int or format != FORMAT:
            raise ModelError(f"the manifest has format {format!r}; this version of secateur reads {FORMAT}")
        if unknown:
            raise ModelError(f"the manifest has the unknown entry {sorted(unknown)[0]!r}; a newer secateur may read it")
        if type(packed) is not bool:
            raise ModelError(f"the manifest's 'packed' is {packed!r}, expected true or false")
        self.quant_method = METHOD
        self.format = FORMAT
        self.note = NOTE
        self.packed = packed
        read = Changes.from_json({} if changes is None else changes)
        self.changes = read.to_json()
        self.tokens = tokens
        if tokens is not None:
            read_entry(tokens)
        self.checksum = read.checksum(tokens) if checksum is None else checksum

    def get(self, key: str, default: Any = None) -> Any:
        """`dict.get`: transformers takes this object for a dict when it loads with the config of a live model."""
        return getattr(self, key, default)


class Unpack(ConversionOps):
    """Turns the bits and values of a packed weight back into the weight while a model loads."""

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the unpacked tensor under the full name of its parameter."""
        name, model = kwargs["full_layer_name"], kwargs["model"]
        (bits,), (values,) = input_dict[zero_packing.BITS], input_dict[zero_packing.VALUES]
        shape = tuple(model.get_parameter_or_buffer(name).shape)
        return {name: zero_packing.unpack(bits, values, shape)}


class SecateurQuantizer(HfQuantizer):
    """The hooks of `from_pretrained`; nothing here quantizes."""

    requires_calibration = False
    fitted: Changes
    strict: bool
    """Whether the model has the class that was saved, so that the files must hold all its weights."""

    def update_attn_implementation(self, config: Any) -> Any:
        """Give the config the numbers that build the stock skeleton, before the model is built."""
        return start_config(config, self._changes())

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        saved = getattr(model.config, "architectures", None) or ()
        self.strict = type(model).__name__ in saved
        if self.quantization_config.tokens is not None and not self.strict:
            raise ModelError(
                f"{model.name_or_path or 'the folder'} holds a {saved[0] if saved else 'model'} with a schedule of "
                f"tokens, and a {type(model).__name__} may read tokens that it leaves out; load the class that was "
                "saved"
            )
        self.fitted = self._changes().fit(model, model.base_model_prefix, strict=self.strict)
        manifest.apply(model, self.fitted, is_size)
        files = kwargs.get("checkpoint_files")
        check_files(model, files, self.fitted.shapes, packed=self.quantization_config.packed)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Raise ModelError; the loader asks when a weight has another shape than the model, to fill in random ones."""
        shape = tuple(model.get_parameter_or_buffer(param_name).shape)
        raise ModelError(
            f"{param_name} has another shape in the checkpoint than {shape}, which its manifest and class give; "
            "`ignore_mismatched_sizes` would fill it with random numbers, so load it as saved and change it after"
        )

    def get_weight_conversions(self) -> list[Any]:
        """Return the conversion of packed weights, if the files hold any."""
        if not self.quantization_config.packed:
            return []
        return [WeightConverter([zero_packing.BITS, zero_packing.VALUES], "", [Unpack()])]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        source = model.name_or_path or "the folder"
        if self.strict:
            check_initialised(source, model)
        manifest.take_buffers(model, self.fitted)
        manifest.set_configs(model, self.fitted)
        tokens = self.quantization_config.tokens
        self._changes().check(self.quantization_config.checksum, source, tokens)
        for name in ("hf_quantizer", "quantization_method", "is_quantized"):
            vars(model).pop(name, None)
        for module in model.modules():
            config = vars(module).get("config")
            if config is not None:
                vars(config).pop("_is_quantized", None)
        check_types(source, model)
        conversions = getattr(model, "_weight_conversions", None)
        if conversions is not None:
            model._weight_conversions = [c for c in conversions if not _unpacks(c)]
        manifest.remember(model, self.fitted)
        install_entry(model, tokens)
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
    """Set the numbers that build the stock skeleton on a config, in place, and return the config."""
    vars(config).pop("transformers_weights", None)
    for path, values in changes.base.items():
        part = config
        for name in path.split(".") if path else ():
            part = getattr(part, name, None)
        manifest.set_config(part, values, path)
    return config


def _unpacks(conversion: Any) -> bool:
    return any(isinstance(op, Unpack) for op in getattr(conversion, "operations", ()))


def attach(model: Any, changes: Changes) -> None:
    """Put the manifest into the model's config, so that everything that saves the model saves the manifest too."""
    tokens = entry_of(model)
    if changes or tokens is not None:
        model.config.quantization_config = SecateurConfig(changes.to_json(), tokens=tokens)
    else:
        vars(model.config).pop("quantization_config", None)


def check_files(model: Any, files: Any, shapes: Mapping[str, tuple[int, ...]], *, packed: bool) -> None:
    """Raise ModelError for weight files that are pickles, are damaged, or hold other sizes than the manifest says."""
    prefix = model.base_model_prefix + "."
    held: list[Entry] = []
    for path in files or ():
        if not str(path).endswith(".safetensors"):
            raise ModelError(f"{path} is no safetensors file; secateur never opens pickled weights")
        entries = read_entries(path)
        check_flag(path, entries, packed=packed)
        held += entries.values()
        for name, entry in entries.items():
            plain = name.removesuffix(zero_packing.BITS)
            names = (plain, prefix + plain, plain.removeprefix(prefix))
            expected = next((shapes[n] for n in names if n in shapes), None)
            if expected is not None and not _fits(entry, expected, is_bits=name != plain):
                raise ModelError(f"{path} holds {name} as {entry.shape}, but its manifest says {plain} is {expected}")
    if files:
        check_elements(model.name_or_path or "the folder", model, held)


def _fits(entry: Entry, shape: tuple[int, ...], *, is_bits: bool) -> bool:
    """Whether an entry of a file is a tensor of that shape, or the bits of such a tensor when it is packed."""
    if is_bits:
        return entry.shape == (-(-math.prod(shape) // 8),) and entry.dtype == "U8"
    return entry.shape == shape


def register() -> None:
    """Make `quant_method: secateur` known to transformers; a second call changes nothing."""
    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(METHOD)(SecateurQuantizer)
    if METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(METHOD)(SecateurConfig)


register()
