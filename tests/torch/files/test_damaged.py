"""What must not load: manifests that lie, and folders that are no model."""

import json

import pytest
import transformers

import secateur  # noqa: F401  teaches transformers
from secateur.errors import ModelError
from secateur.torch.files import saving
from tests.torch.files.shrunk import edit, shrunk


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
    (folder / saving.INDEX).write_text(json.dumps({"weight_map": {"a": "x" * 256}}))
    refused("names a file of more than 255 bytes")
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
