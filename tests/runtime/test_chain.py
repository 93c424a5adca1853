"""Blocks of an encoder as one call: what becomes a chain, that it gives the same, and what runs layer by layer."""

import copy
import json
import pickle
import threading
from collections import Counter

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from torch import nn

from secateur import runtime
from secateur.errors import ModelError
from secateur.kernels.native import load_native
from secateur.runtime import compile_model, saving
from secateur.runtime.layers import attention, operators
from secateur.runtime.layers.tuning import unmeasured
from secateur.runtime.run import install_chain
from secateur.runtime.run.chain import chains_of, leaves
from secateur.torch.data.example import example_for

from ..torch import slow, tiny

pytestmark = pytest.mark.skipif(load_native() is None, reason="the kernels are not compiled")

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
IMAGES = {"image_size": 16, "patch_size": 8}


def bert():
    return tiny.bert(num_hidden_layers=2)


def vit():
    return tiny.vit(num_hidden_layers=2)


def distilbert():
    config = transformers.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=48, vocab_size=50)
    return transformers.DistilBertModel(config)


def roberta():
    return transformers.RobertaModel(transformers.RobertaConfig(**SIZES, vocab_size=50, max_position_embeddings=60))


def dinov2():
    model = transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, **IMAGES))
    for name, parameter in model.named_parameters():
        if "lambda" in name:
            parameter.data.uniform_(0.5, 2)
    return model


def deit():
    return transformers.DeiTModel(transformers.DeiTConfig(**SIZES, **IMAGES))


def siglip():
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIZES, **IMAGES))


def whisper():
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return transformers.WhisperModel(
        transformers.WhisperConfig(**both_sides(), **ids, vocab_size=50, max_source_positions=20)
    )


def both_sides():
    """The sizes of an encoder-decoder."""
    names = ("d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim")
    sizes = dict(zip(names, (32, 2, 4, 48), strict=True))
    return {**sizes, **{name.replace("encoder", "decoder"): size for name, size in sizes.items()}}


def bart():
    return transformers.BartModel(transformers.BartConfig(**both_sides(), vocab_size=50))


class Block(nn.Module):
    """Norms after the sums, a mask that is added, and a tuple for an output."""

    def __init__(self, width=24, heads=3):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=i != 1) for i in range(4))
        self.up, self.down = nn.Linear(width, 40), nn.Linear(40, width)
        self.first, self.second = nn.LayerNorm(width), nn.RMSNorm(width)

    def forward(self, x, *, seen=None, flag=False):
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        attended = nn.functional.scaled_dot_product_attention(q, 0.5 * k if flag else k, v, seen)
        x = self.first(x + self.o(attended.transpose(1, 2).flatten(2)))
        return self.second(self.down(torch.relu(self.up(x))) + x), None


class Holder(nn.Module):
    """Goes through blocks in ways that the trace does not show."""

    def __init__(self, count=3):
        super().__init__()
        self.blocks, self.way = nn.ModuleList(Block() for _ in range(count)), "all"

    def forward(self, x, seen=None, **more):
        kept = []
        for i, block in enumerate(self.blocks):
            if self.way == "early" and i == 2:
                break
            if self.way == "skip" and i == 1:
                continue
            x = block(x, seen=None if self.way == "mask" and i == 1 else seen, **more)[0]
            kept.append(x)
            if self.way == "twice" and i == 1:
                x = block(x, seen=seen)[0]
            if self.way == "between" and i == 1:
                x = x + 1
        return {"last": x, "all": kept} if self.way == "keep" else {"last": x}


def prune(model, density=0.3):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if type(module) is nn.Linear:
                module.weight.mul_(torch.rand(module.weight.shape, generator=generator) < density)
            if isinstance(module, nn.LayerNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
    return model.eval()


def text(batch, length, hidden=()):
    ids = torch.randint(4, 50, (batch, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    for i in hidden:
        mask[i, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def added(batch=2, length=7):
    """An input of `Holder`, with a mask that is added."""
    generator = torch.Generator().manual_seed(1)
    seen = torch.randn(batch, 1, length, length, generator=generator)
    return {"x": torch.randn(batch, length, 24, generator=generator), "seen": seen}


@pytest.fixture
def calls(monkeypatch):
    """How often each function of the kernels is called."""
    count, real = Counter(), load_native()

    class Counting:
        def __getattr__(self, name):
            count[name] += 1
            return getattr(real, name)

    monkeypatch.setattr(operators, "load_native", lambda: Counting())
    return count


def compiled(make, example=None, **options):
    torch.manual_seed(0)
    model = prune(make())
    example = example_for(model) if example is None else example
    return model, runtime.compile(model, **{"tokens": 32, "measure": False, **options}, example=example), example


def compare(fast, model, batch, tolerance=1e-5):
    with torch.inference_mode():
        got, expected = ([t for t in leaves(m(**batch)) if isinstance(t, torch.Tensor)] for m in (fast, model))
    assert len(got) == len(expected) > 0
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        largest = float(b.abs().nan_to_num().max()) if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * largest, equal_nan=True)
    return got


def chained(calls, fast, model, batch):
    """How many chains a call runs; what it gives is compared."""
    before = calls["chain"]
    compare(fast, model, batch)
    return calls["chain"] - before


@pytest.mark.parametrize(
    "make",
    [bert, vit, dinov2, *slow(distilbert, roberta, deit, siglip, bart, whisper)],
    ids=lambda make: make.__name__,
)
def test_encoders_run_as_one_call(make, calls):
    model, fast, example = compiled(make)
    assert fast.secateur_report.blocks == 2
    assert "2 blocks run as one call." in fast.secateur_report.summary()
    assert chained(calls, fast, model, example) == 1
    small = {name: value[:1] for name, value in example.items()}
    assert chained(calls, fast, model, small) == 1


@pytest.mark.parametrize("make", [bert, distilbert])
@pytest.mark.parametrize("threads", [1, 2])
def test_lengths_batches_and_padding(make, threads, calls):
    model, fast, _ = compiled(make)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for batch in (text(1, 1), text(1, 40), text(3, 17), text(3, 33, (0, 2)), text(1, 9, (0,))):
            assert chained(calls, fast, model, batch) == 1
        without = {"input_ids": text(2, 20)["input_ids"]}
        assert chained(calls, fast, model, without) == 1
    finally:
        torch.set_num_threads(before)


def test_a_mask_that_is_added_and_one_of_truth_values(calls):
    model, fast, example = compiled(Holder, added())
    assert fast.secateur_report.blocks == 3
    wide = torch.randn(3, 3, 11, 11)
    x = torch.randn(3, 11, 48)[..., ::2]
    for mask in (wide, wide[:1], wide[:, :1, :1], wide > 0, wide.transpose(2, 3), None):
        assert chained(calls, fast, model, {"x": x, "seen": mask}) == 1
    assert chained(calls, fast, model, {"x": x, "seen": wide[0, 0]}) == 0
    assert chained(calls, fast, model, {"x": x[:0], "seen": None}) == 1
    assert chained(calls, fast, model, {**example, "flag": True}) == 0


def test_nan_reaches_what_it_does_in_a_dense_model(calls):
    model, fast, batch = compiled(Holder, added())
    for value in (float("nan"), float("inf")):
        x = batch["x"].clone()
        x[1, 3, 5] = value
        assert chained(calls, fast, model, {"x": x, "seen": batch["seen"]}) == 1
        with torch.inference_mode():
            got = fast(x, batch["seen"])["last"]
        assert got[1].isnan().all()
        assert not got[0].isnan().any()


def test_hidden_states_and_attentions_are_those_of_the_layers(calls):
    for make, batch in ((bert, text(2, 9)), (vit, None)):
        model, fast, example = compiled(make)
        batch = batch or example
        assert chained(calls, fast, model, {**batch, "output_hidden_states": True}) == 0
        with torch.inference_mode():
            assert len(fast(**batch, output_hidden_states=True).hidden_states) == 3
        assert chained(calls, fast, model, batch) == 1
        watched = next(m for m in fast.modules() if m._forward_hooks)
        handle = watched.register_forward_hook(lambda *_: None)
        assert chained(calls, fast, model, batch) == 0
        handle.remove()
        with torch.inference_mode():
            expected, got = (m(**batch, output_hidden_states=True).hidden_states for m in (model, fast))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    model, fast, example = compiled(bert)
    model.set_attn_implementation("eager")
    fast.set_attn_implementation("eager")
    assert chained(calls, fast, model, {**text(2, 9, (0,)), "output_attentions": True}) == 0


def test_a_model_that_has_shown_its_hidden_states_is_compiled_whole(calls):
    def shown():
        model = bert()
        with torch.inference_mode():
            model.eval()(**text(2, 9), output_hidden_states=True)
        assert any(module._forward_hooks for module in model.modules())
        return model

    model, fast, _ = compiled(shown)
    assert fast.secateur_report.blocks == 2
    assert chained(calls, fast, model, text(2, 9)) == 1
    assert chained(calls, fast, model, {**text(2, 9), "output_hidden_states": True}) == 0


@pytest.mark.parametrize("way", ["early", "skip", "keep", "twice", "between", "mask"])
def test_other_ways_through_the_blocks(way, calls):
    model, fast, batch = compiled(Holder, added())
    model.way = fast.way = way
    compare(fast, model, batch)
    model.way = fast.way = "all"
    assert chained(calls, fast, model, batch) == 1


def test_streams_that_the_trace_keeps_end_a_chain(calls):
    def keeping():
        holder = Holder()
        holder.way = "keep"
        return holder

    model, fast, batch = compiled(keeping, added())
    assert fast.secateur_report.blocks == 3
    assert chained(calls, fast, model, batch) == 3


def test_blocks_of_their_own_and_hooks(calls):
    model, fast, batch = compiled(Holder, added())
    with torch.inference_mode():
        calls.clear()
        got, expected = (m.blocks[0](batch["x"], seen=batch["seen"])[0] for m in (fast, model))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert not calls["chain"]
    seen = []
    for place in (fast.blocks[1], fast.blocks[2].down):
        handle = place.register_forward_hook(lambda *_: seen.append(1))
        assert chained(calls, fast, model, batch) == 0
        handle.remove()
    assert len(seen) == 2
    assert chained(calls, fast, model, batch) == 1
    handle = nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1))
    assert chained(calls, fast, model, batch) == 0
    handle.remove()


def test_training_and_gradients(calls):
    model, fast, batch = compiled(Holder, added())
    fast.train()
    assert chained(calls, fast, model, batch) == 0
    fast.eval()
    calls.clear()
    with torch.no_grad():
        fast(**batch)
    assert calls["chain"] == 1
    with pytest.raises(RuntimeError, match="no backward"):
        fast(batch["x"].clone().requires_grad_(), batch["seen"])


def test_exchanged_modules_count(calls):
    model, fast, batch = compiled(Holder, added())
    for one in (model, fast):
        one.blocks[1].first = nn.Identity()
    assert chained(calls, fast, model, batch) == 0
    model, fast, batch = compiled(Holder, added())
    for one in (model, fast):
        one.blocks[1] = nn.Module()
        one.blocks[1].forward = lambda x, seen: (x, None)
    compare(fast, model, batch)


def test_weights_are_held_once():
    _, fast, _ = compiled(bert)
    ((_, chain),) = ((m, m.chains[0]) for m in fast.modules() if hasattr(m, "chains"))
    kept = {t.data_ptr() for t in (*fast.parameters(), *fast.buffers())}
    assert all(part.data_ptr() in kept for part in chain.tensors())
    sizes = {layer.name: layer.packed_bytes for layer in fast.secateur_report.layers}
    layer = "bert.encoder.layer.0.output.dense"
    assert sizes[layer] == fast.get_submodule(layer).packed.nbytes


@pytest.mark.parametrize("make", [bert, dinov2, Holder], ids=lambda make: make.__name__)
def test_saved_loaded_and_copied(make, calls, tmp_path):
    model, fast, batch = compiled(make, added() if make is Holder else None)
    runtime.save(fast, tmp_path / "fast")
    again = runtime.load(tmp_path / "fast", make() if make is Holder else None)
    assert chains_of(again) == chains_of(fast)
    expected = compare(fast, model, batch)
    for other in (again, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), compile_model.share_copy(fast)):
        before = calls["chain"]
        assert all(map(torch.equal, compare(other, model, batch), expected))
        assert calls["chain"] == before + 1
        assert type(other).__name__ == make().__class__.__name__


def test_without_kernels_a_saved_model_runs(tmp_path, monkeypatch):
    model, fast, batch = compiled(bert)
    runtime.save(fast, tmp_path / "fast")
    for module in (saving, operators, attention):
        monkeypatch.setattr(module, "load_native", lambda: None)
    compare(runtime.load(tmp_path / "fast"), model, batch)


def test_damaged_chains_are_a_sentence(tmp_path):
    _, fast, _ = compiled(bert)
    runtime.save(fast, tmp_path / "fast")
    path = tmp_path / "fast" / "runtime.json"
    manifest = json.loads(path.read_text())
    ((holder, (plan,)),) = manifest["chains"].items()
    first, *rest = plan["steps"]
    for change in (
        {"blocks": ["layer.7"]},
        {"steps": [{**first, "weight": "layer.0.gone.packed"}, *rest]},
        {"steps": [{**first, "reads": [5]}, *rest]},
        {"steps": [{**first, "bias": "layer.0.intermediate.dense.packed", "weight": first["bias"]}, *rest]},
        {"rows": 31},
        {"heads": 2},
        {"form": 3},
    ):
        path.write_text(json.dumps({**manifest, "chains": {holder: [{**plan, **change}]}}))
        with pytest.raises(ModelError, match=f"the chains of '{holder}' do not fit"):
            runtime.load(tmp_path / "fast")


@pytest.mark.parametrize(
    ("make", "example"),
    [
        pytest.param(bert, text(2, 9), marks=pytest.mark.slow),
        pytest.param(vit, None, marks=pytest.mark.slow),
        pytest.param(Holder, added(), marks=pytest.mark.slow),
    ],
)
def test_torch_compile_keeps_one_call(make, example, calls):
    model, fast, batch = compiled(make, example)
    torch.compiler.reset()
    graph = torch.compile(fast, backend="aot_eager", fullgraph=True)
    compare(graph, model, batch)
    assert chained(calls, graph, model, batch) == 1
    compare(fast, model, batch)


def test_two_threads_at_once(calls):
    model, fast, _ = compiled(Holder, added())
    batches = [added(2, 30), added(3, 9)]
    with torch.inference_mode():
        expected = [model(**batch)["last"] for batch in batches]
    barrier, right = threading.Barrier(2), []
    calls.clear()

    def work(number):
        with torch.inference_mode():
            for _ in range(10):
                barrier.wait(timeout=30)
                right.append(torch.allclose(fast(**batches[number])["last"], expected[number], rtol=1e-4, atol=1e-5))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 20
    assert calls["chain"] == 20


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (tiny.t5, "encoder.block.0 reads more than one stream and one mask"),
        (tiny.gpt2, ""),
        (
            lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SIZES, **IMAGES)),
            "encoder.layers.0 computes mul.Tensor in encoder.layers.0.mlp.activation_fn",
        ),
        (
            lambda: transformers.AlbertModel(transformers.AlbertConfig(**SIZES, vocab_size=50, hidden_act="gelu")),
            "encoder.albert_layer_groups.0 is called more than once",
        ),
    ],
)
def test_other_blocks_are_left_alone(make, reason, calls):
    model, fast, example = compiled(make)
    report = fast.secateur_report
    assert (report.blocks, bool(report.apart)) == (0, bool(reason))
    assert reason in report.apart
    assert ("No blocks run as one call: " in report.summary()) == bool(reason)
    assert chained(calls, fast, model, example) == 0


def test_layers_that_stay_dense_split_a_chain(calls):
    def one_dense():
        holder = Holder()
        holder.blocks[1].up.weight.data += 1  # before pruning
        return holder

    torch.manual_seed(0)
    model = prune(one_dense())
    model.blocks[1].up.weight.data += 1
    fast = runtime.compile(model, measure=False, example=added())
    assert fast.secateur_report.blocks == 2
    assert "blocks.1 holds layers that stay dense" in fast.secateur_report.apart
    assert chained(calls, fast, model, added()) == 2


@pytest.mark.parametrize("faster", [True, False])
def test_the_faster_way_is_kept(faster, calls, monkeypatch):
    times = [2.0, 1.0 if faster else 3.0]
    monkeypatch.setattr(
        install_chain,
        "interleaved",
        lambda functions: [f() is None or t for f, t in zip(functions, times, strict=True)],
    )
    monkeypatch.setattr(
        compile_model, "choose", lambda array, bias, tokens, **_: unmeasured(array, tokens=tokens, value="float32")
    )
    model, fast, batch = compiled(Holder, added(), measure=True)
    assert fast.secateur_report.blocks == (3 if faster else 0)
    assert ("measured no faster as a chain" in fast.secateur_report.apart) != faster
    assert chained(calls, fast, model, batch) == faster


def test_a_chain_that_gives_something_else_is_dropped(monkeypatch):
    monkeypatch.setattr(install_chain, "TOLERANCE", -1.0)
    _, fast, _ = compiled(Holder, added())
    assert fast.secateur_report.apart == "blocks.0 gives another result as a chain"


def test_operator_passes_torch_checks_and_refuses_bad_calls():
    _, fast, batch = compiled(Holder, added())
    (chain,) = fast.chains
    call = [batch["x"], batch["seen"], chain.tensors(), chain.steps, chain.numbers, 3, 24]
    call[2] = [part.detach() for part in call[2]]
    torch.library.opcheck(operators.sparse_chain, tuple(call), test_utils=["test_schema", "test_faketensor"])
    damaged = chain.steps.clone()
    damaged[0, 7] = 99
    for place, value, error, match in (
        (0, batch["x"].double(), TypeError, "takes float32"),
        (0, batch["x"][0], ValueError, "takes .batch, tokens, width."),
        (0, batch["x"][..., 1:], ValueError, "do not fit together"),
        (2, call[2][:-1], ValueError, "not there, or too small"),
        (2, [part.long() for part in call[2]], TypeError, "parts of a chain"),
        (3, damaged, ValueError, "not there, or too small"),
        (3, chain.steps[:, 1:], ValueError, "takes .batch, tokens, width. and a table"),
        (5, 4, ValueError, "same heads"),
        (6, 23, ValueError, "do not fit together"),
    ):
        with pytest.raises(error, match=match):
            operators.sparse_chain(*call[:place], value, *call[place + 1 :])
