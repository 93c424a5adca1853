"""image-classification: from a config and a folder of images to a pruned model."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from secateur import criteria
from secateur.budget import Uniform
from secateur.data.read import read_table
from secateur.errors import DataError, ModelError
from secateur.jobs.open_task import look, open_host, open_to_train, prepare
from secateur.jobs.prune_model import Stage, Tuning, run
from secateur.select import parse_pattern
from secateur.tasks import Options, Reference, compare
from secateur.tasks.find import find, headless, named, task_of_config
from secateur.tasks.image_classification import ImageClassification
from secateur.torch.files.saving import load
from tests.tasks.commands import refused, result
from tests.tasks.media_data import write_image_model, write_images


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_image_model(tmp_path_factory.mktemp("vit") / "model")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "data", rows=45)


@pytest.fixture(scope="module")
def opened(folder):
    opened = look(str(folder), None)
    return opened.of(opened.model())


def test_the_task_is_found_from_the_config():
    assert task_of_config(transformers.ViTConfig(architectures=["ViTForImageClassification"])) is ImageClassification
    assert named("ImageClassification") is named("image-classification") is ImageClassification
    assert headless(transformers.ViTConfig(architectures=["ViTModel"])) is ImageClassification


def test_images_of_different_sizes_become_one_batch(opened, images):
    table = read_table(images)
    assert len({Image.open(path).size for path in table.columns["image"]}) > 10
    examples = opened.encode(table)
    batch = opened.collate(examples.features[:5])
    assert {name: (tuple(value.shape), value.dtype) for name, value in batch.items()} == {
        "pixel_values": ((5, 3, 16, 16), torch.float32),
        "labels": ((5,), torch.int64),
    }
    wanted = opened.processor([Image.open(table.columns["image"][3])], return_tensors="np")["pixel_values"][0]
    assert np.array_equal(batch["pixel_values"][3].numpy(), wanted)
    assert examples.references == list(table.columns["label"])
    assert examples.inputs[3] == table.columns["image"][3]
    assert opened.config.id2label == {0: "blue", 1: "green", 2: "red"}  # the head named none


def test_paths_bytes_images_and_arrays_give_the_same_inputs(opened, images):
    path = images / "red" / "2.png"
    picture = Image.open(path)
    cells = [str(path), {"bytes": path.read_bytes(), "path": None}, picture, np.asarray(picture)]
    examples = opened.encode(read_table_of(image=cells))
    pixels = opened.collate(examples.features)["pixel_values"]
    assert examples.references is None
    assert (pixels == pixels[0]).all()


def read_table_of(**columns):
    from secateur.data.table import as_table

    return as_table(columns)


def test_rows_beyond_the_memory_for_arrays_are_read_again(opened, images, monkeypatch):
    from secateur.tasks.base import media

    table = read_table(images)
    kept = opened.encode(table).features
    monkeypatch.setattr(media, "MOST_BYTES", 3 * 3 * 16 * 16 * 4)
    again = opened.encode(table).features
    assert [feature["image"].kept is not None for feature in again[:5]] == [True, True, True, False, False]
    assert torch.equal(opened.collate(again)["pixel_values"], opened.collate(kept)["pixel_values"])


def test_a_model_of_gray_images(tmp_path):
    folder = write_image_model(tmp_path, num_channels=1)
    transformers.ViTImageProcessorPil(
        size={"height": 16, "width": 16}, image_mean=[0.5], image_std=[0.5]
    ).save_pretrained(folder)
    opened = look(str(folder), None)
    task = opened.of(opened.model())
    batches = task.batches({"image": [np.zeros((9, 7, 3), np.uint8)] * 2, "label": [0, 1]})
    assert batches[0]["pixel_values"].shape == (2, 1, 16, 16)
    assert task.evaluate(task.model, batches).rows == 2


def test_several_labels_and_numbers(tmp_path, images):
    several = look(str(write_image_model(tmp_path / "a", problem_type="multi_label_classification")), None)
    task = several.of(several.model(), Options(label_names=("cat", "dog", "sky")))
    batches = task.batches({"image": [np.zeros((9, 9, 3), np.uint8)] * 2, "label": [["cat", "sky"], "dog"]})
    assert batches[0]["labels"].tolist() == [[1, 0, 1], [0, 1, 0]]
    assert set(task.evaluate(task.model, batches).values) == {"micro F1", "average precision", "all labels right"}
    number = look(str(write_image_model(tmp_path / "b", num_labels=1)), None)
    task = number.of(number.model())
    batches = task.batches({"image": [np.zeros((9, 9, 3), np.uint8)] * 2, "label": [0.5, "2"]})
    assert batches[0]["labels"].tolist() == [0.5, 2.0]
    found = task.evaluate(task.model, batches, against=task.model)
    assert found.metric == "Pearson"
    assert found.flips is None


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"image": ["none.png"]}, "the data, row 0: no file none.png"),
        ({"image": [b"no image"]}, "the data, row 0: the cell is no image that can be read (cannot identify"),
        ({"image": [np.zeros((9, 9, 3), np.uint8)] * 2, "label": ["red", "pink"]},
         "the data, row 1: label 'pink' is no class of the model; it knows blue, green, red"),
        ({"image": [np.zeros((9, 9, 3), np.uint8)], "label": [3]},
         "the data, row 0: label 3 is outside the 3 classes of the model's head (0..2)"),
        ({"image": [np.zeros((9, 9, 3), np.uint8)], "label": [None]}, "the data, row 0: column 'label' is empty"),
        ({"photo": ["a.png"]}, "the data has no column image or img or pixel_values or path or file or file_name; name "
         "the image with --image-column, one of photo"),
    ],
)  # fmt: skip
def test_bad_rows(folder, columns, sentence):
    opened = look(str(folder), None)
    task = opened.of(opened.model(), Options(label_names=("blue", "green", "red")))
    with pytest.raises(DataError) as caught:
        task.batches(columns)
    assert str(caught.value).startswith(sentence)


def test_a_folder_without_an_image_processor(tmp_path):
    folder = write_image_model(tmp_path)
    (folder / "preprocessor_config.json").write_text("{")
    with pytest.raises(ModelError, match="holds no image processor that can be read: "):
        ImageClassification.load_processor(folder)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError) as caught:
        ImageClassification.load_processor(folder)
    assert str(caught.value) == (
        f"{folder} holds no image processor (preprocessor_config.json); save the one that the model was trained with "
        "into it"
    )


def test_a_processor_that_does_not_fit_the_model(tmp_path):
    opened = look(str(write_image_model(tmp_path / "a", size=24)), None)
    with pytest.raises(
        DataError, match="makes images of 3 x 24 x 24, which the model does not take .*correct the size"
    ):
        opened.of(opened.model()).batches({"image": [np.zeros((9, 9, 3), np.uint8)]})
    model = look(str(write_image_model(tmp_path / "b")), None).model()
    task = find(model, transformers.ViTImageProcessorPil(do_resize=False))
    sizes = [np.zeros((16, 16, 3), np.uint8), np.zeros((9, 16, 3), np.uint8)]
    with pytest.raises(DataError, match=r"row 1: the image processor gives images of different sizes \(3 x 9 x 16 and"):
        task.batches({"image": sizes})


# -- scores -----------------------------------------------------------------------------------------------------------


def test_scores_by_hand(opened, images):
    table = read_table(images)
    batches = opened.batches(table, 8)
    with torch.no_grad():
        pixels = opened.collate(opened.encode(table).features)["pixel_values"]
        logits = opened.model(pixel_values=pixels).logits
    labels = torch.tensor(table.columns["label"])
    got = opened.evaluate(opened.model, batches)
    assert got.values["accuracy"] == pytest.approx(float((logits.argmax(-1) == labels).double().mean()))
    assert got.loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-5)
    assert got.predictions == logits.argmax(-1).tolist()


def test_without_labels_the_dense_model_is_the_measure(opened, images):
    table = read_table(images)
    batches = opened.batches({"image": table.columns["image"]}, 8)
    with pytest.raises(DataError, match="the data has no labels"):
        opened.evaluate(opened.model, batches)
    same = opened.evaluate(opened.model, batches, against=opened.model)
    assert same.is_against_dense
    assert same.values == {"accuracy": 1.0, "macro F1": 1.0}
    assert same.flips == 0.0
    assert same.kl == pytest.approx(0.0, abs=1e-6)
    other = type(opened.model)(opened.config).eval()
    reference = Reference(opened, opened.model, batches)
    apart = opened.evaluate(other, batches, against=opened.model)
    assert apart.kl > 1e-4
    assert apart.flips == pytest.approx(1 - apart.values["accuracy"])
    assert compare(reference.evaluation(), apart).drop == pytest.approx(apart.flips)
    batch = batches[0]
    labels = opened.own_labels(opened.model(**batch), batch)
    assert torch.isfinite(opened.loss(opened.model, {**batch, **labels}))


# -- pruning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_labelled", [True, False])
def test_prune_and_reload(folder, images, tmp_path, is_labelled):
    table = read_table(images)
    if not is_labelled:
        table = read_table_of(image=table.columns["image"])
    host, task = open_host(look(str(folder), None), Options())
    data = prepare(task, table, None, calibration_samples=16, batch_size=8, seed=0)
    stage = Stage(criteria.taylor, parse_pattern("head,ffn"), Uniform(0.5))
    outcome = run("small", host, [stage], data, Tuning(epochs=1, distil=not is_labelled), tmp_path / "small")
    assert outcome.difference == outcome.reload_difference == 0.0
    assert outcome.dense.is_against_dense is not is_labelled
    small = load(tmp_path / "small")
    layer = small.vit.layers[0]
    assert [p.shape[0] for p in (layer.attention.q_proj.weight, layer.mlp.fc1.weight)] == [16, 24]
    processor = ImageClassification.load_processor(tmp_path / "small")
    assert processor.size == task.processor.size


def test_an_encoder_without_a_head_gets_one_for_the_labels(tmp_path, images):
    folder = write_image_model(tmp_path / "base", "ViTModel")
    new = []
    task = open_to_train(str(folder), None, read_table(images), Options(), new_head=new.extend)
    assert task.name == "image-classification"
    assert task.config.id2label == {0: "blue", 1: "green", 2: "red"}
    assert any("classifier" in name for name in new)


def test_the_command_line(folder, images, tmp_path, capsys):
    dense, small = tmp_path / "dense", tmp_path / "small"
    training = ("--epochs", "8", "--learning-rate", "3e-3", "--batch-size", "8")
    trained = result(capsys, "train", folder, "--data", images, "--output", dense, *training)
    assert trained["task"] == "image-classification"
    scored = result(capsys, "eval", dense, "--data", images)
    assert scored["values"]["accuracy"] > 0.9
    assert scored["loss"] < trained["loss"]
    rows = [f"{file},{file.parent.name}" for file in sorted(images.rglob("*.png"))]
    data = tmp_path / "rows.csv"
    data.write_text("\n".join(["photo,colour", *rows]))
    given = ("--data", data, "--image-column", "photo", "--label-column", "colour")
    assert result(capsys, "eval", dense, *given)["values"] == scored["values"]
    options = ("--criterion", "taylor", "--pattern", "ffn", "--sparsity", "0.5")
    pruned = result(capsys, "prune", dense, *given, *options, "--output", small)
    assert pruned["task"] == "image-classification"
    assert pruned["difference"] == 0.0
    assert result(capsys, "eval", small, "--data", images, "--against", dense)["flips"] <= 0.5
    data.write_text("\n".join(["photo,colour", *rows, "none.png,red"]))
    sentence = refused(capsys, "prune", dense, *given, *options, "--output", tmp_path / "not")
    assert sentence == f"{data}, line {len(rows) + 2}: no file {tmp_path / 'none.png'}"
    assert not (tmp_path / "not").exists()
    (dense / "preprocessor_config.json").unlink()
    assert "holds no image processor" in refused(capsys, "eval", dense, "--data", images)
