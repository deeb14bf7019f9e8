// @ts-check
// The tab's one socket: subscribes, reconnects, pauses. It knows no page.

const FIRST_WAIT_MS = 500;
const LONGEST_WAIT_MS = 15_000;
const SILENCE_MS = 5_000; // the hub sends every second: this long without a message is a dead link
const SIGNED_OUT = 4401;

/** @typedef {"connecting" | "live" | "reconnecting" | "paused"} State */

/**
 * @typedef {object} Watcher
 * @property {(topic: string, value: any) => void} onValue
 * @property {(state: State, ageMs: number | null) => void} onState called once a second at least
 */

export class Live {
  /** @type {WebSocket | null} */
  #socket = null;
  /** @type {State} */
  #state = "connecting";
  /** @type {number | null} */
  #lastAt = null;
  #openedAt = 0;
  #waitMs = FIRST_WAIT_MS;
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #retry;
  /** @type {string | null} */
  #build = null;
  #topics;
  #watcher;

  /**
   * @param {Record<string, object>} topics what to watch, with its parameters
   * @param {Watcher} watcher
   */
  constructor(topics, watcher) {
    this.#topics = topics;
    this.#watcher = watcher;
    setInterval(() => this.#tick(), 1000);
    addEventListener("online", () => this.#state === "reconnecting" && this.#connect());
    addEventListener("pagehide", () => this.#drop());
    // A page that comes back from the browser's memory has a closed socket.
    addEventListener("pageshow", (event) => event.persisted && this.#connect());
    this.#connect();
  }

  get paused() {
    return this.#state === "paused";
  }

  pause() {
    this.#enter("paused");
    this.#subscribe({});
  }

  resume() {
    if (this.#socket?.readyState === WebSocket.OPEN) {
      this.#openedAt = performance.now();
      this.#subscribe(this.#topics);
      this.#enter("connecting");
    } else {
      this.#enter("reconnecting");
      this.#connect();
    }
  }

  #connect() {
    clearTimeout(this.#retry);
    this.#drop();
    const socket = new WebSocket(new URL("/api/v1/live", location.href.replace(/^http/, "ws")));
    this.#socket = socket;
    this.#openedAt = performance.now();
    socket.onopen = () => {
      this.#openedAt = performance.now();
      if (!this.paused) this.#subscribe(this.#topics);
    };
    socket.onmessage = (event) => this.#receive(JSON.parse(event.data));
    socket.onclose = (event) => this.#closed(event.code);
  }

  /** Ends the socket without taking its end for a loss. */
  #drop() {
    if (!this.#socket) return;
    this.#socket.onclose = null;
    this.#socket.close();
    this.#socket = null;
  }

  /** @param {any} message */
  #receive(message) {
    if (message.hello) {
      // Another build of the hub answers: this page's scripts may not fit its messages.
      if (this.#build !== null && this.#build !== message.hello.build) location.reload();
      this.#build = message.hello.build;
    } else if (message.error) {
      console.error(message.error);
    } else if (!this.paused) {
      this.#lastAt = performance.now();
      this.#waitMs = FIRST_WAIT_MS;
      this.#watcher.onValue(message.topic, message.value);
      this.#enter("live");
    }
  }

  /** @param {number} code */
  #closed(code) {
    this.#socket = null;
    if (code === SIGNED_OUT) {
      location.reload();
      return;
    }
    if (this.paused) return;
    this.#enter("reconnecting");
    // Spread over time: tabs that lost the same hub must not return in the same instant.
    this.#retry = setTimeout(() => this.#connect(), this.#waitMs * (0.75 + Math.random() / 2));
    this.#waitMs = Math.min(this.#waitMs * 1.7, LONGEST_WAIT_MS);
  }

  #tick() {
    const heard = Math.max(this.#lastAt ?? 0, this.#openedAt);
    if (this.#socket && !this.paused && performance.now() - heard > SILENCE_MS) {
      this.#drop();
      this.#closed(0);
    }
    this.#report();
  }

  /** @param {State} state */
  #enter(state) {
    this.#state = state;
    this.#report();
  }

  #report() {
    const age = this.#lastAt === null ? null : performance.now() - this.#lastAt;
    this.#watcher.onState(this.#state, age);
  }

  /** @param {Record<string, object>} topics */
  #subscribe(topics) {
    if (this.#socket?.readyState === WebSocket.OPEN) {
      this.#socket.send(JSON.stringify({ sub: topics }));
    }
  }
}
