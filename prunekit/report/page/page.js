"use strict";
(() => {
  const root = document.documentElement;
  const theme = document.getElementById("theme");
  const setTheme = (dark) => {
    root.dataset.theme = dark ? "dark" : "light";
    theme.setAttribute("aria-pressed", String(dark));
  };
  setTheme(matchMedia("(prefers-color-scheme: dark)").matches);
  theme.addEventListener("click", () => setTheme(root.dataset.theme !== "dark"));

  // a number for sorting, of a cell that begins with one; text sorts as text
  const valueOf = (row, column) => {
    const text = row.cells[column].textContent.trim();
    const found = text.replaceAll(",", "").match(/^[+-]?\d+(\.\d+)?(e[+-]?\d+)?/);
    return found ? Number(found[0]) : text.toLowerCase();
  };
  const before = (a, b) => {
    if (typeof a === "number" && typeof b === "number") return a - b;
    if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
    return a < b ? -1 : a > b ? 1 : 0;
  };
  // of a long table the first rows are shown, in the order it has now, until all are asked for; a search is over all
  for (const table of document.querySelectorAll("table.sortable, table.filtered, table[data-first]")) {
    const first = Number(table.dataset.first ?? Infinity);
    const body = table.tBodies[0];
    let words = [];
    let all = false;
    const tools = document.createElement("p");
    tools.className = "tools";
    const count = document.createElement("span");
    count.setAttribute("role", "status");
    const more = document.createElement("button");
    more.type = "button";
    const show = () => {
      let found = 0;
      for (const row of body.rows) {
        const text = row.textContent.toLowerCase();
        const is = words.every((word) => text.includes(word));
        row.hidden = !is || (found >= first && !all);
        found += is;
      }
      const shown = all ? found : Math.min(first, found);
      const searched = words.length ? " with these words" : "";
      count.textContent = shown < found ? `The first ${shown} of ${found}${searched}; ${found - shown} more are in the page.`
        : `${found} rows${searched}.`;
      more.hidden = found <= first;
      more.textContent = all ? `Show the first ${first}` : `Show all ${found}`;
    };
    if (table.classList.contains("filtered")) {
      const label = document.createElement("label");
      label.className = "search";
      const input = document.createElement("input");
      input.type = "search";
      label.append("Only rows with", input);
      tools.append(label);
      input.addEventListener("input", () => {
        words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
        show();
      });
    }
    if (body.rows.length > first) tools.append(count, more);
    if (tools.childNodes.length) table.parentElement.before(tools);
    more.addEventListener("click", () => {
      all = !all;
      show();
    });
    const heads = table.classList.contains("sortable") ? [...table.tHead.rows[0].cells] : [];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") !== "ascending";
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const rows = [...body.rows];
        rows.sort((x, y) => (up ? 1 : -1) * before(valueOf(x, column), valueOf(y, column)));
        body.append(...rows);
        show();
      });
    });
    show();
  }

  // paper cannot unfold anything
  addEventListener("beforeprint", () => {
    for (const each of document.querySelectorAll("details:not([open])")) {
      each.dataset.folded = "";
      each.open = true;
    }
  });
  addEventListener("afterprint", () => {
    for (const each of document.querySelectorAll("details[data-folded]")) {
      delete each.dataset.folded;
      each.open = false;
    }
  });

  const charts = JSON.parse(document.getElementById("charts").textContent);
  const options = { actions: false, renderer: "svg", ast: true, loader: { load: () => Promise.reject(new Error("no network")) } };
  window.drawn = Promise.all(
    Object.entries(charts).map(([name, spec]) => window.vegaEmbed(document.getElementById(name), spec, options)),
  );
})();
