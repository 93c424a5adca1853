"""Whole units of a language model from the command line: text in, a smaller model out, or one sentence."""

import pytest

from secateur import criteria
from tests.tasks.language import counting, write, write_columns, write_lines

UNITS = ("--criterion", "taylor", "--pattern", "ffn,kv", "--sparsity", 0.5, "--context", 16)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return write(tmp_path_factory.mktemp("llm") / "llm", "llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("text") / "text.txt", counting(40, 20))


def test_units_in_one_shot_and_with_training(result, llm, text, tmp_path):
    arguments = ["prune", llm, "--calibration", text, *UNITS, "--samples", 8, "--fine-tune", 2, "--distil"]
    done = result(*arguments, "--learning-rate", 0.01, "--output", tmp_path / "small")
    assert (done["task"], done["metric"]) == ("text-generation", "perplexity")
    stages = done["stages"]
    assert stages["tuned"]["values"]["perplexity"] < stages["pruned"]["values"]["perplexity"]
    assert done["reload_difference"] == 0
    assert done["macs_ratio"] < 0.9
    data = write_columns(tmp_path / "rows.csv", ["text"], [[line] for line in counting(8, 20, seed=1)])
    named = result("eval", tmp_path / "small", "--data", data, "--max-length", 16, "--against", llm)
    old = result(
        "eval", tmp_path / "small", "--task", "perplexity", "--text", data, "--context", 16, "--reference", llm
    )
    assert named["values"]["perplexity"] == pytest.approx(old["perplexity"], rel=1e-6)
    assert named["kl"] == pytest.approx(old["kl"], rel=1e-5)
    assert named["rows"] == old["windows"]


def test_what_is_refused(refused, llm, text, place, tmp_path):
    def prune(*extra, source=text):
        return refused("prune", llm, "--calibration", source, *extra, "--output", place / "out")

    absent = tmp_path / "absent.txt"  # so that none of these sentences waits for data
    for option in (["--memory", "4GiB"], ["--owl"], ["--reconstruct"], ["--option", "damp=1"], ["--data", "x.csv"]):
        wanted = f"{option[0]} has no meaning in pruning units of a language model on --calibration text; leave it out"
        assert prune(*UNITS, *option, source=absent) == wanted
    assert "--distil does nothing without --fine-tune" in prune(*UNITS, "--distil", source=absent)
    assert "--eval-split does nothing without --eval-data" in prune(*UNITS, "--eval-split", "test", source=absent)
    layers = ["--pattern", "layer", "--sparsity", 0.5]
    assert "criterion fisher cannot score units of kind 'layer'" in prune(
        *layers, "--criterion", "fisher", source=absent
    )
    assert "no criterion 'sparsegpt'; there is" in prune(*layers, "--criterion", "sparsegpt", source=absent)
    assert "how much? pass --sparsity" in prune("--pattern", "ffn", source=absent)
    assert prune(*UNITS, source=absent).startswith(f"no data at {absent}; pass a file")
    assert "the model has no axis or kind 'wing'" in prune("--pattern", "wing", "--sparsity", 0.5)
    assert "windows of 512 tokens exceed the 64 positions" in prune(*layers)
    other = write_columns(tmp_path / "other.csv", ["words"], [["w1"]])
    assert "mixed texts need the same" in prune(*UNITS, "--calibration", other)
    assert "no method 'taylor' prunes block by block" in prune("--criterion", "taylor", "--sparsity", 0.5)


def test_the_help_names_criteria_and_kinds(call):
    shown = " ".join(call("prune", "--help").out.replace("│", " ").split())
    for name in (*(n for n in criteria.__all__ if n != "threshold"), "head", "kv", "ffn", "layer", "expert", "hidden"):
        assert name in shown, name
