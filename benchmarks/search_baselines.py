"""Published methods of structured pruning, re-derived for a decoder of the Llama kind, as plain functions.

Each takes a model, calibration windows (count, context) and the share of the blocks' parameters that has to go, and
returns a `Pruned`. Groups are key-value heads with their query heads; neurons are those of the FFN. None trains.

- flap: An et al., 2024. Fluctuation var(x_j) |W_:j|^2, standardised in each layer and cut globally; the mean of what
  went becomes a bias.
- two_stage: Sandri et al., 2025 (2SSP). Neurons by the norm of their activation, equally many in each block; whole
  attention layers one after the other by the perplexity without them.
- taylor: Molchanov et al., 2019; secateur's own criterion, cut globally by score per parameter.
- obs: structured OBS as in ZipLM (Kurtic et al., 2023), the same share in each block, with pruned activations fed
  forward, weights by least squares.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.linalg
import torch
from torch import nn

from secateur import criteria
from secateur.pruning import needs_of, unit_scores
from secateur.torch.data.run_windows import evaluate_text
from secateur.torch.host import TorchHost

ATTENTION, FFN = "attention", "ffn"
PARTS = (ATTENTION, FFN)
DAMPING = 0.01
"""Of a gram, relative to the mean of its diagonal."""
SECOND_STAGE_TOKENS = 1024
"""Tokens on which 2SSP tries layers of attention. Its code takes one sample of 2,048."""
ALPHA = 1.5
"""2SSP's balance between its stages, its default."""

Key = tuple[int, str]
"""Block, and one of `PARTS`."""


@dataclass(frozen=True)
class Sizes:
    """Of a decoder: blocks; groups and neurons of a block; o_proj columns of a group; parameters of a unit."""

    blocks: int
    units: Mapping[str, int]
    group_width: int
    cost: Mapping[str, int]

    @property
    def total(self) -> int:
        """Parameters of all blocks that can go."""
        return self.blocks * sum(self.units[part] * self.cost[part] for part in PARTS)

    def columns(self, part: str, kept: np.ndarray) -> np.ndarray:
        """Inputs of the output projection that stay with the kept units."""
        if part == FFN:
            return kept
        return (kept[:, None] * self.group_width + np.arange(self.group_width)).reshape(-1)

    def by_unit(self, part: str, values: np.ndarray) -> np.ndarray:
        """Values of the inputs (columns,), averaged over those of a unit."""
        return values.reshape(self.units[part], -1).mean(1)


@dataclass(frozen=True)
class Pruned:
    """What a method decided. kept: units that stay, ascending; weights: of output projections (out, in), in place of
    the model's; biases: that these get, (out,)."""

    kept: Mapping[Key, np.ndarray]
    weights: Mapping[Key, np.ndarray] = field(default_factory=dict)
    biases: Mapping[Key, np.ndarray] = field(default_factory=dict)


# -- the model --------------------------------------------------------------------------------------------------------


def sizes_of(model: Any) -> Sizes:
    """The sizes of a model, all blocks alike."""
    config = model.config
    width = config.head_dim or config.hidden_size // config.num_attention_heads
    group = width * config.num_attention_heads // config.num_key_value_heads
    units = {ATTENTION: config.num_key_value_heads, FFN: config.intermediate_size}
    cost = {ATTENTION: config.hidden_size * 2 * (group + width), FFN: 3 * config.hidden_size}
    return Sizes(config.num_hidden_layers, units, group, cost)


def output(model: Any, block: int, part: str) -> nn.Linear:
    """The layer that writes a part's result into the residual stream."""
    layer = model.model.layers[block]
    return layer.self_attn.o_proj if part == ATTENTION else layer.mlp.down_proj


def keys(sizes: Sizes) -> list[Key]:
    """All parts of all blocks, in the order of computation."""
    return [(block, part) for block in range(sizes.blocks) for part in PARTS]


def share_gone(sizes: Sizes, pruned: Pruned) -> float:
    """Share of the blocks' parameters that went."""
    return sum((sizes.units[k[1]] - len(kept)) * sizes.cost[k[1]] for k, kept in pruned.kept.items()) / sizes.total


@torch.no_grad()
def write(model: Any, key: Key, kept: np.ndarray, weight: np.ndarray | None, bias: np.ndarray | None) -> None:
    """Put one part's decision into a model: what went is zero in the output projection."""
    layer, sizes = output(model, *key), sizes_of(model)
    if weight is not None:
        layer.weight.copy_(torch.from_numpy(weight))
    gone = torch.ones(layer.in_features, dtype=torch.bool)
    gone[sizes.columns(key[1], kept)] = False
    layer.weight[:, gone] = 0
    if bias is not None:
        layer.bias = nn.Parameter(torch.from_numpy(bias.astype(np.float32)), requires_grad=False)


def applied(model: Any, pruned: Pruned) -> Any:
    """A pruned copy of the model, with zeros where units went: it computes what a smaller one would."""
    small = copy.deepcopy(model)
    for key, kept in pruned.kept.items():
        write(small, key, kept, pruned.weights.get(key), pruned.biases.get(key))
    return small


# -- what is shared ---------------------------------------------------------------------------------------------------


@dataclass
class Moments:
    """Of the inputs of an output projection, over all tokens: mean, mean square, and norms averaged over windows."""

    mean: np.ndarray
    square: np.ndarray
    norm: np.ndarray


@torch.no_grad()
def moments(model: Any, windows: torch.Tensor) -> dict[Key, Moments]:
    """One pass over the windows."""
    sizes = sizes_of(model)
    found = {key: Moments(*(np.zeros(output(model, *key).in_features) for _ in range(3))) for key in keys(sizes)}
    hooks = [output(model, *key).register_forward_pre_hook(_adder(found[key])) for key in found]
    for window in windows:
        model.model(input_ids=window[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    for each in found.values():
        each.mean /= windows.numel()
        each.square /= windows.numel()
        each.norm /= len(windows)
    return found


def _adder(sums: Moments) -> Any:
    def add(module: Any, arguments: tuple[torch.Tensor]) -> None:
        x = arguments[0].reshape(-1, arguments[0].shape[-1]).double()
        sums.mean += x.sum(0).numpy()
        sums.square += (x * x).sum(0).numpy()
        sums.norm += x.norm(dim=0).numpy()

    return add


def cut(sizes: Sizes, scores: Mapping[Key, np.ndarray], share: float, *, per_parameter: bool) -> dict[Key, np.ndarray]:
    """Kept units: the cheapest of the whole model go until the share is met."""
    flat = [(scores[key][i] / (sizes.cost[key[1]] if per_parameter else 1), key, i) for key in scores for i in
            range(len(scores[key]))]  # fmt: skip
    gone: dict[Key, list[int]] = {key: [] for key in scores}
    count = 0
    for _, key, unit in sorted(flat, key=lambda item: item[0]):
        if count + sizes.cost[key[1]] / 2 <= share * sizes.total:
            gone[key].append(unit)
            count += sizes.cost[key[1]]
    return {key: np.setdiff1d(np.arange(len(scores[key])), units) for key, units in gone.items()}


def uniform(sizes: Sizes, share: float) -> dict[Key, int]:
    """How many units go of each part: as equal as whole groups permit, which spread over the blocks; neurons meet the
    share exactly."""
    numbers: dict[Key, int] = {}
    for block in range(sizes.blocks):
        until = [round(share * sizes.units[ATTENTION] * n) for n in (block, block + 1)]
        numbers[block, ATTENTION] = min(until[1] - until[0], sizes.units[ATTENTION] - 1)
    left = share * sizes.total - sum(numbers.values()) * sizes.cost[ATTENTION]
    each = left / sizes.cost[FFN] / sizes.blocks
    for block in range(sizes.blocks):
        numbers[block, FFN] = round(each * (block + 1)) - round(each * block)
    return numbers


# -- methods ----------------------------------------------------------------------------------------------------------


def flap(model: Any, windows: torch.Tensor, share: float) -> Pruned:
    """FLAP; scores are cut as they are, not per parameter, as its code does."""
    sizes, seen = sizes_of(model), moments(model, windows)
    weights = {key: output(model, *key).weight.detach().double().numpy() for key in seen}
    scores = {}
    for key, each in seen.items():
        fluctuation = (each.square - each.mean**2) * (weights[key] ** 2).sum(0)
        score = sizes.by_unit(key[1], fluctuation)
        scores[key] = (score - score.mean()) / score.std(ddof=1)
    kept = cut(sizes, scores, share, per_parameter=False)
    biases = {}
    for key, units in kept.items():
        gone = np.setdiff1d(np.arange(weights[key].shape[1]), sizes.columns(key[1], units))
        biases[key] = weights[key][:, gone] @ seen[key].mean[gone]
    return Pruned(kept, biases=biases)


def two_stage(model: Any, windows: torch.Tensor, share: float) -> Pruned:
    """2SSP; the number of attention layers by its equation 5."""
    sizes, seen = sizes_of(model), moments(model, windows)
    whole = {part: sizes.units[part] * sizes.cost[part] for part in PARTS}
    layers = round(sizes.blocks * share ** (whole[FFN] / whole[ATTENTION] / ALPHA))
    each = (share * sizes.total - layers * whole[ATTENTION]) / sizes.blocks / sizes.cost[FFN]
    kept: dict[Key, np.ndarray] = {}
    for block in range(sizes.blocks):
        count = sizes.units[FFN] - round(each)
        kept[block, FFN] = np.sort(np.argsort(-seen[block, FFN].norm, kind="stable")[:count])
        kept[block, ATTENTION] = np.arange(sizes.units[ATTENTION])
    small = applied(model, Pruned(kept))
    tokens = windows[: max(1, SECOND_STAGE_TOKENS // windows.shape[1])]
    for _ in range(layers):
        left = [block for block in range(sizes.blocks) if len(kept[block, ATTENTION])]
        losses = {block: _loss_without(small, block, tokens) for block in left}
        worst = min(losses, key=lambda block: losses[block])
        kept[worst, ATTENTION] = np.arange(0)
        write(small, (worst, ATTENTION), kept[worst, ATTENTION], None, None)
    return Pruned(kept)


@torch.no_grad()
def _loss_without(model: Any, block: int, windows: torch.Tensor) -> float:
    """The loss on windows when a layer of attention adds nothing."""
    weight = output(model, block, ATTENTION).weight
    saved = weight.clone()
    weight.zero_()
    loss = evaluate_text(model, windows).loss
    weight.copy_(saved)
    return loss


def taylor(host: TorchHost, windows: torch.Tensor, share: float) -> Pruned:
    """secateur's Taylor criterion, on the text's own next tokens."""
    sizes = sizes_of(host.model)
    axes = {(block, part): axis for part, kind in ((ATTENTION, "kv"), (FFN, "ffn"))
            for block, axis in enumerate(host.layout.of_kind(kind))}  # fmt: skip
    data = [{"input_ids": w[None], "attention_mask": torch.ones_like(w[None]), "labels": w[None]} for w in windows]
    needs = [need for need in needs_of(criteria.taylor) if need != "weight"]
    stats = host.collect(needs, data, axes=[axis.name for axis in axes.values()])
    scores = {key: unit_scores(host, criteria.taylor, axis, stats) for key, axis in axes.items()}
    return Pruned(cut(sizes, scores, share, per_parameter=True))


@torch.no_grad()
def obs(model: Any, windows: torch.Tensor, share: float) -> Pruned:
    """Structured OBS, uniform, block by block on what the pruned blocks before answer."""
    sizes, small = sizes_of(model), copy.deepcopy(model)
    numbers, kept, weights = uniform(sizes, share), {}, {}
    for block, step in enumerate(_walk(small, windows)):
        for part in PARTS:
            key, layer = (block, part), output(small, block, part)
            gram = _gram(layer, step)
            weight = layer.weight.double().numpy()
            order = obs_order(weight, gram, sizes.units[part], numbers[key])
            kept[key] = np.setdiff1d(np.arange(sizes.units[part]), order)
            weights[key] = refitted(weight, gram, sizes.columns(part, kept[key]))
            write(small, key, kept[key], weights[key], None)
    return Pruned(kept, weights)


def obs_order(weight: np.ndarray, gram: np.ndarray, units: int, count: int) -> list[int]:
    """The units that go first, greedily: a unit S costs tr(W_S ([H^-1]_SS)^-1 W_S^T), then W and H^-1 are updated.

    weight (out, in); gram (in, in); units: into how many equal runs the inputs fall; count: how many go.
    """
    width, inverse = weight.shape[1] // units, np.linalg.inv(damped(gram))
    if width == 1:
        return _column_order(torch.tensor(weight).float(), torch.tensor(inverse).float(), count)
    weight, left, order = weight.copy(), np.arange(units), []
    for _ in range(count):
        costs = np.array([_unit_cost(weight, inverse, slice(u * width, (u + 1) * width)) for u in left])
        unit = int(left[costs.argmin()])
        inner = slice(unit * width, (unit + 1) * width)
        solved = np.linalg.solve(inverse[inner, inner], inverse[inner])
        weight -= weight[:, inner] @ solved
        inverse -= inverse[:, inner] @ solved
        left = left[left != unit]
        order.append(unit)
    return order


def _column_order(weight: torch.Tensor, inverse: torch.Tensor, count: int, compact: int = 64) -> list[int]:
    """The same for single columns; what went is cut out of both matrices every `compact` columns."""
    names, alive, order = torch.arange(weight.shape[1]), torch.ones(weight.shape[1], dtype=torch.bool), []
    for step in range(count):
        if step % compact == 0:
            weight, inverse, names = weight[:, alive].contiguous(), inverse[alive][:, alive].contiguous(), names[alive]
            alive = alive[alive]
        costs = (weight * weight).sum(0) / inverse.diagonal()
        j = int(costs.masked_fill(~alive, torch.inf).argmin())
        row, pivot = inverse[j].clone(), float(inverse[j, j])
        weight.addr_(weight[:, j].clone(), row, alpha=-1 / pivot)
        inverse.addr_(row, row, alpha=-1 / pivot)
        inverse[j, j] = 1.0  # its row and column are zero now
        alive[j] = False
        order.append(int(names[j]))
    return order


def _unit_cost(weight: np.ndarray, inverse: np.ndarray, inner: slice) -> float:
    return float(np.sum(np.linalg.inv(inverse[inner, inner]) * (weight[:, inner].T @ weight[:, inner])))


def damped(gram: np.ndarray) -> np.ndarray:
    """The gram with `DAMPING`."""
    return gram + DAMPING * np.diagonal(gram).mean() * np.eye(len(gram))


def refitted(weight: np.ndarray, gram: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The least squares weights on the columns that stay: W H_:K H_KK^-1, zero elsewhere; (out, in), float32."""
    full, fitted = damped(gram), np.zeros_like(weight)
    solved = scipy.linalg.solve(full[np.ix_(columns, columns)], full[columns] @ weight.T, assume_a="pos")
    fitted[:, columns] = solved.T
    return fitted.astype(np.float32)


class _Step:
    """A block and its inputs: calling it runs the block on all windows."""

    def __init__(self, model: Any, block: int, states: list[torch.Tensor]) -> None:
        self.model, self.block, self.states = model, block, states

    def __call__(self) -> list[torch.Tensor]:
        layer, found = self.model.model.layers[self.block], []
        for state in self.states:
            places = torch.arange(state.shape[1])[None]
            rotary = self.model.model.rotary_emb(state, places)
            found.append(layer(state, attention_mask=None, position_ids=places, position_embeddings=rotary))
        return found


def _walk(model: Any, windows: Sequence[torch.Tensor]) -> Iterator[_Step]:
    """The blocks in their order; the outputs of one, with what was written into it, are the inputs of the next."""
    states = [model.model.embed_tokens(window[None]) for window in windows]
    for block in range(len(model.model.layers)):
        step = _Step(model, block, states)
        yield step
        states = step()


def _gram(layer: nn.Linear, step: _Step) -> np.ndarray:
    """Sum of x x^T over the inputs of a layer while a step runs, (in, in)."""
    total = torch.zeros(layer.in_features, layer.in_features)

    def add(module: Any, arguments: tuple[torch.Tensor]) -> None:
        x = arguments[0].reshape(-1, arguments[0].shape[-1])
        total.addmm_(x.T, x)

    hook = layer.register_forward_pre_hook(add)
    step()
    hook.remove()
    return total.double().numpy()
