"""Data as tables: every kind of file and folder, and for each kind of damage the file, the line, the reason."""

import json

import pytest

from secateur.data.columns import Column, choose
from secateur.data.read import read_table
from secateur.data.table import as_table, shuffled, split_table
from secateur.errors import DataError
from tests.tasks.media_data import write_images, write_sounds

ROWS = [{"text": "good film", "label": 1}, {"text": "bad film", "label": 0}]


def rows_of(table):
    return [dict(zip(table.columns, cells, strict=True)) for cells in zip(*table.columns.values(), strict=True)]


def refuse(source, split=None):
    with pytest.raises(DataError) as caught:
        read_table(source, split)
    return str(caught.value)


# -- files ------------------------------------------------------------------------------------------------------------


def test_csv_with_quotes_and_lines_in_a_cell(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbftext,label\r\n"two\nlines, a comma",1\r\n\r\n"a ""quote""",\r\n')
    table = read_table(path)
    assert rows_of(table) == [{"text": "two\nlines, a comma", "label": "1"}, {"text": 'a "quote"', "label": None}]
    assert [table.where(row) for row in (0, 1)] == [f"{path}, line 2", f"{path}, line 5"]
    assert table.base == str(tmp_path)


def test_the_same_rows_in_every_kind_of_file(tmp_path):
    from datasets import Dataset

    lines = [f"{row['text']}\t{row['label']}" for row in ROWS]
    (tmp_path / "a.tsv").write_text("\n".join(["text\tlabel", *lines]))
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, ROWS)))
    (tmp_path / "a.ndjson").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "list.json").write_text(json.dumps(ROWS))
    (tmp_path / "data.json").write_text(json.dumps({"version": "2", "data": ROWS}))
    (tmp_path / "columns.json").write_text(json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}))
    Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "folder")
    assert rows_of(read_table(tmp_path / "a.tsv")) == [{**row, "label": str(row["label"])} for row in ROWS]
    for name in ("a.jsonl", "a.ndjson", "list.json", "data.json", "columns.json", "a.parquet", "folder"):
        assert rows_of(read_table(tmp_path / name)) == ROWS, name
    assert read_table(tmp_path / "a.jsonl").where(1) == f"{tmp_path / 'a.jsonl'}, line 3"
    assert read_table(tmp_path / "list.json").where(1) == f"{tmp_path / 'list.json'}, row 1"


def test_text_is_parted_by_empty_lines_or_else_by_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n\n\nthree\n")
    table = read_table(path)
    assert list(table.columns["text"]) == ["one\ntwo", "three"]
    assert table.where(1) == f"{path}, line 5"
    path.write_text("one\ntwo\n")
    assert list(read_table(path).columns["text"]) == ["one", "two"]


CASES = [
    ("a.csv", b"text,label\na,1\nb,2,3\n", "{path}, line 3 has 3 cells; the first line names 2"),
    ("a.csv", b'text,label\na,1\n"b,2\n', "{path}, line 3 cannot be read as CSV: 'unexpected end of data'"),
    ("a.csv", b"text,label\na,1\nb\xff,2\n", "{path}, line 3 is no UTF-8 text; convert it"),
    ("a.csv", b"text,text\na,1\n", "{path} has the column 'text' twice; rename one"),
    ("a.csv", b"text,label\n", "{path} has no rows"),
    ("a.csv", b"", "{path} has no rows"),
    ("a.tsv", b"text\tlabel\na b\n", "{path}, line 2 has 1 cells; the first line names 2"),
    ("a.jsonl", b'{"a": 1}\n{"a": }\n', "{path}, line 2 is no JSON: "),
    ("a.jsonl", b'{"a": 1}\n\n[1]\n', "{path}, line 3 is [1], not an object with named values"),
    ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "{path}, line 2 is no UTF-8 text; convert it"),
    ("a.json", b"[1", "{path} is no JSON: "),
    ("a.json", b"\xff\xfe[", "{path} is no UTF-8 text; convert it"),
    ("a.json", b'[{"a": 1}, 2]', "{path}, row 1 is 2, not an object with named values"),
    ("a.json", b"3", "{path} is no table; it must be a list of objects, or lists of equal length by name"),
    ("a.json", b'{"a": [1, 2], "b": [1]}', "{path} has columns of different lengths"),
    ("a.json", b"[]", "{path} has no rows"),
    ("a.txt", b"one\ntw\xe9\n", "{path}, line 2 is no UTF-8 text; convert it"),
    ("a.parquet", b"PAR1 no", "{path} cannot be read as parquet: "),
    ("a.xlsx", b"PK", "a.xlsx is none of .csv, .tsv, .jsonl, .ndjson, .json, .parquet, .txt; convert it, or pass a "),
]


@pytest.mark.parametrize(("name", "content", "sentence"), CASES)
def test_damage_is_named(tmp_path, name, content, sentence):
    path = tmp_path / name
    path.write_bytes(content)
    assert refuse(path).startswith(sentence.format(path=path))


def test_the_line_of_bytes_that_are_no_text_is_exact_in_long_files(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"text,label\n" + b"some words,1\n" * 5000 + b"\xff,1\n" + b"some words,1\n" * 5000)
    assert refuse(path) == f"{path}, line 5002 is no UTF-8 text; convert it"


def test_nothing_of_that_name(tmp_path):
    assert refuse(tmp_path / "none.csv").startswith(f"no data at {tmp_path / 'none.csv'}; pass")
    assert refuse("none.csv") == "no data at none.csv; pass a file, a folder, or the name of a data set of the hub"
    assert "no data set of that name could be loaded from the hub or its cache" in refuse("nobody/nothing")


# -- datasets folders -------------------------------------------------------------------------------------------------


def test_splits_and_class_names_of_a_datasets_folder(tmp_path):
    from datasets import ClassLabel, Dataset, DatasetDict

    data = Dataset.from_list(ROWS).cast_column("label", ClassLabel(names=["neg", "pos"]))
    DatasetDict(train=data, test=data.select([1])).save_to_disk(tmp_path / "d")
    table = read_table(tmp_path / "d", "test")
    assert rows_of(table) == [{"text": "bad film", "label": 0}]
    assert table.class_names == {"label": ["neg", "pos"]}
    data.to_parquet(tmp_path / "a.parquet")
    assert as_table(data).class_names == read_table(tmp_path / "a.parquet").class_names == {"label": ["neg", "pos"]}
    assert refuse(tmp_path / "d") == f"{tmp_path / 'd'}: --split is needed; it has train, test"
    assert refuse(tmp_path / "d", "dev") == f"{tmp_path / 'd'}: no split 'dev'; it has train, test"
    data.save_to_disk(tmp_path / "one")
    assert refuse(tmp_path / "one", "test") == f"{tmp_path / 'one'} has no splits; leave --split out"
    (tmp_path / "a.csv").write_text("a\n1\n")
    assert refuse(tmp_path / "a.csv", "test").startswith("--split test names a split of a datasets folder")
    for content in ("{", "{}"):
        (tmp_path / "one" / "state.json").write_text(content)
        assert refuse(tmp_path / "one").startswith(f"{tmp_path / 'one'} is not a datasets folder: ")


# -- folders of images and sounds -------------------------------------------------------------------------------------


def test_class_folders(tmp_path):
    table = read_table(write_images(tmp_path / "images", rows=6))
    assert list(table.columns) == ["image", "label"]
    assert list(table.columns["label"]) == [0, 0, 1, 1, 2, 2]
    assert table.class_names == {"label": ["blue", "green", "red"]}
    assert table.where(5) == f"{tmp_path / 'images'}, red/5.png"
    one = read_table(tmp_path / "images" / "red" / "5.png")
    assert rows_of(one) == [{"image": table.columns["image"][5]}]
    sounds = read_table(write_sounds(tmp_path / "sounds", rows=6))
    assert list(sounds.columns) == ["audio", "label"]
    assert sounds.class_names == {"label": ["high", "low", "middle"]}


def test_splits_of_a_folder(tmp_path):
    path = write_images(tmp_path / "images", rows=6, splits=("training", "val"))
    for file in (path / "val" / "red").iterdir():
        file.unlink()
    table = read_table(path, "validation")
    assert list(table.columns["label"]) == [0, 0, 1, 1]
    assert table.class_names == {"label": ["blue", "green", "red"]}  # the same numbers in every split
    assert refuse(path) == f"{path}: --split is needed; it has train, validation"
    assert refuse(path, "test") == f"{path}: no split 'test'; it has train, validation"
    only = write_images(tmp_path / "only", rows=3, splits=("train",))
    assert len(read_table(only)) == len(read_table(only, "train")) == 3
    plain = write_images(tmp_path / "plain", rows=3)
    assert refuse(plain, "train") == f"{plain} has no splits; leave --split out"


def test_a_metadata_file_names_the_files(tmp_path):
    path = write_images(tmp_path, rows=3)
    (path / "metadata.csv").write_text("file_name,caption\nred/2.png,a red one\nblue/0.png,a blue one\n")
    table = read_table(path)
    assert rows_of(table)[0] == {"image": "red/2.png", "caption": "a red one"}
    assert table.base == str(path)
    assert table.where(1) == f"{path / 'metadata.csv'}, line 3"
    (path / "metadata.csv").write_text("name,caption\nred/2.png,a red one\n")
    assert refuse(path) == f"{path / 'metadata.csv'} has no column file_name; it has name, caption"
    (path / "metadata.csv").write_text("file_name,caption\nred/2.png\n")
    assert refuse(path) == f"{path / 'metadata.csv'}, line 2 has 1 cells; the first line names 2"


def test_files_without_classes(tmp_path):
    path = write_images(tmp_path, rows=3)
    for i, file in enumerate(sorted(path.rglob("*.png"))):
        file.rename(path / f"{i}.png")
    (path / ".hidden.png").write_bytes(b"")
    assert {name: len(cells) for name, cells in read_table(path).columns.items()} == {"image": 3}
    write_images(path, rows=2)
    assert refuse(path).startswith(f"{path / '0.png'} lies in no class folder, other files do; move it, or write a ")


def test_a_folder_of_something_else(tmp_path):
    (tmp_path / "notes.md").write_text("x")
    assert refuse(tmp_path).startswith(f"{tmp_path} is not a datasets folder, and holds no images")


# -- tables -----------------------------------------------------------------------------------------------------------


def test_tables_of_what_people_hold():
    assert rows_of(as_table(ROWS)) == ROWS
    assert rows_of(as_table({"a": [1, 2]})) == [{"a": 1}, {"a": 2}]
    assert rows_of(as_table([{"a": 1}, {"b": 2}])) == [{"a": 1, "b": None}, {"a": None, "b": 2}]
    for wrong in (3, "text", {"a": [1], "b": []}, [], {}):
        with pytest.raises(DataError, match="no table|no rows"):
            as_table(wrong)


def test_parts_are_disjoint_and_keep_their_places():
    table = as_table({"n": list(range(20)), "label": ["a"] * 10 + ["b"] * 10})
    first, second = split_table(table, 0.2, seed=1, by="label")
    assert sorted([*first.columns["n"], *second.columns["n"]]) == list(range(20))
    assert sorted(second.columns["label"]) == ["a", "a", "b", "b"]
    assert second.where(0) == f"the data, row {second.columns['n'][0]}"
    assert list(shuffled(table, 1).columns["n"]) == list(shuffled(table, 1).columns["n"]) != list(range(20))
    for share in (0.0, 1.0, 0.001):
        with pytest.raises(DataError, match="hold out"):
            split_table(table, share)


# -- columns ----------------------------------------------------------------------------------------------------------

PAIR = Column("text", "--text-column", ("text", "premise,hypothesis", "review"))
LABEL = Column("label", "--label-column", ("label", "class"), is_needed=False)


def test_columns_are_found_by_their_usual_names_and_it_is_said():
    def found(*names, **named):
        chosen = choose(as_table({name: [1] for name in names}), (PAIR, LABEL), named)
        return dict(chosen.names), list(chosen.found)

    assert found("label", "text") == ({"text": ("text",), "label": ("label",)}, [])
    assert found("premise", "hypothesis", "class") == (
        {"text": ("premise", "hypothesis"), "label": ("class",)},
        [
            "the column premise and hypothesis is taken as text (--text-column names another)",
            "the column class is taken as label (--label-column names another)",
        ],
    )
    assert found("a", "b", text="b, a") == ({"text": ("b", "a")}, [])
    assert found("a,b", "a", text="a,b") == ({"text": ("a,b",)}, [])


@pytest.mark.parametrize(
    ("columns", "named", "sentence"),
    [
        (["a", "b"], {}, "the data has no column text or premise,hypothesis or review; name the text with "
         "--text-column, one of a, b"),
        (["a"], {"text": "c"}, "the data has no column 'c' (--text-column); it has a"),
        (["text"], {"image": "a"}, "--image-column a: this task reads no image; it reads label, text"),
    ],
)  # fmt: skip
def test_columns_that_are_not_there(columns, named, sentence):
    with pytest.raises(DataError) as caught:
        choose(as_table({name: [1] for name in columns}), (PAIR, LABEL), named)
    assert str(caught.value) == sentence
