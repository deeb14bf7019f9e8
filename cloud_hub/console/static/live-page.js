// @ts-check
// A page that stays fresh: one socket, its state in the bar, its values in the page. What is
// watched stands in the page: data-topic, and data-parameters as in an address.

import "./line-chart.js";
import { Live } from "./live.js";
import { show, write } from "./page.js";

const ANNOUNCE_MS = 10_000; // listeners hear what changed, not every tick

/**
 * @param {string} selector
 * @returns {HTMLElement}
 */
const one = (selector) => /** @type {HTMLElement} */ (document.querySelector(selector));

const figures = one("[data-figures]");
const mark = one("[data-live]");
const markText = one("[data-live-text]");
const status = one("[data-status]");
const pause = one("[data-pause]");
/** @type {HTMLElement | null} */
const copy = document.querySelector("[data-copy]");

const WORDS = { connecting: "Connecting", live: "Live", reconnecting: "Reconnecting", paused: "Paused" };

let announcement = "";
let announcedAt = -ANNOUNCE_MS;
let spokenState = "connecting";

/** @type {import("./live.js").Watcher} */
const watcher = {
  onValue(_topic, page) {
    show(page);
    announcement = page.announcement;
    mark.dataset.beat = mark.dataset.beat === "0" ? "1" : "0";
  },

  onState(state, ageMs) {
    mark.dataset.live = state;
    const word = document.createElement("b");
    word.textContent = WORDS[state];
    const age = ageMs === null ? "" : ` · ${Math.floor(ageMs / 1000)} s`;
    if (markText.textContent !== WORDS[state] + age) markText.replaceChildren(word, age);
    figures.dataset.figures = state === "reconnecting" ? "stale" : "";
    write(pause, state === "paused" ? "Resume" : "Pause");
    announce(state);
  },
};

/** @param {import("./live.js").State} state */
function announce(state) {
  if (state === "connecting") return;
  const changed = state !== spokenState;
  const text = state === "live" ? `Live. ${announcement}` : `${WORDS[state]}.`;
  if (changed || performance.now() - announcedAt >= ANNOUNCE_MS) {
    if (status.textContent !== text) announcedAt = performance.now();
    write(status, text);
    spokenState = state;
  }
}

const parameters = Object.fromEntries(new URLSearchParams(figures.dataset.parameters));
const live = new Live({ [figures.dataset.topic ?? ""]: parameters }, watcher);

pause.hidden = false;
pause.addEventListener("click", () => (live.paused ? live.resume() : live.pause()));

// Browsers offer the clipboard to confidential pages only.
if (copy && navigator.clipboard) {
  copy.hidden = false;
  copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(one("[data-command]").textContent ?? "");
    write(copy, "Copied");
    setTimeout(() => write(copy, "Copy"), 2000);
  });
}
