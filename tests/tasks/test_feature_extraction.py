"""feature-extraction: embeddings as sentence-transformers makes them, pairs with scores, and data without any label."""

import json
import re

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from torch.nn import functional as F

import secateur
from secateur.cli import main
from secateur.data.read import read_table
from secateur.data.table import as_table
from secateur.errors import DataError, ModelError
from secateur.jobs import prune_model
from secateur.jobs.open_task import look, open_host, prepare
from secateur.pruning import prune
from secateur.tasks import Options, find
from secateur.torch.base.batches import run
from secateur.torch.data.text_rows import load_tokenizer
from secateur.torch.files.companions import companions_of, folder_of
from secateur.torch.open import load_model
from secateur.torch.shrink.vocabulary import closed
from secateur.training.fine_tune import fine_tune
from tests.text_models import pairs, sentences, write_classifier, write_csv, write_encoder

SentenceTransformer = pytest.importorskip("sentence_transformers").SentenceTransformer
TEXTS = [text for text, _ in sentences(24)]
POOLINGS = [(mode,) for mode in ("mean", "cls", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")]
POOLINGS.append(("mean", "cls"))
BERT = {"type": "a.Transformer", "path": ""}


def opened(folder, **options):
    model = load_model(folder)
    return model, find(model, load_tokenizer(folder), options=Options(**options))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("encoder") / "encoder")


@pytest.fixture
def texts(tmp_path):
    return write_csv(tmp_path / "texts.csv", [[text] for text, _ in sentences(60)], ["text"])


@pytest.fixture
def scored(tmp_path):
    return write_csv(tmp_path / "pairs.csv", pairs(60), ["sentence1", "sentence2", "score"])


# -- what a folder says -----------------------------------------------------------------------------------------------


def test_a_linear_layer_that_stands_twice(tmp_path):
    place = write_encoder(tmp_path / "encoder", dense=8)
    modules = json.loads((place / "modules.json").read_text())
    (place / "modules.json").write_text(json.dumps([*modules, next(m for m in modules if "Dense" in m["type"])]))
    model, task = opened(place)
    with pytest.raises(ModelError, match=r"takes vectors of \d+, and gets 8"):
        task.evaluate(model, task.batches({"text": TEXTS}), model)


@pytest.mark.parametrize("pooling", POOLINGS, ids="+".join)
def test_embeddings_are_those_of_sentence_transformers(pooling, tmp_path):
    dense = 8 if len(pooling) > 1 else None
    place = write_encoder(tmp_path / "encoder", pooling, dense)
    model, task = opened(place)
    assert task.name == "feature-extraction"
    found = task.evaluate(model, task.batches({"text": TEXTS}), model)
    np.testing.assert_allclose(
        np.stack(found.predictions), SentenceTransformer(str(place), device="cpu").encode(TEXTS), atol=1e-6
    )
    assert found.predictions[0].shape == (dense or 32,)
    assert found.values == {"cosine": pytest.approx(1, abs=1e-12)}
    assert (found.kl, found.flips, found.loss, found.is_against_dense) == (0, None, None, True)


def test_length_case_and_prompt_are_those_of_the_folder(tmp_path):
    place = write_encoder(tmp_path / "encoder")
    settings = place / "sentence_bert_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "max_seq_length": 6, "do_lower_case": True}))
    prompts = place / "config_sentence_transformers.json"
    told = {"prompts": {"query": "good film "}, "default_prompt_name": "query"}
    prompts.write_text(json.dumps({**json.loads(prompts.read_text()), **told}))
    model, task = opened(place)
    rows = [text.upper() for text in TEXTS]
    found = task.evaluate(model, task.batches({"text": rows}), model)
    wanted = SentenceTransformer(str(place), device="cpu").encode(rows)
    np.testing.assert_allclose(np.stack(found.predictions), wanted, atol=1e-6)


def test_a_bare_encoder_gives_the_mean(tmp_path):
    place = write_classifier(tmp_path / "bare", "BertModel")
    model, task = opened(place)
    found = task.evaluate(model, task.batches({"text": TEXTS[:3]}, 2), model)
    for text, vector in zip(TEXTS[:3], found.predictions, strict=True):
        with torch.no_grad():
            states = model(**load_tokenizer(place)(text, return_tensors="pt")).last_hidden_state
        np.testing.assert_allclose(vector, states[0].mean(0), atol=1e-6)
    assert task.companions["carried"] is None


def test_a_pooled_folder_is_no_masked_language_model(folder, tmp_path):
    """Many folders name in their config the model that was trained first."""
    place = write_encoder(tmp_path / "encoder")
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    assert (look(str(place), None).task.name, look(str(place), None).auto_class) == ("feature-extraction", "AutoModel")
    assert type(look(str(place), None).model()).__name__ == "BertModel"
    assert (look(str(folder), None).auto_class, look(str(folder), "text-classification").auto_class) == (
        None,
        "SequenceClassification",
    )


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("modules.json", [BERT, {"type": "b.Pooling", "path": "../x"}], "not to be trusted"),
        ("modules.json", [BERT, {"type": "b.Pooling", "path": "/x"}], "not to be trusted"),
        ("modules.json", [BERT, {"type": "b.Pooling", "path": "x" * 256}], "a folder of more than 255 characters"),
        ("modules.json", [{"path": ""}], "field required"),
        ("modules.json", {"type": "a"}, "is damaged"),
        ("modules.json", [{"type": "b.Pooling", "path": "1_Pooling"}, {"type": "c.Router"}], "through 'c.Router'"),
        ("1_Pooling/config.json", {"pooling_mode": "median"}, "names the pooling 'median'"),
        ("1_Pooling/config.json", {"pooling_mode": []}, "names the pooling None"),
        ("2_Dense/config.json", {"in_features": 32, "out_features": 9}, "does not hold the linear layer of 32 to 9"),
        (
            "2_Dense/config.json",
            {"in_features": 1, "out_features": 1, "activation_function": "os.system"},
            "'os.system'",
        ),
        ("config_sentence_transformers.json", {"default_prompt_name": "query"}, "the prompt 'query'"),
        ("sentence_bert_config.json", {"max_seq_length": 0}, "max_seq_length is 0"),
    ],
)
def test_damaged_folders(file, content, sentence, tmp_path):
    place = write_encoder(tmp_path / "encoder", dense=8)
    (place / file).write_text(json.dumps(content))
    with pytest.raises(ModelError, match=re.escape(sentence)):
        opened(place)


# -- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "columns", "sentence"),
    [
        ("words\nfine\n", {}, "name the text with --text-column"),
        ('text\nfine\n""\n', {}, "bad.csv, line 3: column 'text' is empty"),
        ("sentence1,sentence2,score\na,b,1\na,b,much\n", {}, "bad.csv, line 3: 'much' in column 'score' is no number"),
        ("text,label\nfine,1\n", {"label": "label"}, "--label-column names the score of a pair"),
        ("a,b,c\nx,y,z\n", {"text": "a,b,c"}, "--text-column names 3 columns"),
        (
            "sentence1,sentence2,p,q\na,b,1,2\n",
            {"label": "p,q"},
            "--label-column names 2 columns; a pair has one score",
        ),
    ],
)
def test_bad_data(content, columns, sentence, folder, tmp_path):
    (tmp_path / "bad.csv").write_text(content)
    _, task = opened(folder, columns=columns)
    with pytest.raises(DataError, match=re.escape(sentence)):
        task.encode(read_table(tmp_path / "bad.csv"))


def test_a_label_beside_a_single_text_is_not_read(folder):
    _, task = opened(folder)
    examples = task.encode(as_table({"text": TEXTS, "score": list(range(24))}))
    assert examples.references is None
    assert task.notes == []


def test_pairs_in_a_batch(folder):
    _, task = opened(folder)
    rows = {"sentence1": ["good film", "bad"], "sentence2": ["the plot was dull", "fine a"], "score": [5, 2.5]}
    batch = task.batches(rows)[0]
    assert batch["input_ids"].shape == (4, 6)
    assert batch["labels"].tolist() == [1.0, 0.5]
    first = load_tokenizer(folder)(["good film", "the plot was dull"])["input_ids"]
    assert [batch["input_ids"][i][batch["attention_mask"][i] == 1].tolist() for i in (0, 2)] == first
    assert task.collate(task.encode(as_table(rows)).features, pad_to=9)["input_ids"].shape == (4, 9)
    with pytest.raises(DataError, match="one holds pairs of texts, the other does not"):
        task.encode(as_table({"text": TEXTS}))


def test_metrics_of_pairs_are_those_of_scipy(folder, scored):
    model, task = opened(folder)
    found = task.evaluate(model, task.batches(read_table(scored), 7), model)
    student = SentenceTransformer(str(folder), device="cpu")
    rows = list(pairs(60))
    first, second = (student.encode([row[i] for row in rows]) for i in (0, 1))
    cosines, scores = (first * second).sum(1), [row[2] for row in rows]
    assert list(found.values) == ["Spearman", "Pearson"]
    assert found.values["Spearman"] == pytest.approx(spearmanr(cosines, scores)[0], abs=1e-5)
    assert found.values["Pearson"] == pytest.approx(pearsonr(cosines, scores)[0], abs=1e-5)
    assert found.loss == pytest.approx(np.square(cosines - np.array(scores) / 5).mean(), rel=1e-4)
    assert (found.kl, found.flips) == (0, None)
    assert task.shown(found.predictions[0], []) == {"cosine": pytest.approx(cosines[0], abs=1e-6)}


def test_pairs_without_scores_are_compared_with_the_dense_model(folder):
    model, task = opened(folder)
    other = load_model(folder)
    with torch.no_grad():
        other.encoder.layer[0].output.dense.weight.mul_(-1)
    batches = task.batches([{"text1": a, "text2": b} for a, b, _ in pairs(9)], 4)
    found = task.evaluate(other, batches, model)
    before, after = (task.evaluate(m, batches, model).predictions for m in (model, other))
    cosines = (np.stack(before) * np.stack(after)).sum(-1)
    assert cosines.shape == (9, 2)
    assert found.values == {"cosine": pytest.approx(cosines.mean(), abs=1e-6)}
    assert found.kl == pytest.approx(1 - cosines.mean(), abs=1e-6)
    assert 0.01 < found.kl < 1.99


# -- gradients without labels -----------------------------------------------------------------------------------------


def test_the_cosine_has_no_gradient_at_the_dense_model_but_own_labels_have(folder):
    model, task = opened(folder)
    batch = task.batches({"text": TEXTS[:4]})[0]
    with torch.no_grad():
        dense = run(model, batch)
    weight = model.encoder.layer[1].output.dense.weight
    flat = torch.autograd.grad(task.divergence(run(model, batch), dense, batch).mean(), weight)[0]
    labels = task.own_labels(dense, batch)
    loss = task.loss(model, {**batch, **labels})
    steep = torch.autograd.grad(loss, weight)[0]
    assert loss.isfinite()
    assert flat.abs().max() < 1e-6 < 1e-3 < steep.abs().max()
    assert torch.equal(task.own_labels(dense, batch)["labels"], labels["labels"])
    other = find(model, task.processor, options=Options(seed=1))
    assert not torch.equal(other.own_labels(dense, batch)["labels"], labels["labels"])


def test_squared_gradients_of_own_labels_estimate_the_curvature_of_the_cosine(folder):
    """diag(J^T J) of the unit embedding, from its Jacobian; and the second derivative of 1 - cosine itself."""
    model, task = opened(folder)
    batch = task.batches({"text": TEXTS[:1]})[0]
    bias = model.encoder.layer[0].intermediate.dense.bias
    unit = F.normalize(task.embed(run(model, batch), batch), dim=-1)[0]
    jacobian = torch.stack([torch.autograd.grad(value, bias, retain_graph=True)[0] for value in unit])
    wanted = jacobian.square().sum(0)
    squares = torch.zeros_like(wanted)
    draws = 200
    for seed in range(draws):
        seeded = find(model, task.processor, options=Options(seed=seed))
        with torch.no_grad():
            labels = seeded.own_labels(run(model, batch), batch)["labels"]
        loss = (unit - labels).square().sum() / 2
        squares += torch.autograd.grad(loss, bias, retain_graph=True)[0].square() / draws
    # a mean of squares of normal numbers is off by sqrt(2 / draws) of itself: 10%
    assert ((squares / wanted - 1).abs() < 5 * (2 / draws) ** 0.5).all()
    with torch.no_grad():
        dense, step, i = run(model, batch), 1e-2, int(wanted.argmax())
        bias[i] += step
        apart = float(task.divergence(run(model, batch), dense, batch))
        bias[i] -= step
    assert 2 * apart / step**2 == pytest.approx(float(wanted[i]), rel=0.05)


# -- jobs -------------------------------------------------------------------------------------------------------------


def test_the_loss_falls_on_pairs_with_scores(folder, scored):
    model, task = opened(folder)
    batches = task.batches(read_table(scored))
    before = task.evaluate(model, batches)
    host = secateur.open(model, loss=task.loss)
    fine_tune(host, task, batches.examples, epochs=5, learning_rate=3e-3, batch_size=16, progress=False)
    after = task.evaluate(model, batches)
    assert after.loss < 0.6 * before.loss
    assert after.value > before.value + 0.1


def test_half_the_ffn_goes_and_the_rest_heals_without_labels(folder, texts, tmp_path, capsys):
    words = [
        *("prune", str(folder), "--data", str(texts), "--criterion", "fisher", "--pattern", "ffn"),
        *("--sparsity", "0.5", "--fine-tune", "8", "--learning-rate", "2e-3", "--distil"),
        *("--output", str(tmp_path / "small"), "--json"),
    ]
    with pytest.raises(SystemExit) as exit:
        main(words)
    out, err = capsys.readouterr()
    assert exit.value.code == 0, err
    told = json.loads(out)
    assert (told["task"], told["metric"], told["reload_difference"]) == ("feature-extraction", "cosine", 0)
    assert told["stages"]["tuned"]["divergence"] == "1 - cosine"
    stages = {name: stage["values"]["cosine"] for name, stage in told["stages"].items()}
    assert stages["dense"] == pytest.approx(1)
    assert stages["pruned"] < stages["tuned"] < 1
    for name in companions_of(folder):
        assert (tmp_path / "small" / name).read_bytes() == (folder / name).read_bytes(), name
    dense, small = (SentenceTransformer(str(place), device="cpu") for place in (folder, tmp_path / "small"))
    assert small.tokenizer.get_vocab() == dense.tokenizer.get_vocab()
    assert [type(part).__name__ for part in small] == ["Transformer", "Pooling", "Normalize"]
    assert small[0].model.config.intermediate_size == 32
    assert small.max_seq_length == dense.max_seq_length == 40
    model, task = opened(tmp_path / "small")
    found = task.evaluate(model, task.batches({"text": TEXTS}), load_model(folder))
    np.testing.assert_allclose(np.stack(found.predictions), small.encode(TEXTS), atol=1e-6)
    assert found.value == pytest.approx((small.encode(TEXTS) * dense.encode(TEXTS)).sum(1).mean(), abs=1e-5)


def test_heads_go_by_the_scores_of_pairs(folder, scored, tmp_path):
    host, task = open_host(look(str(folder), None), Options())
    data = prepare(task, read_table(scored), None, calibration_samples=30, batch_size=8, seed=0)
    stage = prune_model.Stage(secateur.criteria.taylor, secateur.Unit("head"), secateur.Uniform(0.5))
    tuning = prune_model.Tuning(epochs=1, distil=True)
    outcome = prune_model.run("small", host, [stage], data, tuning, tmp_path / "small")
    assert (outcome.drop.metric, outcome.drop.rows, outcome.reload_difference) == ("Spearman", 6, 0)
    assert outcome.tuned.kl > 0
    assert load_model(tmp_path / "small").config.num_attention_heads in (2, 4)


def test_embeddings_of_another_width_are_not_compared(folder):
    model, task = opened(folder)
    host = secateur.open(str(folder))
    host.resize(prune(host, secateur.criteria.magnitude, secateur.Unit("hidden"), 0.5))
    with pytest.raises(DataError, match="embeddings of 16 and of 32 numbers"):
        task.evaluate(host, task.batches({"text": TEXTS}), model)


def test_an_encoder_decoder_gives_no_embedding(tmp_path):
    import transformers

    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 30}
    with pytest.raises(ModelError, match="open its encoder"):
        find(transformers.T5Model(transformers.T5Config(**sizes)), task="feature-extraction")


# -- what lies beside the weights -------------------------------------------------------------------------------------


def test_a_host_saves_the_tokenizer_of_its_folder(folder, tmp_path, recwarn):
    host = secateur.open(str(folder))
    host.save(tmp_path / "again")
    assert {str(name) for name in companions_of(folder)} >= {"tokenizer.json", "modules.json", "1_Pooling/config.json"}
    for name in companions_of(folder):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), name
    assert not [warning for warning in recwarn if "tokenizer" in str(warning.message)]
    again = SentenceTransformer(str(tmp_path / "again"), device="cpu")
    np.testing.assert_allclose(
        again.encode(TEXTS), SentenceTransformer(str(folder), device="cpu").encode(TEXTS), atol=1e-6
    )


def test_a_classifier_keeps_its_tokenizer_and_no_file_of_another_kind(tmp_path):
    place = write_classifier(tmp_path / "classifier")
    for name in ("notes.txt", "trainer_state.json", "optimizer.pt"):
        (place / name).write_text("{}")
    secateur.open(str(place)).save(tmp_path / "again")
    names = {file.name for file in (tmp_path / "again").iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "secateur-hashes.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_a_module_that_came_with_a_tokenizer_says_that_none_is_saved(folder, tmp_path):
    host = secateur.open(load_model(folder))
    with pytest.warns(UserWarning, match="no tokenizer of .* is saved with this model; pass tokenizer="):
        host.save(tmp_path / "again")


def test_what_lies_beside_a_model_of_the_hub(folder, tmp_path, monkeypatch):
    """The cache has the weights alone; the rest is fetched for the same commit, or a sentence says that it is not."""
    import huggingface_hub

    snapshot = tmp_path / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    asked = []

    def cached(name, file, revision=None):
        if name == "../x":
            raise ValueError("no hub id")
        return str(snapshot / file) if name == "acme/encoder" else None

    def fetch(name, revision, allow_patterns):
        asked.append((name, revision))
        (snapshot / "modules.json").write_bytes((folder / "modules.json").read_bytes())
        if len(asked) > 1:
            raise OSError("no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert folder_of("acme/encoder") == snapshot
    assert [str(name) for name in companions_of(snapshot)] == ["modules.json"]
    with pytest.warns(UserWarning, match="acme/encoder are taken from the cache alone: no network"):
        assert folder_of("acme/encoder@main") == snapshot
    assert asked == [("acme/encoder", "0123abc")] * 2
    assert folder_of("acme/other") is folder_of("../x") is folder_of("") is None
    model, task = opened(folder)
    model.config.name_or_path = model.name_or_path = "acme/other"
    task = find(model, task.processor)
    assert task.notes == ["the files of acme/other are not found; the mean of token vectors is taken as embedding"]


def test_a_tokenizer_follows_removed_tokens(tmp_path):
    place = write_encoder(tmp_path / "encoder")
    host = secateur.open(str(place))
    tokenizer = load_tokenizer(place)
    kept = closed(tokenizer, tokenizer("good film is great")["input_ids"])
    host.resize(secateur.Plan(keep={next(a.name for a in host.layout.axes.values() if a.kind == "vocab"): kept}))
    host.save(tmp_path / "small")
    small = SentenceTransformer(str(tmp_path / "small"), device="cpu")
    assert len(small.tokenizer) == len(kept) < len(tokenizer)
    text = ["good film is great"]
    np.testing.assert_allclose(
        small.encode(text), SentenceTransformer(str(place), device="cpu").encode(text), atol=1e-6
    )
