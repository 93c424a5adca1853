import json

import numpy as np
import pytest

from secateur.errors import PlanError, SecateurError
from secateur.files import check_output, new_folder
from secateur.layout import Layout
from secateur.plan import Plan

LAYOUT = Layout.from_text(
    """
axes
  ffn 4 ffn
  hidden 3 hidden
parameters
  up : ffn hidden
  down : hidden ffn
"""
)


def test_mask_combines_units_and_elements():
    element = np.ones((4, 3), dtype=bool)
    element[0, 0] = False
    plan = Plan(keep={"ffn": np.array([0, 1])}, masks={"up": element}, sizes={"ffn": 4}).check(LAYOUT)
    expected = element.copy()
    expected[2:] = False
    np.testing.assert_array_equal(plan.mask(LAYOUT, "up"), expected)
    np.testing.assert_array_equal(plan.mask(LAYOUT, "down"), np.array([[True, True, False, False]] * 3))
    assert Plan().mask(LAYOUT, "up") is None


def test_save_and_load(tmp_path):
    mask = np.random.default_rng(0).random((4, 3)) > 0.5
    plan = Plan({"ffn": np.array([1, 3])}, {"up": mask}, {"ffn": 4}, {"criterion": "magnitude"})
    plan.save(tmp_path)
    again = Plan.load(tmp_path)
    assert again.keep["ffn"].tolist() == [1, 3]
    np.testing.assert_array_equal(again.masks["up"], mask)
    assert again.sizes == {"ffn": 4}
    assert again.provenance == {"criterion": "magnitude"}


def test_merge_keeps_what_both_keep():
    a = Plan({"ffn": np.array([0, 1])}, {}, {"ffn": 4}, {"criterion": "a"})
    b = Plan({"ffn": np.array([1, 2])}, {}, {"ffn": 4}, {"criterion": "b"})
    merged = a.merge(b)
    assert merged.keep["ffn"].tolist() == [1]
    assert [step["criterion"] for step in merged.provenance["steps"]] == ["a", "b"]


def test_a_plan_for_another_model_is_refused():
    with pytest.raises(PlanError, match="made for ffn of size 5, the model has 4"):
        Plan({"ffn": np.array([0])}, {}, {"ffn": 5}).check(LAYOUT)
    with pytest.raises(PlanError, match=r"masks up as \(2, 2\)"):
        Plan(masks={"up": np.ones((2, 2), bool)}).check(LAYOUT)


def test_damaged_files_are_refused(tmp_path):
    with pytest.raises(PlanError, match="holds no plan.json"):
        Plan.load(tmp_path)
    Plan(masks={"up": np.ones((4, 3), bool)}).save(tmp_path)
    data = json.loads((tmp_path / "plan.json").read_text())
    data["masks"]["up"] = [400, 3]
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(PlanError, match="damaged"):
        Plan.load(tmp_path)


def test_new_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), new_folder(target) as folder:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with new_folder(target) as folder:
        (folder / "a").write_text("1")
    with pytest.raises(SecateurError, match="exists; choose another output"), new_folder(target):
        pass
    with new_folder(target, overwrite=True) as folder:
        (folder / "b").write_text("2")
    assert [p.name for p in target.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_output_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SecateurError, match="is not a folder"):
        check_output(tmp_path / "file" / "out", overwrite=False)


def test_a_plan_that_was_never_checked_is_not_saved(tmp_path):
    plan = Plan({"ffn": np.array([1, 3])})
    with pytest.raises(PlanError, match=r"does not say how many units ffn had; save plan.check\(layout\)"):
        plan.save(tmp_path)
    assert not any(tmp_path.iterdir())
    plan.check(LAYOUT).save(tmp_path)
    assert Plan.load(tmp_path).sizes == {"ffn": 4}


@pytest.mark.parametrize("text", ["[]", "3", "null", '"plan"'])
def test_a_plan_file_that_is_no_object(text, tmp_path):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(PlanError, match="is damaged: it holds a"):
        Plan.load(tmp_path)


def damage(folder, change):
    data = json.loads((folder / "plan.json").read_text())
    change(data)
    (folder / "plan.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    "change",
    [
        {"keep": {"ffn": {"of": 4, "units": [0, 2**70]}}},
        {"keep": {"ffn": {"of": 4, "units": [0, 0]}}},
        {"keep": {"ffn": {"of": 4, "units": [4]}}},
        {"keep": {"ffn": {"of": 4, "units": [-1]}}},
        {"keep": {"ffn": {"of": "4", "units": [1]}}},
        {"keep": {"ffn": {"of": float("inf"), "units": [1]}}},
        {"keep": {"ffn": {"of": 4, "units": [1.5]}}},
        {"keep": {"ffn": {"of": 4, "units": [[0], [1]]}}},
        {"keep": {"ffn": [1]}},
        {"keep": [1]},
        {"keep": None},
        {"masks": {"up": [float("inf")]}},
        {"masks": {"up": [2**62, 4]}},
        {"masks": {"up": [0] * 3 + [2**62] * 3}},
        {"masks": {"up": [-4, -3]}},
        {"masks": {"up": "43"}},
        {"masks": {"up": [1] * 100}},
        {"masks": {"down": [4, 3]}},
        {"masks": [["up"]]},
        {"weights": {"up": 1}},
        {"weights": ["down"]},
        {"weights": 3},
        {"provenance": [1]},
        {"format": True},
        {"format": "1"},
        {"more": 1},
    ],
)
def test_a_plan_with_wrong_values(change, tmp_path):
    plan = Plan({"ffn": np.array([1, 3])}, {"up": np.ones((4, 3), bool)}, {"ffn": 4}, weights={"up": np.ones((4, 3))})
    plan.save(tmp_path)
    Plan.load(tmp_path)
    damage(tmp_path, lambda data: data.update(change))
    with pytest.raises(PlanError, match=r"damaged|format .* this version reads") as caught:
        Plan.load(tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_deep_plan_and_damaged_arrays(tmp_path):
    Plan(masks={"up": np.ones((4, 3), bool)}).save(tmp_path)
    (tmp_path / "plan.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(PlanError, match="plan.safetensors is damaged"):
        Plan.load(tmp_path)
    (tmp_path / "plan.safetensors").unlink()
    with pytest.raises(PlanError, match="plan.safetensors is damaged"):
        Plan.load(tmp_path)
    (tmp_path / "plan.json").write_text("[" * 10**5)
    with pytest.raises(PlanError, match="nested more than 64 deep"):
        Plan.load(tmp_path)


def test_a_plan_and_a_layout_say_in_a_line_what_they_are():
    assert repr(Plan()) == "Plan(removes nothing)"
    mask = np.ones((4, 3), dtype=bool)
    mask[0] = False
    keep = {"L0.ffn": np.array([0]), "L1.ffn": np.array([0, 1]), "hidden": np.array([2])}
    plan = Plan(keep, {"up": mask}, {"L0.ffn": 4, "L1.ffn": 4}, weights={"up": np.ones((4, 3))})
    removed = "5 of 8 ffn, all but 1 hidden, 3 of 12 weights in 1 parameters"
    assert repr(plan) == f"Plan(removes {removed}; 1 parameters repaired)"
    assert repr(LAYOUT) == "Layout(ffn 1 x 4, hidden 1 x 3; 2 parameters)"
    text = "axes\n  a 4 ffn\n  b 2 ffn\n  c 3 ffn frozen: why\nparameters\n"
    assert repr(Layout.from_text(text)) == "Layout(ffn 2 x 2..4, ffn 1 x 3 (frozen); 0 parameters)"
    assert repr(Layout({}, {})) == "Layout(no axes; 0 parameters)"
