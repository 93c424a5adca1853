"""Runs Torch-Pruning 1.6.1 (`GroupTaylorImportance`) on a BERT classifier, heads and FFN neurons, on a CPU.

`search_peers.py` calls this file in an environment of its own:

    python3.11 -m venv ENV
    ENV/bin/pip install torch==2.13.0 transformers==5.23.0 torch-pruning==1.6.1
    ENV/bin/python benchmarks/search_peer_torch_pruning.py JOB

As in its examples of Transformers, the layers that write into the residual stream are ignored, so that heads and inner
neurons go, and gradients are those of the loss on labelled rows. `scope` is `uniform` (the same share in each layer)
or `global` (all layers ranked together; shares by bisection, so that the multiply-accumulates are met). JOB is an
.npz as `search_peer_kwon.py` describes it, with labelled calibration rows.
"""

import copy
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_pruning
import transformers
from search_peer_kwon import TEST_BATCH, batches
from zoo_torch_pruning import heads_of, mend

BATCH, BISECTIONS = 32, 7


def with_gradients(model: Any, source: Any) -> Any:
    """A copy of the model whose parameters have the gradients of the source."""
    twin = copy.deepcopy(model)
    for ours, theirs in zip(twin.parameters(), source.parameters(), strict=True):
        ours.grad = None if theirs.grad is None else theirs.grad.clone()
    return twin


def sizes(model: Any) -> tuple[list[int], list[int]]:
    """Heads and neurons of each layer."""
    layers = model.bert.encoder.layer
    width = model.config.hidden_size // model.config.num_attention_heads
    heads = [layer.attention.self.query.out_features // width for layer in layers]
    return heads, [layer.intermediate.dense.out_features for layer in layers]


def share_of(model: Any, length: float) -> float:
    """Multiply-accumulates of the encoder's blocks relative to the dense model, at a number of tokens."""
    config, (heads, neurons) = model.config, sizes(model)
    width = config.hidden_size // config.num_attention_heads
    head, neuron = 4 * config.hidden_size * width + 2 * length * width, 2 * config.hidden_size
    dense = config.num_hidden_layers * (config.num_attention_heads * head + config.intermediate_size * neuron)
    return (sum(heads) * head + sum(neurons) * neuron) / dense


def pruned(model: Any, gone: float, *, everywhere: bool) -> Any:
    """A copy of the model without this share of heads and neurons."""
    twin = with_gradients(model, model)
    layers, count = twin.bert.encoder.layer, model.config.num_attention_heads
    whole = 1 - (round(count * (1 - gone)) + 0.01) / count  # it rounds the heads that stay down
    outputs = [m for layer in layers for m in (layer.attention.output.dense, layer.output.dense)]
    example = {"input_ids": torch.ones(2, 16, dtype=torch.long), "attention_mask": torch.ones(2, 16, dtype=torch.long)}
    pruner = torch_pruning.pruner.BasePruner(
        twin,
        example,
        importance=torch_pruning.importance.GroupTaylorImportance(),
        global_pruning=everywhere,
        pruning_ratio=gone,
        head_pruning_ratio=gone if everywhere else max(0.0, whole),
        num_heads=heads_of(twin),
        prune_num_heads=True,
        prune_head_dims=False,
        ignored_layers=[*outputs, twin.bert.embeddings, twin.bert.pooler, twin.classifier],
        output_transform=lambda out: out.logits.sum(),
    )
    pruner.step()
    mend(twin, pruner)
    return twin


def prune(model: Any, data: list[dict[str, Any]], share: float, length: float, scope: str) -> Any:
    """The pruned model of about this share of multiply-accumulates."""
    model.zero_grad()
    for batch in data:
        model(**batch).loss.backward()
    if scope == "uniform":
        return pruned(model, 1 - share, everywhere=False)
    low, high, best = 0.0, 1.0, None
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        found = pruned(model, middle, everywhere=True)
        if share_of(found, length) <= share:
            high, best = middle, found
        else:
            low = middle
    return best


def main() -> None:
    """Run one job."""
    job = np.load(sys.argv[1])
    torch.set_num_threads(1)
    folder = Path(str(job["model"]))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    data = batches(job["ids"], job["lengths"], BATCH, job["labels"])
    length = float(job["length"])
    start = time.process_time()
    smaller = prune(model, data, float(job["share"]), length, str(job["scope"]))
    seconds = time.process_time() - start
    test = batches(job["test_ids"], job["test_lengths"], TEST_BATCH)
    with torch.no_grad():
        logits = torch.cat([smaller(**batch).logits for batch in test]).numpy()
    heads, neurons = sizes(smaller)
    np.savez(str(job["output"]), logits=logits, seconds=seconds, heads=heads, neurons=neurons)


if __name__ == "__main__":
    main()
