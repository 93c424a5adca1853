"""Images and sounds of cells: each kind of cell, and for each kind of damage the file, the line, the reason."""

import io

import numpy as np
import pytest
from PIL import Image

from secateur.data.media import image, sound
from secateur.data.read import read_table
from secateur.data.table import Table, as_table
from secateur.errors import DataError
from tests.tasks.media_data import RATE, tone, write_wav

PIXELS = np.arange(5 * 6 * 3, dtype=np.uint8).reshape(5, 6, 3)


def png(pixels=PIXELS, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", **options)
    return file.getvalue()


def table_of(*cells):
    return Table({"x": list(cells)}, "rows.csv", [f"line {i + 2}" for i in range(len(cells))])


def refuse(read, *cells, **options):
    with pytest.raises(DataError) as caught:
        read(table_of(*cells), "x", len(cells) - 1, **options)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["path", "relative", "bytes", "mapping", "image", "array", "list", "first"])
def test_every_kind_of_cell_gives_the_same_image(tmp_path, kind):
    path = tmp_path / "a.png"
    path.write_bytes(png())
    cells = {"path": str(path), "relative": "a.png", "bytes": png(), "mapping": {"bytes": png(), "path": None}}
    cells |= {"image": Image.fromarray(PIXELS), "array": PIXELS, "list": PIXELS.tolist()}
    cells["first"] = np.moveaxis(PIXELS, 2, 0).astype(np.float64)
    table = Table({"x": [cells[kind]]}, "rows", base=str(tmp_path))
    assert np.array_equal(np.asarray(image(table, "x", 0)), PIXELS)


def test_images_of_other_modes_and_turned_ones():
    gray = PIXELS[..., 0]
    assert np.array_equal(np.asarray(image(table_of(gray), "x", 0)), np.stack([gray] * 3, 2))
    assert np.array_equal(np.asarray(image(table_of(gray[..., None]), "x", 0, "L")), gray)
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was turned
    assert image(table_of(png(exif=turned)), "x", 0).size == (5, 6)


def test_images_that_cannot_be_read(tmp_path):
    damaged = tmp_path / "a.png"
    damaged.write_bytes(png()[:45])
    assert refuse(image, png(), str(damaged)).startswith(f"rows.csv, line 3: {damaged} is no image that can be read (")
    damaged.write_text("no image")
    assert refuse(image, str(damaged)).startswith(f"rows.csv, line 2: {damaged} is no image that can be read (")
    assert refuse(image, "none.png") == "rows.csv, line 2: no file none.png"
    assert refuse(image, 3) == "rows.csv, line 2: column 'x' holds 3, not the name of a file"
    assert refuse(image, None) == "rows.csv, line 2: column 'x' holds None, not the name of a file"
    floats = refuse(image, PIXELS / 255)
    assert floats == "rows.csv, line 2: the cell is no image that can be read (its numbers are not 0..255)"
    assert "is no image that can be read" in refuse(image, np.zeros((2, 2, 2, 2), np.uint8))


def test_too_many_pixels(monkeypatch):
    from secateur.data import media

    monkeypatch.setattr(media, "MOST_PIXELS", 29)
    assert refuse(image, png()) == "rows.csv, line 2: an image of 6 x 5 pixels is too large"


@pytest.mark.parametrize("kind", ["path", "bytes", "list", "mapping", "decoded"])
def test_every_kind_of_cell_gives_the_same_sound(tmp_path, kind):
    samples = tone(440.0, 0.1, np.random.default_rng(0))
    path = write_wav(tmp_path / "a.wav", samples)
    cells = {"path": str(path), "bytes": path.read_bytes(), "list": samples.tolist()}
    cells |= {"mapping": {"path": str(path), "bytes": None}, "decoded": {"array": samples, "sampling_rate": RATE}}
    got = sound(table_of(cells[kind]), "x", 0, RATE)
    assert got.dtype == np.float32
    assert np.abs(got - samples).max() < 1e-4


def test_other_rates_and_channels(tmp_path):
    times = np.arange(8000) / 8000
    stereo = np.stack([np.sin(2 * np.pi * 440 * times), 0 * times], 1).astype(np.float32)
    write_wav(tmp_path / "a.wav", stereo, rate=8000)
    got = sound(table_of(str(tmp_path / "a.wav")), "x", 0, 16000)
    wanted = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert got.shape == wanted.shape
    assert np.abs(got - wanted)[500:-500].max() < 2e-3


def test_sounds_that_cannot_be_read(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(b"RIFF no sound")
    assert refuse(sound, str(path), rate=RATE).startswith(f"rows.csv, line 2: {path} is no sound that can be read (")
    assert refuse(sound, "none.wav", rate=RATE) == "rows.csv, line 2: no file none.wav"
    write_wav(path, np.zeros(0, np.float32))
    assert refuse(sound, str(path), rate=RATE) == f"rows.csv, line 2: {path} holds no samples, or NaN"
    assert refuse(sound, [0.0, float("nan")], rate=RATE) == "rows.csv, line 2: the cell holds no samples, or NaN"
    assert "is no sound that can be read" in refuse(sound, ["a"], rate=RATE)


def test_long_sounds(tmp_path, monkeypatch):
    from secateur.data import media

    monkeypatch.setattr(media, "LONGEST_SECONDS", 1)
    path = write_wav(tmp_path / "a.wav", np.zeros(20000, np.float32))
    assert refuse(sound, str(path), rate=RATE) == "rows.csv, line 2: a sound of more than 1 seconds; cut it"


def test_images_and_sounds_of_datasets_stay_files(tmp_path):
    from datasets import Audio, Dataset
    from datasets import Image as ImageFeature

    (tmp_path / "a.png").write_bytes(png())
    write_wav(tmp_path / "a.wav", tone(440.0, 0.1, np.random.default_rng(0)))
    data = Dataset.from_dict({"image": [str(tmp_path / "a.png")], "audio": [str(tmp_path / "a.wav")]})
    data = data.cast_column("image", ImageFeature()).cast_column("audio", Audio())
    data.save_to_disk(tmp_path / "folder")
    for table in (as_table(data), read_table(tmp_path / "folder")):
        assert np.array_equal(np.asarray(image(table, "image", 0)), PIXELS)
        assert len(sound(table, "audio", 0, RATE)) == 1600
