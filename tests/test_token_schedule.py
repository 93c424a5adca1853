"""The share of tokens that goes on, as data: presets, numbers of one's own, JSON and errors."""

import pytest

from secateur.errors import ModelError
from secateur.token_schedule import DEFAULT, PRESETS, TokenSchedule, schedule_of


def test_presets_of_six_blocks_are_the_numbers_that_they_name():
    assert schedule_of("exact", 6).keep == (100,) * 6
    assert schedule_of("mild", 6).keep == (100, 90, 80, 70, 60, 60)
    assert schedule_of("mid", 6).keep == (100, 80, 65, 50, 40, 40)
    assert schedule_of("fast", 6).keep == (100, 70, 50, 35, 25, 25)
    assert DEFAULT in PRESETS


def test_a_preset_of_twelve_blocks_falls_evenly_between_its_depths():
    assert schedule_of("fast", 12).keep == (100, 100, 85, 70, 60, 50, 42, 35, 30, 25, 25, 25)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("blocks", [1, 2, 3, 5, 7, 24, 48])
def test_a_preset_suits_any_depth_and_never_rises(preset, blocks):
    keep = schedule_of(preset, blocks).keep
    assert len(keep) == blocks
    assert list(keep) == sorted(keep, reverse=True)
    assert all(PRESETS[preset][-1] <= percent <= 100 for percent in keep)


@pytest.mark.parametrize(
    ("wanted", "keep"),
    [
        ("80,65,50,40", (100, 80, 65, 50, 40, 40)),
        ([50], (100, 100, 100, 100, 50, 50)),
        ([90, 80, 70, 60, 50, 40], (90, 80, 70, 60, 50, 40)),
        (" 70 , 30 ", (100, 100, 100, 70, 30, 30)),
    ],
)
def test_numbers_end_one_block_before_the_model_does(wanted, keep):
    assert schedule_of(wanted, 6).keep == keep


def test_at_least_one_token_goes_on_and_shares_are_rounded_up():
    schedule = schedule_of([50, 1], 3)
    assert [schedule.count(0, n) for n in (1, 2, 3, 5, 100)] == [1, 1, 2, 3, 50]
    assert [schedule.count(1, n) for n in (1, 2, 100, 101)] == [1, 1, 1, 2]


def test_a_block_reduces_where_fewer_tokens_leave_than_enter():
    schedule = TokenSchedule((100, 80, 80, 50))
    assert [schedule.reduces(block) for block in range(4)] == [False, True, False, True]


def test_work_is_a_third_before_and_two_thirds_after_each_removal():
    assert TokenSchedule((100, 100), pooled=False).work() == 1
    assert TokenSchedule((50, 50), pooled=False).work() == pytest.approx(((1 + 2 * 0.5) / 3 + 0.5) / 2)
    assert TokenSchedule((100,)).work(length=100) == pytest.approx((1 + 2 * 0.01) / 3)


def test_blocks_that_are_removed_take_their_shares_along():
    schedule = TokenSchedule((100, 80, 65, 50), "merge", pooled=False)
    assert schedule.without([0, 3]) == TokenSchedule((100, 50), "merge", pooled=False)


def test_json_gives_the_schedule_back():
    schedule = TokenSchedule((100, 80, 50), "merge", pooled=False)
    assert TokenSchedule.from_json(schedule.to_json()) == schedule


def test_a_schedule_is_taken_as_it_is_by_a_model_of_its_depth_alone():
    schedule = TokenSchedule((100, 50))
    assert schedule_of(schedule, 2) is schedule
    with pytest.raises(ModelError, match="the schedule has 2 blocks, and the model 3"):
        schedule_of(schedule, 3)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("quick", "'quick' is no schedule of tokens; use exact, mild, mid, fast, or per cents"),
        ("", "is no schedule"),
        ([], "is no schedule"),
        (["x"], "is no schedule"),
        ([None], "is no schedule"),
        ([50, 60], "tokens that are gone do not come back"),
        ([0], "whole numbers from 1 to 100"),
        ([101], "whole numbers from 1 to 100"),
        ([50] * 4, "4 per cents are given for 3 blocks; give at most 3"),
    ],
)
def test_what_is_no_schedule_is_refused(wanted, said):
    with pytest.raises(ModelError, match=said):
        schedule_of(wanted, 3)


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {"keep": [100]},
        {"keep": 100, "method": "prune", "pooled": True},
        {"keep": [100], "method": "prune", "pooled": 1},
        {"keep": [99.5], "method": "prune", "pooled": True},
        {"keep": [True], "method": "prune", "pooled": True},
        {"keep": [100], "method": "drop", "pooled": True},
        {"keep": [100], "method": ["prune"], "pooled": True},
        {"keep": [], "method": "prune", "pooled": True},
        {"keep": [100], "method": "prune", "pooled": True, "more": 1},
    ],
)
def test_damaged_json_is_refused_in_a_sentence(data):
    with pytest.raises(ModelError, match="schedule"):
        TokenSchedule.from_json(data)
