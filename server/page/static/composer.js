// Where the visitor writes, and what sends it or stops the answer.

import { byId, icon } from "./dom.js";

/** @typedef {import("./app.js").App} App */

export class Composer {
  #box = /** @type {HTMLTextAreaElement} */ (byId("say"));
  #button = /** @type {HTMLButtonElement} */ (byId("send"));
  #notice = byId("notice");
  #isWriting = /** @type {boolean | null} */ (null);

  /** @param {App} app @param {import("./thread.js").Thread} thread */
  constructor(app, thread) {
    this.app = app;
    this.thread = thread;
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#act();
    });
    this.#box.addEventListener("input", () => this.#fit());
    this.#box.addEventListener("keydown", (event) => {
      const isLineBreak = event.shiftKey || event.isComposing || matchMedia("(pointer: coarse)").matches;
      if (event.key !== "Enter" || (isLineBreak && !event.ctrlKey)) return;
      event.preventDefault();
      if (this.app.answer === null) this.#act();
    });
    app.listen(() => this.update());
    this.update();
  }

  update() {
    const { app } = this;
    const isWriting = app.answer !== null;
    if (isWriting !== this.#isWriting) {
      this.#isWriting = isWriting;
      this.#button.replaceChildren(icon(isWriting ? "stop" : "send"));
      this.#button.setAttribute("aria-label", isWriting ? "Stop" : "Send");
      this.#button.title = isWriting ? "Stop (Esc)" : "Send (Enter)";
    }
    this.#button.disabled = app.models.length === 0;
    this.#notice.hidden = app.notice === null;
    this.#notice.textContent = app.notice?.text ?? "";
    this.#notice.classList.toggle("bad", app.notice?.isBad ?? false);
  }

  /** Send what is written, or stop what is being answered. */
  #act() {
    if (this.app.answer !== null) return this.app.stop();
    if (this.app.models.length === 0) return;
    const text = this.#box.value;
    this.#box.value = "";
    this.#fit();
    this.app.tell("");
    this.thread.toEnd();
    void this.app.send(text);
  }

  /** As high as its text, within what the style allows. */
  #fit() {
    this.#box.style.height = "auto";
    this.#box.style.height = `${this.#box.scrollHeight}px`;
  }
}
