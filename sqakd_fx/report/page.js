"use strict";
(() => {
  const still = { displayModeBar: false, displaylogo: false, responsive: true };
  const movable = {
    ...still,
    displayModeBar: true,
    modeBarButtons: [["zoomIn2d", "zoomOut2d", "autoScale2d", "resetScale2d"]],
    scrollZoom: true,
  };

  /* Open at a scale of so many pixels a unit, from the top, at any width. */
  const atScale = (element, layout, [width, height]) => {
    const across = element.clientWidth / width;
    const down = (layout.height - layout.margin.t) / height;
    const left = -Math.max(0.6, (across - 0.8) / 2);
    layout.xaxis = { ...layout.xaxis, range: [left, left + across] };
    layout.yaxis = { ...layout.yaxis, range: [down - 0.7, -0.7] };
  };

  const draw = (spec, index) => {
    const element = document.getElementById(spec.name);
    const { data, layout } = structuredClone(spec.choices[index]);
    const moving = spec.cell !== null;
    if (moving && element.layout === undefined) {
      atScale(element, layout, spec.cell);
    } else if (moving) {
      layout.xaxis = { ...layout.xaxis, range: element.layout.xaxis.range };
      layout.yaxis = { ...layout.yaxis, range: element.layout.yaxis.range };
    }
    return Plotly.react(element, data, layout, moving ? movable : still);
  };

  const specs = JSON.parse(document.getElementById("charts").textContent);
  const drawn = specs.map((spec) => draw(spec, 0));
  for (const chooser of document.querySelectorAll("select[data-chart]")) {
    const spec = specs.find((one) => one.name === chooser.dataset.chart);
    chooser.addEventListener("change", () => draw(spec, Number(chooser.value)));
  }

  const valueOf = (row, column) => {
    const cell = row.cells[column];
    if (!("value" in cell.dataset)) return cell.textContent;
    return cell.dataset.value === "" ? -Infinity : Number(cell.dataset.value);
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    const titles = [...table.tHead.rows[0].cells];
    titles.forEach((title, column) => {
      title.addEventListener("click", () => {
        const down = title.getAttribute("aria-sort") !== "descending";
        titles.forEach((one) => one.removeAttribute("aria-sort"));
        title.setAttribute("aria-sort", down ? "descending" : "ascending");
        const rows = [...table.tBodies[0].rows];
        rows.sort((a, b) => {
          const [x, y] = [valueOf(a, column), valueOf(b, column)];
          const order = typeof x === "string" ? String(x).localeCompare(String(y)) : x - y || 0;
          return down ? -order : order;
        });
        table.tBodies[0].append(...rows);
      });
    });
  }
  Promise.all(drawn).then(() => document.body.setAttribute("data-drawn", String(drawn.length)));
})();
