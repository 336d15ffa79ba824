// Sorting and filtering of tables with the class sortable; a search that works from a disk
"use strict";

// A page from a disk may not read its neighbors, which summaries of results would need
if (location.protocol === "file:" && typeof DOCUMENTATION_OPTIONS !== "undefined")
  DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;

const numberOf = (text) => {
  const found = text.replace(/[,\s]/g, "").match(/^-?\d+(\.\d+)?(e-?\d+)?$/i);
  return found ? Number(found[0]) : null;
};

function compare(a, b) {
  const x = numberOf(a), y = numberOf(b);
  if (x !== null && y !== null) return x - y;
  if (a === "" || b === "") return a === "" ? (b === "" ? 0 : 1) : -1;
  return a.localeCompare(b, "en", { numeric: true });
}

function sortBy(table, column) {
  const head = table.tHead.rows[0].cells, th = head[column];
  const direction = th.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
  for (const other of head) other.removeAttribute("aria-sort");
  th.setAttribute("aria-sort", direction);
  const sign = direction === "ascending" ? 1 : -1, body = table.tBodies[0];
  const text = (row) => row.cells[column].textContent.trim();
  [...body.rows].sort((a, b) => sign * compare(text(a), text(b))).forEach((row) => body.append(row));
}

function makeSortable(table) {
  [...table.tHead.rows[0].cells].forEach((th, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = th.textContent;
    button.addEventListener("click", () => sortBy(table, column));
    th.replaceChildren(button);
  });
  for (const cell of table.tBodies[0].querySelectorAll("td"))
    if (numberOf(cell.textContent.trim()) !== null) cell.classList.add("number");
  if (table.tBodies[0].rows.length < 8) return;
  const filter = document.createElement("input");
  filter.type = "search";
  filter.className = "table-filter";
  filter.placeholder = "Filter rows";
  filter.setAttribute("aria-label", `Filter: ${table.getAttribute("aria-label")}`);
  filter.addEventListener("input", () => {
    const wanted = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of table.tBodies[0].rows)
      row.hidden = !wanted.every((word) => row.textContent.toLowerCase().includes(word));
  });
  table.parentElement.before(filter);
}

document.addEventListener("DOMContentLoaded", () => document.querySelectorAll("table.sortable").forEach(makeSortable));
