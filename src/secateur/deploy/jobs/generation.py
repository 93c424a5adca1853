"""Generation on a runtime: a decoder as one graph with its key-value cache as inputs and outputs, an encoder-decoder as
three (encoder, first step, later steps); and the greedy loop around them, in numpy.

transformers' `decompose_for_generation` records the inputs of each step; a decoder's step is traced over several tokens
at once, so that with an empty cache it also reads the prompt.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur import agreement
from secateur.arrays import to_numpy
from secateur.deploy import runner, target
from secateur.deploy.jobs import material
from secateur.deploy.target import DeployError, ExportUnit, Port
from secateur.deploy.targets import genai
from secateur.deploy.targets.inputs import ports_of, positions_of

PAST, PRESENT = "input.", "output."
"""Prefixes of the cache among the inputs and outputs of a graph."""
NEW_TOKENS = 32
"""How many tokens `compare` generates, where the model has positions for them."""


def graphs_of(model: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, ExportUnit]:
    """The graphs that generation needs, with tensors to trace them; DeployError when the model cannot generate."""
    from transformers.exporters.utils import decompose_for_generation

    if not (hasattr(model, "can_generate") and model.can_generate()):
        raise DeployError(
            f"{type(model).__name__} does not generate; leave out generate, which exports its forward pass"
        )
    main = {k: v.clone() for k, v in inputs.items() if not k.startswith("decoder_")}
    if "attention_mask" in main:
        main["attention_mask"][0, :2] = 0  # padding on the left, else `generate` leaves the mask out
    try:
        stages = decompose_for_generation(model, dict(main), multi_token_decode=True)
    except RuntimeError as error:
        raise DeployError(
            f"{type(model).__name__} cannot generate from {', '.join(main)}: {runner.line(error.__cause__ or error)}"
        ) from error
    if "prefill" not in stages:
        raise DeployError(f"{type(model).__name__} generates from several encoders, which is not supported; export it")
    if not model.config.is_encoder_decoder:
        return {"decode": _graph(*stages["decode"])}
    encoder = model.get_encoder()
    graphs = {"encoder": ExportUnit(encoder, main, ports_of(model, main))}
    return {**graphs, **{name: _graph(*stages[name]) for name in ("prefill", "decode")}}


def _graph(module: nn.Module, inputs: dict[str, Any]) -> ExportUnit:
    from transformers.exporters.utils import get_leaf_tensors

    ports = []
    for name, value in get_leaf_tensors(inputs).items():
        shape: list[int | str] = list(value.shape)
        if name.startswith("past_key_values"):
            shape[0], shape[2], name = "batch", "past", PAST + name
        else:
            shape[:2] = ["batch", "length"]
        ports.append(Port(name, str(value.dtype).removeprefix("torch."), tuple(shape)))
    return ExportUnit(module, inputs, ports)


def caches(ports: list[dict[str, Any]], batch: int) -> dict[str, np.ndarray]:
    """Empty caches for the ports of a graph as `artefact.json` holds them."""
    sizes: dict[Any, int] = {"batch": batch, "past": 0}
    return {
        p["name"]: np.zeros([sizes.get(n, n) for n in p["shape"]], p["dtype"])
        for p in ports
        if p["name"].startswith(PAST)
    }


def generate(
    folder: Path | str,
    inputs: Mapping[str, Any],
    max_new_tokens: int = NEW_TOKENS,
    *,
    threads: int = 1,
    on_logits: Callable[[np.ndarray], None] | None = None,
) -> np.ndarray:
    """Greedy generation on the runtime of an exported artefact: token ids (batch, tokens), the prompt included.

    inputs: what the tokenizer or feature extractor returns, prompts padded on the left. A row that has ended goes on
    with padding.
    on_logits: called with the scores of every step, (batch, vocabulary), which it may change in place: for other ways
    to choose a token (sampling, beams, forced or suppressed tokens).

    The program is loaded at each call; `generator` loads it once. Raises DeployError for an artefact without a cache.
    """
    return generator(folder, threads=threads)(inputs, max_new_tokens, on_logits=on_logits)


def generator(folder: Path | str, *, threads: int = 1) -> Callable[..., np.ndarray]:
    """`generate` on an artefact that stays loaded: a function of inputs, max_new_tokens and on_logits."""
    info = target.read(folder)
    rule = info.get("generation")
    if not rule:
        raise DeployError(f"{folder} was exported without a cache; export it again for generation (--generate)")
    run = {name: target.load(folder, name, threads) for name in info["graphs"]}
    begin = _from_encoder if "encoder" in run else functools.partial(_from_prompt, info["graphs"]["decode"]["inputs"])

    def loop(
        inputs: Mapping[str, Any],
        max_new_tokens: int = NEW_TOKENS,
        *,
        on_logits: Callable[[np.ndarray], None] | None = None,
    ) -> np.ndarray:
        state = begin(run, rule, {name: np.asarray(value) for name, value in inputs.items()})
        ended = np.zeros(len(state.tokens), bool)
        for _ in range(max_new_tokens):
            out = run[state.step](state.feed())
            scores = out["logits"][:, -1]
            if on_logits is not None:
                on_logits(scores)
            new = np.where(ended, rule["pad"], scores.argmax(-1))[:, None].astype(np.int64)
            state.take(new, out)
            ended |= np.isin(new[:, 0], rule["end"])
            if ended.all():
                break
        return state.tokens

    return loop


@dataclass
class _State:
    """The state of a generation.

    inputs: what every step reads.
    tokens: all tokens so far, (batch, tokens), and new: those that no graph has read yet.
    past: the cache.
    step: the graph of the next step.
    prompted: whether the decoder itself reads the prompt; then it takes positions, and a mask of the padding.
    """

    inputs: dict[str, np.ndarray]
    tokens: np.ndarray
    new: np.ndarray
    past: dict[str, np.ndarray]
    step: str
    prompted: bool

    def feed(self) -> dict[str, np.ndarray]:
        """All values that the graph of the next step may read."""
        feed = {**self.inputs, **self.past, "decoder_input_ids": self.new, "input_ids": self.new}
        if self.prompted:
            positions = np.clip(self.inputs["attention_mask"].cumsum(-1) - 1, 0, None)
            feed["position_ids"] = positions[:, -self.new.shape[1] :].astype(np.int64)
        return feed

    def take(self, new: np.ndarray, out: Mapping[str, np.ndarray]) -> None:
        """Append one token (batch, 1) to each row, and keep the cache of the step that chose it."""
        self.new, self.tokens = new, np.concatenate([self.tokens, new], 1)
        self.past = {PAST + k.removeprefix(PRESENT): v for k, v in out.items() if "past_key_values" in k}
        self.step = "decode"
        if self.prompted:
            mask = self.inputs["attention_mask"]
            self.inputs["attention_mask"] = np.concatenate([mask, np.ones((len(new), 1), mask.dtype)], 1)


def _from_encoder(run: Mapping[str, Any], rule: Mapping[str, Any], inputs: dict[str, np.ndarray]) -> _State:
    batch = len(next(iter(inputs.values())))
    inputs["encoder_outputs.last_hidden_state"] = next(iter(run["encoder"](inputs).values()))
    tokens = np.full((batch, 1), rule["start"], np.int64)
    return _State(inputs, tokens, tokens, {}, "prefill", prompted=False)


def _from_prompt(
    ports: list[dict[str, Any]], run: Mapping[str, Any], rule: Mapping[str, Any], inputs: dict[str, np.ndarray]
) -> _State:
    tokens = inputs.pop("input_ids").astype(np.int64)
    inputs.setdefault("attention_mask", np.ones_like(tokens))
    return _State(inputs, tokens, tokens, caches(ports, len(tokens)), "decode", prompted=True)


def rule_of(model: Any) -> dict[str, Any]:
    """Where generation starts and ends: token numbers from the model's generation config."""
    config = model.generation_config
    end = config.eos_token_id
    ends = [int(n) for n in (end if isinstance(end, list) else [end]) if n is not None]
    pad = config.pad_token_id if config.pad_token_id is not None else (ends or [0])[0]
    start = config.decoder_start_token_id if config.decoder_start_token_id is not None else config.bos_token_id
    return {"start": start, "end": ends, "pad": int(pad)}


def write_genai(model: Any, info: Mapping[str, Any], folder: Path) -> list[str]:
    """Write what ONNX Runtime GenAI has to know of an ONNX artefact; a sentence where it cannot run it.

    info: what `artefact.json` says. Other artefacts stay as they are.
    """
    if "generation" not in info or info["target"] != "onnx":
        return []
    reason = genai.write_config(model, info, folder, (PAST, PRESENT))
    return [reason] if reason else []


def compare(
    model: Any, folder: Path, inputs: Mapping[str, torch.Tensor], tolerance: float, *, rounded: bool = False
) -> dict[str, Any]:
    """Greedy tokens of the artefact and of PyTorch; DeployError when tokens or logits differ.

    rounded: weights are stored in fewer bits, which changes the order of almost equal logits: the artefact then goes on
    with PyTorch's tokens, and only its logits must be within the tolerance.

    Returns how many new tokens were compared, the share of the steps (of every row) that choose the same token, and the
    largest relative error of the logits of a step (`secateur.agreement.compare`).
    """
    positions = positions_of(model)
    prompt_length = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    count = NEW_TOKENS if positions is None else max(1, min(NEW_TOKENS, positions - prompt_length))
    options = {"do_sample": False, "num_beams": 1, "max_new_tokens": count, "min_new_tokens": count}
    expected = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    sequences = to_numpy(expected.sequences)
    answers = sequences[:, -count:]
    seen: list[np.ndarray] = []
    chosen: list[np.ndarray] = []
    tokens = _unended(folder, inputs, count, seen, chosen, answers if rounded else None)
    steps = [{f"logits of step {i}": to_numpy(x) for i, x in enumerate(logits)} for logits in (expected.logits, seen)]
    try:
        worst = agreement.compare(*steps).error
    except agreement.AgreementError as error:
        raise DeployError(f"generation differs from PyTorch: {error}; nothing was written") from error
    whole = tokens.shape == sequences.shape
    share = float((np.stack(chosen, 1) == answers).mean()) if whole else 0.0
    equal = whole and bool((tokens == sequences).all()) and share == 1.0
    if not whole or not (equal or rounded) or not worst <= tolerance:
        raise DeployError(
            f"generation differs from PyTorch: {'the same' if equal else 'other'} tokens, logits by {worst:.1e} of "
            f"their scale (permitted: {tolerance:.0e}); nothing was written"
        )
    return {"tokens": count, "equal": equal, "agreement": share, "relative_error": worst}


def _unended(
    folder: Path,
    inputs: Mapping[str, torch.Tensor],
    count: int,
    seen: list[np.ndarray],
    chosen: list[np.ndarray],
    answers: np.ndarray | None,
) -> np.ndarray:
    """Generate `count` tokens, also after a text has ended, as PyTorch does with `min_new_tokens`.

    seen, chosen: take the scores of each step, and the token that is best.
    answers: tokens (batch, count) to go on with instead of those chosen.
    """
    end = target.read(folder)["generation"]["end"]

    def forbid(scores: np.ndarray) -> None:
        seen.append(scores.copy())
        scores[:, end] = -np.inf
        chosen.append(scores.argmax(-1))
        if answers is not None:
            scores[np.arange(len(scores)), answers[:, len(chosen) - 1]] = np.inf

    return generate(folder, {k: to_numpy(v) for k, v in inputs.items()}, count, on_logits=forbid)


def prompts_of(
    model: nn.Module, data: material.Material | None, inputs: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Two prompts of the user's data; or the made-up inputs."""
    chosen = inputs if data is None else data.prompts()
    return {k: v for k, v in chosen.items() if k in (model.main_input_name, "attention_mask") and k in inputs}
