// @ts-check
// Writes a page's new values into its elements; only what differs is touched.

/** @typedef {{text: string, at: string}} Cell */
/** @typedef {{key: string, state: string, cells: Record<string, Cell>}} Row */
/**
 * @typedef {object} Page the hub's views.Page
 * @property {Record<string, string>} text
 * @property {Record<string, Record<string, string>>} shapes
 * @property {Record<string, boolean>} flags
 * @property {Record<string, import("./line-chart.js").Chart>} charts
 * @property {Record<string, Row[]>} tables
 * @property {string} announcement
 */

/**
 * @param {Element} element
 * @param {string} text
 */
export function write(element, text) {
  if (element.textContent !== text) element.textContent = text;
  // Words that are also a color and a shape: the style sheet knows them by this attribute.
  if (element.hasAttribute("data-word")) set(element, "data-word", text.toLowerCase());
  if (element instanceof HTMLProgressElement) element.value = parseFloat(text) || 0;
}

/**
 * @param {Element} element
 * @param {string} name
 * @param {string} value
 */
export function set(element, name, value) {
  if (element.getAttribute(name) !== value) element.setAttribute(name, value);
}

/** @param {Page} page */
export function show(page) {
  for (const element of find("[data-text]")) write(element, page.text[element.dataset.text ?? ""]);
  for (const element of find("[data-shape]")) {
    const shape = page.shapes[element.dataset.shape ?? ""];
    for (const [name, value] of Object.entries(shape)) set(element, name, value);
  }
  for (const element of find("[data-flag]")) {
    element.toggleAttribute("hidden", !page.flags[element.dataset.flag ?? ""]);
  }
  for (const element of find("line-chart")) {
    /** @type {import("./line-chart.js").LineChart} */ (element).show(
      page.charts[element.dataset.chart ?? ""],
    );
  }
  for (const body of find("[data-table]")) {
    showRows(body, body.dataset.table ?? "", page.tables[body.dataset.table ?? ""]);
  }
}

/**
 * @param {HTMLElement} body
 * @param {string} name
 * @param {Row[]} rows
 */
function showRows(body, name, rows) {
  const known = new Map([...body.children].map((row) => [row.getAttribute("data-key"), row]));
  rows.forEach((row, index) => {
    const element = known.get(row.key) ?? newRow(name, row.key);
    known.delete(row.key);
    if (body.children[index] !== element) body.insertBefore(element, body.children[index] ?? null);
    set(element, "data-state", row.state);
    for (const [cell, { text, at }] of Object.entries(row.cells)) {
      const place = element.querySelector(`[data-cell="${cell}"]`);
      if (!place) continue;
      write(place, text);
      if (at && place.getAttribute("datetime") !== at) {
        set(place, "datetime", at);
        set(place, "title", new Date(at).toLocaleString());
      }
    }
  });
  for (const element of known.values()) element.remove();
}

/**
 * @param {string} name
 * @param {string} key
 * @returns {Element}
 */
function newRow(name, key) {
  const pattern = /** @type {HTMLTemplateElement} */ (
    document.querySelector(`template[data-row="${name}"]`)
  );
  const row = /** @type {DocumentFragment} */ (pattern.content.cloneNode(true)).children[0];
  row.setAttribute("data-key", key);
  for (const link of row.querySelectorAll("[data-link]")) {
    set(link, "href", link.getAttribute("data-link") + encodeURIComponent(key));
  }
  return row;
}

/**
 * @param {string} selector
 * @returns {NodeListOf<HTMLElement>}
 */
function find(selector) {
  return document.querySelectorAll(selector);
}
