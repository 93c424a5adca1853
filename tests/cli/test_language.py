"""secateur prune and eval on language models, through the real entry point."""

import errno
import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from secateur.errors import PlanError
from tests.text_models import write_documents, write_model
from tests.torch.language import files

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llm") / "llm"
    write_model(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    return write_documents(tmp_path / "text.txt")


OPTIONS = ("--criterion", "sparsegpt", "--pattern", "2:4", "--samples", 6, "--context", 16)


def test_prune_and_perplexity(call, result, llm, text, place):
    done = call("prune", llm, "--calibration", text, *OPTIONS, "--memory", "4GiB", "--output", place / "out")
    assert done.code == 0, done.err
    assert "block 3/3: model.layers.2: error 0." in done.err
    assert "0:00 left" in done.err
    assert "13,824 of 27,648 weights are zero (50.00%)" in done.out
    assert "not embeddings, norms, biases or heads" in done.out
    assert [p.name for p in place.iterdir()] == ["out"]
    words = ["--task", "perplexity", "--text", text, "--context", 16]
    score = result("eval", place / "out", *words, "--reference", llm, "--check")
    assert score["context"] == 16
    assert score["windows"] == 40 * 21 // 16
    assert score["interval"][0] < score["delta"] < score["interval"][1]
    assert score["kl"] > 0
    assert 0 < score["flips"] < 1
    assert [row["name"] for row in score["rows"]][::3] == ["dense float32", "this model float32"]
    assert [row["format"] for row in score["rows"]] == ["float32", "q8_0", "q4_0"] * 2
    assert {name: score[name] for name in ("kl", "delta")} == {n: score["rows"][3][n] for n in ("kl", "delta")}
    alone = result("eval", llm, *words)
    assert alone["perplexity"] == pytest.approx(score["dense_perplexity"])
    assert alone["delta"] is None
    assert [row["name"] for row in alone["rows"]] == ["this model float32"]
    shown = call("eval", place / "out", *words)
    assert "out on text.txt: 52 windows of 16 tokens that do not overlap" in shown.out
    assert "has collapsed: it predicts worse" in shown.err  # a random model knows less than a table of frequencies


def test_rows_at_fewer_bits_on_the_command_line(call, refused, llm, text, monkeypatch):
    from secateur.deploy.gguf import export

    words = ["eval", llm, "--task", "perplexity", "--text", text, "--context", 16, "--samples", 3, "--reference", llm]
    done = call(*words, "--quantized", "Q8_0, f16")
    assert done.code == 0, done.err
    names = re.findall("^ *((?:dense|this model) [a-z]+[0-9_]+)  ", done.out, re.M)
    assert names == [f"{whose} {form}" for whose in ("dense", "this model") for form in ("float32", "q8_0", "f16")]
    assert "this model q8_0 (0.0 MB) beside dense q8_0 (0.0 MB): loss +0.0000 [+0.0000, +0.0000]" in done.out
    assert "no format 'q9' for GGUF" in refused(*words, "--quantized", "q9")
    assert "--lm-eval-limit does nothing without --lm-eval" in refused(*words, "--lm-eval-limit", 3)
    monkeypatch.setattr(export, "PACKAGES", ("absent_package",))
    done = call(*words)
    assert done.code == 0, done.err
    assert "no rows at 8 and 4 bits: absent_package is not installed; `pip install 'secateur[gguf]'`" in done.err
    assert "q8_0" not in done.out
    assert "absent_package is not installed" in refused(*words, "--quantized", "q8_0")
    assert "absent_package is not installed" in refused(*words, "--speed")


UNITS = ("--target", "params<=0.75", "--samples", 6, "--context", 16, "--memory", "4GiB")


def test_whole_units_within_a_memory(call, refused, llm, text, place):
    done = call("prune", llm, "--calibration", text, *UNITS, "--round", 8, "--json", "--output", place / "out")
    assert done.code == 0, done.err
    assert "whole layers and experts are not searched" in done.err
    assert "block 3/3" in done.err
    found = json.loads(done.out)
    assert found["parameters"] <= 0.75 * found["dense_parameters"]
    assert all(count % 8 == 0 for axis, count in found["kept"].items() if axis.endswith("ffn"))
    assert [p.name for p in place.iterdir()] == ["out"]
    words = ["prune", llm, "--calibration", text, *UNITS, "--output", place / "other"]
    assert "--max-drop has no meaning in a search within --memory" in refused(*words, "--max-drop", 0.01)
    assert "a latency is measured on whole models" in refused(*words, "--target", "latency<=0.5x@onnx")
    assert "--heal-budget has no meaning in a search within --memory" in refused(*words, "--heal-budget", "1min")
    assert "reads text; pass --calibration" in refused("prune", llm, *UNITS[:2], *UNITS[-2:], "--output", place / "a")


@pytest.mark.slow
def test_a_recipe_says_the_same_as_options(call, llm, text, place):
    recipe = text.parent / "recipe.yaml"
    recipe.write_text(
        f"model: {llm}\ncriterion: sparsegpt\npattern: 2:4\ncalibration: text.txt\nsamples: 6\ncontext: 16\n"
    )
    assert call("prune", "--recipe", recipe, "--output", place / "a").code == 0
    assert call("prune", llm, "--calibration", text, *OPTIONS, "--output", place / "b").code == 0
    assert files(place / "a") == files(place / "b")


def test_what_the_command_line_says_of_method_and_sparsity(call, llm, text, place):
    words = ["--criterion", "ria+swaps", "--option", "damp=0.1", "--option", "passes=1", "--sparsity", 0.5]
    words += ["--sensitivity", "--samples", 6, "--context", 16, "--output", place / "out"]
    done = call("prune", llm, "--calibration", text, *words)
    assert done.code == 0, done.err
    assert "dealing out the sparsity 15/15" in done.err
    assert "13,824 of 27,648 weights are zero" in done.out
    record = json.loads((place / "out" / "pruned.json").read_text())
    assert record["recipe"]["options"] == {"damp": 0.1, "passes": 1}
    assert record["recipe"]["sensitivity"]["windows"] == 8
    zeros = {layer["zeros"] / layer["weights"] for block in record["blocks"] for layer in block["layers"]}
    assert len(zeros) > 3
    for word in ("damp", "=1", "damp=", "damp=[1"):
        done = call("prune", llm, "--calibration", text, "--option", word, "--output", place / "other")
        assert done.code == 2
        assert f"option '{word}'" in done.err


def test_the_command_line_wins_over_a_recipe(tmp_path):
    from secateur.recipe import read_recipe

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("criterion: wanda\ndistil:\n  passes: 3\n")
    found = read_recipe(recipe, sparsity=0.5, distil=True, owl=True)
    assert found.sparsity == 0.5
    assert found.distil.passes == 3  # switched on, as the file describes it
    assert found.owl.spread == 0.08
    with pytest.raises(PlanError, match="^pattern 2:4 says itself how much goes") as caught:
        read_recipe(recipe, pattern="2:4", sparsity=0.5)
    assert "line" not in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("pattern: 2:4\nsamplez: 3\n", "line 2: 'samplez' is no entry of a recipe; there is model"),
        ("pattern: 2:4\nsamples: many\n", "line 2: 'samples': input should be a valid integer"),
        ("pattern: 2:4\nreconstruct:\n  passes: 1\n  rate: 7\n", "line 4: 'rate': input should be less than 1"),
        ("pattern: 2:4\n\ncriterion: luck\n", "line 3: no method 'luck' prunes block by block; there is alps"),
        ("pattern: 2:4\nsparsity: 0.5\n", "line 2: pattern 2:4 says itself how much goes; leave out sparsity"),
        ("pattern: [\n", "line 2: "),
        ("- 1\n", "is no recipe: it holds list"),
        ("pattern: 2:4\nmemory: much\n", "line 2: memory 'much' is not understood; write 4GiB"),
        ("samples: 3\npattern: head\n", "line 2: pattern head removes units; use element, 2:4 or a block"),
        ("samples: 3\n", "line 1: pattern element needs a sparsity, such as 0.5"),
        ("pattern: 2:4\nowl: true\n", "line 2: pattern 2:4 takes the same everywhere; leave out owl"),
        ("sparsity: 0.5\nsensitivity: true\nowl: true\n", "line 2: owl and sensitivity both deal out"),
        ("pattern: 2:4\noptions:\n  dump: 1\n", "line 2: sparsegpt has no option 'dump'; it has damp, columns"),
        ("pattern: 2:4\ncriterion: ria+wanda\n", "line 2: wanda chooses by itself what stays, so nothing comes before"),
        ("pattern: 2:4\nmemory: inf B\n", "memory 'inf B' is not understood; write 4GiB"),
        ("pattern: 2:4\nseed: -1\n", "line 2: 'seed': input should be greater than or equal to 0 (got -1)"),
    ],
)
def test_what_is_wrong_with_a_recipe(refused, place, tmp_path, lines, message):
    (tmp_path / "recipe.yaml").write_text(lines)
    assert message in refused("prune", "model", "--recipe", tmp_path / "recipe.yaml", "--output", place / "out")


@pytest.mark.slow
def test_bad_text_and_options(refused, llm, text, place, tmp_path):
    def prune(*extra, source=text):
        return refused("prune", llm, "--calibration", source, *extra, "--output", place / "out")

    short = write_documents(tmp_path / "short.txt", documents=1, words=5)
    assert "has 6 tokens, fewer than one window of 16" in prune(*OPTIONS, source=short)
    assert "no text at" in prune(*OPTIONS, source=tmp_path / "absent.txt")
    assert "windows of 128 tokens exceed the 64 positions" in prune("--pattern", "2:4", "--context", 128)
    assert "one block of this model needs about" in prune(*OPTIONS, "--memory", "1MiB")
    for option in ("--fine-tune", "--budget", "--learning-rate", "--layout-file", "--split", "--eval-split"):
        assert f"{option} has no meaning in pruning block by block" in prune(*OPTIONS, option, 1)
    for option in ("--max-length", "--batch-size", "--sweep-by", "--label-column", "--calibration-samples"):
        assert f"{option} has no meaning in pruning block by block" in prune(*OPTIONS, option, 8)
    assert "--trust-remote-code has no meaning in pruning" in prune(*OPTIONS, "--trust-remote-code")
    assert "model.layers.0.self_attn.q_proj.weight: the weight has 32 inputs, not a multiple of 5" in prune(
        "--criterion", "wanda", "--pattern", "2:5", "--context", 16
    )
    words = ["eval", llm, "--task", "perplexity"]
    assert "pass --text FILE" in refused(*words)
    assert "--max-length has no meaning in --task perplexity" in refused(*words, "--text", text, "--max-length", 8)


def test_a_tokenizer_that_does_not_fit(refused, tmp_path, text, place):
    write_model(tmp_path / "small", vocab_size=20)
    sentence = refused("prune", tmp_path / "small", "--calibration", text, *OPTIONS, "--output", place / "out")
    assert "the tokenizer gives token" in sentence
    assert "the model knows 20; they do not belong together" in sentence


@pytest.mark.slow
def test_folders_and_outputs_that_cannot_be(refused, llm, text, place, tmp_path):
    def prune(model, output=place / "out"):
        return refused("prune", model, "--calibration", text, *OPTIONS, "--output", output, "--overwrite")

    model = shutil.copytree(llm, tmp_path / "model")
    assert "is the model itself, which is read to the end; choose another output" in prune(model, model)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "is a link to" in prune(model, tmp_path / "link")
    assert "is not a folder" in prune(model, text / "out")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "nonsense"}))
    assert "has a config that cannot be read" in prune(model)
    (model / "config.json").write_text(json.dumps({**config, "intermediate_size": 24}))
    assert "where the config says (24, 32); copy the model again" in prune(model)
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    assert "lacks model.layers.3." in prune(model)


def test_tensors_that_the_model_does_not_use_are_named(call, llm, text, place, tmp_path):
    from safetensors.torch import save_file

    model = shutil.copytree(llm, tmp_path / "model")
    index = json.loads((model / "model.safetensors.index.json").read_text())
    save_file({"mtp.norm.weight": torch.ones(4)}, model / "more.safetensors", metadata={"format": "pt"})
    index["weight_map"]["mtp.norm.weight"] = "more.safetensors"
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    done = call("prune", model, "--calibration", text, *OPTIONS, "--output", place / "out")
    assert done.code == 0, done.err
    assert "copied as they were: 1 tensor that the model does not use, such as mtp.norm.weight" in done.out
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    done = call("prune", model, "--calibration", text, *OPTIONS, "--output", place / "two")
    assert "has no place for: model.layers.2." in done.err


def write_gguf(path):
    """A random Llama of two layers, float32, with a tokenizer of single characters."""
    import gguf
    import numpy as np

    hidden, inner, heads, kv, layers = 32, 64, 4, 2, 2
    tokens = ["<unk>", "<eos>", "\u0120", "\u010a", "w", *"0123456789", "w1"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["w 1"])
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(0)
    rng = np.random.default_rng(0)
    narrow = hidden // heads * kv
    shapes = {"attn_q": (hidden, hidden), "attn_k": (narrow, hidden), "attn_v": (narrow, hidden)}
    shapes |= {"attn_output": (hidden, hidden), "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden)}
    shapes |= {"ffn_down": (hidden, inner), "attn_norm": (hidden,), "ffn_norm": (hidden,)}
    named = {f"blk.{i}.{name}.weight": shape for i in range(layers) for name, shape in shapes.items()}
    named |= {"token_embd.weight": (len(tokens), hidden), "output_norm.weight": (hidden,)}
    named["output.weight"] = (len(tokens), hidden)
    for name, shape in named.items():
        writer.add_tensor(name, rng.normal(0, 0.1, shape).astype(np.float32) + ("norm" in name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_pruned(call, text, place, tmp_path):
    pytest.importorskip("gguf")
    from transformers import AutoModelForCausalLM

    write_gguf(tmp_path / "tiny.gguf")
    (place / ".out.gguf.killed" / "model").mkdir(parents=True)
    done = call("prune", tmp_path / "tiny.gguf", "--calibration", text, *OPTIONS, "--output", place / "out")
    assert done.code == 0, done.err
    assert "tiny.gguf is read whole and dequantised" in done.err
    assert [p.name for p in place.iterdir()] == ["out"]
    dense = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32).state_dict()
    for name, value in AutoModelForCausalLM.from_pretrained(place / "out").state_dict().items():
        if "_proj" in name:
            assert ((value != 0).reshape(-1, 4).sum(1) == 2).all()
        else:
            assert torch.equal(value, dense[name])


@pytest.mark.slow
def test_a_gram_that_is_not_positive_definite_is_damped_and_said(call, llm, text, place, monkeypatch):
    from secateur.torch.blockwise import prune_block

    real = prune_block.grams_of

    def spoilt(*arguments):
        grams = real(*arguments)
        first = next(iter(grams.values()))
        first.mul_(3 - 2 * torch.eye(len(first)))  # three times what is beside the diagonal
        return grams

    monkeypatch.setattr("secateur.torch.blockwise.walk.grams_of", spoilt)
    done = call("prune", llm, "--calibration", text, *OPTIONS, "--output", place / "out")
    assert done.code == 0, done.err
    assert "q_proj.weight: the gram is not positive definite" in " ".join(done.err.split())


@pytest.mark.slow
def test_distillation_from_the_command_line(call, result, llm, text, place):
    options = (*OPTIONS, "--distil", "--output", place / "out")
    found = result("prune", llm, "--calibration", text, *options)
    assert found["distilled"][0] > 0
    assert found["zeros"] * 2 == found["weights"]
    assert json.loads((place / "out" / "pruned.json").read_text())["recipe"]["distil"]["passes"] > 0
    again = call("prune", llm, "--calibration", text, *options, "--overwrite")
    assert re.search(r"distilling (\d+)/\1: loss 0\.", again.err)
    assert "distilled: loss" in again.out


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(call, llm, text, place, monkeypatch):
    from secateur.torch.stream import run as stream

    real = stream.write_shard
    written = []

    def interrupt(path, *rest, **options):
        written.append(path.name)
        if len(written) == 2:
            raise KeyboardInterrupt
        return real(path, *rest, **options)

    command = ["prune", llm, "--calibration", text, *OPTIONS, "--output", place / "out"]
    monkeypatch.setattr(stream, "write_shard", interrupt)
    done = call(*command)
    assert done.code == 130
    assert "interrupted after 1 of 3 blocks; run the same command again to go on" in " ".join(done.err.split())
    assert [p.name for p in place.iterdir()] == [".out.partial"]
    monkeypatch.setattr(stream, "write_shard", real)
    again = call(*command)
    assert again.code == 0
    assert "1 block done before" in again.err
    assert [p.name for p in place.iterdir()] == ["out"]


@pytest.mark.slow
def test_a_full_disk_is_said_and_the_run_goes_on_later(call, llm, text, place, monkeypatch):
    from secateur.torch.files import safetensors_shards
    from secateur.torch.stream import run as stream

    real = safetensors_shards.os.fsync
    calls = []

    def full(number):
        calls.append(number)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(number)

    command = ["prune", llm, "--calibration", text, *OPTIONS, "--output", place / "out"]
    monkeypatch.setattr(safetensors_shards.os, "fsync", full)
    done = call(*command)
    assert done.code == 2
    assert "stopped after 1 of 3 blocks: no space left on device" in " ".join(done.err.split())
    assert "make room or mend the cause" in " ".join(done.err.split())
    monkeypatch.setattr(safetensors_shards.os, "fsync", real)
    assert call(*command).code == 0
    whole = ["prune", llm, "--calibration", text, *OPTIONS, "--output", place / "whole"]
    assert call(*whole).code == 0
    assert files(place / "out") == files(place / "whole")
    assert stream.write_shard is safetensors_shards.write_shard


@pytest.mark.slow
def test_a_limit_on_file_sizes_in_a_real_process(llm, text, place):
    code = "import sys; from secateur.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "prune", llm, "--calibration", text, *OPTIONS, "--output", place / "out"]

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    def run(before=None):
        return subprocess.run([str(w) for w in command], capture_output=True, text=True, cwd=ROOT, preexec_fn=before)

    done = run(limit)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "file too large" in " ".join(done.stderr.split())
    assert run().returncode == 0
    assert [p.name for p in place.iterdir()] == ["out"]


def test_scores_by_hand():
    import math

    import numpy as np

    from secateur.scores import interval_of, text_score, unigram_loss

    assert unigram_loss(np.array([[1, 1, 2, 2]])) == pytest.approx(math.log(2))
    tokens = np.array([[0, 1, 2], [0, 2, 1]])
    score = text_score(np.array([1.0, 3.0]), tokens, np.array([0.5, 1.5]))
    assert score.perplexity == pytest.approx(math.exp(2))
    assert score.delta == pytest.approx(1.0)
    half = 1.96 * np.std([0.5, 1.5], ddof=1) / math.sqrt(2)
    assert score.interval == pytest.approx((1 - half, 1 + half))
    assert interval_of(np.array([1.0])) is None
    assert "more than 2 times that of the dense model" in score.collapsed
    assert text_score(np.array([0.1, 0.2]), tokens).collapsed is None
    assert "not a finite number" in text_score(np.array([math.nan, 1.0]), tokens).collapsed


def test_losses_and_distances_equal_plain_ones(llm):
    from secateur.torch.data.run_windows import evaluate_text
    from secateur.torch.open import load_model
    from tests import zoo
    from tests.torch.language import windows

    model, other = load_model(llm), zoo.llama()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
        ids = windows(3, 16)
        p, q = other(ids).logits[:, :-1].log_softmax(-1), model(ids).logits[:, :-1].log_softmax(-1)
    score = evaluate_text(model, ids, other)
    assert score.loss == pytest.approx(float(-q.gather(-1, ids[:, 1:, None]).mean()), rel=1e-5)
    assert score.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert score.flips == pytest.approx(float((p.argmax(-1) != q.argmax(-1)).float().mean()))
    assert json.dumps(vars(score))
