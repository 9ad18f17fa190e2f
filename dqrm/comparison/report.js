for (const table of document.querySelectorAll("table.sorted")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.onclick = () => {
      const up = head.ariaSort ? head.ariaSort === "descending" : head.dataset.first === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = (row) => row.cells[column].dataset.value ?? "";
      const order = (a, b) => value(a).localeCompare(value(b), "en", { numeric: true });
      const number = (a, b) => value(a) - value(b);
      const rows = [...table.tBodies[0].rows];
      const known = rows.filter((row) => value(row) !== "").sort(column ? number : order);
      if (!up) known.reverse();
      table.tBodies[0].append(...known, ...rows.filter((row) => value(row) === ""));
    };
  });
}
const drawn = [...document.querySelectorAll("svg [data-group]")];
let kept = null;
for (const handle of document.querySelectorAll("[data-shows]")) {
  const show = (group) => drawn.forEach((part) =>
    part.classList.toggle("dimmed", group !== null && part.dataset.group !== group));
  const own = handle.dataset.shows;
  handle.onpointerenter = () => show(own);
  handle.onpointerleave = () => show(kept);
  handle.onclick = () => show(kept = kept === own ? null : own);
}
