"""Bad input: one sentence, exit code 2, nothing written."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.text_models import sentences, write_csv, write_texts

WEIGHT = "bert.encoder.layer.1.output.dense.weight"


@pytest.fixture
def prune(refused, classifier, data, place):
    """`secateur prune` with options changed from ones that work."""

    def run(*extra, model=classifier, rows=data, sparsity="0.5"):
        share = [] if sparsity is None else ["--sparsity", sparsity]
        source = [] if rows is None else ["--data", rows]
        return refused("prune", model, *source, *share, "--max-length", 16, "--output", place / "out", *extra)

    return run


def edit_weight(folder, change, name=WEIGHT):
    path = folder / "model.safetensors"
    state = load_file(path)
    state[name] = change(state[name].clone())
    save_file(state, path, metadata={"format": "pt"})


# -- data -----------------------------------------------------------------------------------------------------------


def test_unknown_columns(prune):
    assert "no column 'review' (--text-column); it has text, label" in prune("--text-column", "review")
    assert "no column 'stars' (--label-column)" in prune("--label-column", "stars")


def test_data_that_is_empty_or_missing(prune, tmp_path):
    assert "has no rows" in prune(rows=write_csv(tmp_path / "header.csv", []))
    (tmp_path / "nothing.csv").write_text("")
    assert "has no rows" in prune(rows=tmp_path / "nothing.csv")
    assert "no data at" in prune(rows=tmp_path / "absent.csv")
    assert "data is needed here; pass --data" in prune(rows=None)
    assert "hole.csv, line 3: column 'label' is empty" in prune(
        rows=write_csv(tmp_path / "hole.csv", [("a", "pos"), ("b", ""), *sentences(40)])
    )
    assert "too few to hold out" in prune(rows=write_csv(tmp_path / "few.csv", sentences(4)))


def test_files_that_cannot_be_read(prune, tmp_path):
    (tmp_path / "rows.xlsx").write_text("x")
    assert "rows.xlsx is none of .csv" in prune(rows=tmp_path / "rows.xlsx")
    (tmp_path / "rows.jsonl").write_text('{"text": ')
    assert "rows.jsonl, line 1 is no JSON" in prune(rows=tmp_path / "rows.jsonl")
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 is not enough")
    assert "cannot be read as parquet" in prune(rows=tmp_path / "rows.parquet")


def test_labels_that_do_not_fit_the_head(prune, tmp_path):
    for label, message in (
        ("maybe", "label 'maybe' is no class of the model; it knows neg, pos"),
        ("7", "outside the 2"),
    ):
        rows = write_csv(tmp_path / "rows.csv", [*sentences(40), ("some film", label)])
        assert message in prune(rows=rows)


def test_one_label_makes_no_classifier(refused, encoder, place, tmp_path):
    rows = write_csv(tmp_path / "rows.csv", [("a film", "pos")] * 8)
    sentence = refused("train", encoder, "--data", rows, "--output", place / "out")
    assert "at least two labels; the data has pos" in sentence


def test_texts_longer_than_the_model(prune, tmp_path):
    rows = write_csv(tmp_path / "rows.csv", [*sentences(40), ("film " * 60, "pos")])
    assert "a text has 40 tokens, the model 32 positions; pass --max-length 32" in prune("--max-length", 40, rows=rows)


def test_positions_that_begin_after_a_padding_index(encoder):
    import transformers

    from secateur.errors import DataError
    from secateur.torch.data.text_rows import text_positions, token_ids

    sizes = {"vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    sizes |= {"intermediate_size": 8, "max_position_embeddings": 34, "pad_token_id": 1}
    roberta = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**sizes)).eval()
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))
    assert (text_positions(roberta), text_positions(bert)) == (32, 34)
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
    with pytest.raises(DataError, match="a text has 33 tokens, the model 32 positions; pass --max-length 32"):
        token_ids(roberta, tokenizer, ["film " * 40], 33)
    roberta(input_ids=torch.tensor(token_ids(roberta, tokenizer, ["film " * 40], 32)["input_ids"]))


@pytest.mark.parametrize("seed", ["-1", str(2**32)])
def test_seeds_outside_their_range(prune, refused, encoder, data, place, seed):
    assert "Invalid value for '--seed'" in prune("--seed", seed, "--fine-tune", "0.1")
    assert "Invalid value for '--seed'" in refused(
        "train", encoder, "--data", data, "--output", place / "o", "--seed", seed
    )


def test_splits(prune, data, tmp_path):
    import datasets

    assert "--split train names a split of a datasets folder" in prune("--split", "train")
    texts, labels = zip(*sentences(40), strict=True)
    part = datasets.Dataset.from_dict({"text": list(texts), "label": list(labels)})
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path / "parts")
    part.save_to_disk(tmp_path / "whole")
    assert "--split is needed; it has train, test" in prune(rows=tmp_path / "parts")
    assert "no split 'valid'; it has train, test" in prune("--split", "valid", rows=tmp_path / "parts")
    assert "has no splits" in prune("--split", "train", rows=tmp_path / "whole")
    both = prune("--split", "train", "--eval-split", "train", rows=tmp_path / "parts")
    assert "--split and --eval-split are both 'train'" in both
    assert "is not a datasets folder" in prune(rows=tmp_path)


# -- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(prune, copy, value):
    edit_weight(copy, lambda w: w.index_fill_(0, torch.tensor([0]), value))
    for options in ([], ["--criterion", "attention_mass", "--pattern", "head"]):
        assert f"{WEIGHT} holds NaN or infinite weights" in prune(*options, model=copy)


def test_a_nan_outside_of_what_is_pruned(prune, copy):
    edit_weight(copy, lambda w: w.fill_(float("nan")), "bert.embeddings.LayerNorm.bias")
    assert "bert.embeddings.LayerNorm.bias holds NaN" in prune(model=copy)


def test_gradients_that_are_no_numbers(prune, copy):
    edit_weight(copy, lambda w: w.fill_(3e38), "classifier.weight")
    assert "NaN or infinity" in prune("--criterion", "taylor", model=copy)


def test_folders_that_are_no_model(prune, refused, copy, tmp_path, place):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "is no saved model: it has no config.json" in prune(model=empty)
    assert "does not exist; pass a model folder" in prune(model=tmp_path / "absent")
    assert "no model of that name could be loaded" in prune(model="no-such-org/no-such-model")
    assert "no model of that name could be loaded" in refused("inspect", "no-such-model")
    (copy / "config.json").write_text("{")
    assert "config.json is damaged" in prune(model=copy)
    (copy / "config.json").write_text('{"model_type": "unheard-of"}')
    assert "has a config that cannot be read" in prune(model=copy)


def test_a_config_of_wrong_types(prune, copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "hidden_size": "wide"}))
    assert "has a config that cannot be read" in prune(model=copy)


def test_a_damaged_weight_file(prune, copy):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert "damaged or cut short" in prune(model=copy)


def test_pickled_weights(prune, copy):
    (copy / "model.safetensors").unlink()
    torch.save({}, copy / "pytorch_model.bin")
    assert "holds pickled weights (pytorch_model.bin)" in prune(model=copy)


def test_a_folder_without_a_tokenizer(prune, copy):
    for path in copy.glob("tokenizer*"):
        path.unlink()
    assert "holds no tokenizer" in prune(model=copy)


def test_a_model_that_is_no_classifier(refused, encoder, place, tmp_path):
    rows = write_texts(tmp_path / "rows.csv", 40)
    for extra in (["eval"], ["prune", "--sparsity", "0.5", "--output", place / "out"]):
        sentence = refused(extra[0], encoder, "--data", rows, "--task", "text-classification", *extra[1:])
        assert "classifier.weight" in sentence


@pytest.mark.slow
def test_a_model_with_nothing_prunable(prune, encoder, tmp_path):
    assert "no axis or kind 'expert'; it has" in prune("--pattern", "expert")
    import transformers

    config = transformers.AutoConfig.from_pretrained(encoder, num_attention_heads=1, num_labels=2)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "one")
    transformers.AutoTokenizer.from_pretrained(encoder).save_pretrained(tmp_path / "one")
    rows = write_texts(tmp_path / "rows.csv", 40)
    sentence = prune("--pattern", "head", model=tmp_path / "one", rows=rows)
    assert "no axis or kind 'head'; it has" in sentence


# -- what to prune --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", ["-0.1", "1", "1.5", "nan", "inf"])
def test_sparsity_outside_its_range(prune, sparsity):
    assert "is outside [0, 1)" in prune(sparsity=sparsity)
    assert "is outside [0, 1)" in prune("--sweep", f"0.5,{sparsity}", sparsity=None)


@pytest.mark.slow
def test_thresholds(prune):
    assert "would empty bert.encoder" in prune("--threshold", 1e6, sparsity=None)
    assert "would empty L0.ffn" in prune("--threshold", 1e6, "--pattern", "ffn", sparsity=None)
    assert "threshold -1.0 is negative" in prune("--threshold", "-1", sparsity=None)
    assert "threshold nan is negative" in prune("--threshold", "nan", sparsity=None)
    assert "would empty" in prune("--sweep", "0.001,1e6", "--sweep-by", "threshold", sparsity=None)


def test_words_that_are_not_known(prune):
    assert "no criterion 'luck'; there is" in prune("--criterion", "luck")
    assert "no criterion 'threshold'" in prune("--criterion", "threshold")
    assert "pattern 'a b' is not understood" in prune("--pattern", "a b")
    assert "no axis or kind 'tail'" in prune("--pattern", "tail")
    assert "no budget 'fair'; there is uniform, global, per-kind" in prune("--budget", "fair")
    assert "--sweep-by 'luck' is neither" in prune("--sweep", "0.5", "--sweep-by", "luck", sparsity=None)
    assert "no task 'Juggling'; there is text-classification" in prune("--task", "Juggling")
    assert "No such option: --spasity" in prune("--spasity", "0.5")
    assert "Invalid value for '--sparsity'" in prune(sparsity="much")


@pytest.mark.slow
def test_options_that_contradict_each_other(prune):
    assert "exclude each other" in prune("--threshold", "0.1")
    assert "how much?" in prune(sparsity=None)
    assert "pattern 2:4 says itself how much goes" in prune("--pattern", "2:4")
    assert "nothing to sweep" in prune("--pattern", "2:4", "--sweep", "0.5", sparsity=None)
    for option in ("--sparsity", "--fine-tune", "--threshold"):
        sentence = prune("--sweep", "0.5", option, "0.5", sparsity=None)
        assert f"{option} has no meaning in a --sweep, which lists the values to try and does not train" in sentence
    assert "not a list of numbers" in prune("--sweep", "0.5;0.7", sparsity=None)
    assert "--sweep is empty" in prune("--sweep", "", sparsity=None)
    assert "scores units, not weights" in prune("--criterion", "attention_mass")
    assert "not a multiple of 5" in prune("--pattern", "2:5", sparsity=None)
    assert "no stock checkpoint can hold" in prune("--uniform", "--pattern", "L0.ffn")
    assert "--reconstruct has no meaning in a run without --calibration" in prune("--reconstruct")
    assert "--distil does nothing without --fine-tune; add that, or leave it out" in prune("--distil")


def test_epochs_that_are_no_number(prune):
    assert "epochs must be a positive number, not inf" in prune("--fine-tune", "inf")
    assert "--fine-tune" in prune("--fine-tune", "nan")


@pytest.mark.slow
def test_training_that_diverges(prune):
    assert "training diverged" in prune("--fine-tune", "0.5", "--learning-rate", "1e38")


def test_missing_arguments(refused):
    assert "Missing argument 'MODEL'" in refused("inspect")
    assert "No such command 'prone'" in refused("prone")


# -- output ---------------------------------------------------------------------------------------------------------


def test_output_that_exists(prune, place):
    (place / "out").mkdir()
    (place / "out" / "mine").write_text("keep me")
    assert "exists; choose another output or pass --overwrite" in prune()
    assert (place / "out" / "mine").read_text() == "keep me"


def test_overwrite_replaces_results_and_nothing_dearer(prune, place, monkeypatch):
    inside = place / "out" / "work"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    assert "will not be replaced, for it holds the working folder" in prune("--overwrite")
    monkeypatch.chdir(place)
    (place / "out" / ".git").mkdir()
    assert "will not be replaced, for it is a git repository" in prune("--overwrite")
    assert inside.is_dir()


def test_output_that_cannot_be_written(refused, classifier, data, place):
    (place / "file").write_text("")
    for output, message in (
        (place / "file" / "out", "is not a folder"),
        ("/proc/out", "cannot be written: "),
        (place / ("x" * 300), "too long"),
    ):
        arguments = ["--data", data, "--sparsity", "0.5", "--output", output]
        assert message in refused("prune", classifier, *arguments)
        assert message in refused("train", classifier, "--data", data, "--output", output)


def test_eval_against_a_model_with_other_classes(refused, classifier, encoder, data, tmp_path):
    import transformers

    config = transformers.AutoConfig.from_pretrained(encoder, num_labels=3)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "three")
    sentence = refused("eval", classifier, "--data", data, "--against", tmp_path / "three")
    assert "both models need the same classes" in sentence
