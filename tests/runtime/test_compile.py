"""secateur.runtime.compile, save and load on tiny random models."""

import json

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from torch import nn

from secateur import runtime
from secateur.errors import ModelError
from secateur.kernels.native import load_native
from secateur.kernels.zero_patterns import zeros_of
from secateur.runtime import compile_model
from secateur.runtime.layers import tuning as choosing
from secateur.runtime.layers.linear import ByTokens, SparseLinear

pytestmark = pytest.mark.skipif(load_native() is None, reason="the kernels are not compiled")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))


def prune(model, density=0.2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if type(module) is nn.Linear or type(module).__name__ == "Conv1D":
            keep = torch.rand(module.weight.shape, generator=generator) < density
            module.weight.data.mul_(keep)
    return model.eval()


def tiny_bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=99
    )
    return prune(transformers.BertForSequenceClassification(config))


def tiny_gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=99, n_positions=64)
    return prune(transformers.GPT2LMHeadModel(config))


def tiny_llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=99,
    )
    return prune(transformers.LlamaForCausalLM(config))


@pytest.fixture(params=[tiny_bert, tiny_gpt2, tiny_llama], ids=["bert", "gpt2", "llama"])
def model(request):
    return request.param()


def ids(batch=2, length=9):
    return torch.randint(0, 99, (batch, length), generator=torch.Generator().manual_seed(1))


def test_compiled_model_equals_the_pruned_one(model):
    fast = runtime.compile(model, measure=False)
    assert any(isinstance(m, SparseLinear) for m in fast.modules())
    assert not any(isinstance(m, SparseLinear) for m in model.modules())
    with torch.inference_mode():
        assert torch.allclose(fast(ids()).logits, model(ids()).logits, atol=1e-5)


def test_dense_weights_are_shared_not_copied():
    model = tiny_bert()
    fast = runtime.compile(model, measure=False)
    assert fast.bert.embeddings.word_embeddings.weight is model.bert.embeddings.word_embeddings.weight


def test_torch_compile_keeps_the_kernels_in_one_graph():
    model = tiny_bert()
    fast = runtime.compile(model, measure=False)
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    with torch.inference_mode():
        assert torch.allclose(compiled(ids()).logits, model(ids()).logits, atol=1e-5)


def test_operator_passes_torch_checks():
    layer = runtime.compile(prune(nn.Linear(40, 30)), measure=False)
    assert isinstance(layer, SparseLinear)
    args = (torch.randn(3, 5, 40), layer.packed, layer.bias, 30, 0)
    torch.library.opcheck(
        torch.ops.secateur.sparse_linear.default,
        args,
        test_utils=["test_schema", "test_faketensor"],
    )


def test_generate_gives_the_same_tokens():
    model = tiny_llama()
    fast = runtime.compile(model, measure=False)
    kwargs = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(fast.generate(ids(1), **kwargs), model.generate(ids(1), **kwargs))


def test_measured_choice_is_remembered_and_reported(tmp_path):
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 8))
    prune(model, 0.02)
    fast = runtime.compile(model, tokens=64)
    report = fast.secateur_report
    assert [layer.name for layer in report.layers] == ["0", "2"]
    assert all(layer.dense_us > 0 and layer.sparse_us > 0 for layer in report.layers)
    assert fast.summary() == report.summary()
    stored = json.loads(choosing.cache_file().read_text())["machines"][choosing.machine_key()]
    assert len(stored) == 2
    again = runtime.compile(model, tokens=64).secateur_report
    assert [layer.dense_us for layer in again.layers] == [layer.dense_us for layer in report.layers]


def test_broken_cache_is_measured_anew():
    choosing.cache_file().parent.mkdir(parents=True)
    choosing.cache_file().write_text("{not json")
    fast = runtime.compile(prune(nn.Linear(128, 128), 0.05), tokens=32)
    assert fast.secateur_report.layers[0].dense_us > 0


def test_summary_says_why_layers_stay_dense():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64).double())
    prune(model[0])
    text = runtime.compile(model, measure=False).summary()
    assert text.startswith("1 of 3 linear layers")
    assert "kernels, not timed, at 0." in text
    assert "1 with fewer than 30% zeros" in text
    assert "torch.float64" in text
    assert runtime.compile(nn.ReLU()).summary() == "No layer of 0 runs on the sparse kernels."


def test_tied_and_hooked_layers_stay_dense():
    model = tiny_llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    model.model.embed_tokens.weight.data[:, ::2] = 0
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)
    reasons = {layer.name: layer.reason for layer in runtime.compile(model, measure=False).secateur_report.layers}
    assert "share" in reasons["lm_head"]
    assert "hooks" in reasons["model.layers.0.mlp.up_proj"]


def test_layouts_of_inputs_and_empty_batches():
    layer = prune(nn.Linear(24, 10))
    fast = runtime.compile(layer, measure=False)
    x = torch.randn(4, 6, 24)
    with torch.inference_mode():
        for each in (
            x,
            x.transpose(0, 1),
            x[0, 0],
            x[:, ::2],
            torch.randn(24, 5).t(),
            x[:1].expand(3, 6, 24),
            x[:0],
        ):
            got = fast(each)
            assert got.shape == layer(each).shape
            assert torch.allclose(got, layer(each), atol=1e-6)


def test_errors_say_what_to_do():
    fast = runtime.compile(prune(nn.Linear(24, 10)), measure=False)
    with pytest.raises(RuntimeError, match="no backward"):
        fast(torch.randn(2, 24, requires_grad=True))
    with pytest.raises(TypeError, match=r"float32 activations, not torch.float64"):
        fast(torch.randn(2, 24).double())
    with pytest.raises(ValueError, match=r"packed weight is \(10, 24\), but the input has 23 features"):
        fast(torch.randn(2, 23))
    with pytest.raises(TypeError, match="stays on the CPU"):
        fast.to("meta")
    with pytest.raises(TypeError, match="float32"):
        fast.half()
    with pytest.raises(ValueError, match="tokens must be positive, not 0"):
        runtime.compile(nn.Linear(2, 2), tokens=0)
    with pytest.raises(ValueError, match="'float16', 'int8', not 'int4'"):
        runtime.compile(nn.Linear(2, 2), value="int4")


def test_save_and_load_round_trip(model, tmp_path):
    fast = runtime.compile(model, measure=False)
    runtime.save(fast, tmp_path / "fast")
    again = runtime.load(tmp_path / "fast")
    assert type(again) is type(model)
    packed = next(m.packed for m in again.modules() if isinstance(m, SparseLinear))
    assert packed.untyped_storage().nbytes() >= packed.numel()
    with torch.inference_mode():
        assert torch.equal(again(ids()).logits, fast(ids()).logits)


def test_load_into_a_given_skeleton(tmp_path):
    model = prune(nn.Sequential(nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 3)))
    fast = runtime.compile(model, measure=False)
    runtime.save(fast, tmp_path / "fast")
    with torch.device("meta"):
        skeleton = nn.Sequential(nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 3))
    x = torch.randn(5, 40)
    with torch.inference_mode():
        assert torch.equal(runtime.load(tmp_path / "fast", skeleton)(x), fast(x))
    with pytest.raises(ValueError, match=r"does not fit|but .* in the file|no layer"):
        runtime.load(tmp_path / "fast", nn.Sequential(nn.Linear(41, 40), nn.Tanh(), nn.Linear(40, 3)))
    with pytest.raises(ValueError, match="pass a skeleton"):
        runtime.load(tmp_path / "fast")


def test_damaged_file_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    runtime.save(runtime.compile(prune(nn.Sequential(nn.Linear(40, 40))), measure=False), tmp_path / "fast")
    tensors = load_file(tmp_path / "fast" / "runtime.safetensors")
    tensors["0.packed"][128:160] = 255
    save_file(tensors, tmp_path / "fast" / "runtime.safetensors")
    with pytest.raises(ValueError, match=r"layer '0': .*damaged"):
        runtime.load(tmp_path / "fast", nn.Sequential(nn.Linear(40, 40)))


def test_nothing_to_save_or_load(tmp_path):
    with pytest.raises(ValueError, match="no packed layer"):
        runtime.save(nn.Linear(2, 2), tmp_path)
    with pytest.raises(ModelError, match=r"holds no runtime\.json"):
        runtime.load(tmp_path / "fast")


def in_blocks(layer, block, density=0.2):
    rows, cols = layer.weight.shape
    keep = torch.rand(-(-rows // block), cols, generator=torch.Generator().manual_seed(2)) < density
    layer.weight.data.mul_(keep.repeat_interleave(block, 0)[:rows])
    return layer.eval()


@pytest.mark.parametrize(("block", "value"), [(8, "float16"), (4, "int8"), (8, "float32")])
def test_blocks_are_found_and_kept_through_save_and_load(block, value, tmp_path):
    layer = in_blocks(nn.Linear(96, 61), block)
    fast = runtime.compile(nn.Sequential(layer), measure=False, value=value)
    info = fast[0].extra_repr()
    assert f"block {value}" in info
    runtime.save(fast, tmp_path / "fast")
    again = runtime.load(tmp_path / "fast", nn.Sequential(nn.Linear(96, 61)))
    with torch.inference_mode():
        for tokens in (1, 5, 30):
            x = torch.randn(tokens, 96)
            expected = nn.functional.linear(x, fast[0].dense_weight(), layer.bias)
            assert torch.allclose(fast(x), expected, atol=1e-5)
            assert torch.equal(again(x), fast(x))
    assert torch.allclose(fast[0].dense_weight(), layer.weight, atol=1e-3)


def in_quads(layer, density=0.2):
    rows, cols = layer.weight.shape
    keep = torch.rand(rows, -(-cols // 4), generator=torch.Generator().manual_seed(2)) < density
    layer.weight.data.mul_(keep.repeat_interleave(4, 1)[:, :cols])
    return layer.eval()


def in_groups(layer, keep, of):
    rows, cols = layer.weight.shape
    chosen = torch.rand(rows, -(-cols // of), of, generator=torch.Generator().manual_seed(3)).argsort(-1) < keep
    layer.weight.data.mul_(chosen.reshape(rows, -1)[:, :cols])
    return layer.eval()


@pytest.mark.parametrize(("keep", "of", "value"), [(2, 4, "float16"), (4, 8, "int8"), (1, 4, "float32")])
def test_fixed_counts_are_found_for_few_tokens(keep, of, value, tmp_path):
    model = nn.Sequential(in_groups(nn.Linear(90, 61), keep, of))
    fast = runtime.compile(model, tokens=1, measure=False, value=value)
    assert f"nm {value}" in fast[0].extra_repr()
    runtime.save(fast, tmp_path / "fast")
    again = runtime.load(tmp_path / "fast", nn.Sequential(nn.Linear(90, 61)))
    with torch.inference_mode():
        for tokens in (1, 3, 7, 40):
            x = torch.randn(tokens, 90)
            expected = nn.functional.linear(x, fast[0].dense_weight(), model[0].bias)
            assert torch.allclose(fast(x), expected, atol=1e-5)
            assert torch.equal(again(x), fast(x))
    many = runtime.compile(model, tokens=128, measure=False)
    assert "tiled float32" in many[0].extra_repr()


def test_patterns_are_told_apart():
    def zeros(layer):
        return str(zeros_of(layer.weight.detach().numpy()))

    assert zeros(in_blocks(nn.Linear(64, 64), 8)) == "8x1"
    assert zeros(in_blocks(nn.Linear(64, 64), 4)) == "4x1"
    assert zeros(in_quads(nn.Linear(66, 64))) == "0x1 1x4"
    assert zeros(in_groups(nn.Linear(66, 64), 2, 4)) == "0x1 2:4"
    assert zeros(in_groups(nn.Linear(66, 64), 4, 8)) == "0x1 4:8"
    assert zeros(in_groups(nn.Linear(66, 64), 1, 4)) == "0x1 1:4"
    assert zeros(prune(nn.Linear(64, 64))) == "0x1"
    assert str(zeros_of(torch.zeros(9, 3).numpy())) == "0x1"


def test_activations_are_rounded_only_when_asked(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(in_quads(nn.Linear(96, 61)), nn.GELU(), prune(nn.Linear(61, 5)))
    plain = runtime.compile(model, measure=False, value="int8")
    assert plain.secateur_report.layers[0].format == "dense"
    assert "rounded to 8 bits" not in plain.secateur_report.summary()
    x = torch.randn(3, 11, 96)
    fast = runtime.compile(model, measure=False, value="int8", activations="int8", example=(x,))
    assert "1 of 2 linear layers" in fast.secateur_report.summary()
    assert "1 of them with activations rounded to 8 bits at each call" in fast.secateur_report.summary()
    assert "quad int8" in fast[0].extra_repr()
    assert fast[0].activation == "gelu"
    with torch.inference_mode():
        expected = model(x)
        assert (fast(x) - expected).norm() < 0.03 * expected.norm()
        runtime.save(fast, tmp_path / "fast")
        skeleton = nn.Sequential(nn.Linear(96, 61), nn.GELU(), nn.Linear(61, 5))
        assert torch.equal(runtime.load(tmp_path / "fast", skeleton)(x), fast(x))
    with pytest.raises(ValueError, match="activations='int8' goes with value='int8', not 'float32'"):
        runtime.compile(model, activations="int8")
    with pytest.raises(ValueError, match="'float32', 'int8', not 'int4'"):
        runtime.compile(model, activations="int4")


def test_a_measured_layer_may_round_its_activations(monkeypatch):
    monkeypatch.setattr(choosing, "interleaved", lambda runs, cold: [9.0, *map(float, range(1, len(runs)))])
    options = {"tokens": 64, "value": "int8", "activations": "int8", "cache": False}
    fast = runtime.compile(in_quads(nn.Linear(512, 512), 0.05), **options)
    assert fast.secateur_report.layers[0].format == "quad"


def test_layers_with_few_zeros_are_rounded_where_asked(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(prune(nn.Linear(96, 64)), nn.GELU(), nn.Linear(64, 43))
    options = {"tokens": (1, 20), "value": "int8", "measure": False}
    plain, fast = runtime.compile(model, **options), runtime.compile(model, dense="int8", **options)
    assert "rounded" not in plain.secateur_report.summary()
    assert "; 1 with few zeros, or a shared weight, only rounded" in fast.secateur_report.summary()
    assert [layer.full for layer in fast.secateur_report.layers] == [False, True]
    assert isinstance(fast[2], ByTokens)
    assert fast[2].layers[1].weight is model[2].weight
    runtime.save(fast, tmp_path / "fast")
    skeleton = nn.Sequential(nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 43))
    again = runtime.load(tmp_path / "fast", skeleton)
    x = torch.randn(20, 96)
    with torch.inference_mode():
        assert torch.equal(fast(x), plain(x))
        one, exact = fast(x[:1]), plain(x[:1])
        assert 0 < (one - exact).norm() < 0.02 * exact.norm()
        assert torch.equal(again(x[:1]), one)
        assert torch.equal(again(x), fast(x))
    with pytest.raises(ValueError, match="dense must be one of .*, not 'int4'"):
        runtime.compile(model, dense="int4")
    monkeypatch.setattr(choosing, "interleaved", lambda runs, cold: [9.0, 3.0, 3.0][: len(runs)])
    timed = runtime.compile(model, tokens=1, value="int8", dense="float16", cache=False)
    assert "only rounded and 3.0 times as fast" in timed.secateur_report.summary()
    monkeypatch.setattr(choosing, "interleaved", lambda runs, cold: [9.0, 9.0, 9.0][: len(runs)])
    timed = runtime.compile(model, tokens=1, value="int8", dense="float16", cache=False)
    assert "1 because they measured no faster rounded" in timed.secateur_report.summary()


def test_an_output_layer_that_shares_its_weight_is_rounded_in_a_copy():
    model = tiny_llama()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = {"input_ids": torch.arange(9)[None]}
    before = model.lm_head.weight.clone()
    fast = runtime.compile(model, tokens=1, value="int8", dense="int8", measure=False, example=ids)
    assert isinstance(fast.lm_head, SparseLinear)
    assert fast.model.embed_tokens.weight is model.lm_head.weight
    assert torch.equal(model.lm_head.weight, before)
    with torch.inference_mode():
        got, exact = fast(**ids).logits, model(**ids).logits
        assert (got - exact).norm() < 0.05 * exact.norm()
        assert fast.generate(**ids, max_new_tokens=3, do_sample=False).shape == (1, 12)


def test_value_type_without_a_format_stays_dense():
    fast = runtime.compile(prune(nn.Linear(64, 64)), measure=False, value="float16")
    assert "1 because no format stores float16" in fast.secateur_report.summary()
    few = runtime.compile(prune(nn.Linear(64, 64)), measure=False, value="int8", tokens=1)
    assert few.secateur_report.layers[0].format == "bitmask"


def test_decoding_is_measured_with_cold_weights():
    fast = runtime.compile(in_blocks(nn.Linear(512, 512), 8, 0.05), tokens=1, value="int8")
    layer = fast.secateur_report.layers[0]
    assert layer.format in ("block", "bitmask", "dense")
    assert min(layer.dense_us, layer.sparse_us) > 0


def test_activations_are_fused_where_the_graph_allows(tmp_path):
    model = tiny_bert()
    batch = {"input_ids": ids()}
    fast = runtime.compile(model, measure=False, example=batch)
    dense = [layer.intermediate.dense for layer in fast.bert.encoder.layer]
    assert [layer.activation for layer in dense] == ["gelu", "gelu"]
    assert isinstance(fast.bert.encoder.layer[0].intermediate.intermediate_act_fn, nn.Identity)
    assert not isinstance(model.bert.encoder.layer[0].intermediate.intermediate_act_fn, nn.Identity)
    with torch.inference_mode():
        assert torch.allclose(fast(**batch).logits, model(**batch).logits, atol=1e-5)
        runtime.save(fast, tmp_path / "fast")
        assert torch.equal(runtime.load(tmp_path / "fast")(**batch).logits, fast(**batch).logits)


def test_an_activation_that_others_need_is_not_fused():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.act, self.silu = nn.Linear(32, 32), nn.Linear(32, 32), nn.ReLU(), nn.SiLU()

        def forward(self, x):
            hidden = self.a(x)
            return self.act(hidden) + hidden + self.silu(self.b(self.act(x)))

    model = prune(Both())
    x = torch.randn(20, 32)
    fast = runtime.compile(model, measure=False, example=(x,))
    assert (fast.a.activation, fast.b.activation) == ("none", "silu")
    with torch.inference_mode():
        assert torch.allclose(fast(x), model(x), atol=1e-6)


def test_a_layer_takes_the_variant_for_the_call(monkeypatch, tmp_path):
    def at_few_tokens(array, bias, *, tokens, **_):
        packing = {"format": "bitmask"} if tokens == 1 else {"format": "tiled"} if array.shape[0] == 64 else None
        return choosing.FormatChoice(packing, 2.0, 1.0)

    monkeypatch.setattr(compile_model, "choose", at_few_tokens)
    model = prune(nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 5)))
    fast = runtime.compile(model, tokens=(1, 100), example=(torch.randn(3, 40),))
    assert isinstance(fast[0], ByTokens)
    assert [variant.activation for variant in fast[0].layers] == ["relu", "relu"]
    assert isinstance(fast[1], nn.Identity)
    assert fast[2].layers[1].weight is model[2].weight
    used = []
    for number, variant in enumerate(fast[0].layers):
        variant.register_forward_hook(lambda *_, number=number: used.append(number))
    runtime.save(fast, tmp_path / "fast")
    again = runtime.load(
        tmp_path / "fast", prune(nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 5)), seed=3)
    )
    with torch.inference_mode():
        for shape in ((1, 40), (2, 5, 40), (11, 40), (0, 40)):
            x = torch.randn(shape)
            assert torch.allclose(fast(x), model(x), atol=1e-6)
            assert torch.equal(again(x), fast(x))
    assert used == [0, 0, 0, 0, 1, 1, 0, 0]
    text = fast.summary()
    assert text.startswith("2 of 2 linear layers")
    assert "2.0 times as fast as dense at 1 tokens" in text
    assert "At 100 tokens: 1 of 2 linear layers" in text


def test_a_layer_of_one_variant_is_held_once():
    model = in_blocks(nn.Linear(96, 64), 8)
    assert isinstance(runtime.compile(model, tokens=(1, 64), measure=False), SparseLinear)
    with pytest.raises(ValueError, match=r"tokens must be positive, not \(0, 4\)"):
        runtime.compile(model, tokens=(0, 4))
