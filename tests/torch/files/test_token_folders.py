"""Folders of models with a schedule of tokens: what they hold, what they refuse, and units that go from such models."""

import json

import numpy as np
import pytest
import torch
import transformers

import secateur
from secateur.dynamic import all_tokens, merge_tokens, prune_tokens, without_schedule
from secateur.errors import ModelError
from secateur.plan import Plan
from secateur.torch.files import saving
from secateur.torch.files.from_pretrained_hook import NOTE
from secateur.torch.tokens.install import install, tokens_of
from tests import zoo
from tests.text_models import NUMBERED, tokenizer_of
from tests.torch.files.shrunk import edit

KEEP = [80, 60, 40, 30]


@pytest.fixture(scope="module")
def batch():
    ids = torch.randint(3, zoo.VOCAB, (4, 30), generator=torch.Generator().manual_seed(0))
    seen = torch.ones_like(ids)
    seen[0, -9:] = 0
    return {"input_ids": ids, "attention_mask": seen, "labels": torch.tensor([0, 1, 1, 0])}


@pytest.fixture(scope="module")
def dense(batch):
    return secateur.open(zoo.bert(num_hidden_layers=4), batch)


@pytest.fixture(scope="module")
def short(dense):
    """The host with a schedule."""
    return prune_tokens(dense, KEEP)


@pytest.fixture
def folder(short, tmp_path):
    short.save(tmp_path / "model")
    return tmp_path / "model"


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def same(model, host, batch):
    """Whether a model answers as a host does, to the bit, and runs with a schedule like it."""
    assert tokens_of(model).schedule == tokens_of(host.model).schedule
    assert tokens_of(model).sites == tokens_of(host.model).sites
    return torch.equal(logits(model, batch), logits(host.model, batch))


def test_a_folder_gives_the_schedule_back(short, folder, batch, tmp_path):
    with all_tokens():
        every = logits(short.model, batch)
    assert (every - logits(short.model, batch)).abs().max() > 1e-3  # otherwise nothing below shows anything
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert same(loaded, short, batch)
    assert same(secateur.open(folder, batch).model, short, batch)
    assert same(secateur.load(folder).eval(), short, batch)
    loaded.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "again").eval()
    assert same(again, short, batch)


def test_a_model_in_memory_keeps_it_in_save_pretrained_too(short, batch, tmp_path):
    short.model.save_pretrained(tmp_path / "model")
    assert same(transformers.BertForSequenceClassification.from_pretrained(tmp_path / "model").eval(), short, batch)


def test_it_is_never_a_stock_checkpoint(short, folder, tmp_path):
    saved = saving.save(short.model, tmp_path / "other")
    assert (saved.stock, saved.reason) == (False, saving.TOKENS)
    assert json.loads((folder / "config.json").read_text())["transformers_weights"] == NOTE
    with pytest.raises(ModelError) as caught:
        short.save(tmp_path / "stock", uniform=True)
    assert str(caught.value) == f"no stock checkpoint can hold this model: {saving.TOKENS}; leave out uniform"
    assert not (tmp_path / "stock").exists()


def test_a_schedule_that_is_taken_off_leaves_nothing_behind(dense, short, batch, tmp_path):
    host = without_schedule(short)
    assert torch.equal(logits(host.model, batch), logits(dense.model, batch))
    assert saving.save(host.model, tmp_path / "model").stock
    assert "quantization_config" not in json.loads((tmp_path / "model/config.json").read_text())
    assert tokens_of(short.model) is not None


@pytest.mark.parametrize("cls", ["AutoModel", "AutoModelForTokenClassification"])
def test_another_class_may_read_tokens_that_are_gone(cls, folder):
    message = "holds a BertForSequenceClassification with a schedule of tokens, and a .* load the class that was saved"
    with pytest.raises(ModelError, match=message):
        getattr(transformers, cls).from_pretrained(folder)


def test_zeros_are_packed_beside_a_schedule(dense, batch, tmp_path):
    plan = secateur.prune(dense, secateur.criteria.magnitude, secateur.Element(), 0.6)
    host = dense.copy()
    host.apply(plan)
    host = prune_tokens(host, KEEP)
    saved = saving.save(host.model, tmp_path / "model", plan=plan)
    assert (saved.packed, saved.stock) == (True, False)
    assert same(secateur.open(tmp_path / "model", batch).model, host, batch)


def test_a_tokenizer_goes_along(short, tmp_path):
    """The mark of a schedule on a model is not that of a smaller vocabulary, which writes a table of tokens."""
    tokenizer = tokenizer_of(NUMBERED, "[PAD]", "[UNK]", "[BOS]", "[EOS]")
    short.save(tmp_path / "model", tokenizer=tokenizer)
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "model")) == len(tokenizer)


# -- units and layers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("criterion", "kinds"), [("taylor", ("head", "ffn")), ("attention_mass", ("head",)), ("wanda", ("ffn",))]
)
def test_units_go_before_or_after_the_schedule_with_the_same_result(criterion, kinds, dense, short, batch, tmp_path):
    def chosen(host):
        return secateur.prune(host, getattr(secateur.criteria, criterion), secateur.Unit(*kinds), 0.5, data=[batch])

    first, then = dense.copy(), short.copy()
    plan = chosen(dense)
    first.resize(plan)
    first = prune_tokens(first, KEEP)
    other = chosen(short)
    assert {name: list(units) for name, units in other.keep.items()} == {k: list(u) for k, u in plan.keep.items()}
    assert secateur.verify(short, other, [batch]).difference < 1e-5
    then.resize(other)
    assert torch.equal(logits(first.model, batch), logits(then.model, batch))
    then.save(tmp_path / "model", other)
    assert same(transformers.BertForSequenceClassification.from_pretrained(tmp_path / "model").eval(), then, batch)


@pytest.mark.parametrize(
    ("left", "keep"),
    [([0, 1, 3], (80, 60, 30)), ([1, 2, 3], (60, 40, 30)), ([0, 1, 2], (80, 60, 40)), ([1, 2], (60, 40))],
)
def test_layers_go_from_a_model_with_a_schedule(left, keep, short, batch):
    plan = Plan(keep={"layers": np.array(left)})
    with short.masked(plan):
        masked = logits(short.model, batch)
    assert tokens_of(short.model).schedule.keep == tuple(KEEP)
    host = short.copy()
    host.resize(plan)
    assert tokens_of(host.model).schedule.keep == keep
    assert torch.allclose(logits(host.model, batch), masked, atol=1e-5)
    with all_tokens():
        assert (logits(host.model, batch) - masked).abs().max() > 1e-3
    assert secateur.verify(short, plan, [batch]).difference < 1e-5


def test_layers_go_from_a_model_that_merges():
    model = zoo.vit(num_hidden_layers=4, image_size=32)
    images = zoo.inputs(model)
    host = merge_tokens(secateur.open(model, images), [80, 70, 60, 50])
    plan = Plan(keep={"layers": np.array([0, 2])})
    with host.masked(plan):
        masked = logits(host.model, images)
    host.resize(plan)
    assert tokens_of(host.model).schedule.keep == (80, 60)
    assert torch.allclose(logits(host.model, images), masked, atol=1e-5)


# -- entries that lie -------------------------------------------------------------------------------------------------


def entry(folder, change, *, checksum=False):
    """Change the entry; without the checksum, as somebody would who wants it to be believed."""

    def write(data):
        change(data["quantization_config"]["tokens"])
        if not checksum:
            del data["quantization_config"]["checksum"]

    edit(folder / "config.json", write)


LIES = [
    (lambda t: t.pop("sites"), "the manifest's 'tokens' is damaged: sites"),
    (lambda t: t.update(more=1), "the manifest's 'tokens' is damaged: more"),
    (lambda t: t.update(schedule=[80]), "the manifest's 'tokens' is damaged: schedule"),
    (lambda t: t["schedule"].update(keep=[80, 60, 40]), "is for 3 blocks, which bert.encoder.layer does not hold"),
    (lambda t: t["schedule"].update(keep=[80, 90, 40, 30]), "tokens that are gone do not come back"),
    (lambda t: t["schedule"].update(keep=[80, 60, 40, 0]), "give whole numbers from 1 to 100"),
    (lambda t: t["schedule"].update(keep=[80, 60, 40.5, 30]), "give whole numbers from 1 to 100"),
    (lambda t: t["schedule"].update(keep="80"), "keep is a list"),
    (lambda t: t["schedule"].update(method="drop"), "has the method 'drop'; use prune, merge or random"),
    (lambda t: t["schedule"].update(method={}), "has the method {}; use prune, merge or random"),
    (lambda t: t["schedule"].pop("pooled"), "expected keep, method and pooled"),
    (lambda t: t["sites"].update(stack="bert.encoder"), "which bert.encoder does not hold"),
    (lambda t: t["sites"].update(stack="bert.nothing"), "names the module 'bert.nothing'"),
    (lambda t: t["sites"].update(stack="os.system('x')"), "sites of a schedule of tokens name"),
    (lambda t: t["sites"].update(inner="nothing"), "names the module 'nothing'"),
    (lambda t: t["sites"].update(feed_forward="forward"), "names the module 'forward'"),
    (lambda t: t["sites"].update(arguments={"[0][1]": [9]}), "have the dimensions"),
    (lambda t: t["sites"].update(arguments={"[0][1]": "2"}), "have the dimensions"),
    (lambda t: t["sites"].update(arguments=[]), "have the dimensions"),
]


@pytest.mark.parametrize(("lie", "message"), LIES)
def test_an_entry_that_lies(lie, message, folder):
    entry(folder, lie)
    for load in (transformers.AutoModelForSequenceClassification.from_pretrained, secateur.open):
        with pytest.raises(ModelError, match=message) as caught:
            load(folder)
        assert "\n" not in str(caught.value)


def test_dimensions_that_an_argument_does_not_have(folder, batch):
    entry(folder, lambda t: t["sites"].update(arguments={"[0][1]": [7]}))
    model = transformers.BertForSequenceClassification.from_pretrained(folder).eval()
    with pytest.raises(ModelError, match="a block is called with .* dimensions"):
        model(**batch)


def test_the_checksum_covers_the_entry(folder):
    entry(folder, lambda t: t["schedule"].update(keep=[80, 60, 40, 31]), checksum=True)
    with pytest.raises(ModelError, match="was changed after it was saved"):
        saving.load(folder)


def test_a_schedule_that_does_not_fit_leaves_no_hooks(short, dense, batch):
    host = without_schedule(short)
    found = tokens_of(short.model)
    sites = found.sites.to_json() | {"inner": "nothing"}
    with pytest.raises(ModelError, match="names the module 'nothing'"):
        install(host.model, found.schedule, type(found.sites).from_json(sites))
    assert torch.equal(logits(host.model, batch), logits(dense.model, batch))
