// A header of the table of runs sorts it; a run is lit wherever the page shows it; while the sweep runs the page renews itself.
const body = document.querySelector(".runs tbody"), heads = [...document.querySelectorAll(".runs th")];
heads.forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => {
  const up = head.getAttribute("aria-sort") !== "ascending";
  history.replaceState([column, up], "");
  heads.forEach((other) => other.hasAttribute("aria-sort") && other.setAttribute("aria-sort", "none"));
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = (row) => row.cells[column].dataset.v, number = (v) => v !== "" && !isNaN(v);
  [...body.rows].sort((a, b) => {
    const x = key(a), y = key(b);
    if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
    const order = number(x) && number(y) ? x - y : x.localeCompare(y);
    return up ? order : -order;
  }).forEach((row) => body.append(row));
}));
const runs = [...document.querySelectorAll("[data-run]")];
runs.forEach((one) => ["mouseenter", "mouseleave"].forEach((event) => one.addEventListener(event, () =>
  runs.forEach((other) => other.dataset.run === one.dataset.run && other.classList.toggle("lit", event === "mouseenter")))));
if (history.state) {  // as it was sorted before the page renewed itself
  const [column, up] = history.state, button = heads[column]?.querySelector("button");
  button?.click();
  if (!up) button?.click();
}
const live = document.querySelector("[data-written]");
if (live) {
  if (Date.now() - live.dataset.written > 120000) live.textContent = "This page hasn't been renewed for minutes: the sweep was stopped. The same command goes on.";
  setTimeout(() => location.reload(), 4000);
}
