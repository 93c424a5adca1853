"""Runs the authors' code of Kwon et al., 2022, "A Fast Post-Training Pruning Framework for Transformers", on a CPU.

`search_peers.py` calls this file in an environment of its own, with a checkout of
github.com/WoosukKwon/retraining-free-pruning:

    python3.11 -m venv ENV
    ENV/bin/pip install torch==2.13.0 transformers==4.25.1 "huggingface-hub<0.17" scipy safetensors
    ENV/bin/python benchmarks/search_peer_kwon.py CHECKOUT JOB

The steps and their arguments are those of the checkout's `main.py`: gradients of the masks on 2,048 labelled training
rows in batches of 32, search within the multiply-accumulates, rearrangement, and scales by least squares. Two things
stand in for a GPU: `.cuda()` and `.to("cuda")` do nothing, and scipy's LSMR takes the place of CuPy's, with CuPy's
number of iterations. JOB is an .npz: rows as token ids end to end (`ids`, `lengths`, `labels`; `test_ids`,
`test_lengths`), `model` (a folder), `share`, `seed`, `length` (tokens a row that costs are computed for), `output`.
"""

import json
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse.linalg
import torch
import transformers
from safetensors.torch import load_file

SAMPLES, BATCH, TEST_BATCH = 2048, 32, 128


def stand_in_for_cuda() -> None:
    """Let tensors and modules stay on the CPU, and let scipy be CuPy."""
    moved = torch.Tensor.to

    def to(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return moved(tensor, *("cpu" if a == "cuda" else a for a in args), **kwargs)

    def stay(value: Any, *args: Any, **kwargs: Any) -> Any:
        return value

    def lsmr(matrix: Any, vector: Any, **kwargs: Any) -> Any:
        return scipy.sparse.linalg.lsmr(matrix, vector, maxiter=5 * min(matrix.shape), **kwargs)

    torch.Tensor.to, torch.Tensor.cuda, torch.nn.Module.cuda = to, stay, stay
    names = ("cupy", "cupyx", "cupyx.scipy", "cupyx.scipy.sparse", "cupyx.scipy.sparse.linalg")
    made = {name: types.ModuleType(name) for name in names}
    made["cupy"].asarray = made["cupy"].asnumpy = np.asarray
    made["cupyx.scipy.sparse.linalg"].lsmr = lsmr
    sys.modules.update(made)


def load(folder: Path) -> Any:
    """The classifier, whose folder a newer transformers wrote."""
    stored = json.loads((folder / "config.json").read_text())
    known = transformers.BertConfig().to_dict()
    config = transformers.BertConfig(**{k: v for k, v in stored.items() if k in known and k != "torch_dtype"})
    model = transformers.BertForSequenceClassification(config)
    missing, unexpected = model.load_state_dict(load_file(str(folder / "model.safetensors")), strict=False)
    if unexpected or any("position_ids" not in name for name in missing):
        raise SystemExit(f"{folder} does not fill the model: without {missing}, beyond it {unexpected}")
    model.eval()
    return model.requires_grad_(requires_grad=False)


def batches(ids: np.ndarray, lengths: np.ndarray, size: int, labels: np.ndarray | None = None) -> list[dict[str, Any]]:
    """Rows in their order, each batch padded to its longest."""
    rows = np.split(ids, np.cumsum(lengths)[:-1])
    found = []
    for start in range(0, len(rows), size):
        part = [torch.from_numpy(row) for row in rows[start : start + size]]
        padded = torch.nn.utils.rnn.pad_sequence(part, batch_first=True)
        mask = torch.arange(padded.shape[1])[None] < torch.tensor([len(row) for row in part])[:, None]
        batch = {"input_ids": padded, "attention_mask": mask.long(), "token_type_ids": torch.zeros_like(padded)}
        if labels is not None:
            batch["labels"] = torch.from_numpy(labels[start : start + size])
        found.append(batch)
    return found


def sampled(job: Any) -> list[dict[str, Any]]:
    """Training rows drawn as `main.py` draws them."""
    chosen = np.random.choice(len(job["lengths"]), SAMPLES)
    rows = np.split(job["ids"], np.cumsum(job["lengths"])[:-1])
    ids = np.concatenate([rows[i] for i in chosen])
    return batches(ids, job["lengths"][chosen], BATCH, job["labels"][chosen])


def prune(model: Any, data: list[dict[str, Any]], share: float, length: float) -> dict[str, torch.Tensor]:
    """Masks of heads and neurons: as searched, as rearranged, and as scaled."""
    from prune.fisher import collect_mask_grads
    from prune.rearrange import rearrange_mask
    from prune.rescale import rescale_mask
    from prune.search import search_mac
    from utils.schedule import get_pruning_schedule

    config = model.config
    heads = torch.ones(config.num_hidden_layers, config.num_attention_heads)
    neurons = torch.ones(config.num_hidden_layers, config.intermediate_size)
    gradients = collect_mask_grads(model, heads, neurons, data)
    first = get_pruning_schedule(target=share, num_iter=2)[0]
    teacher = search_mac(config, *gradients, length, first)
    found = search_mac(config, *gradients, length, share)
    chosen = [rearrange_mask(mask, its) for mask, its in zip(found, gradients, strict=True)]
    scaled = rescale_mask(model, config, *teacher, *chosen, data, classification_task=True)
    return {"heads": scaled[0], "neurons": scaled[1], "kept_heads": chosen[0], "kept_neurons": chosen[1]}


@torch.no_grad()
def answers(model: Any, data: list[dict[str, Any]], heads: torch.Tensor, neurons: torch.Tensor) -> np.ndarray:
    """Logits (rows, classes) of the masked model."""
    from utils.arch import MaskNeurons

    with MaskNeurons(model, neurons):
        return torch.cat([model(head_mask=heads, **batch).logits for batch in data]).numpy()


def main() -> None:
    """Run one job."""
    checkout, job = sys.argv[1], np.load(sys.argv[2])
    torch.set_num_threads(1)
    stand_in_for_cuda()
    sys.path.insert(0, checkout)
    model = load(Path(str(job["model"])))
    transformers.set_seed(int(job["seed"]))
    data = sampled(job)
    start = time.process_time()
    masks = prune(model, data, float(job["share"]), float(job["length"]))
    seconds = time.process_time() - start
    test = batches(job["test_ids"], job["test_lengths"], TEST_BATCH)
    dense = {name: torch.ones_like(masks[name]) for name in ("heads", "neurons")}
    np.savez(
        str(job["output"]),
        logits=answers(model, test, masks["heads"], masks["neurons"]),
        logits_unscaled=answers(model, test, masks["kept_heads"], masks["kept_neurons"]),
        logits_dense=answers(model, test, dense["heads"], dense["neurons"]),
        seconds=seconds,
        **{name: mask.numpy() for name, mask in masks.items()},
    )


if __name__ == "__main__":
    main()
