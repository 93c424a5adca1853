"""Python attributes that mirror sizes of weights (`num_heads`, `split_size`, `normalized_shape`), and their new values.

A table, keyed by attribute name, says what a number counts. An attribute changes only when its value equals that count
among the weights of its own module before pruning; its new value is the same count afterwards. No code here depends on
a model class.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.dims import Dim, Term, extent, names
from secateur.errors import ModelError
from secateur.layout import Layout
from secateur.torch.base.manifest import named_tensors
from secateur.torch.shrink.method_reads import powers, reads

LEAF = {
    "in_features": 1,
    "out_features": 0,
    "nx": 0,
    "nf": 1,
    "num_embeddings": 0,
    "embedding_dim": 1,
    "out_channels": 0,
    "in_channels": 1,
    "num_features": 0,
    "num_channels": 0,
}
"""Attribute of a module that holds a `weight` -> the dimension of the weight that it mirrors."""

_WORDS = {
    "heads": "num_heads num_attention_heads n_heads n_head heads nhead num_attn_heads num_query_heads num_q_heads "
    "no_heads num_heads_per_partition n_local_heads decoder_attention_heads encoder_attention_heads",
    "kv": "num_key_value_heads num_kv_heads n_kv_heads n_head_kv kv_heads n_local_kv_heads num_kv n_kv_head",
    "groups": "num_key_value_groups n_rep num_queries_per_kv kv_groups num_kv_groups",
    "dim": "head_dim attention_head_size head_size dim_head d_head key_value_proj_dim d_kv dim_per_head "
    "head_dimension v_head_dim head_v_dim qk_head_dim qk_nope_head_dim head_k_dim",
    "width": "all_head_size inner_dim split_size kv_dim q_dim q_size kv_size qkv_dim key_dim value_dim "
    "key_value_dim query_dim attn_dim",
    "hidden": "hidden_size embed_dim d_model hidden_dim dim n_embd model_dim embed_size input_size channels "
    "output_size d_embed",
    "inner": "intermediate_size intermediate_dim ffn_dim d_ff d_inner inner_size ffn_hidden_size dim_feedforward "
    "n_inner mlp_dim ffn_size hidden_features q_lora_rank kv_lora_rank encoder_ffn_dim decoder_ffn_dim expert_dim "
    "moe_intermediate_size shared_expert_intermediate_size ffn_embed_dim num_dense_units",
    "expert": "num_experts num_local_experts n_routed_experts moe_num_experts n_experts",
    "vocab": "vocab_size n_vocab num_tokens",
}
MEANING = {word: meaning for meaning, words in _WORDS.items() for word in words.split()}
"""Attribute -> what it counts: query heads, kv heads, queries per kv head, width of one head, heads x width, ..."""

LAYER_INDEX = ("layer_idx", "layer_id", "layer_index", "layer_number", "block_idx")
HEADS = ("head", "kv", "group")
"""Kinds of axes that count heads."""


def is_size(attribute: str) -> bool:
    """Whether a name is in the tables of this file: no other attribute of a module is ever set."""
    return (
        attribute in LEAF
        or attribute in MEANING
        or attribute in LAYER_INDEX
        or attribute in ("normalized_shape", "padding_idx", "groups")
    )


# -- what a number of each meaning counts -----------------------------------------------------------------------------

Kinds = Mapping[str, str]
"""Axis -> kind."""
Parts = Callable[[Dim, Kinds], Iterable[Dim]]
"""Parts of a dimension of a weight whose extents a number may equal."""


def _axes_of(*kinds: str) -> Parts:
    """The axes of the first of these kinds that the dimension has."""

    def parts(dim: Dim, kind_of: Kinds) -> list[Dim]:
        by_kind = ([_one_axis(name) for name in names(dim) if kind_of[name] == kind] for kind in kinds)
        return next((axes for axes in by_kind if axes), [])

    return parts


def _without(*kinds: str) -> Parts:
    """The whole dimension, its terms and its axes; nothing where it has an axis of one of these kinds."""

    def parts(dim: Dim, kind_of: Kinds) -> list[Dim]:
        if any(kind_of[name] in kinds for name in names(dim)):
            return []
        return [dim, *((term,) for term in dim), *map(_one_axis, names(dim))]

    return parts


def _heads(dim: Dim, kind_of: Kinds) -> list[Dim]:
    """The heads in each term that has any."""
    return [(heads,) for _, heads, _ in _terms_with_heads(dim, kind_of)]


def _inside_heads(dim: Dim, kind_of: Kinds) -> list[Dim]:
    """The other factors of each term that has heads: each, and their product."""
    inner_terms = [inner for _, _, inner in _terms_with_heads(dim, kind_of) if inner]
    return [((factor,),) for inner in inner_terms for factor in inner] + [(inner,) for inner in inner_terms]


def _heads_and_inside(dim: Dim, kind_of: Kinds) -> list[Dim]:
    """Each term that has heads, and the whole dimension if there is such a term."""
    terms: list[Dim] = [(term,) for term, _, _ in _terms_with_heads(dim, kind_of)]
    return [*terms, dim] if terms else []


def _terms_with_heads(dim: Dim, kind_of: Kinds) -> Iterator[tuple[Term, Term, Term]]:
    """Each term that has axes of heads, at any depth: (term, its axes of heads, its other factors)."""
    for term in dim:
        heads = tuple(f for f in term if isinstance(f, str) and kind_of[f] in HEADS)
        if heads:
            yield term, heads, tuple(f for f in term if f not in heads)
        for factor in term:
            if isinstance(factor, tuple):
                yield from _terms_with_heads(factor, kind_of)


def _one_axis(name: str) -> Dim:
    return ((name,),)


_COUNTED: dict[str, Parts] = {
    "heads": _heads,
    "kv": _axes_of("kv", "head"),
    "groups": _axes_of("group"),
    "dim": _inside_heads,
    "width": _heads_and_inside,
    "hidden": _without(*HEADS, "ffn", "expert", "vocab"),
    "inner": _without(*HEADS),
    "expert": _axes_of("expert"),
    "vocab": _axes_of("vocab"),
}
"""Meaning of a number -> the parts of a dimension that it may count."""


# -- the attributes of a model ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resizing:
    """A layout, and the sizes of its axes after removal.

    layout: the layout before, with the dimensions of each tensor under every name that it has in the model.
    new_sizes: size of each axis afterwards.
    """

    layout: Layout
    new_sizes: Mapping[str, int]

    @functools.cached_property
    def kinds(self) -> dict[str, str]:
        """Kind of each axis."""
        return {name: axis.kind for name, axis in self.layout.axes.items()}

    @functools.cached_property
    def changed(self) -> frozenset[str]:
        """The tensors that have an axis whose size changes."""
        axes = {name for name, size in self.layout.sizes.items() if self.new_sizes[name] != size}
        params = self.layout.params.items()
        return frozenset(param for param, dims in params if axes & {name for dim in dims for name in names(dim)})

    def new_shape(self, param: str) -> tuple[int, ...]:
        """The shape of a tensor afterwards."""
        return tuple(extent(dim, self.new_sizes) for dim in self.layout.params[param])

    def after(self, value: int, meaning: str, params: Iterable[str]) -> set[int]:
        """What `value` becomes where it is, before removal, a number of this meaning among the tensors."""
        old_sizes = self.layout.sizes
        dims = (dim for param in params for dim in self.layout.params[param])
        parts = (part for dim in dims for part in _COUNTED[meaning](dim, self.kinds))
        return {extent(part, self.new_sizes) for part in parts if extent(part, old_sizes) == value}


@dataclass(frozen=True)
class Owner:
    """A module whose attributes may mirror sizes of weights.

    path: name of the module in the model.
    module: the module.
    near: tensors of the module itself and of leaf modules directly below it.
    inside: tensors of the module and of all modules below it.
    """

    path: str
    module: nn.Module
    near: list[str]
    inside: list[str]

    def reads(self, attribute: str) -> bool:
        """Whether a method of the module, other than those that set it up, names the attribute."""
        return reads(type(self.module), attribute)


def mirrors(
    model: nn.Module, layout: Layout, new_sizes: Mapping[str, int], kept: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Attributes and own configuration values to change, by module path, as (attributes, own_configs).

    new_sizes: size of each axis afterwards.
    kept: parameter -> `Layout.kept` of it, for padding rows.

    Raises:
        ModelError: when an attribute that the forward pass reads could mean two different new numbers.
    """
    attributes: dict[str, dict[str, Any]] = {}
    own_configs: dict[str, dict[str, Any]] = {}
    resizing = Resizing(dataclasses.replace(layout, params=_all_names(model, layout)), new_sizes)
    for path, module in model.named_modules():
        inside = [param for param in resizing.layout.params if not path or param.startswith(path + ".")]
        if not resizing.changed.intersection(inside):
            continue
        owner = Owner(path, module, [param for param in inside if _near(model, path, param)], inside)
        if isinstance(module, nn.MultiheadAttention):
            _refuse_attention(owner, resizing)
        new_values = _weight_attributes(owner, resizing, kept)
        new_values |= _counting_attributes(owner, resizing, new_values)
        _check_top_k(owner, new_values)
        if new_values:
            attributes[path] = new_values
        config_values = _config_values(owner, resizing)
        if config_values:
            own_configs[path] = config_values
    return attributes, own_configs


def _refuse_attention(owner: Owner, resizing: Resizing) -> None:
    if any(resizing.layout.shape(param) != resizing.new_shape(param) for param in owner.inside):
        raise ModelError(
            f"{owner.path} is a torch.nn.MultiheadAttention, which insists that its heads fill the hidden width; prune "
            "the feed-forward layers beside it, or write the attention with separate projections"
        )


def _all_names(model: nn.Module, layout: Layout) -> dict[str, tuple[Dim, ...]]:
    """The dimensions of each parameter under every name that it has in the model."""
    tensors = named_tensors(model)
    by_id = {id(tensors[name]): dims for name, dims in layout.params.items() if name in tensors}
    dims_of = {name: by_id[id(tensor)] for name, tensor in tensors.items() if id(tensor) in by_id}
    dims_of.update({alias: layout.params[name] for alias, name in layout.tied.items() if alias in tensors})
    return dims_of


def _weight_attributes(owner: Owner, resizing: Resizing, kept: Mapping[str, Any]) -> dict[str, Any]:
    """New values of the attributes that mirror the shape of the module's own `weight`."""
    module, layout = owner.module, resizing.layout
    name = f"{owner.path}.weight" if owner.path else "weight"
    if name not in layout.params or not isinstance(getattr(module, "weight", None), torch.Tensor):
        return {}
    old, new = layout.shape(name), resizing.new_shape(name)
    if getattr(module, "groups", 1) != 1 and old != new:
        return _grouped_convolution(owner, old, new)
    new_values: dict[str, Any] = {}
    for attribute, dim in LEAF.items():
        if attribute in ("in_channels", "out_channels") and getattr(module, "transposed", False):
            dim = 1 - dim
        if dim < len(old) and vars(module).get(attribute) == old[dim] and new[dim] != old[dim]:
            new_values[attribute] = new[dim]
    normalized_shape = vars(module).get("normalized_shape")
    if normalized_shape is not None and tuple(normalized_shape) == old and new != old:
        new_values["normalized_shape"] = list(new)
    return new_values | _padding_index(module, kept.get(layout.tied.get(name, name)))


def _grouped_convolution(owner: Owner, old: tuple[int, ...], new: tuple[int, ...]) -> dict[str, Any]:
    """Channel numbers of a convolution in which each channel is a group of its own."""
    groups = owner.module.groups
    if not (old[0] == groups == getattr(owner.module, "in_channels", None) and old[1] == new[1]):
        raise ModelError(f"{owner.path} is a convolution in {groups} groups; its channels cannot be pruned singly")
    return dict.fromkeys(("in_channels", "out_channels", "groups"), new[0])


def _padding_index(module: nn.Module, kept: list[np.ndarray | None] | None) -> dict[str, int | None]:
    """The new row of an embedding's padding token; None when the row is removed.

    kept: which positions of each dimension of the weight are kept, or None for all.
    """
    padding = vars(module).get("padding_idx")
    if not isinstance(padding, int) or not kept or kept[0] is None:
        return {}
    rows = np.flatnonzero(np.flatnonzero(kept[0]) == padding)
    return {"padding_idx": int(rows[0]) if rows.size else None}


def _near(model: nn.Module, path: str, param: str) -> bool:
    """Whether a parameter belongs to the module itself or to a leaf directly below it (containers do not count)."""
    rest = param[len(path) + 1 :] if path else param
    module = model.get_submodule(path)
    parts = rest.split(".")[:-1]
    for depth, part in enumerate(parts):
        module = module.get_submodule(part)
        last = depth == len(parts) - 1
        if not last and not isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict):
            return False
        if last and any(True for _ in module.children()):
            return False
    return True


def _counting_attributes(owner: Owner, resizing: Resizing, settled: Collection[str]) -> dict[str, int]:
    """New values of the attributes that count sizes of weights below the module, without those that are `settled`."""
    scopes = [scope for scope in (owner.near, owner.inside) if resizing.changed.intersection(scope)]
    new_values = {}
    for name, value in vars(owner.module).items():
        if name not in MEANING or name in settled or type(value) is not int:
            continue
        if MEANING[name] == "hidden" and name in powers(type(owner.module)):  # a scale, which must not follow
            continue
        new = _new_value(owner, resizing, name, value, scopes)
        if new != value:
            new_values[name] = new
    return new_values


def _new_value(owner: Owner, resizing: Resizing, name: str, value: int, scopes: list[list[str]]) -> int:
    """What a number becomes: decided by the first scope in which it counts something, else unchanged."""
    meaning = MEANING[name]
    for scope in scopes:
        is_near = scope is owner.near
        new = resizing.after(value, meaning, scope)
        if is_near and meaning == "hidden":
            # Attention calls the width of all its heads `embed_dim` too, and it may now differ from the hidden width:
            # the forward pass reshapes by the width of all heads, if it reads the attribute at all.
            all_heads = resizing.after(value, "width", scope)
            if all_heads and all_heads != new and owner.reads(name):
                new = all_heads
        if len(new) == 1:
            return new.pop()
        if len(new) > 1 and is_near and owner.reads(name):
            raise ModelError(
                f"{owner.path}.{name} = {value} could become {' or '.join(map(str, sorted(new)))}: the sizes that it "
                "mirrored differ now and the forward pass reads it; prune them alike"
            )
        if new:
            return value
    return value


def _check_top_k(owner: Owner, new_values: Mapping[str, Any]) -> None:
    experts = [value for name, value in new_values.items() if MEANING.get(name) == "expert"]
    top_k = next((getattr(owner.module, n) for n in ("top_k", "num_experts_per_tok") if hasattr(owner.module, n)), None)
    if experts and isinstance(top_k, int) and min(experts) < top_k:
        raise ModelError(f"{owner.path} routes every token to {top_k} experts; {min(experts)} would remain, keep more")


def _config_values(owner: Owner, resizing: Resizing) -> dict[str, int]:
    """New values of the sizes that the forward pass of this module reads from its config."""
    config = getattr(owner.module, "config", None)
    if config is None or not owner.path or not resizing.changed.intersection(owner.near) or not owner.reads("config"):
        return {}
    new_values = {}
    for key, meaning in MEANING.items():
        value = getattr(config, key, None)
        if meaning not in ("hidden", "vocab") and type(value) is int and owner.reads(key):
            new = _new_value(owner, resizing, key, value, [owner.near])
            if new != value:
                new_values[key] = new
    return new_values
