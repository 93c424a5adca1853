"""Pruning block by block: the same bits from a folder, from memory, and from a plain loop over the whole model."""

import copy
import json
import os

import pytest
import torch
import transformers

import secateur
from secateur.errors import DataError, ModelError, PlanError
from secateur.repair import prepare, sparsegpt
from secateur.select import NM
from secateur.torch.stream import journal, run
from secateur.torch.stream.run import prune_folder, prune_loaded
from tests import zoo
from tests.text_models import write_model
from tests.torch import slow
from tests.torch.language import Stop, files, recipe, same, stopped_after, windows

FAMILIES = {"llama": (zoo.llama, 21), "gpt2": (zoo.gpt2, 12), "bert": (zoo.bert, 18), "t5": (zoo.t5, 38)}
pytestmark = pytest.mark.usefixtures("traced_once")


@pytest.mark.parametrize(
    ("family", "tuned"),
    [
        ("bert", False),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("llama", False), ("gpt2", False), ("t5", False))),
        pytest.param("t5", True, marks=pytest.mark.slow),
    ],
)
def test_folder_and_memory_give_the_same_bits(family, tuned, tmp_path):
    make, tensors = FAMILIES[family]
    model = write_model(tmp_path / "in", make)
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 2
    told = []
    report = prune_folder(
        tmp_path / "in", tmp_path / "out", windows(), recipe(reconstruct=tuned, memory="4GiB"), told.append
    )
    prune_loaded(model, windows(), recipe(reconstruct=tuned))
    assert same(model, tmp_path / "out")
    assert len(report.layers) == tensors
    assert report.zeros * 2 == report.weights
    assert [d.number for d in told] == list(range(1, told[0].total + 1))
    assert [p.name for p in tmp_path.iterdir() if p.name not in ("in", "out")] == []
    if tuned:
        assert all(d.tuned[1] < d.tuned[0] for d in told)


def test_options_of_the_method_count_and_are_checked(tmp_path):
    write_model(tmp_path / "in")
    states = []
    for damp in (0.01, 100.0):
        model = type(zoo.llama()).from_pretrained(tmp_path / "in")
        prune_loaded(model, windows(), recipe(options={"damp": damp}))
        states.append(model.state_dict())
    assert any(not torch.equal(value, states[1][name]) for name, value in states[0].items())
    for criterion, options, message in (
        ("sparsegpt", {"damp": "x"}, "option damp of sparsegpt: input should be a valid number"),
        ("sparsegpt", {"dampp": 1}, "sparsegpt has no option 'dampp'; it has damp, columns"),
        ("wanda", {"damp": 1}, "wanda has no option 'damp'; it has none"),
        ("wanda+swaps", {"start": 1}, "swaps has no option 'start'; it has damp, passes, tolerance"),
        ("swaps+wanda", {}, r"wanda chooses by itself what stays, so nothing comes before it in swaps\+wanda; alps"),
        ("swaps+", {}, "no method '' prunes block by block"),
    ):
        with pytest.raises(PlanError, match=message):
            recipe(criterion=criterion, options=options)
    with pytest.raises(PlanError, match="damp -1.0 is no number from 0 upwards"):
        prune_loaded(model, windows(), recipe(options={"damp": -1.0}))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_models_of_half_precision_give_the_same_bits_from_a_folder_and_in_memory(dtype, tmp_path):
    write_model(tmp_path / "in", lambda: zoo.llama().to(dtype))
    model = type(zoo.llama()).from_pretrained(tmp_path / "in")
    before = {name: p.clone() for name, p in model.named_parameters()}
    report = prune_folder(tmp_path / "in", tmp_path / "out", windows(), recipe())
    again = prune_loaded(model, windows(), recipe())
    assert same(model, tmp_path / "out")
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert again.layers == report.layers
    pruned = {layer["name"] for layer in report.layers}
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == pruned
    with pytest.raises(ModelError, match="is torch.float64, and blocks are pruned in torch.float32; pass"):
        prune_loaded(zoo.llama().double(), windows(), recipe())


def test_the_teacher_has_no_dropout(tmp_path):
    found = []
    for training in (False, True):
        model = zoo.llama(attention_dropout=0.5).train(training)
        found.append(prune_loaded(model, windows(), recipe(distil={"passes": 1})).distilled)
        assert model.training is training
    assert found[0] == found[1]


@pytest.mark.parametrize("family", ["llama", *slow("bert", "t5")])
def test_distillation_gives_the_same_bits_from_a_folder_and_in_memory(family, tmp_path):
    make, tensors = FAMILIES[family]
    model = write_model(tmp_path / "in", make)
    values = {"distil": {"passes": 4, "rate": 3e-3, "hidden": 1.0, "windows": 2}}
    steps = []
    report = prune_folder(
        tmp_path / "in", tmp_path / "out", windows(), recipe(**values), tuning=lambda *step: steps.append(step)
    )
    masked = prune_folder(tmp_path / "in", tmp_path / "before", windows(), recipe())
    again = prune_loaded(model, windows(), recipe(**values))
    assert same(model, tmp_path / "out")
    assert [step[:2] for step in steps] == [(i, 12) for i in range(1, 13)]
    assert report.distilled == again.distilled
    assert report.distilled[1] < report.distilled[0]
    assert report.zeros == masked.zeros == again.zeros
    before, after = (type(model).from_pretrained(tmp_path / name).state_dict() for name in ("before", "out"))
    pruned = {layer["name"] for layer in report.layers}
    assert len(pruned) == tensors
    for name, value in after.items():
        assert torch.equal(value == 0, before[name] == 0)
        assert torch.equal(value, before[name]) == (name not in pruned)


@pytest.mark.slow
def test_distillation_that_is_stopped_ends_with_the_same_files(tmp_path, monkeypatch):
    write_model(tmp_path / "in")
    tuned = recipe(distil={"passes": 2})
    prune_folder(tmp_path / "in", tmp_path / "whole", windows(), tuned)

    def stop(step, steps, loss):
        if step == 2:
            raise Stop

    with pytest.raises(Stop):
        prune_folder(tmp_path / "in", tmp_path / "out", windows(), tuned, tuning=stop)
    replace, moved = os.replace, []

    def replaced(source, target):
        moved.append(os.path.basename(source))
        if os.path.basename(os.path.dirname(source)) == "tuned" and len(moved) > 1:
            raise Stop
        replace(source, target)

    for kill in (replaced, replace):
        monkeypatch.setattr(journal.os, "replace", kill)
        if kill is replaced:
            with pytest.raises(Stop):
                prune_folder(tmp_path / "in", tmp_path / "out", windows(), tuned)
        else:
            assert prune_folder(tmp_path / "in", tmp_path / "out", windows(), tuned).resumed == 3
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out", "whole"]


@pytest.mark.slow
@pytest.mark.parametrize("on_disk", [False, True])
def test_owl_spreads_the_sparsity_in_both_paths(on_disk, tmp_path, monkeypatch):
    from secateur import OWL
    from secateur.criteria import wanda
    from secateur.torch.open import open_module

    model = write_model(tmp_path / "in")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[:2] *= 30
    model.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    ids = windows()
    host = open_module(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "in"), {"input_ids": ids})
    data = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    plan = secateur.prune(host, criterion=wanda, pattern=secateur.Element(), budget=OWL(0.7), data=data)
    values = {"criterion": "wanda", "pattern": "element", "sparsity": 0.7, "owl": True}
    choose = run.choose
    monkeypatch.setattr(run, "choose", lambda *a, **k: run.MemoryPlan(choose(*a, **k).batch, on_disk, 0))
    with pytest.raises(Stop):
        prune_folder(tmp_path / "in", tmp_path / "out", ids, recipe(**values), stopped_after(1))
    report = prune_folder(tmp_path / "in", tmp_path / "out", ids, recipe(**values))
    prune_loaded(model, ids, recipe(**values))
    assert same(model, tmp_path / "out")
    assert report.zeros == round(0.7 * report.weights)
    assert {layer["name"]: layer["zeros"] for layer in report.layers} == {
        name: int((~mask).sum()) for name, mask in plan.masks.items()
    }
    assert len({layer["zeros"] for layer in report.layers if layer["name"].endswith("up_proj.weight")}) == 3
    with pytest.raises(PlanError, match="pattern 2:4 takes the same everywhere; leave out owl"):
        recipe(owl=True)


def test_a_method_goes_on_from_another(tmp_path):
    """ria+swaps is swaps that starts with ria: same counts in each row, a lower error; options go to the last."""
    errors, before = {}, None
    for criterion in ("ria", "ria+swaps", "ria+swaps+least_squares"):
        model = write_model(tmp_path / criterion)
        values = {"criterion": criterion, "pattern": "element", "sparsity": 0.5}
        report = prune_loaded(model, windows(), recipe(**values, options={"damp": 0.1} if "+" in criterion else {}))
        assert report.zeros * 2 == report.weights
        first = report.blocks[0]["layers"][0]
        errors[criterion] = first["error"]
        rows = (model.get_parameter(first["name"]) == 0).sum(1)
        assert criterion == "ria" or torch.equal(rows, before)
        before = rows
    assert errors["ria+swaps+least_squares"] <= errors["ria+swaps"] * 1.001 < errors["ria"]


def test_a_plain_loop_over_the_whole_model_gives_the_same_bits(tmp_path):
    model = write_model(tmp_path / "in")
    prune_folder(tmp_path / "in", tmp_path / "out", windows(), recipe())
    ids = windows()
    for layer in model.model.layers:
        seen = {}
        linears = {n: m for n, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}
        handles = [
            m.register_forward_pre_hook(lambda m, args, n=n, seen=seen: seen.__setitem__(n, args[0]))
            for n, m in linears.items()
        ]
        with torch.no_grad():
            model(ids, attention_mask=torch.ones_like(ids), use_cache=False)
        for handle in handles:
            handle.remove()
        for name, module in linears.items():
            x = seen[name].reshape(-1, module.in_features)
            module.weight.data = sparsegpt(module.weight.data, prepare(x.T @ x / len(x)), NM(2, 4))
    assert same(model, tmp_path / "out")


def test_what_is_written_is_exact_and_said(tmp_path):
    write_model(tmp_path / "in")
    before = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "in").state_dict()
    report = prune_folder(tmp_path / "in", tmp_path / "out", windows(), recipe(pattern="1:4", criterion="wanda"))
    after = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    pruned = {layer["name"] for layer in report.layers}
    for name, value in after.items():
        if name in pruned:
            assert ((value != 0).reshape(-1, 4).sum(1) == 1).all()
        else:
            assert torch.equal(value, before[name])
    record = json.loads((tmp_path / "out" / "pruned.json").read_text())
    zeros = sum(int((after[name] == 0).sum()) for name in pruned)
    assert record["counted"] == {"tensors": 21, "weights": report.weights, "zeros": zeros}
    assert zeros * 4 == report.weights * 3
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_weights_keep_the_type_of_the_files(tmp_path):
    model = zoo.llama().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    prune_folder(tmp_path / "in", tmp_path / "out", windows(), recipe())
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


@pytest.mark.slow
def test_experts_are_left_as_they_were_and_named(tmp_path):
    model = write_model(tmp_path / "in", zoo.mixtral)
    report = prune_folder(tmp_path / "in", tmp_path / "out", windows(), recipe())
    assert "model.layers.0.mlp.experts.gate_up_proj" in report.left_out
    prune_loaded(model, windows(), recipe())
    assert same(model, tmp_path / "out")


def test_magnitude_needs_no_text_and_others_do(tmp_path):
    model = write_model(tmp_path / "in")
    prune_folder(tmp_path / "in", tmp_path / "out", None, recipe(criterion="magnitude"))
    prune_loaded(model, None, recipe(criterion="magnitude"))
    assert same(model, tmp_path / "out")
    with pytest.raises(PlanError, match="wanda needs calibration text"):
        prune_folder(tmp_path / "in", tmp_path / "other", None, recipe(criterion="wanda"))


def test_no_block_runs_where_only_weights_are_looked_at(tmp_path, monkeypatch):
    """The windows of a recipe are for the stages that read them: here distillation, and the survey of OWL."""
    model = write_model(tmp_path / "in")
    dense, wanted = copy.deepcopy(model), copy.deepcopy(model)
    prune_loaded(wanted, None, recipe(criterion="magnitude"))
    prune_folder(tmp_path / "in", tmp_path / "before", None, recipe(criterion="magnitude"))  # traced by now

    def refuse(*args, **kwargs):
        raise AssertionError("a block was run")

    with monkeypatch.context() as patched:
        patched.setattr(type(model.model.layers[0]), "forward", refuse)
        report = prune_folder(tmp_path / "in", tmp_path / "out", windows(), recipe(criterion="magnitude"))
        again = prune_loaded(model, windows(), recipe(criterion="magnitude"))
        with pytest.raises(AssertionError, match="a block was run"):
            prune_loaded(copy.deepcopy(dense), windows(), recipe(criterion="magnitude", reconstruct=True))
    assert same(model, tmp_path / "out")
    assert same(wanted, tmp_path / "out")
    assert {layer["error"] for layer in report.layers} == {block["error"] for block in again.blocks} == {None}
    assert report.zeros * 2 == report.weights
    tuned = prune_loaded(copy.deepcopy(dense), windows(), recipe(criterion="magnitude", distil={"passes": 2}))
    assert tuned.distilled[1] < tuned.distilled[0]
    assert tuned.zeros == report.zeros
    spread = recipe(criterion="magnitude", pattern="element", sparsity=0.5, owl=True)
    shares = {b["path"]: sum(x["zeros"] for x in b["layers"]) for b in prune_loaded(dense, windows(), spread).blocks}
    assert len(set(shares.values())) > 1


# -- bad input ------------------------------------------------------------------------------------------------------


def test_truncated_and_lying_folders(tmp_path):
    write_model(tmp_path / "in")
    shard = sorted((tmp_path / "in").glob("model-*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    with pytest.raises(ModelError, match="damaged or cut short"):
        prune_folder(tmp_path / "in", tmp_path / "out", windows(), recipe())
    shard.write_bytes(whole)
    index = tmp_path / "in" / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    name = next(iter(data["weight_map"]))
    other = next(f for f in data["weight_map"].values() if f != data["weight_map"][name])
    shard.rename(tmp_path / "outside.safetensors")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    for file, message in (
        (other, f"says that {other} holds {name}, which it does not"),
        ("../outside.safetensors", "points outside its folder, to"),
        ("../link.safetensors", "points outside its folder, to"),
    ):
        index.write_text(json.dumps({**data, "weight_map": {**data["weight_map"], name: file}}))
        shard.unlink(missing_ok=True)
        shard.write_bytes(whole)
        with pytest.raises(ModelError, match=message):
            prune_folder(tmp_path / "in", tmp_path / "out", windows(), recipe())
    assert not [p.name for p in tmp_path.iterdir() if "out" in p.name and p.name != "outside.safetensors"]


def test_shards_that_are_links_are_read(tmp_path):
    """A snapshot in the cache of the hub is a folder of links."""
    model = write_model(tmp_path / "in")
    (tmp_path / "blobs").mkdir()
    for shard in list((tmp_path / "in").glob("*.safetensors")):
        shard.rename(tmp_path / "blobs" / shard.name)
        shard.symlink_to(tmp_path / "blobs" / shard.name)
    prune_folder(tmp_path / "in", tmp_path / "out", windows(), recipe())
    prune_loaded(model, windows(), recipe())
    assert same(model, tmp_path / "out")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda value: value.to(torch.int8), "as I8; convert the model to float32 or bfloat16"),
        (lambda value: value.to(torch.float8_e4m3fn), "as F8_E4M3; convert"),
        (lambda value: value[:3], r"up_proj.weight has shape \(3, 32\) in .*, where the config says"),
        (lambda value: value * float("nan"), "model.layers.1.mlp.up_proj.weight holds NaN or infinity; mend the model"),
    ],
)
def test_damaged_weights_are_named(damage, message, tmp_path):
    from safetensors.torch import load_file, save_file

    write_model(tmp_path / "in", shard="1GB")
    file, name = tmp_path / "in" / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    state = load_file(file)
    save_file({**state, name: damage(state[name]).contiguous()}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=message):
        prune_folder(tmp_path / "in", tmp_path / "out", windows(), recipe())
    assert (tmp_path / ".out.partial").exists() == ("NaN" in message)  # all else is found before the first block


def test_a_missing_weight_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    write_model(tmp_path / "in", shard="1GB")
    state = load_file(tmp_path / "in" / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks model.layers.1.mlp.up_proj.weight"):
        prune_folder(tmp_path / "in", tmp_path / "out", windows(), recipe())


def test_memory_that_is_too_small_or_puts_states_on_disk(tmp_path):
    from secateur.torch.stream.memory_plan import choose
    from secateur.torch.trace.derive import trace

    model = zoo.llama()
    layout = trace(model, zoo.inputs(model))
    blocks = [f"model.layers.{i}" for i in range(3)]

    def chosen(limit, count=10**6):
        return choose(layout, blocks, 0, count, 512, limit, dense=True, tuned=True)

    assert not chosen(None).on_disk
    assert not chosen(100 * 2**30, 10).on_disk
    assert chosen(4 * 2**30).on_disk
    with pytest.raises(PlanError, match=r"one block of this model needs about .* GiB"):
        chosen(2**20)


def test_memory_of_what_takes_gradients_of_the_whole_model():
    from secateur.torch.stream.memory_plan import whole_model

    model = zoo.llama().to("meta")
    names = [n for n, _ in model.named_parameters() if n.endswith("_proj.weight")]

    def need(tokens, beside, limit=2**40):
        return whole_model(model, names, tokens, beside, limit, "it holds everything", "less")

    trained = sum(model.get_parameter(name).numel() for name in names)
    assert 0 <= need(10, 3) - need(10, 1) - 4 * 2 * trained < 2**24  # the process may grow a little
    assert need(10**7, 1) > need(10**6, 1)
    with pytest.raises(PlanError, match=r"it holds everything, about \d.* GiB, more than 0.1 GiB; .* or use less"):
        need(10, 1, 10**8)


def test_text_that_is_too_short_or_does_not_fit():
    from secateur.torch.data.token_windows import cut, tokens_of

    with pytest.raises(DataError, match="a.txt has 10 tokens, fewer than one window of 16"):
        cut(list(range(10)), 16, "a.txt")

    class Tokenizer:
        eos_token_id = 1

        def __call__(self, texts, **options):
            return {"input_ids": [[5, 60] for _ in texts]}

    assert tokens_of(Tokenizer(), ["a", "b"], 61) == [5, 60, 1, 5, 60, 1]
    with pytest.raises(DataError, match="token 60, the model knows 50"):
        tokens_of(Tokenizer(), ["a"], 50)
