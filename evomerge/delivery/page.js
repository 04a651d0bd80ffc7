// The page's script: tips, details of candidates, tables that sort. Nothing is fetched.
"use strict";
(() => {
  let details = null;
  const read = () => {
    const source = document.getElementById("details");
    details = source ? JSON.parse(source.textContent) : null;
  };
  read();
  document.addEventListener("replaced", read); // a served page that follows its run
  const points = (value) => (value === null ? "-" : value.toFixed(1));

  // Tips: the text of data-t, or of the candidate that data-i numbers.
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  document.body.append(tip);
  const lines = (row) => [
    `${row.id}${row.names.length ? ` (${row.names.join(", ")})` : ""}`,
    `generation ${row.generation}, ${points(row.score)} points on ${row.blocks} of ${details.blocks} item blocks`,
    ...details.genes.slice(0, 6).map((name, n) => `${name}: ${row.genes[n]}`),
    "click for all of it",
  ];
  document.addEventListener("pointermove", (event) => {
    const mark = event.target.closest?.("[data-t], [data-i]");
    tip.hidden = !mark || !(mark.dataset.t || details);
    if (tip.hidden) return;
    tip.textContent = mark.dataset.t ?? lines(row(mark.dataset.i)).join("\n");
    const box = tip.getBoundingClientRect();
    const left = Math.min(event.clientX + 14, innerWidth - box.width - 8);
    const below = event.clientY + 16 + box.height < innerHeight;
    tip.style.left = `${Math.max(4, left)}px`;
    tip.style.top = `${below ? event.clientY + 16 : event.clientY - box.height - 10}px`;
  });

  // A candidate's details, in a dialog.
  const row = (number) => {
    const [id, generation, score, blocks, names, tasks, genes] = details.rows[number];
    return { id, generation, score, blocks, names, tasks, genes };
  };
  const dialog = document.getElementById("candidate");
  const list = (pairs) => {
    const table = document.createElement("table");
    for (const [name, value] of pairs) {
      const line = table.insertRow();
      line.insertCell().textContent = name;
      line.insertCell().textContent = value;
    }
    return table;
  };
  const open = (number) => {
    const chosen = row(number);
    const title = document.createElement("h2");
    title.textContent = `Candidate ${chosen.id}`;
    const about = document.createElement("p");
    about.textContent = lines(chosen).slice(0, 2).join(" · ");
    const command = document.createElement("pre");
    command.textContent = `evomerge show ${details.run} ${chosen.id}\nevomerge export ${details.run} OUT --pick ${chosen.id}`;
    const tasks = list(details.tasks.map((name, n) => [name, points(chosen.tasks[n] ?? null)]));
    const genes = list(details.genes.map((name, n) => [name, chosen.genes[n]]));
    const left = details.more ? [Object.assign(document.createElement("p"), { textContent: `and ${details.more} genes that matter less: evomerge show` })] : [];
    const page = details.page ? [Object.assign(document.createElement("a"), { textContent: "Recipe, scores and items", href: `${details.page}/${chosen.id}` })] : [];
    dialog.querySelector("div").replaceChildren(title, about, ...page, command, tasks, genes, ...left);
    dialog.showModal();
  };
  document.addEventListener("click", (event) => {
    const mark = event.target.closest?.("[data-i]");
    if (mark && dialog && details) open(mark.dataset.i);
    else if (event.target === dialog) dialog.close();
  });

  // Tables sort by the column whose head is pressed; rows with data-pinned stay on top.
  document.addEventListener("click", (event) => {
    const head = event.target.closest?.("table.sortable th button")?.closest("th");
    if (!head) return;
    const table = head.closest("table");
    const down = head.getAttribute("aria-sort") !== "descending";
    for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = (line) => {
      const cell = line.cells[head.cellIndex];
      const text = cell.dataset.v ?? cell.textContent.trim();
      const number = parseFloat(text);
      return Number.isNaN(number) ? text : number;
    };
    const body = table.tBodies[0];
    const rows = [...body.rows].sort((a, b) => {
      const pinned = ("pinned" in b.dataset) - ("pinned" in a.dataset);
      if (pinned) return pinned;
      const [x, y] = [value(a), value(b)];
      const order = typeof x === typeof y ? (x < y ? -1 : x > y ? 1 : 0) : typeof x === "number" ? 1 : -1;
      return down ? -order : order;
    });
    body.append(...rows);
  });

  // Paper shows everything.
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => (d.open = true)));
})();
