"""How token vectors become the embedding of a text, as a sentence-transformers folder says it.

Source: Reimers and Gurevych, 2019, whose package defines the files.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from secateur.errors import ModelError, listed, shown
from secateur.schemas.model_folder import REMEDY
from secateur.schemas.reading import check
from secateur.schemas.sentence_folder import (
    Dense,
    Module,
    Pooling,
    read_module_config,
    read_modules,
    read_prompt,
    read_text_settings,
)

FLAGS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
"""Way of pooling -> its flag in older folders, in the order in which several stand in an embedding."""
Step = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Embedding:
    """What follows the transformer, and what its texts are cut and preceded by.

    folder: the sentence-transformers folder that says so; None where there is none, and the mean is taken.
    modes: ways of pooling, of `FLAGS`; several stand one after the other.
    steps: functions of vectors (texts, width) that follow, such as a linear layer or a division by the norm.
    max_length: the longest text in tokens; None where the tokenizer says it.
    prompt: what is put before each text.
    is_lowered: whether texts lose their case.
    """

    folder: Path | None = None
    modes: tuple[str, ...] = ("mean",)
    steps: Sequence[Step] = ()
    max_length: int | None = None
    prompt: str = ""
    is_lowered: bool = False

    def texts(self, texts: Sequence[str]) -> list[str]:
        """The texts as the tokenizer gets them."""
        return [self.prompt + (text.lower() if self.is_lowered else text) for text in texts]

    def of(self, states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Embeddings (texts, width) of token vectors (texts, tokens, hidden); mask (texts, tokens): 0 for padding."""
        if mask is None or mask.shape != states.shape[:2]:
            mask = torch.ones(states.shape[:2], dtype=torch.long, device=states.device)
        pooled = torch.cat([pool(states, mask, mode) for mode in self.modes], dim=-1)
        for step in self.steps:
            pooled = step(pooled)
        return pooled


def pool(states: torch.Tensor, mask: torch.Tensor, mode: str) -> torch.Tensor:
    """One vector (texts, hidden) of the token vectors (texts, tokens, hidden) that the mask counts."""
    rows = torch.arange(len(states), device=states.device)
    if mode == "cls":
        return states[rows, mask.int().argmax(1)]
    if mode == "lasttoken":
        return states[rows, mask.shape[1] - 1 - mask.int().flip(1).argmax(1)]
    if mode == "max":
        return states.masked_fill(mask[..., None] == 0, float("-inf")).amax(1)
    weights = mask.float()
    if mode == "weightedmean":
        weights = weights * weights.cumsum(1)
    total = weights.sum(1, keepdim=True).clamp_min(1e-9)
    summed = (states.float() * weights[..., None]).sum(1)
    return (summed / (total.sqrt() if mode == "mean_sqrt_len_tokens" else total)).to(states.dtype)


def read_embedding(folder: Path | None) -> Embedding:
    """The pooling of a folder; the mean where it is no sentence-transformers folder.

    Raises ModelError when one of its files is damaged, or a module is of a kind that is not known here.
    """
    modules = [] if folder is None else read_modules(folder)
    if folder is None or not is_pooled(modules):
        return Embedding()
    modes: tuple[str, ...] = ()
    steps: list[Step] = []
    prompt, text = read_prompt(folder), read_text_settings(folder)
    for module in modules:
        kind = _kind(module)
        if kind == "Pooling":
            path = f"{folder / module.path}/config.json"
            read = check(read_module_config(folder, module), Pooling, path, remedy=REMEDY)
            modes = _modes(read, path)
            if prompt and not read.include_prompt:
                raise ModelError(f"{path} leaves the prompt out of the pooling, which is not known here")
        elif kind == "Normalize":
            steps.append(_normalized)
        elif kind == "Dense":
            steps.append(_dense(folder, module))
        elif kind == "Transformer" and module.path == "":
            continue
        elif kind != "Dropout":  # which does nothing outside training
            raise ModelError(f"{folder} sends texts through {shown(module.type)}, which is not known here")
    return Embedding(folder, modes, tuple(steps), text.max_seq_length, prompt, bool(text.do_lower_case))


def is_pooled(modules: Sequence[Module]) -> bool:
    """Whether modules end in one vector a text; those of a cross-encoder do not."""
    return any(_kind(module) == "Pooling" for module in modules)


def _kind(module: Module) -> str:
    return module.type.rpartition(".")[2]


def _modes(read: Pooling, path: str) -> tuple[str, ...]:
    if read.pooling_mode is not None:
        modes = (read.pooling_mode,) if isinstance(read.pooling_mode, str) else tuple(read.pooling_mode)
    else:
        modes = tuple(mode for mode, flag in FLAGS.items() if getattr(read, flag)) or ("mean",)
    unknown = next((mode for mode in modes if mode not in FLAGS), None)
    if unknown is not None or not modes:
        raise ModelError(f"{path} names the pooling {shown(unknown)}; there is {listed(FLAGS)}")
    return modes


def _normalized(vectors: torch.Tensor) -> torch.Tensor:
    return F.normalize(vectors, dim=-1)


def _dense(folder: Path, module: Module) -> Step:
    """The linear layer of a module with its activation, and with the residual where it has one."""
    path = folder / module.path
    read = check(read_module_config(folder, module), Dense, f"{path}/config.json", remedy=REMEDY)
    activation = getattr(nn, read.activation_function.rpartition(".")[2], None)
    if not read.activation_function.startswith("torch.nn.") or activation not in (
        nn.Identity,
        nn.Tanh,
        nn.ReLU,
        nn.GELU,
        nn.SiLU,
        nn.Sigmoid,
    ):
        raise ModelError(f"{path} has the activation {shown(read.activation_function)}, which is not known here")
    layers = nn.ModuleDict({"linear": nn.Linear(read.in_features, read.out_features, bias=read.bias)})
    if read.use_residual and read.in_features != read.out_features:
        layers["residual"] = nn.Linear(read.in_features, read.out_features, bias=False)
    try:
        layers.load_state_dict(load_file(path / "model.safetensors"))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ModelError(
            f"{path}/model.safetensors does not hold the linear layer of {read.in_features} to {read.out_features} "
            f"({' '.join(str(error).split())[:200]}); save the model again with sentence-transformers"
        ) from None
    return _Linear(layers.requires_grad_(requires_grad=False), activation(), is_residual=read.use_residual)


class _Linear:
    """A linear layer that is not trained, on the device of its input."""

    def __init__(self, layers: nn.ModuleDict, activation: nn.Module, *, is_residual: bool) -> None:
        self.layers, self.activation, self.is_residual = layers, activation, is_residual

    def __call__(self, vectors: torch.Tensor) -> torch.Tensor:
        layers = self.layers.to(device=vectors.device, dtype=vectors.dtype)
        if vectors.shape[-1] != layers["linear"].in_features:
            raise ModelError(
                f"a linear layer of the sentence-transformers folder takes vectors of {layers['linear'].in_features}, "
                f"and gets {vectors.shape[-1]}; save the model again with sentence-transformers"
            )
        result = self.activation(layers["linear"](vectors))
        if not self.is_residual:
            return result
        return result + (layers["residual"](vectors) if "residual" in layers else vectors)
