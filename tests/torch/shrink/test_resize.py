import copy

import numpy as np
import pytest
import torch
import transformers

from secateur.errors import LayoutError, ModelError, PlanError
from secateur.layout import Layout
from secateur.torch.base.manifest import Changes, changes_of, original, renamed
from secateur.torch.shrink.resize import new_sizes, resize
from tests import zoo
from tests.torch.exact import mask
from tests.torch.layouts import UNEVEN, layout_of


@pytest.mark.parametrize("family", UNEVEN)
def test_removed_equals_masked(family):
    model = zoo.build(family)
    layout, dense = layout_of(model), zoo.logits(model)
    masked = zoo.logits(mask(model, layout, UNEVEN[family]))
    resize(model, layout, UNEVEN[family])
    assert (dense - masked).abs().max() > 1e-3
    torch.testing.assert_close(zoo.logits(model), masked, rtol=0, atol=1e-5)
    for name, tensor in model.named_parameters():
        if name in layout.params:
            assert tuple(tensor.shape) == layout.kept_shape(name, UNEVEN[family])
            assert tensor.requires_grad


def test_attributes_that_mirror_sizes():
    model = zoo.bert()
    resize(model, layout_of(model), {"L0.head": [0, 3], "L0.ffn": range(7)})
    attention, layer = model.bert.encoder.layer[0].attention, model.bert.encoder.layer[0]
    assert (attention.self.num_attention_heads, attention.self.all_head_size) == (2, 16)
    assert attention.self.attention_head_size == 8
    assert (attention.self.query.in_features, attention.self.query.out_features) == (32, 16)
    assert (attention.output.dense.in_features, attention.output.dense.out_features) == (16, 32)
    assert (layer.intermediate.dense.out_features, layer.output.dense.in_features) == (7, 7)
    assert model.bert.encoder.layer[1].attention.self.all_head_size == 32

    model = zoo.gpt2()
    resize(model, layout_of(model), {"L0.head": [0, 3, 2]})
    attention = model.transformer.h[0].attn
    assert (attention.num_heads, attention.split_size, attention.c_attn.nf, attention.c_proj.nx) == (3, 24, 72, 24)
    assert attention.embed_dim == 32

    model = zoo.llama()
    resize(model, layout_of(model), {"L0.head": [0, 2, 4, 6], "L1.kv": [3]})
    assert [layer.self_attn.num_key_value_groups for layer in model.model.layers] == [1, 2, 2]


def test_hidden_width_reaches_norms_embeddings_and_config():
    model = zoo.gpt2()
    layout = layout_of(model)
    resize(model, layout, {"hidden": range(20)})
    assert model.transformer.h[1].ln_1.normalized_shape == (20,)
    assert model.transformer.wte.embedding_dim == 20
    assert model.transformer.embed_dim == 20
    assert model.config.n_embd == 20
    assert model.lm_head.weight is model.transformer.wte.weight
    assert zoo.logits(model).shape == (2, 7, zoo.VOCAB)


def test_value_width_alone_is_refused_and_nothing_changes():
    model = zoo.gpt2()
    layout, before = layout_of(model), zoo.logits(model)
    with pytest.raises(ModelError, match=r"head_dim = 8 could become 5 or 8.*prune them alike"):
        resize(model, layout, {"L0.v": range(5)})
    assert torch.equal(zoo.logits(model), before)
    assert not changes_of(model)


def test_tied_parameters_stay_tied_and_keep_dtype():
    model = zoo.llama().bfloat16()
    model.model.embed_tokens.weight.requires_grad_(requires_grad=False)
    resize(model, layout_of(model), {"vocab": range(30)})
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.shape == (30, 32)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert not model.lm_head.weight.requires_grad
    assert model.config.vocab_size == 30
    assert model.model.embed_tokens.num_embeddings == 30


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_layers_go_and_generation_uses_its_cache(family):
    model = zoo.build(family)
    layout = layout_of(model)
    reference = copy.deepcopy(model)
    layers = "model.layers" if family == "llama" else "transformer.h"
    stack = reference.get_submodule(layers)
    stack[1].forward = lambda hidden_states, *args, **kwargs: hidden_states
    expected = zoo.logits(reference)
    resize(model, layout, {"layers": [0, 2], "L0.ffn": range(24)} if family == "llama" else {"layers": [0, 2]})
    if family == "gpt2":
        assert torch.equal(zoo.logits(model), expected)
    assert [getattr(m, "layer_idx") for m in model.modules() if hasattr(m, "layer_idx")] == [0, 1]  # noqa: B009
    assert model.config.num_hidden_layers == 2
    ids = zoo.inputs(model)["input_ids"]
    cached = model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=True, pad_token_id=0)
    plain = model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False, pad_token_id=0)
    assert torch.equal(cached, plain)


def test_layers_of_one_stack_only():
    model = zoo.t5()
    resize(model, layout_of(model), {"encoder.layers": [0, 2], "decoder.layers": [0]})
    assert (model.config.num_layers, model.config.num_decoder_layers) == (2, 1)
    assert (model.encoder.config.num_layers, model.decoder.config.num_layers) == (2, 1)
    assert zoo.logits(model).shape == (2, 5, zoo.VOCAB)


def test_experts():
    model = zoo.mixtral()
    layout = layout_of(model)
    resize(model, layout, {"L0.expert": [0, 2, 3], "L1.expert": [1, 2]})
    blocks = [layer.mlp for layer in model.model.layers]
    assert [(b.gate.num_experts, b.experts.num_experts) for b in blocks] == [(3, 3), (2, 2)]
    assert zoo.logits(model).isfinite().all()
    with pytest.raises(ModelError, match="routes every token to 2 experts; 1 would remain"):
        other = zoo.mixtral()
        resize(other, layout_of(other), {"L0.expert": [1]})


def test_module_list_of_experts_in_layers_that_go():
    class Layer(torch.nn.Module):
        def __init__(self, index):
            super().__init__()
            self.layer_idx = index
            self.experts = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            return sum(expert(x) for expert in self.experts)

    model = torch.nn.Sequential(*(Layer(i) for i in range(3)))
    wrapped = torch.nn.ModuleDict({"layers": model})
    names = [n for n, _ in wrapped.named_parameters()]
    text = ["axes", "  layers 3 layer @ layers", "  E2 3 expert @ layers.2.experts", "  width 4 hidden", "parameters"]
    text += [f"  {n} : width{' width' if n.endswith('weight') else ''}" for n in names]
    kept = [copy.deepcopy(model[0]), copy.deepcopy(model[2])]
    step = resize(wrapped, Layout.from_text("\n".join(text)), {"layers": [0, 2], "E2": [1]})
    assert step.kept == {"layers": (0, 2), "layers.1.experts": (1,)}
    x = torch.randn(2, 4)
    assert torch.equal(model(x), kept[1].experts[1](kept[0](x)))
    assert [layer.layer_idx for layer in model] == [0, 1]


def test_non_persistent_buffers_are_taken():
    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = torch.nn.Linear(3, 6), torch.nn.Linear(6, 2)
            self.register_buffer("scale", torch.arange(6.0), persistent=False)

        def forward(self, x):
            return self.down(self.up(x) * self.scale)

    model = Scaled()
    text = "axes\n  f 6 ffn\nparameters\n  up.weight : f 3\n  up.bias : f\n  down.weight : 2 f\n  scale : f"
    step = resize(model, Layout.from_text(text), {"f": [1, 4]})
    assert model.scale.tolist() == [1, 4]
    assert step.takes == {"scale": ((1, 4),)}
    assert "scale" not in step.shapes
    assert model(torch.ones(1, 3)).shape == (1, 2)


def test_new_sizes_of_a_product():
    layout = layout_of(zoo.llama())
    sizes = new_sizes(layout, {"L0.head": np.array([0, 4]), "L0.kv": np.array([0, 2])})
    assert (sizes["L0.kv"], sizes["L0.group"], sizes["L0.head"]) == (2, 1, 2)
    sizes = new_sizes(layout, {"L0.kv": np.array([0, 2])})
    assert (sizes["L0.kv"], sizes["L0.group"], sizes["L0.head"]) == (2, 2, 4)


def test_what_is_refused():
    model = zoo.bert()
    layout = layout_of(model)
    with pytest.raises(PlanError, match="no unit would remain"):
        resize(model, layout, {"L0.ffn": []})
    with pytest.raises(LayoutError, match="has shape"):
        resize(zoo.bert(intermediate_size=40), layout, {"L0.ffn": [0]})
    with pytest.raises(ModelError, match="the layout describes bert.embeddings"):
        resize(zoo.llama(), layout, {"L0.ffn": [0]})
    model.config.quantization_config = {"quant_method": "awq"}
    with pytest.raises(ModelError, match="quantized with awq"):
        resize(model, layout, {"L0.ffn": [0]})


def test_two_steps_merge_into_one():
    once, twice = zoo.bert(), zoo.bert()
    layout = layout_of(once)
    resize(once, layout, {"layers": [0, 2], "L2.ffn": [2, 4, 9], "L2.head": [1, 3]})
    resize(twice, layout, {"layers": [0, 2], "L2.ffn": range(10), "L2.head": [1, 3]})
    second = Layout.from_text(str(layout_of(zoo.bert(num_hidden_layers=2))).replace("L1.ffn 48", "L1.ffn 10"))
    text = str(second)
    text = "\n".join(_sized(line, {"L1.ffn": 10, "L1.head": 2}) for line in text.splitlines())
    resize(twice, Layout.from_text(text), {"L1.ffn": [2, 4, 9]})
    assert changes_of(twice) == changes_of(once)
    assert torch.equal(zoo.logits(once), zoo.logits(twice))


def _sized(line, sizes):
    parts = line.split()
    return f"  {parts[0]} {sizes[parts[0]]} {parts[2]}" if parts and parts[0] in sizes else line


def test_changes_are_json_and_names_move():
    model = zoo.llama()
    step = resize(model, layout_of(model), {"layers": [1, 2], "L1.kv": [0], "hidden": range(16)})
    assert Changes.from_json(step.to_json()) == Changes.from_json(changes_of(model).to_json())
    kept = {"layers": (0, 2), "layers.1.experts": (1,)}
    assert renamed("layers.2.experts.1.weight", kept) == "layers.1.experts.0.weight"
    assert renamed("layers.1.experts.1.weight", kept) is None
    assert renamed("norm", kept) == "norm"
    assert original("layers.1.experts.0.weight", kept) == "layers.2.experts.1.weight"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "expected an object"),
        ({"code": {}}, "unknown part 'code'"),
        ({"shapes": []}, "expected an object"),
        ({"shapes": {"w": [1.5]}}, "non-negative integers"),
        ({"shapes": {"w": [True]}}, "non-negative integers"),
        ({"kept": {"w": [-1]}}, "non-negative integers"),
        ({"takes": {"w": 3}}, "expected a list"),
        ({"attributes": {"w": 3}}, "expected an object"),
        ({"attributes": {"w": {"num_heads": 1.5}}}, "expected integers"),
        ({"attributes": {"w": {"num_heads": {"a": 1}}}}, "expected integers"),
        ({"scales": {"w": {"eps": 2}}}, "expected numbers between 0 and 1"),
        ({"scales": {"w": "eps"}}, "expected numbers between 0 and 1"),
    ],
)
def test_changes_that_cannot_be_read(data, message):
    with pytest.raises(ModelError, match=message):
        Changes.from_json(data)


def test_sizes_read_from_a_config_go_into_an_own_copy():
    class Attention(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config = config
            self.q, self.o = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

        def forward(self, x):
            heads = self.q(x).view(len(x), self.config.num_attention_heads, -1)
            return self.o((heads * 2).reshape(len(x), -1))

    config = transformers.BertConfig(hidden_size=8, num_attention_heads=4)
    model = torch.nn.ModuleDict({"a": Attention(config), "b": Attention(config)})
    text = "axes\n  h 4 head\n  d 2 qk\nparameters\n  a.q.weight : (h d) 8\n  a.q.bias : (h d)\n  a.o.weight : 8 (h d)"
    resize(model, Layout.from_text(text), {"h": [0, 1, 3]})
    assert model.a.config.num_attention_heads == 3
    assert model.b.config.num_attention_heads == 4
    assert model.a(torch.ones(2, 8)).shape == (2, 8)


def test_heads_of_torch_attention_are_refused_and_its_neighbours_shrink():
    model = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 1).eval()
    text = "axes\n  h 2 head\n  d 4 qk\n  f 12 ffn\nparameters\n"
    rows = {"in_proj_weight": "(h d + h d + h d) 8", "in_proj_bias": "(h d + h d + h d)", "out_proj.weight": "8 (h d)"}
    text += "".join(f"  layers.0.self_attn.{name} : {dims}\n" for name, dims in rows.items())
    text += "  layers.0.linear1.weight : f 8\n  layers.0.linear1.bias : f\n  layers.0.linear2.weight : 8 f\n"
    layout = Layout.from_text(text)
    with pytest.raises(ModelError, match=r"layers.0.self_attn is a torch.nn.MultiheadAttention"):
        resize(model, layout, {"h": [0]})
    resize(model, layout, {"f": [0, 5, 7]})
    with torch.no_grad():
        assert model(torch.ones(1, 3, 8)).shape == (1, 3, 8)


def test_convolutions():
    class Depthwise(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Conv1d(4, 6, 1), torch.nn.Conv1d(6, 6, 3, groups=6)
            self.c = torch.nn.ConvTranspose1d(6, 4, 1)

        def forward(self, x):
            return self.c(self.b(self.a(x)))

    model, x = Depthwise(), torch.randn(2, 4, 9)
    text = "axes\n  f 6 ffn\nparameters\n  a.weight : f 4 1\n  a.bias : f\n  b.weight : f 1 3\n  b.bias : f\n"
    layout = Layout.from_text(text + "  c.weight : f 4 1\n  c.bias : 4")
    masked = mask(model, layout, {"f": [0, 5]})
    resize(model, layout, {"f": [0, 5]})
    torch.testing.assert_close(model(x), masked(x))
    assert (model.b.in_channels, model.b.out_channels, model.b.groups, model.c.in_channels) == (2, 2, 2, 2)
    grouped = torch.nn.ModuleDict({"a": torch.nn.Conv1d(6, 6, 1, groups=2)})
    with pytest.raises(ModelError, match="convolution in 2 groups"):
        resize(grouped, Layout.from_text("axes\n  f 6 ffn\nparameters\n  a.weight : f 3 1\n  a.bias : f"), {"f": [0]})


def test_nested_factors():
    class Rotary(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads, self.head_dim = 4, 6
            self.q, self.o = torch.nn.Linear(5, 24), torch.nn.Linear(24, 5)

        def forward(self, x):
            return self.o(self.q(x).view(len(x), self.num_heads, self.head_dim).reshape(len(x), -1))

    model = Rotary()
    text = "axes\n  h 4 head\n  r 2 qk\n  p 4 qk\nparameters\n  q.weight : (h (r + p)) 5\n  q.bias : (h (r + p))\n"
    resize(model, Layout.from_text(text + "  o.weight : 5 (h (r + p))"), {"h": [0, 2, 3], "p": [1, 2]})
    assert (model.num_heads, model.head_dim) == (3, 4)
    assert model(torch.ones(2, 5)).shape == (2, 5)
