"""Tables of the options that each kind of run of a command has: an option that would do nothing is refused.

A test checks that the table of a command has all of its options.
"""

import typer

KINDS = {
    "classifier": "a run without --calibration or --recipe",
    "sweep": "a --sweep, which lists the values to try and does not train",
    "thresholds": "a --sweep of thresholds, which lists the values to try and does not train",
    "automatic": "a search for a target, which chooses what goes and how to train",
    "streamed": "a search within --memory, which counts sizes and never has a whole model to measure or to train",
    "language": "pruning block by block",
    "tokens": "giving a model a schedule of tokens",
    "units": "pruning units of a language model on --calibration text",
    "labels": "a run without --task perplexity",
    "perplexity": "--task perplexity",
    "torch": "a run on a PyTorch model",
    "keras": "a run on a .keras file",
    "gguf": "an export to GGUF",
    "decilm": "an export to DeciLM",
    "results": "showing --results of a kit",
    "kit": "writing an --export-kit",
    "time": "timing models here",
    "answer": "running a model that writes no text",
    "write": "running a model that writes an answer",
    "continue": "running a decoder",
    "compiled-answer": "running a compiled model, which stays as it was packed",
    "compiled-write": "running a compiled model, which stays as it was packed",
    "compiled-continue": "running a compiled decoder, which stays as it was packed",
    "llama": "running a GGUF artefact on llama.cpp",
}
"""The words of an error for each kind of run."""

_SWEEPS = "sweep thresholds"
_TEXTS = f"classifier {_SWEEPS}"
_COLUMNS = "label_column image_column audio_column label_names"
_RUNS = "answer write continue compiled-answer compiled-write compiled-continue"

TABLES: dict[str, dict[str, str]] = {
    "prune": {
        f"{_TEXTS} keras language units automatic streamed tokens": "model output threads overwrite json quiet",
        "classifier keras language units automatic streamed tokens": "report",
        f"{_TEXTS} keras language units automatic streamed": "seed",
        f"{_TEXTS} keras language units": "criterion pattern",
        f"{_TEXTS} keras automatic tokens": "data",
        f"{_TEXTS} keras automatic": "calibration_samples",
        f"{_TEXTS} keras units automatic tokens": "batch_size",
        f"{_TEXTS} keras units automatic": "eval_data",
        f"{_TEXTS} language units automatic tokens": "text_column task",
        f"{_TEXTS} units automatic tokens": "target_column new_tokens layout_file trust_remote_code",
        f"{_TEXTS} units automatic": "eval_split",
        f"{_TEXTS} automatic tokens": f"{_COLUMNS} split max_length",
        "classifier units tokens": "tokens keep merge",
        _TEXTS: "sweep sweep_by",
        "classifier keras language units": "sparsity",
        "classifier sweep keras units": "budget",
        "classifier keras units": "threshold fine_tune learning_rate",
        "classifier keras": "gradual",
        "classifier language units": "distil",
        "classifier units automatic": "uniform",
        "classifier units": "train_args",
        "language units automatic streamed": "calibration samples context",
        "automatic": "speed_up on max_drop max_divergence batch length quantize confident closest zeros reader "
        "frontier heal_budget search_budget",
        "automatic streamed": "target round",
        "language streamed": "text_column memory",
        "language": "recipe reconstruct owl sensitivity option",
    },
    "eval": {
        "labels perplexity keras": "model against threads report overwrite json",
        "labels perplexity": "text_column task trust_remote_code check quiet",
        "labels keras": "data batch_size",
        "labels": f"{_COLUMNS} target_column split max_length new_tokens",
        "perplexity": "text context samples quantized speed lm_eval lm_eval_path lm_eval_limit",
    },
    "export": {
        "torch keras gguf decilm": "model to output tolerance overwrite json",
        "torch keras": "data samples batch length sparse",
        "torch gguf decilm": "threads trust_remote_code",
        "torch": "text_column image_column audio_column split generate int8 tokens value activations cascade task",
        "gguf": "quantize",
        "decilm": "exact_widths",
    },
    "inspect": {"torch keras": "model layout layout_file json", "torch": "task trust_remote_code check levels plot"},
    "bench": {
        "time kit keras results": "models overwrite json",
        "time keras results": "plot report",
        "time kit keras": "runtime batch length turns threads quiet",
        "time kit": "int8 check task",
        "kit": "export_kit",
        "results": "results",
    },
    "run": {
        f"{_RUNS} llama": "model inputs data text_column split threads json",
        _RUNS: "image_column audio_column max_length",
        "answer write compiled-answer compiled-write": "batch_size",
        "write continue compiled-write compiled-continue llama": "new_tokens",
        "answer write continue": "value activations dense measure",
        "answer write continue compiled-answer compiled-write": "task",
    },
}
"""For each command: kinds of run -> the options that they have, by the names of the command's parameters."""

NEEDS: dict[str, dict[str, tuple[str, ...]]] = {
    "prune": {
        "budget": ("sparsity", "sweep"),
        "sweep_by": ("sweep",),
        "learning_rate": ("fine_tune",),
        "distil": ("fine_tune",),
        "gradual": ("fine_tune",),
        "eval_split": ("eval_data", "data"),
        "train_args": ("fine_tune",),
    },
    "eval": {"overwrite": ("report",), "lm_eval_path": ("lm_eval",), "lm_eval_limit": ("lm_eval",)},
    "export": {
        "tokens": ("sparse",),
        "value": ("sparse",),
        "activations": ("sparse",),
        "text_column": ("data",),
        "image_column": ("data",),
        "audio_column": ("data",),
        "split": ("data",),
        "samples": ("data",),
        "cascade": ("data",),
    },
    "inspect": {"plot": ("levels",)},
    "run": dict.fromkeys(("text_column", "image_column", "audio_column", "split"), ("data",)),
}
"""For each command: option -> options of which it needs one, in the kinds of run that have these."""


def options_of(command: str, kind: str) -> set[str]:
    """The parameters that belong to a kind of run."""
    return {name for kinds, names in TABLES[command].items() if kind in kinds.split() for name in names.split()}


def refuse(context: typer.Context, kind: str) -> None:
    """PlanError for an option of the command line that would do nothing in this kind of run."""
    from secateur.errors import PlanError

    command = context.command
    flags = {p.name: p.opts[0] for p in command.params}
    defaults = {p.name: p.default for p in command.params}
    known = options_of(str(command.name), kind)
    needs = NEEDS.get(str(command.name), {})
    for name in filter(None, flags):
        if not given(context, name):
            continue
        if name not in known:
            raise PlanError(f"{flags[name]} has no meaning in {KINDS[kind]}; leave it out")
        needed = [option for option in needs.get(name, ()) if option in known]
        if needed and all(context.params[option] == defaults[option] for option in needed):
            wanted = " or ".join(flags[option] for option in needed)
            raise PlanError(f"{flags[name]} does nothing without {wanted}; add that, or leave it out")


def given(context: typer.Context, name: str) -> bool:
    """Whether a parameter is on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
