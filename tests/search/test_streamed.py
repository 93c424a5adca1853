"""Units of a decoder block by block: the same levels, choice and model as in memory, and a run that can be killed."""

import numpy as np
import pytest

from tests import zoo
from tests.text_models import write_model

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import secateur
from secateur.errors import ModelError, PlanError, TargetError
from secateur.plan import Plan
from secateur.record import read_record
from secateur.search.build import plan_of
from secateur.search.choosing.choice import choose
from secateur.search.costs import costs_of
from secateur.search.levels import levels_of
from secateur.search.stored import load as load_levels
from secateur.search.streamed.run import METHOD, RIDGE, prune_units
from secateur.search.target import make_target
from secateur.tasks.text_generation import TextGeneration
from secateur.torch.data.token_windows import batches_of
from secateur.torch.files.saving import check_unchanged
from secateur.torch.stats.curvature import collect_curvature

TARGET = make_target(limits=["params<=0.75"], round=4)
WALKS = ("dense outputs", "curvature", "block")


@pytest.fixture(scope="module")
def windows():
    return torch.randint(4, zoo.VOCAB, (6, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streamed") / "llm"
    write_model(folder)
    return folder


@pytest.fixture(scope="module")
def small(llm, windows):
    """The folder that an uninterrupted run has written, and its report."""
    folder = llm.parent / "small"
    return folder, prune_units(llm, folder, windows, TARGET)


@pytest.fixture(scope="module")
def in_memory(llm, windows):
    """The dense host, with levels, choice and plan of the search in memory on the same windows."""
    host = secateur.open(llm)
    task, batches = TextGeneration(host.model, None), batches_of(host.model, windows, 1)
    stats = collect_curvature(host.model, host.layout, batches, task.fisher_loss, task.examples_of)
    levels = levels_of(host, stats, METHOD)
    candidate = choose(levels, costs_of(TARGET, host))
    return host, levels, candidate, plan_of(host, levels, stats, candidate, RIDGE)


def test_orders_and_curves_are_those_of_the_search_in_memory(small, in_memory):
    found, wanted = load_levels(small[0]), in_memory[1]
    assert found.axes.keys() == wanted.axes.keys()
    for name, axis in wanted.axes.items():
        assert found.axes[name].order.tolist() == axis.order.tolist()
        np.testing.assert_allclose(found.axes[name].losses, axis.losses, rtol=1e-4)
    assert "layers are not searched block by block" in found.notes["layers"]


def test_the_choice_is_that_of_the_search_in_memory_and_keeps_to_the_limit(small, in_memory):
    kept = {one.axis: one.kept for one in small[1].units}
    assert in_memory[2].kept
    assert all(kept[axis] == count for axis, count in in_memory[2].kept.items())
    assert Plan.load(small[0]).keep.keys() == in_memory[2].kept.keys()
    (asked,) = small[1].asked
    assert asked.is_met
    assert small[1].sizes.parameters <= 0.75 * small[1].sizes.dense_parameters


def test_neurons_stay_in_multiples_of_the_round_number(small):
    counts = [one.kept for one in small[1].units if one.kind == "ffn"]
    assert min(counts) < 48
    assert all(count % 4 == 0 for count in counts)


def test_the_folder_opens_as_the_masked_dense_model(small, in_memory, windows):
    host, _, _, plan = in_memory
    shrunk = secateur.open(small[0])
    batch = {"input_ids": windows[:2], "attention_mask": torch.ones_like(windows[:2])}
    with host.masked(plan):
        wanted = host.named_outputs(batch)["logits"]
    np.testing.assert_allclose(shrunk.named_outputs(batch)["logits"], wanted, atol=1e-4)
    assert sum(p.numel() for p in shrunk.model.parameters()) == small[1].sizes.parameters


def test_record_and_config_are_those_of_a_saved_model(small, in_memory, tmp_path):
    host, _, _, plan = in_memory
    other = host.copy()
    other.resize(plan)
    other.save(tmp_path / "saved", plan)
    read = [(folder / "config.json").read_text() for folder in (small[0], tmp_path / "saved")]
    assert read[0] == read[1]
    record = read_record(small[0])
    assert record.units == list(small[1].units)
    assert "the quality was not measured" in record.notes[0]
    assert check_unchanged(small[0]) >= 8  # the weights in four shards, index, config, plan and levels


class Stop(Exception):
    pass


@pytest.mark.parametrize("at", [(walk, 2) for walk in WALKS])
def test_a_killed_run_goes_on_to_the_same_files(at, llm, small, windows, tmp_path):
    def kill(walk, step, steps):
        if (walk, step) == at:
            raise Stop

    with pytest.raises(Stop):
        prune_units(llm, tmp_path / "out", windows, TARGET, progress=kill)
    seen = []
    report = prune_units(llm, tmp_path / "out", windows, TARGET, began=lambda plan, resumed: seen.append(resumed))
    assert seen == [2 if at[0] == "block" else 0]
    assert report.resumed == seen[0]
    names = {file.name for file in small[0].iterdir()}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    for name in names - {"secateur-record.json", "secateur-hashes.json", "README.md"}:  # with names and seconds
        assert (tmp_path / "out" / name).read_bytes() == (small[0] / name).read_bytes(), name
    assert not list(tmp_path.glob(".out*"))


def test_what_needs_the_whole_model_is_refused_with_a_sentence(llm, windows, tmp_path):
    for asked, sentence in (
        ({"limits": ["latency<=0.5x@onnx"]}, "a latency is measured on whole models"),
        ({"limits": ["params<=0.5"], "max_drop": 0.01}, "a drop is measured on whole models"),
        ({"speed_up": 2, "on": "onnx"}, "which --memory rules out"),
    ):
        with pytest.raises(TargetError, match=sentence):
            prune_units(llm, tmp_path / "out", windows, make_target(**asked))
    with pytest.raises(PlanError, match="a params of 10.0% cannot be reached"):
        prune_units(llm, tmp_path / "out", windows, make_target(limits=["params<=0.1"]))
    with pytest.raises(PlanError, match="more than the 0.1 GiB of --memory"):
        prune_units(llm, tmp_path / "out", windows, TARGET, memory=10**8)
    assert not list(tmp_path.iterdir())


def test_an_encoder_decoder_is_refused(windows, tmp_path):
    write_model(tmp_path / "t5", make=zoo.build, name="t5")
    with pytest.raises(ModelError, match="is no decoder with next-token logits"):
        prune_units(tmp_path / "t5", tmp_path / "out", windows, TARGET)
