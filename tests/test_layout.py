import numpy as np
import pytest

from secateur.dims import coordinates, extent, format_dims, parse_dims
from secateur.errors import LayoutError, PlanError
from secateur.layout import Axis, Layout, Linear, Product, aligned

TEXT = """
axes
  L0.kv     2 kv
  L0.group  2 group
  L0.head   4 head = L0.kv L0.group
  L0.qk     3 qk frozen: slice in rotary embedding
  L0.v      3 v
  L0.ffn    5 ffn
  hidden    4 hidden
  layers    1 layer @ layers
parameters
  layers.0.q.weight    : (L0.kv L0.group L0.qk) hidden < x0 1
  layers.0.k.weight    : (L0.kv L0.qk) hidden < x0 1
  layers.0.o.weight    : hidden (L0.kv L0.group L0.v)
  layers.0.fused.bias  : (L0.ffn + L0.ffn)
  layers.0.square      : hidden hidden
  layers.0.scalar      :
tied
  head.weight = layers.0.square
products
  7 layers.0.q.weight : (L0.kv L0.group L0.qk) hidden
  6 - : (L0.kv L0.group) L0.qk
"""


@pytest.fixture
def layout():
    return Layout.from_text(TEXT)


def test_text_round_trip(layout):
    again = Layout.from_text(str(layout))
    assert again == layout
    assert again.axes["L0.head"] == Axis("L0.head", 4, "head", parts=("L0.kv", "L0.group"))
    assert again.linears["layers.0.q.weight"] == Linear("x0", 1)
    assert again.products[1] == Product(None, 6, parse_dims("(L0.kv L0.group) L0.qk"))


@pytest.mark.parametrize("text", ["a", "(a b) c", "(a (b + c b)) 3", "(a + a) (b c + d)", ""])
def test_dims_round_trip(text):
    assert format_dims(parse_dims(text)) == text


def test_coordinates_of_a_nested_sum():
    (dim,) = parse_dims("(h (q + 2))")
    sizes = {"h": 2, "q": 3}
    assert extent(dim, sizes) == 10
    assert coordinates(dim, "h", sizes).tolist() == [0] * 5 + [1] * 5
    assert coordinates(dim, "q", sizes).tolist() == [0, 1, 2, -1, -1] * 2


def test_query_heads_are_owned_by_the_product_axis(layout):
    rows, columns = layout.owners("layers.0.q.weight", "L0.head")
    assert rows.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert columns is None
    assert layout.owners("layers.0.k.weight", "L0.head") == [None, None]


def test_reduce_matches_a_loop(layout):
    array = np.random.default_rng(0).normal(size=(12, 4))
    expected = [array[3 * i : 3 * i + 3].sum() for i in range(4)]
    np.testing.assert_allclose(layout.reduce("layers.0.q.weight", array, "L0.head"), expected)
    np.testing.assert_allclose(layout.reduce("layers.0.q.weight", array, "layers"), [array.sum()])


def test_reduce_counts_an_element_of_two_dimensions_once(layout):
    array = np.arange(16.0).reshape(4, 4)
    expected = [array[i].sum() + array[:, i].sum() - array[i, i] for i in range(4)]
    np.testing.assert_allclose(layout.reduce("layers.0.square", array, "hidden"), expected)


def test_kept_positions(layout):
    keep = {"L0.ffn": np.array([0, 4])}
    (kept,) = layout.kept("layers.0.fused.bias", keep)
    assert kept.tolist() == [True, False, False, False, True] * 2
    assert layout.kept_shape("layers.0.fused.bias", keep) == (4,)
    assert layout.kept_shape("layers.0.q.weight", {"L0.kv": np.array([1])}) == (6, 4)
    assert layout.kept("layers.0.scalar", {"layers": np.array([], dtype=int)}) is None


def test_members(layout):
    assert list(layout.members("L0.ffn")) == ["layers.0.fused.bias"]
    assert len(list(layout.members("layers"))) == 6


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"L0.qk": [0]}, "slice in rotary"),
        ({"L0.ffn": []}, "no unit would remain"),
        ({"L0.ffn": [5]}, "outside 0..4"),
        ({"L0.ffn": [1, 1]}, "twice"),
        ({"L0.head": [0, 1, 2]}, r"\[2, 1\] units kept per unit of L0.kv"),
    ],
)
def test_keep_that_is_refused(layout, keep, message):
    with pytest.raises(PlanError, match=message):
        layout.check_keep(keep)


def test_uneven_groups_are_fine_when_the_group_goes(layout):
    checked = layout.check_keep({"L0.head": [2, 3], "L0.kv": [1]})
    assert checked["L0.head"].tolist() == [2, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("parameters\n  w : (a", "line 2"),
        ("axes\n  a x ffn", "line 2"),
        ("parameters\n  w : a", "no axis 'a'"),
        ("w : 3", "starts with the line 'axes'"),
    ],
)
def test_text_that_is_refused(text, message):
    with pytest.raises(LayoutError, match=message):
        Layout.from_text(text)


def test_shapes_that_do_not_fit(layout):
    with pytest.raises(LayoutError, match=r"has shape \(9, 4\) but the layout says \(12, 4\)"):
        layout.check({"layers.0.q.weight": (9, 4)})


def test_resized_layout_has_the_shapes_of_what_is_kept(layout):
    keep = layout.check_keep({"L0.head": [0, 2], "L0.ffn": [1]})
    small = layout.resized(keep)
    assert small.axes["L0.group"].size == 1
    for param in layout.params:
        assert small.shape(param) == layout.kept_shape(param, keep)
    both = layout.check_keep({"L0.kv": [1], "L0.head": [2]})
    assert layout.resized(both).shape("layers.0.q.weight") == layout.kept_shape("layers.0.q.weight", both) == (3, 4)
    with pytest.raises(LayoutError, match="renames parameters"):
        layout.resized({"layers": np.array([], dtype=int)})


def test_an_axis_of_which_a_multiple_must_remain():
    layout = Layout.from_text("axes\n  f 20 ffn multiple 4\nparameters\n  w : f 3")
    assert layout.axis("f").multiple == 4
    assert Layout.from_text(str(layout)) == layout
    assert layout.check_keep({"f": range(8)})["f"].tolist() == list(range(8))
    with pytest.raises(
        PlanError, match="f: 9 of 20 units would remain, but the model runs only with a multiple of 4; keep 8"
    ):
        layout.check_keep({"f": range(9)})
    assert [aligned(layout.axis("f"), n) for n in (1, 5, 6, 10, 19, 20)] == [4, 4, 8, 12, 20, 20]
    with pytest.raises(LayoutError, match="line 2 of the layout cannot be read"):
        Layout.from_text("axes\n  f 20 ffn multiple four\nparameters\n  w : f 3")


@pytest.mark.parametrize(
    ("axis", "dims", "reason"),
    [
        ("ffn 4 ffn", "(" * 5000 + "ffn" + ")" * 5000, "more than 16 nested parentheses"),
        ("ffn 4 ffn", "(ffn " + "'" * 5000, "missing '\\)'"),
        ("f" + "(" * 3000 + " 4 ffn", "ffn", r"is no name of an axis"),
        ("f(n 4 ffn", "4", "'f\\(n' is no name of an axis; leave out spaces, parentheses and \\+"),
    ],
)
def test_text_of_any_length_is_refused_in_a_sentence(axis, dims, reason):
    with pytest.raises(LayoutError, match=reason) as error:
        Layout.from_text(f"axes\n  {axis}\nparameters\n  w : {dims}")
    assert len(str(error.value)) < 1000
