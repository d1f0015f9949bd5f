// One answer on its way into a turn: asked for, read as it comes, read on after a broken line, stopped.

import { Refused, call } from "./api.js";
import { EventReader } from "./sse.js";
import { Gatherer } from "./tokens.js";

/** @typedef {import("./chat.js").Turn} Turn */

const TRIES = 6; // Of a line that broke, each twice as long after the one before.
const FIRST_WAIT_MS = 300;

export class Answer {
  #control = new AbortController();
  #gatherer = new Gatherer();
  #before;
  #begunMs = performance.now();
  #firstMs = 0;
  #numChunks = 0;
  #isOver = false;
  /** How far the prompt has been read, in tokens. @type {{total: number, processed: number} | null} */
  progress = null;

  /**
   * @param {Turn} turn gains text; what it has already stays in front
   * @param {number} window in tokens, to be kept with its usage
   * @param {() => void} changed
   */
  constructor(turn, window, changed) {
    this.turn = turn;
    this.window = window;
    this.changed = changed;
    this.#before = { text: turn.text.length, thought: (turn.thought ?? "").length, odds: turn.odds ?? [] };
  }

  /** Whether nothing of it has come yet. */
  get isSilent() {
    return this.#firstMs === 0;
  }

  /** Ask for it, and read it to its end. Throws Refused before its first word. @param {object} body */
  async write(body) {
    for (const field of /** @type {const} */ (["error", "end", "usage", "firstS", "rate"])) delete this.turn[field];
    const options = { method: "POST", body, signal: this.#control.signal, headers: { "X-Resumable": "1" } };
    await this.#follow(() => call("/v1/chat/completions", options));
  }

  /** Read on in one that was begun before this page was loaded. */
  async readOn() {
    await this.#follow(() => this.#rest());
  }

  /** End it where it is; the server stops, too. */
  stop() {
    const { stream } = this.turn;
    this.#end("stopped");
    this.#control.abort();
    if (stream !== undefined) call(`/v1/stream/${encodeURIComponent(stream.id)}`, { method: "DELETE" }).catch(() => {});
  }

  /** Read no further; it is written on, and can be read on. */
  leave() {
    this.#isOver = true;
    this.#control.abort();
  }

  #rest() {
    const { id, from } = /** @type {import("./chat.js").Stream} */ (this.turn.stream);
    return call(`/v1/stream/${encodeURIComponent(id)}?from=${from}`, { signal: this.#control.signal });
  }

  /** @param {() => Promise<Response>} ask */
  async #follow(ask) {
    for (let tries = 0; !this.#isOver; tries += 1) {
      try {
        const reply = await (tries === 0 ? ask() : this.#rest());
        const id = reply.headers.get("X-Stream-Id");
        if (id !== null) this.turn.stream ??= { id, from: 0 };
        this.changed();
        await this.#read(reply, () => (tries = 0));
      } catch (error) {
        if (this.#isOver) return;
        const isLost = error instanceof Refused && error.status !== 0;
        if (this.turn.stream === undefined) throw error;
        if (isLost || tries >= TRIES) {
          this.#end("cut");
          return;
        }
      }
      if (!this.#isOver) await new Promise((resolve) => setTimeout(resolve, FIRST_WAIT_MS * 2 ** tries));
    }
  }

  /** Take in what comes until the line ends. @param {Response} reply @param {() => void} heard */
  async #read(reply, heard) {
    const bytes = /** @type {ReadableStream<Uint8Array>} */ (reply.body).getReader();
    const events = new EventReader();
    const base = this.turn.stream?.from ?? 0;
    for (;;) {
      const { done, value } = await bytes.read();
      if (done || this.#isOver) return;
      heard();
      for (const data of events.feed(value)) this.#take(data);
      if (this.turn.stream !== undefined) this.turn.stream.from = base + events.consumed;
      this.changed();
    }
  }

  /** @param {string} data of one event */
  #take(data) {
    if (data === "[DONE]") return this.#end(this.turn.end ?? "stop");
    const event = JSON.parse(data);
    if (event.error) return this.#fail(String(event.error.message ?? event.error));
    if (event.prompt_progress) this.progress = event.prompt_progress;
    if (event.usage) this.#count(event.usage);
    for (const choice of event.choices ?? []) this.#add(choice);
  }

  /** @param {any} choice of a chunk */
  #add({ delta = {}, logprobs, finish_reason, stop_reason }) {
    const { turn } = this;
    if (logprobs?.content) this.#gatherer.add(logprobs.content);
    if (delta.reasoning_content) turn.thought = (turn.thought ?? "") + delta.reasoning_content;
    if (delta.content) turn.text += delta.content;
    if (delta.content || delta.reasoning_content) {
      this.#firstMs ||= performance.now();
      this.#numChunks += 1;
    }
    if (finish_reason === "error") this.#fail(String(stop_reason ?? "The answer failed."));
    else if (finish_reason) turn.end = finish_reason;
    if (logprobs?.content) this.#keepOdds();
  }

  #keepOdds() {
    const { text, thought, odds } = this.#before;
    const run = this.#gatherer.run((this.turn.thought ?? "").slice(thought), this.turn.text.slice(text), text);
    this.turn.odds = run === null ? odds : [...odds, run];
  }

  /** @param {any} usage */
  #count(usage) {
    const { cached_tokens: cached = 0, moved_tokens: moved = 0 } = usage.prompt_tokens_details ?? {};
    this.turn.usage = { prompt: usage.prompt_tokens, cached, moved, written: usage.completion_tokens, window: this.window };
    if (!this.#firstMs || this.#before.text) return;
    this.turn.firstS = (this.#firstMs - this.#begunMs) / 1000;
    const seconds = (performance.now() - this.#firstMs) / 1000;
    if (usage.completion_tokens > 1 && seconds > 0) this.turn.rate = (usage.completion_tokens - 1) / seconds;
  }

  /** Tokens a second so far. */
  get rate() {
    const seconds = (performance.now() - this.#firstMs) / 1000;
    return this.isSilent || this.#numChunks < 2 || seconds <= 0 ? 0 : (this.#numChunks - 1) / seconds;
  }

  /** @param {string} message */
  #fail(message) {
    this.turn.error = message;
    this.#end("error");
  }

  /** @param {string} how */
  #end(how) {
    if (this.#isOver) return;
    this.#isOver = true;
    this.turn.end = how;
    delete this.turn.stream;
    this.changed();
  }
}
