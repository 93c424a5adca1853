"""The report page as HTML: its parts, what is left out, and that the text of users stays text."""

import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from secateur import record as records_of_folders
from secateur.errors import ModelError, SecateurError
from secateur.report import bundle, page
from secateur.report.page import of_folders, render, script_json, write_report
from secateur.schemas.record import Curve, Example, FrontierPoint, Quality, Record
from tests.report.records import rich, several, speeds, thumbnail

pytest.importorskip("jinja2")
pytestmark = pytest.mark.usefixtures("no_vega")
BAD = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&\"'\u2028"
VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """What tests ask of a page: its elements with their attributes, the texts of headings, and its JSON."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.open, self.specs = [], [], [], {}
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if not self.open:
            return
        tag, attributes = self.open[-1]
        if attributes.get("type") == "application/json":
            self.specs[attributes["id"]] = json.loads(data)
        elif tag not in ("script", "style"):
            self.texts.append((tag, " ".join(data.split())))

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def headings(self):
        return [text for tag, text in self.texts if tag in ("h1", "h2", "h3", "h4", "h5") and text]

    def text(self):
        return " ".join(text for _, text in self.texts if text)


def test_the_big_numbers_come_first():
    text = Page(render([rich()])).text()
    assert "Speed on onnx 1.96× 24.7 ms, dense 48.2 ms; 1 × 128 tokens, 1 thread" in text
    assert "Drop of accuracy +0.0013 95% interval −0.0098 to +0.0105" in text
    assert "13.1 M of 22.7 M parameters; 13 M not zero; 52.4 MB of weights, dense 90.9 MB" in text
    assert text.index("1.96×") < text.index("Asked and reached")


def test_the_speed_that_was_asked_for_is_the_big_number():
    other = speeds(10.0)[0].model_copy(update={"length": 512})
    found = [speeds(30.0)[1], other, speeds(20.0)[0]]
    assert "Speed on onnx 2.41×" in Page(render([rich(speeds=found)])).text()
    assert "Speed on onnx 4.83×" in Page(render([rich(speeds=found[:2])])).text()
    assert "Speed on openvino 1.34×" in Page(render([rich(speeds=found, asked=[])])).text()
    alone = found[0].model_copy(update={"dense_ms": None})
    assert "Speed on" not in Page(render([rich(speeds=[alone])])).text()


def test_every_part_of_a_rich_record_has_its_section():
    found = Page(render([rich()]))
    expected = ["Asked and reached", "Notes", "Quality", "Speed", "Layers", "Curves", "Parity", "How it was made"]
    assert [heading for heading in found.headings() if heading in expected] == expected
    assert len(found.specs) == len([a for a in found.all("div") if a.get("class") == "chart"]) == 7
    verdicts = [text for tag, text in found.texts if tag == "span" and text in ("met", "missed", "within", "outside")]
    assert verdicts == ["met", "met", "missed", "within", "within", "outside"]


def test_what_was_not_measured_is_left_out():
    found = Page(render([Record(title="bare")]))
    assert found.headings() == ["bare"]
    assert found.specs == {}
    assert not found.all("table")
    one = Page(render([Record(title="one", quality=Quality(metric="f1", dense=0.5, pruned=0.4, drop=0.1, rows=9))]))
    assert one.headings() == ["one", "Quality"]
    assert "no interval was computed" in one.text()
    assert "Speed" not in one.text()


def test_headings_descend_by_one_and_ids_are_unique():
    for text in (render([rich()]), render(several())):
        found = Page(text)
        levels = [int(tag[1]) for tag, _ in found.elements if tag in ("h1", "h2", "h3", "h4", "h5", "h6")]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
        ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
        assert len(ids) == len(set(ids))


def spoiled(value):
    """The JSON of a record with every text of people replaced by one that would run."""
    fixed = {"group", "kind"}
    if isinstance(value, dict):
        return {key: item if key in fixed else spoiled(item) for key, item in value.items()}
    if isinstance(value, list):
        return [spoiled(item) for item in value]
    return f"{BAD}{value}" if isinstance(value, str) and value not in ("forward", "prompt", "token") else value


def test_the_text_of_users_stays_text():
    data = spoiled(rich().model_dump())
    for speed, clean in zip(data["speeds"], rich().speeds, strict=True):
        speed["what"] = clean.what
    bad = Record.model_validate(data)
    clean = Page(render([rich()]))
    for records in ([bad], [bad, bad.model_copy(update={"title": f"2{BAD}"})]):
        text = render(records)
        assert "<script>alert" not in text
        in_scripts = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', text, re.DOTALL)
        assert len(in_scripts) >= 7
        assert not [spec for spec in in_scripts if set("<>&\u2028") & set(spec)]
        found = Page(text)
        assert not [a for a in found.all("img") if not a["src"].startswith("data:image/")]
        assert not [name for _, attributes in found.elements for name in attributes if name.startswith("on")]
        assert len([a for a in found.all("script") if "type" not in a]) == 2
    assert {tag for tag, _ in Page(render([bad])).elements} == {tag for tag, _ in clean.elements} - {"img"}


def test_json_in_a_script_ends_nothing():
    text = script_json({"a": BAD})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"a": BAD}


def test_the_page_asks_for_nothing():
    found = Page(render([rich()]))
    addresses = [a[name] for _, a in found.elements for name in ("src", "href") if name in a]
    assert addresses
    assert all(address.startswith(("#", "data:image/")) for address in addresses)
    policy = next(a["content"] for a in found.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == rules["style-src"] == "'unsafe-inline'"
    assert rules["img-src"] == "data:"
    assert "url(" not in (Path(page.__file__).parent / "template" / "style.css").read_text()


def test_images_that_are_none_are_shown_as_text():
    examples = [
        Example(kind="image", shown="https://example.org/a.png", dense="a", pruned="b"),
        Example(kind="image", shown="data:image/svg+xml;base64,AAAA", dense="a", pruned="b"),
        Example(kind="image", shown=thumbnail(), expected="a", dense="a", pruned="b", divergence=0.2),
    ]
    found = Page(render([Record(title="t", examples=examples)]))
    assert [image["src"] for image in found.all("img")] == [thumbnail()]
    assert "https://example.org/a.png" in found.text()


def test_examples_come_by_divergence_and_those_that_do_not_fit_are_counted():
    texts = [Example(kind="text", shown=f"row {n}.", dense="a", pruned="b", divergence=n) for n in range(50)]
    found = Page(render([Record(title="t", examples=texts)]))
    shown = [text for tag, text in found.texts if text.startswith("row ")]
    assert shown == [f"row {n}." for n in range(49, 9, -1)]
    assert "10 more are left out" in found.text()
    large = "data:image/png;base64," + "A" * 400_000
    images = [Example(kind="image", shown=large, dense="a", pruned="b") for _ in range(20)]
    text = render([Record(title="t", examples=images)])
    assert len(text) < 1_200_000
    assert len(Page(text).all("img")) == 2


def test_a_long_curve_is_thinned_and_keeps_its_ends():
    curve = Curve(name="loss", x="step", y="loss", points=[[n, 1 / (n + 1)] for n in range(100_000)])
    (spec,) = Page(render([Record(title="t", curves=[curve])])).specs.values()
    rows = spec["data"]["values"]
    assert len(rows) == 300
    assert (rows[0]["x"], rows[-1]["x"]) == (0, 99_999)


def test_the_frontier_takes_parameters_where_latency_is_not_known():
    points = [
        FrontierPoint(name="dense", group="dense", latency_share=1, parameters_share=1, value=0.9),
        FrontierPoint(name="half", group="chosen", parameters_share=0.5, value=0.8, before=0.7, is_result=True),
    ]
    (spec,) = Page(render([Record(title="t", frontier=points)])).specs.values()
    rows = spec["data"]["values"]
    assert [(row["x"], row["y"], row["group"]) for row in rows] == [
        (1, 0.9, "dense"),
        (0.5, 0.8, "chosen"),
        (0.5, 0.7, "before healing"),
    ]
    assert [row["is_result"] for row in rows] == [False, True, False]
    assert Page(render([Record(title="t", frontier=points[:1])])).specs == {}


def test_an_axis_of_equal_values_shows_that_value():
    points = [
        FrontierPoint(name=name, group="chosen", latency_share=share, value=0.5)
        for name, share in (("a", 1), ("b", 0.5))
    ]
    (spec,) = Page(render([Record(title="t", frontier=points)])).specs.values()
    assert spec["layer"][-1]["encoding"]["y"]["scale"]["domain"] == [0.475, 0.525]


def test_several_records_are_compared():
    found = Page(render(several()))
    assert found.headings()[0] == "Comparison of 3 models"
    (comparison,) = [a for a in found.all("table") if "sortable" in a["class"]]
    assert comparison
    sortable = [a for a in found.all("th") if "aria-sort" in a]
    assert len(sortable) == len(found.all("button")) == 8
    assert len([a for a in found.all("details") if a.get("class") == "model"]) == 3
    points = found.specs["plane-chart-spec"]["data"]["values"]
    assert [(row["name"], round(row["x"], 2), row["y"]) for row in points] == [
        ("reviews-2x", 0.51, 0.86),
        ("reviews-3x", 0.34, 0.8421),
        ("dense", 1.0, 0.8613),
    ]


def test_one_folder_one_page(tmp_path):
    records_of_folders.write_record(rich(), tmp_path)
    path = write_report(of_folders([tmp_path]), tmp_path / "page.html")
    assert path == tmp_path / "page.html"
    assert path.stat().st_size < 300_000
    assert Page(path.read_text(encoding="utf-8")).headings()[0] == "reviews-2x"
    with pytest.raises(SecateurError, match="exists"):
        write_report([rich()], path)
    assert write_report([rich("again")], path, overwrite=True) == path
    assert "again" in path.read_text(encoding="utf-8")


def test_text_that_utf8_cannot_hold_is_no_reason_to_fail(tmp_path):
    assert write_report([rich(notes=["\ud800 half"])], tmp_path / "page.html").stat().st_size


def test_a_folder_without_a_record_is_named_with_what_to_do(tmp_path):
    with pytest.raises(ModelError, match=r"has no secateur-record\.json; name a folder .* `secateur prune MODEL"):
        of_folders([tmp_path])
    with pytest.raises(ModelError, match="is not a folder"):
        of_folders([tmp_path / "none"])
    with pytest.raises(ModelError, match="at least one record"):
        render([])


def test_a_missing_package_is_named_with_its_extra(monkeypatch, tmp_path):
    monkeypatch.setattr(bundle, "PACKAGES", ("jinja2", "not_there"))
    with pytest.raises(SecateurError, match=r"needs the package not_there; .*pip install 'secateur\[report\]'"):
        write_report([rich()], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
