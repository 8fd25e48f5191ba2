// The page Speed: finds a CPU in the look-up, and draws the rows that the filters leave.
"use strict";

(() => {
  const parsed = (id) => JSON.parse(document.getElementById(id).textContent);
  const data = parsed("speed-data");
  const { plain, dtypes } = parsed("speed-columns");
  const table = document.getElementById("speed-table");
  const form = document.getElementById("speed-filters");
  const cpus = [...form.elements.cpu.options].slice(1);
  const cpuName = Object.fromEntries(cpus.map((option) => [option.value, option.textContent]));
  let sorted = { column: 0, ascending: true };

  const number = (value, digits) => (value === null ? "–" : value.toFixed(digits));
  // Four digits are measured.
  const time = (value) => value.toFixed(value < 10 ? 2 : value < 100 ? 1 : 0);

  function element(tag, text, attributes = {}) {
    const made = document.createElement(tag);
    made.append(text);
    for (const [name, value] of Object.entries(attributes)) {
      if (value) made.setAttribute(name, value);
    }
    return made;
  }

  // A time with its contender as a tooltip; "not measured" looks unlike "failed".
  function timeCell(cell, remark) {
    if (cell === null) {
      return element("td", "·", { class: "number missing", title: "not measured" });
    }
    const [value, contender, reason, other] = cell;
    if (value === null) {
      return element("td", "failed", { class: "number failed", title: `${contender}: ${reason}` });
    }
    const made = element("td", time(value), {
      class: "number",
      title: other ? `${contender}, in another run, of ${other}` : contender,
    });
    if (other) made.append(element("span", " †", { class: "remark" }));
    if (remark) made.append(element("span", ` ${remark}`, { class: "remark" }));
    return made;
  }

  function overCell(over) {
    if (!over) return element("td", "·", { class: "number missing", title: "not measured" });
    const [ratio, contender, why] = over;
    const kind = ratio < 1 ? "number loss" : "number";
    // A loss never reads as 1.00.
    const shown = ratio < 1 && ratio >= 0.995
      ? (Math.floor(1000 * ratio) / 1000).toFixed(3) : ratio.toFixed(2);
    return element("td", `${shown}×`, { class: kind, title: `over ${contender}${ratio < 1 && why ? `: ${why}` : ""}` });
  }

  function dateCell(row) {
    const versions = Object.entries(row.versions).map((pair) => pair.join(" ")).join(", ");
    const commit = row.commit ? `commit ${row.commit}` : "commit unknown";
    const old = row.older ? "; the kernels have changed since" : "";
    const made = element("td", row.date ?? "–", { title: `${commit}, ${versions}${old}` });
    if (row.older) made.append(element("span", " older", { class: "remark" }));
    return made;
  }

  // Heading, key to sort by, cell; of a dtype, if the column belongs to one.
  const first = (cell) => (cell === null ? null : cell[0]);
  const columns = [
    { title: "Model", key: (r) => r.model, cell: (r) => {
      const made = element("th", element("code", r.model), { scope: "row" });
      made.append(element("span", ` ${r.size}²`, { class: "remark" }));
      return made;
    } },
    { title: "CPU", key: (r) => r.cpu, cell: (r) => element("td", cpuName[r.cpu]), only: "cpu" },
    { title: "Images", key: (r) => r.batch, cell: (r) => element("td", r.batch, { class: "number" }), only: "batch" },
    { title: "Threads", key: (r) => r.threads, cell: (r) => element("td", r.threads, { class: "number" }), only: "threads" },
    { title: "Top-1, %", key: (r) => r.top1, cell: (r) => element("td", number(r.top1, 1), { class: "number" }) },
    { title: "M params", key: (r) => r.params, cell: (r) => element("td", number(r.params, 1), { class: "number" }) },
    ...plain.map((title) => ({
      title: `${title}, ms`,
      key: (r) => first(r.cells[title]),
      cell: (r) => timeCell(r.cells[title]),
      dtype: "float32",
    })),
    ...dtypes.map((dtype) => ({
      title: `Ours, ${dtype}, ms`,
      key: (r) => first(r.cells[dtype]),
      cell: (r) => timeCell(r.cells[dtype], dtype === "int8" && r.cells.int8?.[0] ? r.layers : null),
      dtype,
    })),
    ...dtypes.map((dtype) => ({
      title: `Ours over the rest, ${dtype}`,
      key: (r) => r.over[dtype]?.[0] ?? null,
      cell: (r) => overCell(r.over[dtype]),
      dtype,
    })),
    { title: "Images/s", key: (r) => r.images, cell: (r) => element("td", number(r.images, 1), { class: "number" }) },
    { title: "Memory, MiB", key: (r) => r.memory, cell: (r) => element("td", number(r.memory, 1), { class: "number" }) },
    { title: "Date", key: (r) => r.date, cell: dateCell },
  ];

  function shownColumns() {
    const { elements } = form;
    return columns.filter(({ dtype, only }) =>
      (!dtype || !elements.dtype.value || dtype === elements.dtype.value)
      && (!only || !elements[only].value));
  }

  function chosen() {
    const { cpu, model, family, batch, threads, dtype, losses } = form.elements;
    const wanted = model.value.trim().toLowerCase();
    const loses = (row) => Object.entries(row.over).some(([name, [ratio]]) =>
      ratio < 1 && (!dtype.value || name === dtype.value));
    return data.filter((row) =>
      (!cpu.value || row.cpu === cpu.value)
      && row.model.toLowerCase().includes(wanted)
      && (!family.value || row.family === family.value)
      && (!batch.value || row.batch === Number(batch.value))
      && (!threads.value || row.threads === Number(threads.value))
      && (!dtype.value || row.cells[dtype.value] !== null)
      && (!losses.checked || loses(row)));
  }

  function inOrder(rows) {
    const { key } = columns[sorted.column];
    return rows.toSorted((a, b) => {
      const [left, right] = [key(a), key(b)];
      // What has no figure stays at the end, whichever way.
      if (left === null || right === null) return (left === null) - (right === null);
      const order = typeof left === "number" ? left - right
        : left.localeCompare(right, "en", { numeric: true });
      return sorted.ascending ? order : -order;
    });
  }

  function heading(column) {
    const button = element("button", column.title, { type: "button" });
    const made = element("th", button, { scope: "col" });
    if (column !== columns[0] && column.title !== "CPU") made.dataset.type = "number";
    const place = columns.indexOf(column);
    if (place === sorted.column) {
      made.setAttribute("aria-sort", sorted.ascending ? "ascending" : "descending");
    }
    button.addEventListener("click", () => {
      sorted = { column: place, ascending: place !== sorted.column || !sorted.ascending };
      update();
    });
    return made;
  }

  function update() {
    const rows = chosen();
    const shown = shownColumns();
    const head = element("tr", "");
    head.append(...shown.map(heading));
    table.tHead.replaceChildren(head);
    table.tBodies[0].replaceChildren(...inOrder(rows).map((row) => {
      const line = element("tr", "");
      line.append(...shown.map(({ cell }) => cell(row)));
      return line;
    }));
    document.getElementById("speed-count").value = `${rows.length} of ${data.length} measurements`;
  }

  const finder = document.getElementById("cpu-form");
  function find() {
    const wanted = finder.elements.cpu.value.trim().toLowerCase();
    const words = wanted.split(/\s+/);
    const lines = [...document.getElementById("cpu-table").tBodies[0].rows];
    for (const line of lines) {
      const text = line.textContent.toLowerCase();
      line.hidden = !(words.every((word) => text.includes(word))
        || new RegExp(line.dataset.pattern).test(wanted));
    }
    const count = lines.filter((line) => !line.hidden).length;
    document.getElementById("cpu-count").value = count || !wanted
      ? "" : "not listed: `vision-backbones doctor` names its instruction set";
  }
  finder.addEventListener("input", find);
  finder.addEventListener("submit", (event) => event.preventDefault());
  for (const button of document.querySelectorAll("#cpu-table button[data-cpu]")) {
    button.addEventListener("click", () => {
      form.elements.cpu.value = button.dataset.cpu;
      update();
      form.scrollIntoView({ behavior: "instant", block: "start" });
    });
  }

  form.elements.cpu.selectedIndex = 1;
  // Text comes as "input"; of a list, not every browser sends more than "change".
  form.addEventListener("input", update);
  form.addEventListener("change", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(update));
  update();
})();
