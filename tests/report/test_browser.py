"""The page in a real browser: every chart is drawn, hovering and sorting work, nothing is asked for, nothing fails.

A script that is added to a copy of the page drives it and writes down what it saw; Chromium prints the page that comes
out. So no package is needed to drive the browser.
"""

import json
import re
import shutil
import subprocess

import pytest

from secateur.report.page import render
from tests.report.records import rich, several

pytest.importorskip("jinja2")
pytest.importorskip("vl_convert")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt-get install chromium)"),
]
WATCH = """<script>
window.seen = {errors: [], refused: []};
window.addEventListener("error", (event) => seen.errors.push(String(event.message)));
window.addEventListener("unhandledrejection", (event) => seen.errors.push(String(event.reason)));
document.addEventListener("securitypolicyviolation", (event) => seen.refused.push(event.violatedDirective));
for (const name of ["error", "warn"]) console[name] = (...words) => seen.errors.push(words.join(" "));
</script>"""
DRIVE = """<script>
(async () => {
  const until = async (test) => { for (let n = 0; n < 600 && !test(); n++)
    await new Promise((f) => setTimeout(f, 99)); };
  await until(() => document.documentElement.hasAttribute("data-ready"));
  const all = (what) => [...document.querySelectorAll(what)];
  for (const details of all("details.model")) details.open = true;
  await until(() => all(".chart").every((chart) => chart.dataset.drawn === "yes"));
  seen.charts = all(".chart").map((chart) => [chart.dataset.drawn, chart.querySelectorAll("svg path").length > 0]);
  seen.labels = all("[role=graphics-document]").map((one) => one.getAttribute("aria-label"));
  seen.fits = all(".chart svg").every((svg) => svg.clientWidth <= svg.closest(".chart").clientWidth + 1);
  seen.scrolls = document.documentElement.scrollWidth > innerWidth;

  const tip = () => document.querySelector("#vg-tooltip-element.visible")?.textContent;
  seen.tips = [];
  for (const part of ["model: ", "model: pruned", "what: FFN neurons"]) {
    const mark = all(".chart path[aria-label]").find((path) => path.ariaLabel.includes(part));
    mark.scrollIntoView({block: "center", behavior: "instant"});
    const box = mark.getBoundingClientRect();
    const at = {bubbles: true, clientX: box.x + box.width / 2, clientY: box.y + box.height / 2};
    const before = tip();
    for (const kind of ["pointerover", "mouseover", "pointermove", "mousemove"]) {
      const event = new (kind.startsWith("p") ? PointerEvent : MouseEvent)(kind, at);
      document.elementFromPoint(at.clientX, at.clientY).dispatchEvent(event);
    }
    await until(() => tip() !== before);
    seen.tips.push(tip());
  }

  seen.orders = all(".sortable thead button").slice(0, 5).map((button) => {
    const once = () => {
      button.focus(); button.click();
      return [button.parentElement.getAttribute("aria-sort"), ...all(".sortable tbody th a").map((a) => a.textContent)];
    };
    return [once(), once()];
  });
  seen.requests = performance.getEntriesByType("resource").map((e) => e.name).filter((n) => !n.startsWith("data:"));
  const out = document.createElement("script");
  out.type = "application/json";
  out.id = "seen";
  out.textContent = JSON.stringify(seen).replaceAll("<", "\\\\u003c");
  document.body.append(out);
})();
</script>"""


def visit(folder, records, *options):
    """What the added script saw of the page of these records."""
    text = render(records).replace("<style>", f"{WATCH}<style>", 1)
    page, _, _ = text.rpartition("</body>")  # Vega holds this word too
    path = folder / "page.html"
    path.write_text(f"{page}{DRIVE}</body></html>", encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--virtual-time-budget=120000", *options, "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    found = re.findall(r'<script type="application/json" id="seen">(.*?)</script>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    return json.loads(found[0])


@pytest.mark.parametrize(
    "options", [["--window-size=1280,900"], ["--window-size=500,800", "--blink-settings=preferredColorScheme=0"]]
)
def test_a_page_of_one_record(tmp_path, options):
    seen = visit(tmp_path, [rich()], *options)
    assert (seen["errors"], seen["refused"], seen["requests"]) == ([], [], [])
    assert seen["charts"] == [["yes", True]] * 7
    assert len(set(seen["labels"])) == 7
    assert seen["fits"]
    assert not seen["scrolls"]
    point, bar, cell = seen["tips"]
    assert "dense" in point
    assert "0.8613" in point
    assert "24.2 ms to 25.7 ms" in bar
    assert "1,536 of 1,536" in cell


def test_a_comparison_is_sorted_and_texts_of_users_run_nowhere(tmp_path):
    bad = "<img src=x onerror=console.error(1)>"
    records = several()
    records[0] = records[0].model_copy(update={"title": f"reviews-2x{bad}"})
    seen = visit(tmp_path, records)
    assert (seen["errors"], seen["refused"], seen["requests"]) == ([], [], [])
    assert all(chart == ["yes", True] for chart in seen["charts"])
    assert "reviews-2x<img" in seen["tips"][0]
    first, second, third = (record.title for record in records)
    by_name, by_accuracy, by_drop, _, by_onnx = seen["orders"]
    assert by_name == [["ascending", third, first, second], ["descending", second, first, third]]
    assert by_accuracy == [["ascending", second, first, third], ["descending", first, second, third]]
    assert by_drop == [["ascending", first, second, third], ["descending", second, first, third]]
    assert by_onnx == [["ascending", second, first, third], ["descending", third, first, second]]
