// @ts-check
// <line-chart>: a chart the hub has drawn. Takes over new drawings, and reads out the point
// under the pointer in the legend. Readers without a pointer have the table below.

import { set, write } from "./page.js";

/** @typedef {{key: string, label: string, line: string, area: string, values: string[], latest: string}} Series */
/**
 * @typedef {object} Chart the hub's charts.Chart
 * @property {string} summary
 * @property {boolean} empty
 * @property {string[]} ticks
 * @property {string} grid
 * @property {string[]} at
 * @property {Series[]} series
 */

export class LineChart extends HTMLElement {
  /** @type {Chart | null} */
  #chart = null;
  /** @type {number | null} from 0, left, to 1, right */
  #pointed = null;

  connectedCallback() {
    const svg = this.#one("svg");
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      this.#pointed = Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1);
      this.#readOut();
    });
    svg.addEventListener("pointerleave", () => {
      this.#pointed = null;
      this.#readOut();
    });
    this.#one("details").addEventListener("toggle", () => this.#fillTable());
  }

  /** @param {Chart} chart */
  show(chart) {
    this.#chart = chart;
    set(this.#one("svg"), "aria-label", chart.summary);
    set(this.#one("[data-grid]"), "d", chart.grid);
    this.#one("[data-nothing]").toggleAttribute("hidden", !chart.empty);
    const ticks = this.#one(".ticks");
    if (ticks.childElementCount !== chart.ticks.length) {
      ticks.replaceChildren(...chart.ticks.map(() => document.createElement("li")));
    }
    chart.ticks.forEach((tick, index) => write(ticks.children[index], tick));
    for (const series of chart.series) {
      const group = this.#one(`g[data-series="${series.key}"]`);
      set(/** @type {Element} */ (group.querySelector("[data-line]")), "d", series.line);
      set(/** @type {Element} */ (group.querySelector("[data-area]")), "d", series.area);
    }
    this.#readOut();
    this.#fillTable();
  }

  #readOut() {
    if (!this.#chart) return;
    const { at, series } = this.#chart;
    const index = this.#pointed === null ? null : Math.round(this.#pointed * (at.length - 1));
    for (const one of series) {
      const text = index === null ? one.latest : one.values[index];
      write(this.#one(`li[data-series="${one.key}"] [data-latest]`), text);
    }
    write(this.#one("[data-moment]"), index === null ? "" : `${at[index]} UTC`);
    const cursor = this.#one("[data-cursor]");
    const { width, height } = /** @type {SVGSVGElement} */ (this.#one("svg")).viewBox.baseVal;
    const x = index === null ? 0 : (width * index) / Math.max(at.length - 1, 1);
    set(cursor, "d", index === null ? "" : `M${x},0V${height}`);
  }

  #fillTable() {
    if (!this.#chart || !(/** @type {HTMLDetailsElement} */ (this.#one("details")).open)) return;
    const { at, series } = this.#chart;
    const body = /** @type {HTMLTableSectionElement} */ (this.#one("[data-points]"));
    while (body.rows.length > at.length) body.deleteRow(-1);
    while (body.rows.length < at.length) {
      const row = body.insertRow();
      const head = document.createElement("th");
      head.scope = "row";
      row.append(head);
      for (const _ of series) row.insertCell().className = "number";
    }
    at.forEach((time, index) => {
      const cells = body.rows[at.length - 1 - index].cells;
      write(cells[0], time);
      series.forEach((one, column) => write(cells[column + 1], one.values[index]));
    });
  }

  /**
   * @param {string} selector
   * @returns {Element}
   */
  #one(selector) {
    return /** @type {Element} */ (this.querySelector(selector));
  }
}

customElements.define("line-chart", LineChart);
