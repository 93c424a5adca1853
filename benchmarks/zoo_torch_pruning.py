"""Torch-Pruning 1.6.1 on the tiny models of benchmarks/zoo.py, by its documented use, for the column beside ours.

It lives in an environment of its own:

    python3.11 -m venv /path/to/venv
    /path/to/venv/bin/pip install torch==2.13.0 transformers==5.23.0 torch-pruning==1.6.1 \
        array-api-compat wrapt pydantic safetensors pillow
    python benchmarks/zoo_torch_pruning.py --python /path/to/venv/bin/python [--only bert,llama]

Its README and examples prune Transformers with `BasePruner(model, example, importance, pruning_ratio=0.5,
num_heads={query: heads}, prune_num_heads=True, prune_head_dims=False, ignored_layers=[the output layer])`; the
the user sets attributes that repeat sizes afterwards. Here `num_heads` lists every linear layer whose name says
query, key, value or a fusion of them; attributes `num_heads`, `num_attention_heads`, `all_head_size` and
`num_key_value_groups` are set as its ViT, BERT and Llama examples do. A type passes when the pruned model runs, has
lost parameters in attention and in the FFN, and gives outputs of the same shapes. (Whether masked equals pruned cannot
be asked: hidden width is pruned too.)

Rows go to .cache/zoo-torch-pruning.jsonl; benchmarks/zoo.py puts them into its table.
"""

import argparse
import json
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache" / "zoo-torch-pruning.jsonl"
SECONDS_PER_MODEL = 60
"""CPU time; a process that hangs without using any is ended after ten times as long."""
MOST_IN_A_GROUP = 5000
"""Its search for coupled layers does not end on most rotary embeddings (after 60 s the group of one layer of a tiny
Llama had 23,000 entries and still grew), so the search is ended with that reason at this size of a group."""
MEMORY = 3 << 30
ATTENTION = re.compile(r"(^|[._])(q|k|v|qkv|query|key|value|query_key_value|c_attn|[qkv]_?proj|[qkv]_lin|qkv_proj)$")


def heads_of(model: Any) -> dict[Any, int]:
    """Linear layers of attention -> their number of heads, as the `num_heads` argument wants it."""
    import torch

    heads_by_layer = {}
    for path, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or not ATTENTION.search(path):
            continue
        owner = model.get_submodule(path.rpartition(".")[0])
        config = getattr(owner, "config", None) or model.config
        names = ("num_heads", "num_attention_heads", "n_heads", "n_head")
        key_value = re.search(r"(^|[._])(k|v|key|value|k_proj|v_proj)$", path)
        if key_value and getattr(config, "num_key_value_heads", None):
            heads_by_layer[module] = config.num_key_value_heads
            continue
        heads = next((getattr(o, n) for o in (owner, config) for n in names if isinstance(getattr(o, n, None), int)), 0)
        if heads:
            heads_by_layer[module] = heads
    return heads_by_layer


def mend(model: Any, pruner: Any) -> None:
    """Attributes that the documented examples set by hand after pruning."""
    for _, module in model.named_modules():
        queries = [m for n, m in module.named_children() if ATTENTION.search(n) and m in pruner.num_heads]
        for name in ("num_heads", "num_attention_heads"):
            if queries and isinstance(vars(module).get(name), int):
                vars(module)[name] = pruner.num_heads[queries[0]]
        if queries and "all_head_size" in vars(module):
            module.all_head_size = queries[0].out_features
        keys = [m for n, m in module.named_children() if re.search(r"k_proj|key", n) and m in pruner.num_heads]
        if queries and keys and "num_key_value_groups" in vars(module):
            module.num_key_value_groups = queries[0].out_features // max(keys[0].out_features, 1)


def prune(kind: str) -> str:
    """The result of one type: `yes`, `partly: ...` or the reason why not."""
    sys.path[:0] = [str(ROOT / "src"), str(ROOT), str(ROOT / "benchmarks")]
    import torch_pruning
    import zoo
    from tests.torch.exact import outputs

    _limit_groups()
    model, inputs = zoo.build_and_run(kind)
    before = [tuple(o.shape) for o in outputs(model, inputs)]
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    last = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    ignored = [m for m in (last, getattr(model, "classifier", None)) if m is not None]
    pruner = torch_pruning.pruner.BasePruner(
        model,
        inputs,
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=0.5,
        num_heads=heads_of(model),
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=0.5,
        ignored_layers=ignored,
        output_transform=lambda out: sum(o.sum() for o in _tensors(out)),
    )
    pruner.step()
    mend(model, pruner)
    after = [tuple(o.shape) for o in outputs(model, inputs)]
    if after != before:
        return f"outputs of other shapes: {before[:2]} became {after[:2]}"
    now = {n: p.numel() for n, p in model.named_parameters()}
    attention = any(now.get(n, 0) < sizes[n] for n in sizes if re.search(r"att", n))
    other = any(
        now.get(n, 0) < sizes[n] for n in sizes if re.search(r"mlp|ffn|fc\d|intermediate|dense|lin\d|experts", n)
    )
    if not attention and not other:
        return "nothing was removed"
    return "yes" if attention and other else f"partly: {'attention' if attention else 'FFN'} only"


class Endless(Exception):
    """A dependency group grows without end."""


def _limit_groups() -> None:
    from torch_pruning.dependency.group import Group

    add = Group.add_dep

    def limited(self: Any, dep: Any, idxs: Any) -> None:
        if len(self.items) > MOST_IN_A_GROUP:
            raise Endless(f"a dependency group passed {MOST_IN_A_GROUP} entries")
        add(self, dep, idxs)

    Group.add_dep = limited


def _tensors(out: Any) -> list[Any]:
    import torch

    if isinstance(out, torch.Tensor):
        return [out] if out.is_floating_point() else []
    values = out.values() if isinstance(out, dict) else out if isinstance(out, (list, tuple)) else ()
    return [t for value in values for t in _tensors(value)]


def _child(kind: str, send: Any) -> None:
    import contextlib
    import io

    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    signal.setitimer(signal.ITIMER_PROF, SECONDS_PER_MODEL)  # ends the process: CPU time, so a pause costs nothing
    warnings.simplefilter("ignore")
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            text = prune(kind)
    except Exception as error:
        text = f"no: {type(error).__name__}: {' '.join(str(error).split())[:120]}".replace("|", "/")
    send.send(text)
    send.close()
    os._exit(0)


def work(kinds: list[str]) -> None:
    """Runs in the environment of Torch-Pruning: a process for each type."""
    import torch
    import torch_pruning  # noqa: F401
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    for kind in kinds:
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(kind, send))
        process.start()
        send.close()
        try:
            if not receive.poll(10 * SECONDS_PER_MODEL):
                os.kill(process.pid, signal.SIGPROF)
            text = receive.recv()
        except EOFError:
            process.join()
            took = process.exitcode == -signal.SIGPROF
            text = f"no: took more than {SECONDS_PER_MODEL} s" if took else f"no: ended with {process.exitcode}"
        process.join()
        print(kind, "|", text, flush=True)
        with CACHE.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"name": kind, "result": text}) + "\n")


def main() -> None:
    """Start the worker in the other environment, on the types that our table examines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True)
    parser.add_argument("--only", default="")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    kinds = [k for k in options.only.split(",") if k]
    if options.work:
        work(kinds)
        return
    if not kinds:
        done = {json.loads(line)["name"] for line in CACHE.read_text().splitlines()} if CACHE.is_file() else set()
        rows = {r["name"]: r for r in map(json.loads, (ROOT / ".cache" / "zoo.jsonl").read_text().splitlines())}
        kinds = [k for k, r in rows.items() if r["exported"] == "yes" and k not in done]
    command = [options.python, __file__, "--python", options.python, "--work", "--only", ",".join(sorted(kinds))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    raise SystemExit(subprocess.run(command, env=environment, check=False).returncode)


if __name__ == "__main__":
    main()
