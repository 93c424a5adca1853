"""Turns a pruned model into one whose sparse layers run on the kernels, and reports which layers are faster and why
others stay dense."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.kernels.format import ROUNDS_ACTIVATIONS, VALUES, check_activations
from secateur.kernels.native import isa, load_native
from secateur.kernels.packing import pack
from secateur.runtime.layers.attention import use_attention
from secateur.runtime.layers.fused import Gated, LinearAddNorm, PrimitiveNorm, use_fused
from secateur.runtime.layers.linear import ByTokens, SparseLinear
from secateur.runtime.layers.tuning import choose, full_packings, unmeasured
from secateur.runtime.program.find_fusions import Fusions, find_fusions
from secateur.runtime.program.from_fx import Traced
from secateur.runtime.run.install_chain import ChainOutcome, chain_blocks
from secateur.runtime.run.install_decoder_step import step_blocks
from secateur.torch.base.batches import arguments
from secateur.torch.tokens.install import tokens_of

MIN_ZEROS = 0.3
"""A layer with a smaller share of zeros is not worth a measurement."""
STEPPED = "blocks of a decoder at one token"
FUSED: Mapping[type, str] = {LinearAddNorm: "residuals and norms", Gated: "gates", PrimitiveNorm: "norms"}
"""What the report calls the kinds of fused modules."""


@dataclass(frozen=True)
class LayerReport:
    """What became of one linear layer.

    - `name`: its path in the model
    - `shape`: (out, in)
    - `density`: the share of weights that are not zero
    - `format`: the format it is packed in, or 'dense'
    - `reason`: why it stays dense, or ''
    - `dense_us`, `sparse_us`: microseconds of a call, as measured for the choice; 0 where nothing was timed
    - `dense_bytes`, `packed_bytes`: the size of its weight
    - `rounds_activations`: its inputs are rounded to 8 bits at each call
    - `full`: it has few zeros and is packed with all its weights
    """

    name: str
    shape: tuple[int, int]
    density: float
    format: str
    reason: str
    dense_us: float = 0.0
    sparse_us: float = 0.0
    dense_bytes: int = 0
    packed_bytes: int = 0
    rounds_activations: bool = False
    full: bool = False


@dataclass(frozen=True)
class Report:
    """What `compile` did.

    - `layers`: a report for each linear layer
    - `isa`: the instruction set of the kernels
    - `tokens`, `threads`: the size of a call and the number of threads that the choice was made for
    - `also`: the reports for other sizes of call
    - `fused`: how often each kind of operation was fused
    - `blocks`: how many blocks run as one call
    - `apart`: why other blocks do not, or ''
    """

    layers: tuple[LayerReport, ...]
    isa: str
    tokens: int
    threads: int
    also: tuple[Report, ...] = ()
    fused: Mapping[str, int] = field(default_factory=dict)
    blocks: int = 0
    apart: str = ""

    def summary(self) -> str:
        """One sentence for each size of call (how many layers are faster, by which measured factor, and why others are
        not), and what was fused."""
        at_other_sizes = [f" At {report.tokens} tokens: {report._sentence()}" for report in self.also]
        fused = ", ".join(f"{count} {kind}" for kind, count in self.fused.items() if count)
        parts = [self._sentence(), *at_other_sizes, f" Fused: {fused}." if fused else ""]
        if self.blocks:
            parts.append(f" {self.blocks} blocks run as one call.")
        elif self.apart:
            parts.append(f" No blocks run as one call: {self.apart}.")
        return "".join(parts)

    def _sentence(self) -> str:
        sparse = [layer for layer in self.layers if layer.format != "dense" and not layer.full]
        reasons = Counter(layer.reason for layer in self.layers if layer.format == "dense")
        why = "; ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        if sparse:
            return self._sped_up(sparse) + self._rounded() + (f"; dense stay {why}." if why else ".")
        start = f"No layer of {len(self.layers)} runs on the sparse kernels{self._rounded()}"
        return start + (f" ({why})." if why else ".")

    def _sped_up(self, sparse: Sequence[LayerReport]) -> str:
        dense_us, dense_bytes = sum(layer.dense_us for layer in sparse), sum(layer.dense_bytes for layer in sparse)
        gain = dense_us / max(1e-9, sum(layer.sparse_us for layer in sparse))
        kept = sum(layer.density * layer.dense_bytes for layer in sparse) / dense_bytes
        size = sum(layer.packed_bytes for layer in sparse) / dense_bytes
        speed = f"{gain:.1f} times as fast as dense at {self.tokens} tokens on {self.threads} thread(s) and "
        rounded = sum(layer.rounds_activations for layer in sparse)
        return (
            f"{len(sparse)} of {len(self.layers)} linear layers ({kept:.0%} of their weights kept) run on the "
            f"{self.isa} kernels, {speed if dense_us else 'not timed, '}at {size:.2f} of the dense size"
        ) + (f", {rounded} of them with activations rounded to 8 bits at each call" if rounded else "")

    def _rounded(self) -> str:
        full = [layer for layer in self.layers if layer.full]
        dense_us = sum(layer.dense_us for layer in full)
        times = f" and {dense_us / sum(layer.sparse_us for layer in full):.1f} times as fast" if dense_us else ""
        return f"; {len(full)} with few zeros, or a shared weight, only rounded{times}" if full else ""


@dataclass(frozen=True)
class _Settings:
    """The arguments of `compile` that decide how a layer is packed; `full_value` is its argument `dense`."""

    value: str
    activations: str
    full_value: str
    measure: bool
    use_cache: bool


def compile(
    model: nn.Module,
    *,
    tokens: int | Sequence[int] = 128,
    value: str = "float32",
    activations: str = "float32",
    dense: str = "float32",
    measure: bool = True,
    cache: bool = True,
    example: Any = None,
) -> nn.Module:
    """A copy of `model` whose sparse linear layers run on the kernels; weights that stay dense are shared, not copied.

    Works under torch.inference_mode, torch.compile, `generate` and `pipeline`. The result has `.secateur_report` and,
    where the class has no such name, `.summary()`.

    Args:
        model: a torch module on the CPU in float32; put in eval mode in the copy.
        tokens: rows that a layer sees in a typical call (batch times sequence length); the choice is made for it.
            Several numbers, such as (1, 128) for a decoder's steps and its prompt: a layer that runs best in another
            packing at each number holds all of these variants, the dense layer if it is among them, and takes the
            variant for the size of the call.
        value: how kept weights are stored. 'float32'; 'bfloat16' halves the memory at three significant digits.
            'float16' (blocks of 4 or 8 rows, or N:M at few tokens) and 'int8' (these, or any pattern at up to 8 tokens;
            one scale a row) round as well: check the model's quality.
        activations: 'int8' allows layers whose zeros come in blocks of 1 x 4 to round their inputs to 8 bits at each
            call, with a scale a token: 1 to 2% of error. Only with value 'int8'; the summary says how many layers do.
        dense: how layers with few zeros, and those that share their weight, are stored for calls of up to 16 tokens:
            'float32', as they are; 'bfloat16', 'float16' or 'int8', one scale a row, for decoders, whose output layer
            takes much of a step. A weight that is shared with an embedding is then in memory twice.
        measure: time each kind of layer dense and sparse and keep the faster; False packs every sparse layer.
        cache: keep measurements in the user's cache folder (see `secateur.runtime.layers.tuning`).
        example: a batch as for `secateur.open`; with it, activations, residuals and norms are fused into the
            packed layers before them, and blocks of an encoder run as one call where they can.

    Raises:
        ValueError: when `tokens` is not positive, or `value`, `activations` or `dense` is unknown or they do not go
            together.
        ModelError: when the model cannot be traced on `example`.
    """
    counts = sorted({tokens} if isinstance(tokens, int) else set(tokens))
    if not counts or counts[0] < 1:
        raise ValueError(f"tokens must be positive, not {tokens}")
    for name, kind in (("value", value), ("dense", dense)):
        if kind not in VALUES:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, VALUES))}, not {kind!r}")
    check_activations(value, activations)
    result = share_copy(model).eval()
    example = None if example is None else arguments(model, example)
    variants, reports = _pack_layers(result, counts, _Settings(value, activations, dense, measure, cache))
    traced = Traced(result, example) if variants and example is not None else None
    fusions = Fusions() if traced is None else find_fusions(traced)
    result, fused = _put_layers(result, variants, counts, fusions)
    chains = ChainOutcome()
    if tokens_of(result) is not None:
        chains.reason = "a schedule takes tokens away inside of them"
    elif traced is not None and example is not None and load_native() is not None:
        chains = chain_blocks(result, traced, example, counts[-1], measure=measure)
        norms = {path: fusion for path, fusion in fusions.modules.items() if isinstance(fusion, PrimitiveNorm)}
        fused[STEPPED], reason = step_blocks(result, traced, norms)
        chains.reason = "" if fused[STEPPED] else reason or chains.reason
    result.secateur_report = _report(reports, chains, fused)
    if not hasattr(type(result), "summary"):
        result.summary = result.secateur_report.summary
    return result


def _report(reports: Mapping[int, list[LayerReport]], chains: ChainOutcome, fused: Mapping[str, int]) -> Report:
    """The report for the smallest size of call, with those for other sizes in it."""
    sizes = chains.packed_bytes
    first, *others = (
        Report(
            tuple(replace(layer, packed_bytes=sizes.get(layer.name, layer.packed_bytes)) for layer in layers),
            isa(),
            tokens,
            torch.get_num_threads(),
        )
        for tokens, layers in reports.items()
    )
    return replace(first, also=tuple(others), fused=fused, blocks=chains.blocks, apart=chains.reason)


Variants = dict[str, list[nn.Module]]
"""The paths of layers that are packed, each with its module for each size of call: a SparseLinear or the layer."""


def _pack_layers(
    model: nn.Module, counts: Sequence[int], settings: _Settings
) -> tuple[Variants, dict[int, list[LayerReport]]]:
    """Decide for each linear layer and number of tokens whether it is packed, and pack it; nothing is replaced yet."""
    shared = _shared_parameters(model)
    reports: dict[int, list[LayerReport]] = {tokens: [] for tokens in counts}
    variants: Variants = {}
    for name, module in model.named_modules():
        weight = linear_weight(module)
        if weight is None:
            continue
        modules: list[nn.Module] = []
        for tokens in counts:
            report, packed = _pack_layer(
                name, module, weight, is_shared=id(module.weight) in shared, tokens=tokens, settings=settings
            )
            reports[tokens].append(report)
            modules.append(module if packed is None else packed)
        if any(variant is not module for variant in modules):
            variants[name] = modules
    return variants, reports


def _pack_layer(
    name: str, module: nn.Module, weight: torch.Tensor, *, is_shared: bool, tokens: int, settings: _Settings
) -> tuple[LayerReport, SparseLinear | None]:
    """The report of a layer for calls of so many tokens, and the packed layer, or None where it stays dense."""
    shape = (weight.shape[0], weight.shape[1])
    reason = reason_dense(module, weight)
    if reason:
        return LayerReport(name, shape, 1.0, "dense", reason), None
    array = np.ascontiguousarray(weight.detach().numpy())
    density = np.count_nonzero(array) / array.size
    has_few_zeros = bool(density > 1 - MIN_ZEROS)
    full = (is_shared or has_few_zeros) and bool(full_packings(tokens, settings.full_value))
    value = settings.full_value if full else settings.value
    if is_shared and not full:
        return LayerReport(name, shape, 1.0, "dense", "because other modules share their weights"), None
    if has_few_zeros and not full:
        return LayerReport(name, shape, density, "dense", f"with fewer than {MIN_ZEROS:.0%} zeros"), None
    if value == "int8" and not np.isfinite(array).all():
        return LayerReport(name, shape, density, "dense", "because int8 holds no NaN or infinity"), None
    bias = None if module.bias is None else module.bias.detach()
    wanted: dict[str, Any] = {"tokens": tokens, "value": value, "activations": settings.activations, "full": full}
    if settings.measure:
        choice = choose(array, bias, **wanted, use_cache=settings.use_cache)
    else:
        choice = unmeasured(array, **wanted)
    times = (choice.dense_us, choice.sparse_us)
    if choice.packing is None:
        reason = f"because they measured no faster {'rounded' if full else 'sparse'}"
        if not choice.possible:
            reason = f"because no format stores {value} for their pattern and {tokens} tokens"
        return LayerReport(name, shape, density, "dense", reason, *times), None
    packed = torch.from_numpy(pack(array, **choice.packing))
    format = choice.packing["format"]
    sizes = (array.nbytes, packed.numel())
    report = LayerReport(name, shape, density, format, "", *times, *sizes, format in ROUNDS_ACTIVATIONS, full)
    return report, SparseLinear(packed, bias)


def reason_dense(module: nn.Module, weight: torch.Tensor) -> str:
    """Why a linear layer cannot be packed, whatever its weights are; '' where it can."""
    if load_native() is None:
        return "for want of compiled kernels"
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        return f"because their weights are {weight.dtype} on {weight.device}, not float32 on the CPU"
    if module._forward_hooks or module._forward_pre_hooks:
        return "because hooks hang on them"
    return ""


def _put_layers(
    model: nn.Module, variants: Variants, counts: Sequence[int], fusions: Fusions
) -> tuple[nn.Module, dict[str, int]]:
    """Put the packed layers into a model and fuse what follows them; the model, and how often each kind was fused."""
    fused = {"activations": _fuse_activations(model, variants, fusions)}
    for name, modules in variants.items():
        model = put_module(model, name, _one_or_by_tokens(modules, counts))
    fused |= _fuse_modules(model, variants, fusions)
    if variants:
        use_attention(model)
    return model.eval(), fused


def _fuse_activations(model: nn.Module, variants: Variants, fusions: Fusions) -> int:
    """Move activations into the packed layers before them; returns how many."""
    count = 0
    for name, (path, activation) in fusions.activations.items():
        modules = variants.get(name, [])
        hooks = model.get_submodule(path)._forward_hooks  # hooks at rest count as well: the module is removed
        if modules and not hooks and all(isinstance(variant, SparseLinear) for variant in modules):
            for variant in modules:
                variant.activate(activation)
            put_module(model, path, nn.Identity())
            count += 1
    return count


def _fuse_modules(model: nn.Module, variants: Variants, fusions: Fusions) -> dict[str, int]:
    """Let modules run as one call where their layers are packed; returns how many of each kind."""
    counts = dict.fromkeys(FUSED.values(), 0)
    for path, fusion in fusions.modules.items():
        layers = {LinearAddNorm: ("linear",), Gated: ("gate", "up")}.get(type(fusion), ())
        names = [f"{path}.{getattr(fusion, layer)}" for layer in layers]
        if any(name not in variants for name in names):
            continue
        # A Gated holds its activation itself.
        activation = fusions.activations.get(names[0]) if isinstance(fusion, LinearAddNorm) else None
        if activation is None or isinstance(model.get_submodule(activation[0]), nn.Identity):
            use_fused(model.get_submodule(path), fusion)
            counts[FUSED[type(fusion)]] += 1
    return counts


def _one_or_by_tokens(modules: Sequence[nn.Module], counts: Sequence[int]) -> nn.Module:
    """One module for a layer's variants at each number of tokens: the variant itself where all are the same."""
    first = modules[0]

    def is_same(variant: nn.Module) -> bool:
        are_packed = isinstance(first, SparseLinear) and isinstance(variant, SparseLinear)
        return variant is first or (are_packed and torch.equal(first.packed, variant.packed))

    return first if all(map(is_same, modules)) else ByTokens(modules, counts)


def put_module(model: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """Set the module at a dotted path; returns the model, which is the module itself where the path is ''."""
    if not path:
        return module
    parent, _, last = path.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
    return model


def share_copy(model: nn.Module) -> nn.Module:
    """A copy of the module tree that shares every parameter and buffer with the original."""
    memo: dict[int, object] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


def linear_weight(module: nn.Module) -> torch.Tensor | None:
    """The weight (out, in) of a plain nn.Linear or a transformers Conv1D; None for anything else.

    Subclasses are left alone: they may use their weight in other ways than `forward`.
    """
    if type(module) is nn.Linear:
        return module.weight
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        return module.weight.t()
    return None


def _shared_parameters(model: nn.Module) -> set[int]:
    """The ids of parameters that more than one module holds, such as an embedding shared with the output."""
    holders = Counter(id(p) for _, m in model.named_modules() for p in m.parameters(recurse=False))
    return {address for address, count in holders.items() if count > 1}
