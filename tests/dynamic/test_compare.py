"""Schedules of tokens on the rows of a task: what they are compared with, and a schedule found for a share of work."""

import pytest
import torch

from secateur.data.read import read_table
from secateur.dynamic import prune_tokens
from secateur.dynamic.compare import as_table, compare, cut_short
from secateur.dynamic.find_schedule import find_schedule
from secateur.errors import ModelError
from secateur.jobs.open_task import look, open_host
from secateur.tasks.base.batches import Batches
from secateur.tasks.base.evaluate import Reference, divergences_of
from secateur.token_schedule import TokenSchedule
from secateur.torch.tokens.install import tokens_of
from tests.text_models import write_classifier, write_texts


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A random classifier of three blocks, its task, and 24 rows in batches."""
    folder = tmp_path_factory.mktemp("tokens")
    write_classifier(folder / "model", layers=3)
    host, task = open_host(look(str(folder / "model"), None), None)
    for parameter in host.model.parameters():
        parameter.data.mul_(3)  # so that answers differ by more than rounding
    return host, task, Batches(task, task.encode(read_table(write_texts(folder / "rows.csv", 24))), 8)


def test_a_schedule_stands_beside_texts_cut_short_and_random_tokens_at_its_work(opened):
    host, task, batches = opened
    rows = compare(task, host, batches, {"exact": "exact", "half": [50, 50, 50]})
    schedule = TokenSchedule((50, 50, 50))
    length = max(task.length(feature) for feature in batches.examples.features)
    short = round(schedule.work(length) * length)
    assert [row.name for row in rows] == [
        "dense",
        "exact",
        "half",
        f"half: texts cut to {short} tokens",
        "half: random tokens",
    ]
    assert rows[1].evaluation.kl < 1e-9
    assert rows[1].agreement == 1
    assert [row.work for row in rows[2:]] == [schedule.work(length)] * 3
    divergences = [row.evaluation.kl for row in rows[2:]]
    assert min(divergences) > 1e-6
    assert len(set(divergences)) == 3
    assert tokens_of(host.model) is None
    assert len(as_table(rows)) == 2 + len(rows)


def test_cut_texts_keep_their_first_tokens_and_their_last(opened):
    host, _, _ = opened
    seen = []
    handle = host.model.bert.embeddings.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    ids = torch.tensor([[5, 6, 7, 8, 9, 10], [5, 6, 7, 11, 0, 0], [5, 11, 0, 0, 0, 0]])
    with cut_short(host.model, 3), torch.no_grad():
        host.model(input_ids=ids, attention_mask=(ids > 0).long())
        host.model(input_ids=ids[:, :2])
    handle.remove()
    assert seen[0].tolist() == [[5, 6, 10], [5, 6, 11], [5, 11, 0]]
    assert seen[1].tolist() == ids[:, :2].tolist()


def test_a_schedule_is_found_for_a_share_of_the_work(opened):
    host, task, batches = opened
    said = []
    found = find_schedule(task, host, batches, work=0.7, say=said.append)
    length = max(task.length(feature) for feature in batches.examples.features)
    assert found.work(length) <= 0.7 < TokenSchedule((100, 100, 100)).work(length)
    assert len(said) >= 1
    assert str(found.keep[0]) in said[-1]


def test_a_schedule_is_found_within_a_divergence(opened):
    host, task, batches = opened
    found = find_schedule(task, host, batches, divergence=1e-3)
    reference = Reference(task, host.model, batches)
    model = prune_tokens(host, found).model
    rows = [divergences_of(task, model, batches, number, reference) for number in range(len(batches))]
    assert sum(part.sum() for part in rows) / sum(map(len, rows)) <= 1e-3


def test_a_share_of_work_that_no_schedule_takes_is_said(opened):
    host, task, batches = opened
    with pytest.raises(ModelError, match=r"no schedule takes 0.1 of the work; the least is 0\.\d+"):
        find_schedule(task, host, batches, work=0.1)
    with pytest.raises(ModelError, match="give either"):
        find_schedule(task, host, batches, work=0.5, divergence=0.1)
