"use strict";
(() => {
  // A chart is drawn when it is first seen with a width; a closed <details> has none.
  const draw = async (place) => {
    if (place.dataset.drawn || !place.clientWidth) return;
    place.dataset.drawn = "started";
    const spec = JSON.parse(document.getElementById(place.dataset.spec).textContent);
    try {
      // ast: expressions are interpreted, because the page allows no code made from strings
      await vegaEmbed(place, spec, { ast: true, renderer: "svg", actions: false, tooltip: { disableDefaultStyle: true } });
      place.dataset.drawn = "yes";
    } catch (error) {
      place.dataset.drawn = "failed";
      place.textContent = "This chart cannot be drawn here; its numbers stand below.";
      console.error(error);
    }
  };
  const drawAll = (within) => Promise.all([...within.querySelectorAll(".chart")].map(draw));

  const compare = (column, sign) => (a, b) => {
    const [x, y] = [a, b].map((row) => row.cells[column]);
    const [p, q] = [x, y].map((cell) => ("key" in cell.dataset ? Number(cell.dataset.key) : null));
    const numbers = p !== null && q !== null;
    if (numbers) return sign * (p - q);
    if (p !== null || q !== null) return p === null ? 1 : -1; // what was not measured comes last
    return sign * x.textContent.trim().localeCompare(y.textContent.trim(), undefined, { numeric: true });
  };
  const sort = (button) => {
    const heading = button.closest("th");
    const body = heading.closest("table").tBodies[0];
    const order = heading.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
    for (const other of heading.parentElement.cells) other.setAttribute("aria-sort", "none");
    heading.setAttribute("aria-sort", order);
    body.append(...[...body.rows].sort(compare(heading.cellIndex, order === "ascending" ? 1 : -1)));
  };
  for (const button of document.querySelectorAll(".sortable th button")) {
    button.addEventListener("click", () => sort(button));
  }

  const openTarget = () => {
    const target = location.hash && document.getElementById(location.hash.slice(1));
    const details = target && target.closest("details");
    if (!details) return;
    details.open = true;
    target.scrollIntoView();
  };
  window.addEventListener("hashchange", openTarget);
  for (const link of document.querySelectorAll(".sortable a")) link.addEventListener("click", () => setTimeout(openTarget));
  for (const details of document.querySelectorAll("details.model")) {
    details.addEventListener("toggle", () => drawAll(details));
  }

  let opened = [];
  window.addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    for (const details of opened) details.open = true;
    drawAll(document);
  });
  window.addEventListener("afterprint", () => {
    for (const details of opened) details.open = false;
  });

  openTarget();
  drawAll(document).then(() => document.documentElement.setAttribute("data-ready", ""));
})();
