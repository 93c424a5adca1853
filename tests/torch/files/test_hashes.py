"""The hashes beside saved models: what is written, and what a comparison says of folders that have changed."""

import hashlib
import json
import shutil

import pytest

from secateur.errors import ModelError
from secateur.plan import Plan
from secateur.torch.files import saving
from secateur.torch.files.hashes import HASHES, file_hash, write_hashes
from tests import zoo
from tests.torch.files.shrunk import edit, shrunk


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    saving.save(shrunk("bert"), folder, plan=Plan({"L0.ffn": [0]}, sizes={"L0.ffn": 48}), max_shard_size="20kB")
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def refused(folder, message):
    with pytest.raises(ModelError, match=message) as caught:
        saving.check_unchanged(folder)
    assert "\n" not in str(caught.value)


def test_every_file_but_the_card_has_its_hash(folder):
    hashes = json.loads((folder / HASHES).read_text())["sha256"]
    files = {path.name for path in folder.iterdir()} - {HASHES, "README.md"}
    assert hashes.keys() == files >= {"config.json", "model.safetensors.index.json", "plan.json"}
    assert sum(name.endswith(".safetensors") for name in files) > 2
    for name, digest in hashes.items():
        assert digest == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    assert saving.check_unchanged(folder) == len(files)


@pytest.mark.parametrize("kind", ["stock", "plain"])
def test_stock_checkpoints_and_plain_modules_have_hashes(kind, tmp_path):
    model = zoo.build("bert") if kind == "stock" else zoo.Sentence()
    saving.save(model, tmp_path / "a")
    assert saving.check_unchanged(str(tmp_path / "a")) == len(list((tmp_path / "a").iterdir())) - 2


def test_one_flipped_bit_names_the_file(folder):
    shard = sorted(folder.glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    refused(folder, f"has changed: {shard.name} is not the file that was saved; save or copy")
    assert saving.load(folder) is not None  # which is why one compares


def test_what_decides_the_answers_beside_the_weights(folder):
    edit(folder / "config.json", lambda data: data.update(layer_norm_eps=0.1))
    refused(folder, "has changed: config.json is not the file")


def test_a_missing_file(folder):
    (folder / "plan.json").unlink()
    refused(folder, "lacks plan.json, which was saved with it")


def test_weights_that_were_added(folder, tmp_path):
    shutil.copy(sorted(folder.glob("*.safetensors"))[0], folder / "more.safetensors")
    assert saving.check_unchanged(folder) > 0  # nobody reads it
    hashes = folder / HASHES
    edit(hashes, lambda data: data["sha256"].pop("model.safetensors.index.json"))
    refused(folder, "has changed: model.safetensors.index.json was not there when it was saved")
    edit(hashes, lambda data: data["sha256"].clear())
    refused(folder, "has changed: config.json was not there")


def test_a_folder_without_hashes(folder):
    (folder / HASHES).unlink()
    refused(folder, f"has no {HASHES}, so nobody can say whether its files have changed; save the model again")


def test_what_is_no_folder():
    refused("org/name", "org/name is no folder, and only folders that secateur saved have hashes; leave out --check")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data["sha256"].update({"../outside": "0" * 64}), "points outside its folder, to '../outside'"),
        (lambda data: data["sha256"].update({"/etc/hostname": "0" * 64}), "points outside its folder"),
        (lambda data: data["sha256"].update({"..\\x": "0" * 64}), "points outside its folder"),
        (lambda data: data["sha256"].update({"config.json": "0" * 63}), "sha256.config.json"),
        (lambda data: data.update(format=2), "format"),
        (lambda data: data.pop("sha256"), "sha256"),
    ],
)
def test_hashes_that_are_damaged(change, message, folder):
    edit(folder / HASHES, change)
    refused(folder, message)


def test_known_hashes_are_taken(tmp_path):
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b").write_bytes(b"b")
    write_hashes(tmp_path, {"a": "0" * 64})
    hashes = json.loads((tmp_path / HASHES).read_text())["sha256"]
    assert hashes == {"a": "0" * 64, "deep/b": file_hash(tmp_path / "deep" / "b")}
