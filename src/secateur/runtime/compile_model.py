"""Turns a pruned model into one whose sparse layers run on the kernels, and reports what was sped up and
why not."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.kernels.native import isa, load_native
from secateur.kernels.packing import ROUNDS_ACTIVATIONS, VALUES, check_activations, pack
from secateur.runtime.layers.attention import use_attention
from secateur.runtime.layers.fused import Gated, LinearAddNorm, PrimitiveNorm, use_one_call
from secateur.runtime.layers.linear import ByTokens, SparseLinear
from secateur.runtime.layers.tuning import FormatChoice, choose, full_packings, unmeasured
from secateur.runtime.program.find_fusions import Fusions, fusions
from secateur.runtime.program.from_fx import Traced
from secateur.runtime.run.install_chain import ChainOutcome, chain_blocks
from secateur.runtime.run.install_decoder_step import step_blocks

MIN_ZEROS = 0.3  # a layer with fewer zeros is not worth a measurement


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer: `kept` dense for `reason`, or packed; times from the chooser's
    measurement. `full`: a layer with few zeros, packed with all its weights."""

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
    """What `compile` did, layer by layer, for calls of `tokens` tokens; `also` is the same for other sizes of call,
    `fused` how often what was fused into the layers, `blocks` how many blocks run as one call, and `apart` why others
    do not."""

    layers: tuple[LayerReport, ...]
    isa: str
    tokens: int
    threads: int
    also: tuple[Report, ...] = ()
    fused: Mapping[str, int] = field(default_factory=dict)
    blocks: int = 0
    apart: str = ""

    def summary(self) -> str:
        """One sentence for each size of call: how many layers were sped up, by how much as measured, and why the others
        were not."""
        more = [f" At {other.tokens} tokens: {other._sentence()}" for other in self.also]
        fused = ", ".join(f"{count} {what}" for what, count in self.fused.items() if count)
        parts = [self._sentence(), *more, f" Fused: {fused}." if fused else ""]
        if self.blocks:
            parts.append(f" {self.blocks} blocks run as one call.")
        elif self.apart:
            parts.append(f" No blocks run as one call: {self.apart}.")
        return "".join(parts)

    def _sentence(self) -> str:
        sparse = [layer for layer in self.layers if layer.format != "dense" and not layer.full]
        full = [layer for layer in self.layers if layer.full]
        dense = [layer for layer in self.layers if layer.format == "dense"]
        reasons = Counter(layer.reason for layer in dense)
        why = "; ".join(f"{n} {reason}" for reason, n in reasons.most_common())
        if not sparse:
            return f"No layer of {len(self.layers)} runs on the sparse kernels{self._rounded(full)}" + (
                f" ({why})." if why else "."
            )
        gain = sum(layer.dense_us for layer in sparse) / max(1e-9, sum(layer.sparse_us for layer in sparse))
        kept = sum(layer.density * layer.dense_bytes for layer in sparse) / sum(layer.dense_bytes for layer in sparse)
        size = sum(layer.packed_bytes for layer in sparse) / sum(layer.dense_bytes for layer in sparse)
        taken = sum(layer.dense_us for layer in sparse)
        speed = (
            f"{gain:.1f} times as fast as dense at {self.tokens} tokens on {self.threads} thread(s) and "
            if taken
            else "not timed, "
        )
        rounded = sum(layer.rounds_activations for layer in sparse)
        text = (
            f"{len(sparse)} of {len(self.layers)} linear layers ({kept:.0%} of their weights kept) run on the "
            f"{self.isa} kernels, {speed}at {size:.2f} of the dense size"
        ) + (f", {rounded} of them with activations rounded to 8 bits at each call" if rounded else "")
        return text + self._rounded(full) + (f"; dense stay {why}." if why else ".")

    def _rounded(self, full: Sequence[LayerReport]) -> str:
        taken = sum(layer.dense_us for layer in full)
        times = f" and {taken / sum(layer.sparse_us for layer in full):.1f} times as fast" if taken else ""
        return f"; {len(full)} with few zeros, or a shared weight, only rounded{times}" if full else ""


def compile(
    model: nn.Module,
    *,
    tokens: int | Sequence[int] = 128,
    value: str = "float32",
    activations: str = "float32",
    dense: str = "float32",
    measure: bool = True,
    cache: bool = True,
    example: Mapping[str, Any] | tuple[Any, ...] | None = None,
) -> nn.Module:
    """A copy of `model` whose sparse linear layers run on the kernels; weights that stay dense are shared,
    not copied.

    Works under torch.inference_mode, torch.compile, `generate` and `pipeline`. The result has
    `.secateur_report` and,
    where the class has no such name, `.summary()`.

    Args:
        model: a torch module on the CPU in float32; put in eval mode in the copy.
        tokens: rows that a layer sees in a typical call (batch times sequence length); the choice is made for it.
            Several numbers, such as (1, 128) for a decoder's steps and its prompt: a layer that runs best in another
            form at each holds all of them, the dense one if it is among them, and takes the one for the call at hand.
        value: how kept weights are stored. 'float32'; 'bfloat16' halves the memory at three significant digits.
            'float16' (blocks of 4 or 8 rows, or N:M at few tokens) and 'int8' (these, or any pattern at up to 8 tokens;
            one scale a row) round too: check the model's quality.
        activations: 'int8' allows layers whose zeros come in blocks of 1 x 4 to round their inputs to 8 bits at each
            call, a scale a token, beside int8 weights: 1 to 2% of error. Only with value 'int8'; the summary tells how
            many layers do.
        dense: how layers with few zeros, and those that share their weight, are stored for calls of up to 16 tokens:
            'float32', as they are; 'bfloat16', 'float16' or 'int8', one scale a row, for decoders, whose output layer
            takes much of a step. One that shares its weight with an embedding is then in memory twice.
        measure: time each kind of layer dense and sparse and keep the faster; False packs every sparse layer.
        example: a batch as for `secateur.open`; with it, activations, residuals and norms are fused into the
            packed layers before them, and blocks of an encoder run as one call where they can.
        cache: keep measurements in the user's cache folder (see `secateur.runtime.layers.tuning`).

    Raises:
        ValueError: when `tokens` is not positive, or `value`, `activations` or `dense` is unknown or they do not go
            together.
        ModelError: when the model cannot be traced on `example`.
    """
    counts = sorted({tokens} if isinstance(tokens, int) else set(tokens))
    if not counts or counts[0] < 1:
        raise ValueError(f"tokens must be positive, not {tokens}")
    for name, given in (("value", value), ("dense", dense)):
        if given not in VALUES:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, VALUES))}, not {given!r}")
    check_activations(value, activations)
    result = share_copy(model).eval()
    tied = _tied(result)
    reports: dict[int, list[LayerReport]] = {count: [] for count in counts}
    changed: dict[str, list[nn.Module]] = {}
    for name, module in list(result.named_modules()):
        weight = linear_weight(module)
        if weight is None:
            continue
        forms: list[nn.Module] = []
        for count in counts:
            report, packed = _convert(name, module, weight, tied, count, value, activations, dense, measure, cache)
            reports[count].append(report)
            forms.append(module if packed is None else packed)
        if any(form is not module for form in forms):
            changed[name] = forms
    traced = Traced(result, example) if changed and example is not None else None
    found = Fusions() if traced is None else fusions(traced)
    fused = {"activations": _fuse_activations(result, changed, found)}
    for name, forms in changed.items():
        replacement = _joined(forms, counts)
        if not name:
            result = replacement
        else:
            put_module(result, name, replacement)
    fused |= _fuse_calls(result, changed, found)
    if changed:
        use_attention(result)
    result.eval()  # what was put in as well
    chains = ChainOutcome()
    if traced is not None and example is not None and load_native() is not None:
        chains = chain_blocks(result, traced, example, counts[-1], measure)
        norms = {path: one for path, one in found.calls.items() if isinstance(one, PrimitiveNorm)}
        fused[STEPPED], apart = step_blocks(result, traced, norms)
        chains.apart = "" if fused[STEPPED] else apart or chains.apart
    first, *others = (
        Report(_repacked(reports[count], chains.packed), isa(), count, torch.get_num_threads()) for count in counts
    )
    outcome = replace(first, also=tuple(others), fused=fused, blocks=chains.blocks, apart=chains.apart)
    result.secateur_report = outcome
    if not hasattr(type(result), "summary"):
        result.summary = outcome.summary
    return result


def _repacked(layers: Sequence[LayerReport], sizes: Mapping[str, int]) -> tuple[LayerReport, ...]:
    """The reports with the sizes of what was packed anew."""
    return tuple(replace(layer, packed_bytes=sizes.get(layer.name, layer.packed_bytes)) for layer in layers)


def _fuse_activations(model: nn.Module, changed: Mapping[str, list[nn.Module]], found: Fusions) -> int:
    """Give packed layers the activations after them; how many."""
    done = 0
    for name, (path, activation) in found.activations.items():
        forms = changed.get(name, [])
        hooks = model.get_submodule(path)._forward_hooks  # also those at rest: the module goes
        if forms and not hooks and all(isinstance(form, SparseLinear) for form in forms):
            for form in forms:
                form.activate(activation)
            put_module(model, path, nn.Identity())
            done += 1
    return done


STEPPED = "blocks of a decoder at one token"
FUSED: Mapping[type, str] = {LinearAddNorm: "residuals and norms", Gated: "gates", PrimitiveNorm: "norms"}


def _fuse_calls(model: nn.Module, changed: Mapping[str, list[nn.Module]], found: Fusions) -> dict[str, int]:
    """Let modules run as one call where their layers are packed; how many of each kind."""
    done = dict.fromkeys(FUSED.values(), 0)
    for path, one in found.calls.items():
        layers = {LinearAddNorm: ("linear",), Gated: ("gate", "up")}.get(type(one), ())
        names = [f"{path}.{getattr(one, layer)}" for layer in layers]
        if any(name not in changed for name in names):
            continue
        # A Gated knows its activation itself.
        activation = found.activations.get(names[0]) if isinstance(one, LinearAddNorm) else None
        if activation is None or isinstance(model.get_submodule(activation[0]), nn.Identity):
            use_one_call(model.get_submodule(path), one)
            done[FUSED[type(one)]] += 1
    return done


def _joined(forms: Sequence[nn.Module], counts: Sequence[int]) -> nn.Module:
    """One module for the forms of a layer at each number of tokens: the form itself where all are the same."""
    first = forms[0]

    def same(other: nn.Module) -> bool:
        both = isinstance(first, SparseLinear) and isinstance(other, SparseLinear)
        return other is first or (both and torch.equal(first.packed, other.packed))

    return first if all(map(same, forms)) else ByTokens(forms, counts)


def put_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Set the module at a dotted path."""
    parent, _, last = path.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


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


def _tied(model: nn.Module) -> set[int]:
    """Addresses of parameters that more than one module holds, such as an embedding shared with the
    output."""
    seen = Counter(id(p) for _, m in model.named_modules() for p in m.parameters(recurse=False))
    return {address for address, times in seen.items() if times > 1}


def _convert(
    name: str,
    module: nn.Module,
    weight: torch.Tensor,
    tied: set[int],
    tokens: int,
    value: str,
    activations: str,
    full_value: str,
    measure: bool,
    use_cache: bool,
) -> tuple[LayerReport, SparseLinear | None]:
    shape = (weight.shape[0], weight.shape[1])

    def dense(reason: str, density: float = 1.0, choice: FormatChoice | None = None) -> tuple[LayerReport, None]:
        times = (choice.dense_us, choice.sparse_us) if choice else (0.0, 0.0)
        return LayerReport(name, shape, density, "dense", reason, *times), None

    if load_native() is None:
        return dense("for want of compiled kernels")
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        return dense(f"because their weights are {weight.dtype} on {weight.device}, not float32 on the CPU")
    if module._forward_hooks or module._forward_pre_hooks:
        return dense("because hooks hang on them")
    array = np.ascontiguousarray(weight.detach().numpy())
    density = np.count_nonzero(array) / array.size
    shared, few_zeros = id(module.weight) in tied, bool(density > 1 - MIN_ZEROS)
    full = (shared or few_zeros) and bool(full_packings(tokens, full_value))
    if shared and not full:
        return dense("because other modules share their weights")
    if few_zeros and not full:
        return dense(f"with fewer than {MIN_ZEROS:.0%} zeros", density)
    value = full_value if full else value
    bias = None if module.bias is None else module.bias.detach()
    if value == "int8" and not np.isfinite(array).all():
        return dense("because int8 holds no NaN or infinity", density)
    if measure:
        choice = choose(array, bias, tokens, value, use_cache, activations, full)
    else:
        choice = unmeasured(array, tokens, value, activations, full)
    if not choice.possible:
        return dense(f"because no format stores {value} for their pattern and {tokens} tokens", density)
    if choice.packing is None:
        return dense(f"because they measured no faster {'rounded' if full else 'sparse'}", density, choice)
    packed = torch.from_numpy(pack(array, **choice.packing))
    report = LayerReport(
        name,
        shape,
        density,
        choice.packing["format"],
        "",
        choice.dense_us,
        choice.sparse_us,
        array.nbytes,
        packed.numel(),
        choice.packing["format"] in ROUNDS_ACTIVATIONS,
        full,
    )
    return report, SparseLinear(packed, bias)
