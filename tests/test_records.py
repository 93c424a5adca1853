"""Parts of records, from values that are counted by hand."""

import numpy as np
import pytest

from secateur.layout import Layout
from secateur.metrics.drop import Drop
from secateur.metrics.evaluation import Evaluation
from secateur.plan import Plan
from secateur.records.model import matrices_of, matrices_with_zeros, sizes_of, units_of, weight_bytes
from secateur.records.outcome import asked_of, removed_share
from secateur.records.provenance import command_line, data_file, provenance_of
from secateur.records.quality import curve_of, parity_of, quality_of, stages_of

TWO_LAYERS = Layout.from_text("""
axes
  L0.head  4 head
  L0.ffn   8 ffn
  L1.ffn   8 ffn
  hidden   4 hidden frozen: residual stream
  layers   2 layer @ layers
parameters
  layers.0.v.weight    : L0.head hidden < x0 1
  layers.0.up.weight   : L0.ffn hidden < x1 1
  layers.1.up.weight   : L1.ffn hidden < x2 1
  head.weight          : 2 hidden < x3 1
products
  10 layers.0.v.weight : L0.head hidden
  10 layers.0.up.weight : L0.ffn hidden
  10 layers.1.up.weight : L1.ffn hidden
""")


def plan(**parts):
    return Plan(**parts).check(TWO_LAYERS)


def evaluation(value, **more):
    return Evaluation(task="text-classification", rows=4, metric="accuracy", values={"accuracy": value}, **more)


def test_units_are_counted_for_each_prunable_axis_and_those_of_a_layer_that_is_gone_are_gone():
    kept = plan(keep={"L0.ffn": np.arange(3), "layers": np.array([0])})
    found = {one.axis: (one.kind, one.block, one.kept, one.total) for one in units_of(TWO_LAYERS, kept)}
    assert found == {
        "L0.head": ("head", 0, 4, 4),
        "L0.ffn": ("ffn", 0, 3, 8),
        "L1.ffn": ("ffn", 1, 0, 8),
        "layers": ("layer", None, 1, 2),
    }


def test_single_weights_leave_all_units_so_that_none_are_listed():
    assert units_of(TWO_LAYERS, plan(masks={"layers.0.up.weight": np.eye(8, 4, dtype=bool)})) == []


def test_heads_that_are_made_of_two_axes_follow_their_parts():
    from tests.fake import TEXT

    layout = Layout.from_text(TEXT)
    kept = Plan(keep={"L0.kv": np.array([1])}).check(layout)
    found = {one.axis: one.kept for one in units_of(layout, kept)}
    assert (found["L0.kv"], found["L0.group"], found["L0.head"], found["L0.v"]) == (1, 2, 2, 3)


def test_matrices_have_their_old_and_new_shape_and_the_share_that_is_not_zero():
    mask = np.zeros((8, 4), dtype=bool)
    mask[:2] = True  # 8 of the 12 weights that stay
    kept = plan(keep={"L0.ffn": np.arange(3), "layers": np.array([0])}, masks={"layers.0.up.weight": mask})
    found = {one.name: (one.block, one.shape, one.dense_shape, one.density) for one in matrices_of(TWO_LAYERS, kept)}
    assert found == {
        "layers.0.v.weight": (0, [4, 4], [4, 4], 1.0),
        "layers.0.up.weight": (0, [3, 4], [8, 4], 8 / 12),
    }
    (matrix,) = matrices_with_zeros(TWO_LAYERS, [("layers.1.up.weight", 1, 32, 8)])
    assert (matrix.shape, matrix.density) == ([8, 4], 0.75)


def test_sizes_count_parameters_products_and_weight_files(tmp_path):
    sizes = sizes_of(TWO_LAYERS, plan(keep={"L0.ffn": np.arange(4)}), bytes=7)
    assert (sizes.parameters, sizes.dense_parameters, sizes.nonzero) == (88 - 16, 88, 72)
    assert sizes.macs_share == pytest.approx((16 + 16 + 32) / (16 + 32 + 32))
    assert sizes.bytes == 7
    for name, count in (("model.safetensors", 5), ("plan.safetensors", 50), ("config.json", 500)):
        (tmp_path / name).write_bytes(bytes(count))
    assert weight_bytes(tmp_path) == 5
    assert weight_bytes("org/name") is weight_bytes(None) is None


def test_what_was_asked_stands_beside_what_is_gone():
    mask = np.ones((8, 4), dtype=bool)
    mask[:6] = False
    masked = plan(masks={"layers.0.up.weight": mask})
    steps = {"steps": [{"pattern": "element", "found": {}}, {"criterion": "wanda", "pattern": "2:4", "budget": None}]}
    (one,) = asked_of(steps, TWO_LAYERS, masked)
    assert (one.what, one.asked, one.reached) == ("2:4 by wanda", "2:4", "75.0% of the weights are zero")
    step = {"criterion": "taylor", "pattern": "ffn", "budget": "Uniform(sparsity=0.5)"}
    units = plan(keep={"L0.ffn": np.arange(2)})
    (one,) = asked_of(step, TWO_LAYERS, units)
    assert (one.asked, one.reached) == ("uniform: sparsity 0.5", "75.0% of the units are gone")
    assert removed_share(TWO_LAYERS, plan()) == 0.0


def test_numbers_that_no_file_holds_are_left_out():
    drop = Drop("accuracy", 0.9, float("nan"), float("nan"), None, 4, 0.01, None)
    assert quality_of(drop, evaluation(float("nan"))) is None
    drop = Drop("accuracy", 0.9, 0.8, 0.1, (0.0, float("inf")), 4, 0.01, None)
    quality = quality_of(drop, evaluation(0.8, kl=float("inf"), flips=0.25))
    assert (quality.drop, quality.interval, quality.divergence, quality.flips) == (0.1, None, None, 0.25)
    stages = stages_of([("dense", evaluation(0.9)), ("pruned", None), ("healed", evaluation(float("inf")))])
    assert [stage.name for stage in stages] == ["dense"]
    (curve,) = curve_of("a", "x", "y", [(0, 1.0), (1, None), (2, float("nan")), (3, 2)])
    assert curve.points == [[0.0, 1.0], [3.0, 2.0]]
    assert curve_of("a", "x", "y", [(0, 1.0), (1, None)]) == []


def test_the_parity_of_an_artefact_is_that_of_its_description():
    (parity,) = parity_of("onnx", {"relative_error": 2e-6, "tolerance": 1e-4, "examples": 12, "shapes": []})
    assert (parity.runtime, parity.difference, parity.bound, parity.inputs) == ("onnx", 2e-6, 1e-4, 12)
    assert parity_of("onnx", None) == parity_of("onnx", {"relative_error": float("inf"), "tolerance": 1e-4}) == []


def test_a_command_is_one_line_without_the_folders_of_this_machine():
    words = ["/home/me/bin/secateur", "prune", "/home/me/dense", "--data=/data/a b.csv", "--output", "small", "--on=x"]
    assert command_line(words) == "secateur prune dense '--data=a b.csv' --output small --on=x"
    assert command_line(["/lib/secateur/__main__.py", "eval", "m"]) == "secateur eval m"
    assert command_line(["/home/me/train.py", "--secret"]) == command_line([]) == ""


def test_data_is_named_by_the_last_part_of_its_path_with_its_hash(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("abc")
    found = data_file("test", str(file), 3)
    assert found.name == "rows.csv"
    assert found.sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert data_file("test", tmp_path).sha256 is None
    assert data_file("test", "org/reviews").name == "org/reviews"
    assert data_file("test", tmp_path / "gone.csv").name == "gone.csv"
    made = provenance_of(seed=3, data=[found])
    assert (made.seed, made.data[0].rows, "numpy" in made.versions) == (3, 3, True)
