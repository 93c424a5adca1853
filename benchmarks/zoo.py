"""Every model type of the installed transformers, shrunk by generic overrides: traced, pruned, saved, reloaded.

Run: `python benchmarks/zoo.py [--only bert,llama] [--jobs 1]`. Writes benchmarks/results/zoo.md, one row a model type:
was it exported, which prunable axes were found, does masking equal removing at half of the heads and FFN units with
another number in each layer, is the reloaded model bit-equal, does `generate` work after it. Rows that fail say why.

Each finished row is stored in .cache/zoo.jsonl: a run continues where the last one stopped, `--only` makes its rows
again, and `--only -` writes the table from the stored rows. Limits are in CPU seconds, so a paused run loses nothing.
"""

import argparse
import contextlib
import copy
import io
import json
import multiprocessing
import os
import signal
import site
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402

CACHE = ROOT / ".cache" / "zoo.jsonl"
OTHER = ROOT / ".cache" / "zoo-torch-pruning.jsonl"
SECONDS_PER_MODEL = 90
MOST_PARAMETERS = 100_000_000
TOLERANCE = 1e-5
KINDS = ("head", "kv", "ffn", "layer", "expert")

SMALL = {
    32: "hidden_size d_model n_embd dim embed_dim hidden_dim embedding_size projection_dim decoder_hidden_size "
    "word_embed_proj_dim text_hidden_size encoder_hidden_size d_embed out_hidden_size input_dim backbone_hidden_size",
    48: "intermediate_size ffn_dim d_ff n_inner encoder_ffn_dim decoder_ffn_dim d_inner ffn_hidden_size hidden_dim_ffn "
    "moe_intermediate_size shared_expert_intermediate_size dim_feedforward decoder_intermediate_size expert_dim",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads n_experts "
    "rotary_dim attention_heads qk_rope_head_dim num_experts num_local_experts n_routed_experts moe_num_experts "
    "decoder_num_attention_heads",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_key_value_heads num_kv_heads "
    "n_head_kv num_decoder_layers num_encoder_layers decoder_num_hidden_layers num_experts_per_tok moe_topk "
    "encoder_num_hidden_layers depth num_experts_per_token moe_k num_blocks window_size",
    8: "head_dim attention_head_size d_kv qk_nope_head_dim v_head_dim dim_head linear_key_head_dim kv_channels "
    "linear_value_head_dim attention_head_dim",
    16: "q_lora_rank kv_lora_rank state_size mamba_d_state",
    64: "vocab_size n_positions max_position_embeddings max_source_positions max_target_positions n_ctx "
    "max_sequence_length entity_vocab_size",
    1: "n_group topk_group n_shared_experts moe_num_shared_experts first_k_dense_replace",
}
NUMBERS = {word: int(value) for value, words in SMALL.items() for word in words.split()}
LISTS = {
    "num_heads": (2, True),
    "num_attention_heads": (2, True),
    "depths": (2, False),
    "hidden_sizes": (16, True),
    "embed_dims": (16, True),
}
"""Sizes that are given by stage: the first, and whether they double from stage to stage."""
VARIANTS: tuple[dict[str, int], ...] = (
    {},
    {"num_hidden_layers": 8, "n_layer": 8, "num_layers": 8},
    dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_head_kv"), 4),
    {
        **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "num_heads"), 4),
        **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "head_dim"), 16),
        **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_num_groups"), 1),
        **dict.fromkeys(("mamba_d_ssm", "mamba_intermediate_size"), 64),
        "num_hidden_layers": 8,
    },
)
"""Sizes to try, in order, when the usual ones do not make a model that runs."""
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "sep_token_id", "cls_token_id")
LARGEST_TOKEN = 60
PIXELS = {"image_size": 32, "patch_size": 8}


@dataclass
class Row:
    """One model type."""

    name: str
    exported: str = ""
    axes: str = ""
    equal: str = ""
    reloaded: str = ""
    generates: str = ""
    note: str = ""
    seconds: float = 0.0


class Timeout(BaseException):
    """A model took too long."""


def tiny_config(kind: str, variant: dict[str, int]) -> Any:
    """The configuration of a model type with every size that has a usual name made small."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[kind]
    return config_class(**_overrides(config_class().to_dict(), {**NUMBERS, **variant}))


def _overrides(values: dict[str, Any], numbers: dict[str, int]) -> dict[str, Any]:
    """Smaller values of the fields of a config, nested configs included."""
    small: dict[str, Any] = {}
    for name, value in values.items():
        if name == "per_layer_config":
            small[name] = None
        elif isinstance(value, dict) and name.endswith("_config") and value:
            small[name] = {**value, **_overrides(value, numbers)}
            _drop_derived(small[name])
        elif isinstance(value, list) and name in LISTS and value:
            first, grows = LISTS[name]
            small[name] = [first * (2**i if grows else 1) for i in range(len(value))]
        elif isinstance(value, int) and not isinstance(value, bool):
            number = _smaller(name, value, numbers)
            if number is not None:
                small[name] = number
    if "kv_lora_rank" in small:
        small.pop("head_dim", None)
        small["num_key_value_heads"] = NUMBERS["num_attention_heads"]
    return small


def _smaller(name: str, value: int, numbers: dict[str, int]) -> int | None:
    """A smaller number for a field, or None where it keeps its own."""
    if name in numbers:
        return min(numbers[name], value) if value > 0 else value
    if name in PIXELS:
        return PIXELS[name]
    if name in TOKENS and value >= 0:
        return min(value, 1)
    return LARGEST_TOKEN if name.endswith("_token_id") and value > LARGEST_TOKEN else None


def _drop_derived(values: dict[str, Any]) -> None:
    for name in ("layer_types", "model_type_", "transformers_version", "torch_dtype"):
        values.pop(name, None)


def build_and_run(kind: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """A tiny random model that runs, and its inputs; the first error when no variant does."""
    from tests.torch.exact import outputs, randomize

    first: Exception | None = None
    for variant in VARIANTS:
        try:
            torch.manual_seed(0)
            model = randomize(build(kind, variant))
            inputs = example(model)
            outputs(model, inputs)
            return model, inputs
        except Timeout:
            raise
        except Exception as error:
            first = first or error
    assert first is not None
    raise first


def build(kind: str, variant: dict[str, int]) -> Any:
    """A tiny random model of a type: the class for generation where there is one."""
    from transformers.models.auto import modeling_auto as auto

    config = tiny_config(kind, variant)
    tables = [auto.MODEL_FOR_CAUSAL_LM_MAPPING, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING]
    if getattr(config, "is_encoder_decoder", False):
        tables.reverse()
    for table in (
        *tables,
        auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        auto.MODEL_FOR_MASKED_LM_MAPPING,
        auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
        auto.MODEL_MAPPING,
    ):
        if type(config) in table:
            model_class = table[type(config)]
            if isinstance(model_class, (list, tuple)):
                model_class = model_class[0]
            with torch.device("meta"):
                size = sum(p.numel() for p in model_class(copy.deepcopy(config)).parameters())
            if size > MOST_PARAMETERS:
                raise ValueError(f"still has {size / 1e6:.0f} M parameters with every usual size made small")
            return model_class(config)
    raise LookupError("no model class for this type (a part of another)")


def example(model: Any) -> dict[str, torch.Tensor]:
    """Inputs made up from the main input of the model."""
    from secateur.torch.data.example import example_for

    if model.main_input_name == "input_values":
        return {"input_values": torch.randn(2, 2000)}
    if model.main_input_name == "pixel_values" and not hasattr(
        getattr(model.config, "vision_config", model.config), "image_size"
    ):
        return {"pixel_values": torch.randn(2, 3, 64, 64)}
    return example_for(model)


def examine(kind: str) -> Row:
    """Fill the row of one model type."""
    from tests.torch.exact import choose, difference, mask, outputs

    from secateur.torch.shrink.probe import derive

    row = Row(kind)
    try:
        model, inputs = build_and_run(kind)
    except Timeout:
        raise
    except Exception as error:
        row.note = f"not built or run: {_sentence(error)}"
        return row
    try:
        layout = derive(model, inputs)
        row.exported = "yes"
    except Timeout:
        raise
    except Exception as error:
        row.exported, row.note = "no", _sentence(error)
        return row
    row.axes = _axes(layout)
    keep = choose(layout, ("head", "kv", "ffn"))
    if not keep:
        reasons = {f"{a.kind} {a.frozen}" for a in layout.axes.values() if a.frozen}
        heads = {reason for reason in reasons if reason.startswith(KINDS)}
        why = "; ".join(sorted(heads or reasons)) or "it has neither heads nor neurons between two linear layers"
        row.note = f"nothing to prune: {why[:400]}".replace("|", "/")
        return row
    try:
        worst = difference(model, layout, keep, inputs)
        row.equal = "yes" if worst <= TOLERANCE else f"NO {worst:.1e}"
        if worst > TOLERANCE:
            _check_in_double(row, model, layout, keep, inputs)
        changed = outputs(mask(model, layout, keep), inputs)
        if all(torch.equal(a, b) for a, b in zip(changed, outputs(model, inputs), strict=True)):
            row.equal += " (no effect)"
    except Timeout:
        raise
    except Exception as error:
        row.equal, row.note = "refused", _sentence(error)
        return row
    _round_trip(row, model, layout, keep, inputs)
    return row


def _round_trip(row: Row, model: Any, layout: Any, keep: Any, inputs: dict[str, torch.Tensor]) -> None:

    from secateur.torch.files.saving import save
    from secateur.torch.shrink.resize import resize

    shrunk = copy.deepcopy(model)
    resize(shrunk, layout, keep)
    try:
        with tempfile.TemporaryDirectory() as folder:
            save(shrunk, Path(folder) / "model")
            again = type(model).from_pretrained(Path(folder) / "model").eval()
        row.reloaded = "yes" if _bit_equal(shrunk, again, inputs) else "NO"
        if row.reloaded == "NO" and not _dense_reloads(model, inputs):
            row.reloaded, row.note = "dense neither", "the dense model is not bit-equal after save_pretrained either"
    except Timeout:
        raise
    except Exception as error:
        row.reloaded, row.note = "refused", _sentence(error)
        if not _dense_reloads(model, inputs):
            row.reloaded, row.note = "dense neither", "the dense model cannot be reloaded after save_pretrained either"
        return
    if hasattr(again, "generate") and again.can_generate():
        try:
            again.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
            row.generates = "yes"
        except Timeout:
            raise
        except Exception as error:
            row.generates, row.note = "no", _sentence(error)
            with contextlib.suppress(Exception):
                model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
                return
            row.generates = "dense neither"


def _bit_equal(first: Any, second: Any, inputs: dict[str, torch.Tensor]) -> bool:
    """Whether two models have the same weights and outputs.

    Loaded tensors lie in memory as the file has them, and products of unaligned ones may be rounded in another order:
    copies, which are aligned, are what is compared.
    """
    from tests.torch.exact import outputs

    weights = [{**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (first, second)]
    if weights[0].keys() != weights[1].keys() or not all(_same(t, weights[1][n]) for n, t in weights[0].items()):
        return False
    pairs = zip(*(outputs(copy.deepcopy(m), inputs) for m in (first, second)), strict=True)
    return all(_same(a, b) for a, b in pairs)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())


def _check_in_double(row: Row, model: Any, layout: Any, keep: Any, inputs: dict[str, torch.Tensor]) -> None:
    """Tell rounding from a wrong result: in float64 the difference must all but vanish."""
    from tests.torch.exact import difference

    from secateur.torch.trace.export import configs_of

    double = copy.deepcopy(model).double()
    for config in configs_of(double):
        if hasattr(config, "_experts_implementation_internal"):
            config._experts_implementation_internal = "batched_mm"  # the grouped product knows no float64
    inputs = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    exact = difference(double, layout, keep, inputs)
    if exact <= TOLERANCE / 10:
        row.equal, row.note = "yes", f"{row.equal.removeprefix('NO ')} in float32, {exact:.1e} in float64: rounding"


def _dense_reloads(model: Any, inputs: dict[str, torch.Tensor]) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder)
            return _bit_equal(model, type(model).from_pretrained(folder).eval(), inputs)
        except Exception:  # a type that cannot be saved and loaded as it is
            return False


def _axes(layout: Any) -> str:
    parts = {part for a in layout.axes.values() for part in a.parts}
    counts = []
    for kind in KINDS:
        axes = [a for a in layout.axes.values() if a.kind == kind and (a.name not in parts or kind == "kv")]
        if axes:
            free = sum(not a.frozen for a in axes)
            counts.append(f"{kind} {free}" + (f"/{len(axes)}" if free < len(axes) else ""))
    return ", ".join(counts)


def _sentence(error: BaseException) -> str:
    text = " ".join(str(error).split()).replace("|", "/")
    return f"{type(error).__name__}: {_without_folders(text)[:220]}"


def _without_folders(text: str) -> str:
    """Where this machine keeps Python and its packages tells nobody anything."""
    for folder in (*site.getsitepackages(), sys.prefix, sys.base_prefix, str(ROOT), tempfile.gettempdir()):
        text = text.replace(folder.rstrip("/") + "/", "")
    return text


def _guarded(kind: str) -> dict[str, Any]:
    def alarm(*_: Any) -> None:
        raise Timeout

    torch.set_num_threads(1)
    signal.signal(signal.SIGPROF, alarm)
    signal.setitimer(signal.ITIMER_PROF, SECONDS_PER_MODEL)
    start = time.process_time()
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            row = examine(kind)
    except Timeout:
        row = Row(kind, note=f"took more than {SECONDS_PER_MODEL} s of CPU time")
    except Exception as error:
        row = Row(kind, note=f"error in the benchmark: {_sentence(error)}")
    signal.setitimer(signal.ITIMER_PROF, 0)
    row.seconds = time.process_time() - start
    return asdict(row)


def _in_a_process(kind: str) -> dict[str, Any]:
    """The row of a type, made in a process of its own, which may die without harm to the others."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def work() -> None:
        send.send(_guarded(kind))
        send.close()
        os._exit(0)

    process = context.Process(target=work)
    process.start()
    send.close()
    try:
        values: dict[str, Any] = receive.recv()
    except EOFError:
        process.join()
        values = asdict(Row(kind, note=f"not built or run: the process ended with {process.exitcode}"))
    process.join()
    return values


def table(rows: list[Row]) -> str:
    """The Markdown table and its totals."""
    rows = [r for r in rows if "no model class for this type" not in r.note]
    built = [r for r in rows if not r.note.startswith("not built")]
    exported = [r for r in built if r.exported == "yes"]
    empty = [r for r in exported if r.note.startswith("nothing to prune")]
    good = [r for r in exported if _passes(r)]
    wrong = [r for r in exported if r.equal.startswith("NO") or r.reloaded == "NO"]
    other = read_other()
    compared = [r for r in exported if r.name in other]
    lines = [
        "# The zoo: every model type, tiny and random",
        "",
        f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, written by benchmarks/zoo.py.",
        "",
        f"{len(rows)} types tried, {len(built)} could be built and run from generic overrides, {len(exported)} were "
        f"exported. Of those {len(good)} ({len(good) / max(len(exported), 1):.0%}) pass every column that applies, "
        f"{len(empty)} have no heads or FFN units that can be pruned (the note says why), {len(wrong)} gave a wrong "
        "result.",
        "",
        "Axes: prunable of each kind (prunable/all where some are frozen). Equal: masked and shrunk differ by at most "
        f"{TOLERANCE:g} of the largest output. 'refused': an error with a sentence, nothing wrong was made.",
        "",
        f"Torch-Pruning 1.6.1 (benchmarks/zoo_torch_pruning.py) was tried on {len(compared)} of the exported types: "
        f"{sum(other[r.name] == 'yes' for r in compared)} ran with heads and FFN removed, "
        f"{sum(other[r.name].startswith('partly') for r in compared)} with one of the two; of the same types "
        f"{sum(_passes(r) for r in compared)} pass here. 'no' is an exception, in its own words.",
        "",
        "| type | exported | axes | masked = shrunk | reload bit-equal | generate | Torch-Pruning | note |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        cells = (
            r.name,
            r.exported,
            r.axes,
            r.equal,
            r.reloaded,
            r.generates,
            other.get(r.name, ""),
            _without_folders(r.note),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def read_other() -> dict[str, str]:
    """Rows of benchmarks/zoo_torch_pruning.py by model type; empty where it has not run."""
    lines = OTHER.read_text(encoding="utf-8").splitlines() if OTHER.is_file() else []
    return {row["name"]: row["result"] for row in map(json.loads, lines)}


def _passes(row: Row) -> bool:
    return (
        row.equal.startswith("yes")
        and row.reloaded in ("yes", "dense neither")
        and row.generates in ("", "yes", "dense neither")
    )


def read_rows(path: Path) -> dict[str, Row]:
    """The rows made so far, by model type; of several for one type the last."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {row["name"]: Row(**row) for row in map(json.loads, lines)}


def main() -> None:
    """Examine the types asked for and write the table."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/zoo.md")
    options = parser.parse_args()
    everything = sorted(CONFIG_MAPPING_NAMES)
    CACHE.parent.mkdir(exist_ok=True)
    kinds = [k for k in options.only.split(",") if k] or [k for k in everything if k not in read_rows(CACHE)]
    import tests.torch.exact  # noqa: F401
    import transformers  # noqa: F401

    import secateur.torch.shrink.probe  # noqa: F401

    with ThreadPoolExecutor(options.jobs) as pool:
        for values in pool.map(_in_a_process, [k for k in kinds if k in everything]):
            print(*values.values(), sep=" | ", flush=True)
            with CACHE.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
    rows = read_rows(CACHE)
    text = table([rows[k] for k in everything if k in rows])
    options.output.write_text(text, encoding="utf-8")
    print(text.splitlines()[4])


if __name__ == "__main__":
    main()
