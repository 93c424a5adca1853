"""What a saved folder holds: the sizes of each layer or a stock checkpoint, packed zeros, all or nothing."""

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import secateur
from secateur.errors import ModelError, SecateurError
from secateur.layout import Layout
from secateur.plan import Plan
from secateur.torch.base.manifest import changes_of
from secateur.torch.files import saving
from secateur.torch.files.hashes import HASHES
from secateur.torch.files.zero_packing import BITS
from secateur.torch.shrink.resize import resize
from tests import zoo
from tests.torch.files.shrunk import edit, shrunk
from tests.torch.layouts import UNEVEN, layout_of

UNIFORM_FFN = {f"L{i}.ffn": range(0, 48, 3) for i in range(3)}


@pytest.mark.parametrize("family", UNEVEN)
def test_different_sizes_per_layer_reload_exactly(family, tmp_path):
    model = shrunk(family)
    saved = saving.save(model, tmp_path / "a")
    assert not saved.stock
    assert "sizes differ by layer" in saved.reason
    loaded = type(model).from_pretrained(tmp_path / "a")
    assert torch.equal(zoo.logits(loaded), zoo.logits(model))
    assert changes_of(loaded) == changes_of(model)
    loaded.save_pretrained(tmp_path / "b")
    again = type(model).from_pretrained(tmp_path / "b")
    for (name, a), (other, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b)
    assert torch.equal(zoo.logits(again), zoo.logits(model))
    assert (load_file(tmp_path / "a/model.safetensors").keys()) == load_file(tmp_path / "b/model.safetensors").keys()


@pytest.mark.parametrize(
    ("family", "keep", "numbers"),
    [
        ("bert", UNIFORM_FFN, {"intermediate_size": 16}),
        ("vit", UNIFORM_FFN, {"intermediate_size": 16}),
        ("gpt2", UNIFORM_FFN, {"n_inner": 16}),
        ("gpt2", {"layers": [0, 2]}, {"n_layer": 2}),
        ("llama", {"layers": [1]}, {"num_hidden_layers": 1}),
        ("bert", {"layers": [1, 2], "L1.ffn": range(8), "L2.ffn": range(8)}, {"intermediate_size": 8}),
        (
            "llama",
            {f"L{i}.{a}": k for i in range(3) for a, k in [("head", [0, 1, 4, 5]), ("kv", [0, 2])]},
            {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6},
        ),
        ("llama", {f"L{i}.head": range(0, 8, 2) for i in range(3)}, {"num_attention_heads": 4}),
        ("llama", {"vocab": range(30)}, {"vocab_size": 30}),
        ("mixtral", {"L0.expert": [0, 1, 3], "L1.expert": [1, 2, 3]}, {"num_local_experts": 3}),
        ("t5", {"decoder.layers": [0]}, {"num_decoder_layers": 1, "num_layers": 3}),
    ],
)
def test_sizes_that_the_config_can_say_make_a_stock_checkpoint(family, keep, numbers, tmp_path):
    model = shrunk(family, keep)
    assert saving.save(model, tmp_path / "a", uniform=True).stock
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert numbers.items() <= config.items()
    assert "quantization_config" not in config
    assert "transformers_weights" not in config
    loaded = type(model).from_pretrained(tmp_path / "a")
    assert not changes_of(loaded)
    assert torch.equal(zoo.logits(loaded), zoo.logits(model))


@pytest.mark.parametrize(
    ("family", "keep", "reason"),
    [
        ("bert", UNEVEN["bert"], "sizes differ by layer"),
        ("bert", {f"L{i}.head": [0, 1] for i in range(3)}, "no number of BertConfig"),
        ("t5", {"encoder.layers": [0, 1], "encoder.L0.ffn": range(9)}, "sizes differ by layer"),
        ("mixtral", {"L0.expert": [0, 1, 3]}, "sizes differ by layer"),
    ],
)
def test_uniform_is_refused_with_the_reason(family, keep, reason, tmp_path):
    with pytest.raises(ModelError, match=reason):
        saving.save(shrunk(family, keep), tmp_path / "a", uniform=True)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("numbers", [{}, {"head_dim": 8}])
def test_a_width_that_a_config_class_refuses_needs_a_manifest(numbers, tmp_path):
    model = shrunk("llama", {"hidden": range(2, 32)}, **numbers)
    saved = saving.save(model, tmp_path / "a")
    assert not saved.stock
    assert "hidden size (30) is not a multiple" in saved.reason
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert torch.equal(zoo.logits(loaded), zoo.logits(model))
    assert not saving.save(loaded, tmp_path / "b").stock
    with pytest.raises(ModelError, match="no stock checkpoint can hold this model: .* not a multiple"):
        saving.save(model, tmp_path / "c", uniform=True)


def test_a_config_that_transformers_refuses_is_one_sentence(tmp_path):
    model = zoo.llama()
    model.config.hidden_size = 50
    with pytest.raises(ModelError, match=r"refuses the LlamaConfig of the model \(.*hidden size \(50\) is not a mul"):
        saving.save(model, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_save_pretrained_alone_saves_what_a_host_resized(tmp_path):
    host = secateur.open(zoo.bert(), zoo.inputs(zoo.bert()))
    host.resize(Plan({"L0.ffn": np.arange(5), "L1.head": np.arange(2)}, {}, {"L0.ffn": 48, "L1.head": 4}))
    host.model.save_pretrained(tmp_path / "a")
    loaded = type(host.model).from_pretrained(tmp_path / "a")
    assert torch.equal(zoo.logits(loaded), zoo.logits(host.model))


def test_sharded_checkpoints(tmp_path):
    model = shrunk("bert")
    saving.save(model, tmp_path / "a", max_shard_size="40KB")
    assert len(list((tmp_path / "a").glob("model-*.safetensors"))) > 1
    loaded = type(model).from_pretrained(tmp_path / "a")
    assert torch.equal(zoo.logits(loaded), zoo.logits(model))


@pytest.mark.parametrize("family", ["bert", "llama", "mixtral", "t5"])
@pytest.mark.parametrize("sharded", [False, True])
def test_packed_weights(family, sharded, tmp_path):
    model = zoo.pruned(zoo.build(family), only=lambda module: True)
    options = {"max_shard_size": "40KB"} if sharded else {}
    saved = saving.save(model, tmp_path / "a", pack=True, **options)
    assert saved.packed
    assert not saved.stock
    files = list((tmp_path / "a").glob("*.safetensors"))
    assert (len(files) > 1) == sharded
    assert any(name.endswith(BITS) for file in files for name in load_file(file))
    saving.save(model, tmp_path / "dense")
    size = {f: sum(p.stat().st_size for p in (tmp_path / f).glob("*.safetensors")) for f in ("a", "dense")}
    assert size["a"] < 0.55 * size["dense"]
    loaded = type(model).from_pretrained(tmp_path / "a")
    assert torch.equal(zoo.logits(loaded), zoo.logits(model))
    assert not hasattr(loaded.config, "quantization_config")
    loaded.save_pretrained(tmp_path / "b")
    assert torch.equal(zoo.logits(type(model).from_pretrained(tmp_path / "b")), zoo.logits(model))
    half = type(model).from_pretrained(tmp_path / "a", dtype=torch.bfloat16)
    assert torch.equal(half.state_dict()[NAMES[family]], model.state_dict()[NAMES[family]].bfloat16())


NAMES = {
    "bert": "bert.encoder.layer.1.output.dense.weight",
    "llama": "model.layers.1.mlp.up_proj.weight",
    "mixtral": "model.layers.1.mlp.experts.gate_up_proj",
    "t5": "decoder.block.1.layer.2.DenseReluDense.wi.weight",
}


def test_packed_and_shrunk_with_its_plan(tmp_path):
    model = zoo.pruned(zoo.bert(intermediate_size=200), only=lambda module: True)
    layout = layout_of(model)
    keep = {"L0.ffn": np.arange(100), "L1.head": np.arange(2)}
    name = "bert.encoder.layer.2.output.dense.weight"
    plan = Plan(keep, {name: (model.state_dict()[name] != 0).numpy()}, {"L0.ffn": 200, "L1.head": 4})
    resize(model, layout, keep)
    saved = saving.save(model, tmp_path / "a", plan=plan)
    assert saved.packed
    loaded = saving.load(tmp_path / "a")
    assert torch.equal(zoo.logits(loaded), zoo.logits(model))
    read = Plan.load(tmp_path / "a")
    assert read.keep["L1.head"].tolist() == [0, 1]
    assert (read.masks[name] == plan.masks[name]).all()


def test_saving_is_whole_or_not_at_all(tmp_path, monkeypatch):
    model = shrunk("bert")
    (tmp_path / "a").mkdir()
    (tmp_path / "a/kept").write_text("x")
    with pytest.raises(SecateurError, match="exists"):
        saving.save(model, tmp_path / "a")

    class Broken:
        def save_pretrained(self, folder):
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        saving.save(model, tmp_path / "a", tokenizer=Broken(), overwrite=True)
    assert [p.name for p in tmp_path.rglob("*")] == ["a", "kept"]
    with pytest.raises(ModelError, match="either uniform or pack"):
        saving.save(model, tmp_path / "b", uniform=True, pack=True)
    with pytest.raises(ModelError, match="meta device"):
        saving.save(zoo.bert().to("meta"), tmp_path / "b")


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(300, 8)
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))
        self.up, self.down = torch.nn.Linear(8, 6), torch.nn.Linear(6, 8)
        self.head = torch.nn.Linear(8, 300, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.arange(6.0), persistent=False)
        self.register_buffer("shift", torch.arange(6.0))

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.down(self.up(x) * self.scale + self.shift))


TIED = """axes
  f 6 ffn
  v 300 vocab
  layers 3 layer @ blocks
parameters
  embed.weight : v 8
  blocks.0.weight : 8 8
  blocks.1.weight : 8 8
  blocks.2.weight : 8 8
  up.weight : f 8
  up.bias : f
  down.weight : 8 f
  scale : f
  shift : f
tied
  head.weight = embed.weight"""


def test_a_plain_module(tmp_path):
    model = Tied()
    with torch.no_grad():
        model.embed.weight[50:] = 0
    resize(model, Layout.from_text(TIED), {"f": [1, 4], "layers": [0, 2], "v": range(290)})
    ids = torch.arange(5)
    for pack in (False, True):
        folder = tmp_path / str(pack)
        assert saving.save(model, folder, pack=pack).packed == pack
        loaded = saving.load(folder, model=Tied())
        assert torch.equal(loaded(ids), model(ids))
        assert loaded.head.weight is loaded.embed.weight
        assert loaded.head.out_features == 290
        assert changes_of(loaded) == changes_of(model)
        assert {p.name for p in folder.iterdir()} == {"secateur.json", "model.safetensors", "README.md", HASHES}
    with pytest.raises(ModelError, match="does not have|lacks"):
        saving.load(tmp_path / "False", model=torch.nn.Linear(2, 2))
    with pytest.raises(ModelError, match="need secateur"):
        saving.save(model, tmp_path / "c", uniform=True)
    edit(tmp_path / "False/secateur.json", lambda data: data["changes"].update(shapes={"up.weight": [9999, 8]}))
    with pytest.raises(ModelError, match="does not fit"):
        saving.load(tmp_path / "False", model=Tied())


@pytest.mark.slow
def test_two_towers_each_with_its_config(tmp_path):
    from secateur.torch.trace.derive import trace

    size = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    text = {**size, "vocab_size": zoo.VOCAB, "max_position_embeddings": 20, "bos_token_id": 1, "eos_token_id": 2}
    vision = {**size, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    model = transformers.CLIPModel(config).eval()
    inputs = {"input_ids": torch.randint(3, zoo.VOCAB, (2, 9)), "pixel_values": torch.randn(2, 3, 16, 16)}
    layout = trace(model, inputs)
    stacks = {axis.path: axis.name for axis in layout.of_kind("layer")}
    resize(model, layout, {stacks["text_model.encoder.layers"]: [0, 2], "vision_model.L1.ffn": range(9)})
    assert model.config.text_config.num_hidden_layers == 2
    assert model.config.vision_config.num_hidden_layers == 3
    saving.save(model, tmp_path / "a")
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    again = transformers.AutoModel.from_pretrained(tmp_path / "b")
    with torch.no_grad():
        expected = model(**inputs).logits_per_image
        assert torch.equal(loaded(**inputs).logits_per_image, expected)
        assert torch.equal(again(**inputs).logits_per_image, expected)


@pytest.mark.slow
def test_a_config_that_ties_layers_to_names_stays_readable(tmp_path):
    from secateur.torch.trace.derive import trace

    config = {"image_size": 16, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**config)).eval()
    layout = trace(model, zoo.inputs(model))
    resize(model, layout, {layout.of_kind("layer")[0].name: [0, 2]})
    saving.save(model, tmp_path / "a")
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "a")
    assert torch.equal(zoo.logits(loaded), zoo.logits(model))
