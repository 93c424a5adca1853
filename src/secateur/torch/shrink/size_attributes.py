"""Python attributes that mirror sizes of weights (`num_heads`, `split_size`, `normalized_shape`), and their mending.

One table, keyed by attribute name, says what a number counts. An attribute changes only when its value equals that
count among the weights of its own module before pruning; its new value is the same count after. No model classes.
"""

import ast
import dataclasses
import functools
import inspect
import textwrap
import types
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.dims import Dim, extent, names
from secateur.errors import ModelError
from secateur.layout import Layout
from secateur.torch.base.manifest import named_tensors

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
"""Attribute of a module that holds a `weight` -> the dimension of the weight it mirrors."""

_WORDS = {
    "heads": "num_heads num_attention_heads n_heads n_head heads nhead num_attn_heads num_query_heads num_q_heads "
    "no_heads num_heads_per_partition n_local_heads decoder_attention_heads encoder_attention_heads",
    "kv": "num_key_value_heads num_kv_heads n_kv_heads n_head_kv kv_heads n_local_kv_heads num_kv n_kv_head",
    "groups": "num_key_value_groups n_rep num_queries_per_kv kv_groups num_kv_groups",
    "dim": "head_dim attention_head_size head_size dim_head d_head key_value_proj_dim d_kv dim_per_head "
    "head_dimension v_head_dim head_v_dim qk_head_dim qk_nope_head_dim head_k_dim",
    "width": "all_head_size inner_dim split_size kv_dim q_dim q_size kv_size qkv_dim key_dim value_dim "
    "key_value_dim query_dim",
    "hidden": "hidden_size embed_dim d_model hidden_dim dim n_embd model_dim embed_size input_size channels "
    "output_size d_embed",
    "inner": "intermediate_size intermediate_dim ffn_dim d_ff d_inner inner_size ffn_hidden_size dim_feedforward "
    "n_inner mlp_dim ffn_size hidden_features q_lora_rank kv_lora_rank encoder_ffn_dim decoder_ffn_dim expert_dim "
    "moe_intermediate_size shared_expert_intermediate_size ffn_embed_dim num_dense_units",
    "expert": "num_experts num_local_experts n_routed_experts moe_num_experts n_experts",
    "vocab": "vocab_size n_vocab num_tokens",
}
MEANING = {word: meaning for meaning, words in _WORDS.items() for word in words.split()}
"""What a number counts: query heads, kv heads, queries per kv head, width of one head, heads x width, hidden, ..."""

LAYER_INDEX = ("layer_idx", "layer_id", "layer_index", "layer_number", "block_idx")
HEADS = ("head", "kv", "group")


def is_size(attribute: str) -> bool:
    """Whether a name is in the tables of this file: nothing else is ever set on a module."""
    return (
        attribute in LEAF
        or attribute in MEANING
        or attribute in LAYER_INDEX
        or attribute in ("normalized_shape", "padding_idx", "groups")
    )


@dataclass(frozen=True)
class Counts:
    """Old and new numbers that weights say of one meaning: pairs (before, after)."""

    pairs: frozenset[tuple[int, int]]

    def after(self, value: int) -> set[int]:
        """What numbers equal to `value` before have become."""
        return {new for old, new in self.pairs if old == value}


def mirrors(
    model: nn.Module, layout: Layout, new_sizes: Mapping[str, int], kept: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Attributes and own configuration values to change, by module path, as (attributes, own_configs).

    new_sizes: size of each axis afterwards. kept: parameter -> `Layout.kept` of it, for padding rows.
    Raises ModelError when an attribute that the forward pass reads could mean two different new numbers.
    """
    attributes: dict[str, dict[str, Any]] = {}
    own_configs: dict[str, dict[str, Any]] = {}
    layout = dataclasses.replace(layout, params=_all_names(model, layout))
    changed = {name for name, size in layout.sizes.items() if new_sizes[name] != size}
    carriers = {p for p, dims in layout.params.items() if changed & {n for dim in dims for n in names(dim)}}
    for path, module in model.named_modules():
        inside = [p for p in layout.params if not path or p.startswith(path + ".")]
        if not carriers.intersection(inside):
            continue
        if isinstance(module, nn.MultiheadAttention):
            _refuse_attention(path, inside, layout, new_sizes)
        mended = _leaf(path, module, layout, new_sizes, kept)
        near = [p for p in inside if _near(model, path, p)]
        scopes = [s for s in (near, inside) if carriers.intersection(s)]
        for name, value in vars(module).items():
            scale = MEANING.get(name) == "hidden" and name in powers(type(module))
            if name in MEANING and name not in mended and type(value) is int and not scale:
                new = _resolve(path, module, name, value, scopes, near, layout, new_sizes)
                if new != value:
                    mended[name] = new
        _check_top_k(path, module, mended)
        if mended:
            attributes[path] = mended
        own = _config_reads(path, module, near, carriers, layout, new_sizes)
        if own:
            own_configs[path] = own
    return attributes, own_configs


def _refuse_attention(path: str, params: list[str], layout: Layout, new_sizes: Mapping[str, int]) -> None:
    for param in params:
        if layout.shape(param) != tuple(extent(dim, new_sizes) for dim in layout.params[param]):
            raise ModelError(
                f"{path} is a torch.nn.MultiheadAttention, which insists that its heads fill the hidden width; prune "
                "the feed-forward layers beside it, or write the attention with separate projections"
            )


def _all_names(model: nn.Module, layout: Layout) -> dict[str, tuple[Dim, ...]]:
    """The dimensions of each parameter under every name that it has in the model."""
    tensors = named_tensors(model)
    by_id = {id(tensors[name]): dims for name, dims in layout.params.items() if name in tensors}
    found = {name: by_id[id(tensor)] for name, tensor in tensors.items() if id(tensor) in by_id}
    found.update({alias: layout.params[name] for alias, name in layout.tied.items() if alias in tensors})
    return found


def _leaf(
    path: str, module: nn.Module, layout: Layout, new_sizes: Mapping[str, int], kept: Mapping[str, Any]
) -> dict[str, Any]:
    """Attributes of a module that mirror the shape of its own `weight`."""
    name = f"{path}.weight" if path else "weight"
    if name not in layout.params or not isinstance(getattr(module, "weight", None), torch.Tensor):
        return {}
    old = layout.shape(name)
    new = tuple(extent(dim, new_sizes) for dim in layout.params[name])
    mended: dict[str, Any] = {}
    transposed, groups = bool(getattr(module, "transposed", False)), getattr(module, "groups", 1)
    if groups != 1 and old != new:
        if not (old[0] == groups == getattr(module, "in_channels", None) and old[1] == new[1]):
            raise ModelError(f"{path} is a convolution in {groups} groups; its channels cannot be pruned singly")
        return dict.fromkeys(("in_channels", "out_channels", "groups"), new[0])
    for attribute, dim in LEAF.items():
        if transposed and attribute in ("in_channels", "out_channels"):
            dim = 1 - dim
        value = vars(module).get(attribute)
        if dim < len(old) and value == old[dim] and new[dim] != old[dim]:
            mended[attribute] = new[dim]
    shape = vars(module).get("normalized_shape")
    if shape is not None and tuple(shape) == old and new != old:
        mended["normalized_shape"] = list(new)
    padding, rows = vars(module).get("padding_idx"), kept.get(layout.tied.get(name, name))
    if isinstance(padding, int) and rows and rows[0] is not None:
        where = np.flatnonzero(np.flatnonzero(rows[0]) == padding)
        mended["padding_idx"] = int(where[0]) if where.size else None
    return mended


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


def _resolve(
    path: str,
    module: nn.Module,
    name: str,
    value: int,
    scopes: list[list[str]],
    near: list[str],
    layout: Layout,
    new_sizes: Mapping[str, int],
) -> int:
    """The new value of one attribute, `value` when nothing says that it changes."""
    meaning = MEANING[name]
    for scope in scopes:
        found = _counts(meaning, scope, layout, new_sizes).after(value)
        if scope is near and meaning == "hidden":
            # Attention calls the width of all its heads `embed_dim` too, and they may now differ from hidden: the
            # forward pass reshapes by it where it reads it at all.
            heads = _counts("width", scope, layout, new_sizes).after(value)
            if heads and heads != found and reads(type(module), name):
                found = heads
        if len(found) == 1:
            return found.pop()
        if len(found) > 1 and scope is near and reads(type(module), name):
            raise ModelError(
                f"{path}.{name} = {value} could become {' or '.join(map(str, sorted(found)))}: the sizes that it "
                "mirrored differ now and the forward pass reads it; prune them alike"
            )
        if found:
            return value
    return value


def _counts(meaning: str, params: list[str], layout: Layout, new_sizes: Mapping[str, int]) -> Counts:
    kinds = {name: axis.kind for name, axis in layout.axes.items()}
    pairs: set[tuple[int, int]] = set()
    for param in params:
        for dim in layout.params[param]:
            pairs |= _of_dim(meaning, dim, layout.sizes, new_sizes, kinds)
    return Counts(frozenset(pairs))


def _of_dim(
    meaning: str, dim: Dim, old: Mapping[str, int], new: Mapping[str, int], kinds: Mapping[str, str]
) -> set[tuple[int, int]]:
    """Pairs (before, after) of what one dimension counts, for one meaning."""
    pairs: set[tuple[int, int]] = set()
    wide = any(kinds[n] in HEADS for n in names(dim))

    def whole(part: Dim) -> tuple[int, int]:
        return extent(part, old), extent(part, new)

    def both(factors: Any) -> tuple[int, int]:
        return whole((factors,))

    if meaning in ("expert", "vocab", "kv", "groups"):
        kind = {"groups": "group"}.get(meaning, meaning)
        found = {(old[n], new[n]) for n in names(dim) if kinds[n] == kind}
        if meaning == "kv" and not found:
            found = {(old[n], new[n]) for n in names(dim) if kinds[n] == "head"}
        return found
    if meaning in ("hidden", "inner"):
        if not wide:
            pairs.add(whole(dim))
            pairs |= {both(term) for term in dim}
            pairs |= {(old[n], new[n]) for n in names(dim)}
        return {p for p in pairs if meaning != "hidden" or _is_hidden(dim, kinds)} if pairs else pairs
    for term in _terms(dim):
        headlike = tuple(f for f in term if isinstance(f, str) and kinds[f] in HEADS)
        rest = tuple(f for f in term if f not in headlike)
        if headlike and meaning == "heads":
            pairs.add(both(headlike))
        elif headlike and rest and meaning == "dim":
            pairs |= {both((f,)) for f in rest} | {both(rest)}
        elif headlike and meaning == "width":
            pairs.add(both(term))
    if wide and meaning == "width":
        pairs.add(whole(dim))
    return pairs


def _is_hidden(dim: Dim, kinds: Mapping[str, str]) -> bool:
    return all(kinds[n] not in ("ffn", "expert", "vocab") for n in names(dim))


def _terms(dim: Dim) -> Iterator[tuple[Any, ...]]:
    for term in dim:
        yield term
        for factor in term:
            if isinstance(factor, tuple):
                yield from _terms(factor)


def _check_top_k(path: str, module: nn.Module, mended: Mapping[str, Any]) -> None:
    experts = [value for name, value in mended.items() if MEANING.get(name) == "expert"]
    top_k = next((getattr(module, n) for n in ("top_k", "num_experts_per_tok") if hasattr(module, n)), None)
    if experts and isinstance(top_k, int) and min(experts) < top_k:
        raise ModelError(f"{path} routes every token to {top_k} experts; {min(experts)} would remain, keep more")


def _config_reads(
    path: str,
    module: nn.Module,
    near: list[str],
    carriers: set[str],
    layout: Layout,
    new_sizes: Mapping[str, int],
) -> dict[str, int]:
    """Sizes that the forward pass of this module reads from its config, with their new values."""
    config = getattr(module, "config", None)
    if config is None or not path or not carriers.intersection(near) or not reads(type(module), "config"):
        return {}
    changed = {}
    for key, meaning in MEANING.items():
        value = getattr(config, key, None)
        if meaning not in ("hidden", "vocab") and type(value) is int and reads(type(module), key):
            new = _resolve(path, module, key, value, [near], near, layout, new_sizes)
            if new != value:
                changed[key] = new
    return changed


_SETUP = ("__init__", "_init_weights", "reset_parameters", "extra_repr", "init_weights")


def reads(module_type: type, attribute: str) -> bool:
    """Whether any method of a module type, beyond setting up, names the attribute."""
    return attribute in _names_in(module_type)


def powers(module_type: type) -> frozenset[str]:
    """Attributes that some method beyond setting up raises to a power, or takes the root of: they are scales there.

    (`hidden * self.model_dim**-0.5` before tied logits must not follow when the width shrinks.)
    """
    return _powers_in(module_type)


@functools.cache
def _powers_in(module_type: Hashable) -> frozenset[str]:
    found: set[str] = set()
    for function in _methods(module_type):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, TypeError, SyntaxError):  # without source, as typed into a prompt: nothing is known of it
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
                base: ast.expr | None = node.left
            else:
                base = node.args[0] if isinstance(node, ast.Call) and node.args and _is_root(node.func) else None
            if isinstance(base, ast.Attribute):
                found.add(base.attr)
    return frozenset(found)


def _is_root(function: ast.expr) -> bool:
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in ("sqrt", "rsqrt")


def _methods(module_type: Any) -> Iterator[Any]:
    """Functions of a module type and its bases, beyond those that set up."""
    for cls in getattr(module_type, "__mro__", ()):
        if cls is nn.Module or cls is object:
            continue
        for name, member in vars(cls).items():
            function = member.fget if isinstance(member, property) else member
            function = inspect.unwrap(function) if callable(function) else function
            if name not in _SETUP and getattr(function, "__code__", None) is not None:
                yield function


@functools.cache
def _names_in(module_type: Hashable) -> frozenset[str]:
    return frozenset(name for function in _methods(module_type) for name in _code_names(function.__code__))


def _code_names(code: types.CodeType) -> set[str]:
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _code_names(constant)
    return found
