// The zoo page: sorts and filters the table, and draws the plots of what the filters leave.
"use strict";

(() => {
  const table = document.getElementById("zoo-table");
  const form = document.getElementById("zoo-filters");
  const data = JSON.parse(document.getElementById("zoo-data").textContent);
  const body = table.tBodies[0];
  const headings = [...table.tHead.rows[0].cells];
  // Tableau's ten colours, and a shape each, so that colour is not all that tells them apart; open
  // shapes in a second round.
  const colours = ["#4e79a7", "#f28e2b", "#e15759", "#76b7b2", "#59a14f",
    "#d4a72c", "#b07aa1", "#ff7f97", "#9c755f", "#8a8a8a", "#2f9e8f"];
  const symbols = ["circle", "square", "diamond", "triangle-up", "cross", "star", "x",
    "pentagon", "triangle-down", "hexagon", "bowtie"];
  const margin = { l: 48, r: 32, t: 40, b: 44 };
  const modeBarButtons = [["zoom2d", "pan2d", "resetScale2d", "toImage"]];
  const families = [...new Set(data.map((row) => row.family))];
  // What stands at the axis of some figures, written out: plotly would write only the digit.
  function marks(figures, width) {
    // Of a single one plotly shows a decade on either side.
    const decades = Math.log10(Math.max(...figures) / Math.min(...figures)) || 2;
    const room = width / decades;
    const digits = room < 110 ? [1, 3] : room < 500 ? [1, 2, 5] : [1, 1.5, 2, 2.5, 3, 4, 5, 6, 8];
    // Plotly leaves a fifth of the width empty. A digit is 7 pixels wide.
    const fits = (mark, before) =>
      0.8 * room * Math.log10(mark / before) > 7 * String(mark).length + 6;
    return [-3, -2, -1, 0, 1, 2, 3, 4]
      .flatMap((power) => digits.map((digit) => Number(`${digit}e${power}`)))
      .filter((mark, i, all) => i % digits.length === 0 || fits(mark, all[i - 1]));
  }

  function sortBy(column) {
    const heading = headings[column];
    const ascending = heading.getAttribute("aria-sort") !== "ascending";
    const isNumber = heading.dataset.type === "number";
    const key = (row) => row.cells[column].dataset.key;
    const rows = [...body.rows].sort((a, b) => {
      const [left, right] = [key(a), key(b)];
      // What has no figure stays at the end, whichever way.
      if (left === undefined || right === undefined) {
        return (left === undefined) - (right === undefined);
      }
      const order = isNumber ? left - right : left.localeCompare(right, "en", { numeric: true });
      return ascending ? order : -order;
    });
    body.append(...rows);
    headings.forEach((other) => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  }

  function chosen() {
    const { name, family, licence, params, macs, pretrained } = form.elements;
    const wanted = name.value.trim().toLowerCase();
    return data.filter((row) =>
      row.name.includes(wanted)
      && (!family.value || row.family === family.value)
      && (!licence.value || row.licence === licence.value)
      && (params.value === "" || row.params_m <= Number(params.value))
      && (macs.value === "" || row.macs_g <= Number(macs.value))
      && (!pretrained.checked || row.pretrained !== null));
  }

  const figure = (value, unit, digits) =>
    value === null ? "–" : `${value.toFixed(digits)} ${unit}`;

  function traces(rows, x, describe) {
    return families.flatMap((family, i) => {
      const points = rows.filter((row) =>
        row.family === family && row.top1 !== null && x(row) !== null);
      return points.length === 0 ? [] : [{
        type: "scatter",
        mode: "markers",
        name: family,
        x: points.map(x),
        y: points.map((row) => row.top1),
        customdata: points.map((row) => row.name),
        text: points.map((row) => `<b>${row.name}</b><br>${row.top1} % at ${row.top1_size}²`
          + `${row.claim ? `, ${row.claim}` : ""}<br>${describe(row)}`),
        hovertemplate: "%{text}<extra></extra>",
        marker: {
          color: colours[i % colours.length],
          symbol: symbols[i % symbols.length] + (i < symbols.length ? "" : "-open"),
          size: 10,
          line: { width: i < symbols.length ? 0 : 2 },
        },
      }];
    });
  }

  function layout(title, xTitle, drawn, ticks) {
    const style = getComputedStyle(document.body);
    const ink = style.getPropertyValue("--md-default-fg-color").trim();
    const lines = style.getPropertyValue("--md-default-fg-color--lightest").trim();
    const axis = { visible: drawn, gridcolor: lines, zerolinecolor: lines, linecolor: lines, automargin: true };
    const empty = {
      text: "No measurement among these", showarrow: false, xref: "paper", yref: "paper",
      x: 0.5, y: 0.5,
    };
    return {
      title: { text: title, font: { size: 15 }, x: 0, xref: "paper" },
      font: { color: ink, family: style.fontFamily, size: 12 },
      paper_bgcolor: "transparent",
      plot_bgcolor: "transparent",
      modebar: { bgcolor: "transparent", color: ink, orientation: "v" },
      margin,
      xaxis: {
        ...axis, type: "log", tickvals: ticks, ticktext: ticks.map(String), tickangle: 0,
        title: { text: xTitle },
      },
      yaxis: { ...axis, title: { text: "Reported top-1, %" } },
      showlegend: drawn,
      legend: { orientation: "h", yref: "container", y: 0, yanchor: "bottom", itemsizing: "constant" },
      annotations: drawn ? [] : [empty],
      hovermode: "closest",
    };
  }

  const plots = [
    {
      id: "zoo-macs",
      title: "Accuracy against MACs",
      xTitle: "G MACs at the size of the accuracy",
      x: (row) => row.plot_macs_g,
      describe: (row) => figure(row.plot_macs_g, "G MACs", 2)
        + (row.macs_size === row.top1_size ? "" : " as its authors count them"),
    },
    {
      id: "zoo-latency",
      title: "Accuracy against CPU latency, fused",
      xTitle: "ms an image, batch 1, one thread",
      // Only where the accuracy belongs to images of the measured size.
      x: (row) => (row.latency_size === row.top1_size ? row.fused_ms : null),
      describe: (row) =>
        `${figure(row.fused_ms, "ms", 1)} fused, ${figure(row.latency_ms, "ms", 1)} as trained`,
    },
  ];

  function draw(rows) {
    for (const { id, title, xTitle, x, describe } of plots) {
      const drawn = traces(rows, x, describe);
      const options = { responsive: true, displaylogo: false, modeBarButtons };
      const width = document.getElementById(id).clientWidth - margin.l - margin.r;
      const ticks = marks(drawn.flatMap((trace) => trace.x), width);
      Plotly.react(id, drawn, layout(title, xTitle, drawn.length > 0, ticks), options);
    }
  }

  function update() {
    const rows = chosen();
    const names = new Set(rows.map((row) => row.name));
    for (const row of body.rows) {
      row.hidden = !names.has(row.id);
    }
    document.getElementById("zoo-count").value = `${rows.length} of ${data.length} variants`;
    draw(rows);
  }

  headings.forEach((heading, column) =>
    heading.querySelector("button").addEventListener("click", () => sortBy(column)));
  // Text comes as "input"; of a list, not every browser sends more than "change".
  form.addEventListener("input", update);
  form.addEventListener("change", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(update));
  update();
  for (const { id } of plots) {
    document.getElementById(id).on("plotly_click", ({ points }) => {
      const row = document.getElementById(points[0].customdata);
      row.scrollIntoView({ block: "center" });
      row.classList.add("found");
      setTimeout(() => row.classList.remove("found"), 2000);
    });
  }
  // The colours of the page have changed.
  new MutationObserver(() => draw(chosen()))
    .observe(document.body, { attributeFilter: ["data-md-color-scheme"] });
})();
