// The chat on the page: its turns one below the other, the end kept in sight while an answer comes.

import { path, siblings } from "./chat.js";
import { byId, h } from "./dom.js";
import { TurnView } from "./turn.js";

/** @typedef {import("./app.js").App} App */

const NEAR = 80; // Pixels above the end that still count as the end.

export class Thread {
  /** @type {Map<number, TurnView>} */
  views = new Map();
  #chat = "";
  #list = byId("thread");
  #scroller = byId("scroller");
  #wasWriting = false;
  #sticks = true;
  #width = 0;

  /** @param {App} app */
  constructor(app) {
    this.app = app;
    app.listen(() => this.update());
    this.#scroller.addEventListener("scroll", () => {
      const { scrollTop, clientHeight, clientWidth, scrollHeight } = this.#scroller;
      if (clientWidth !== this.#width) return; // It isn't the visitor who scrolls, but a drawer that opens.
      this.#sticks = scrollHeight - scrollTop - clientHeight < NEAR;
      byId("to-end").hidden = this.#sticks;
    });
    new ResizeObserver(() => {
      this.#width = this.#scroller.clientWidth;
      if (this.#sticks) this.toEnd();
    }).observe(this.#scroller);
    byId("to-end").addEventListener("click", () => this.toEnd());
    this.#list.addEventListener("click", (event) => void copyCode(/** @type {HTMLElement} */ (event.target)));
  }

  update() {
    const { app } = this;
    const { chat } = app;
    if (chat.id !== this.#chat) {
      this.views.clear();
      this.#list.replaceChildren();
      this.#chat = chat.id;
      this.#sticks = true;
    }
    const turns = path(chat);
    const present = new Set(turns.map(({ id }) => id));
    for (const [id, view] of this.views) {
      if (present.has(id)) continue;
      view.element.remove();
      this.views.delete(id);
    }
    turns.forEach((turn, place) => {
      const view = this.#view(turn);
      if (this.#list.children[place] !== view.element) this.#list.insertBefore(view.element, this.#list.children[place] ?? null);
      const all = siblings(chat, turn);
      const isCut = app.firstKept === turn.id;
      view.update({ place: 1 + all.indexOf(turn), count: all.length, isLast: place === turns.length - 1, isCut });
    });
    byId("welcome").hidden = turns.length > 0;
    this.#announce();
    if (this.#sticks) this.#scroller.scrollTop = this.#scroller.scrollHeight;
  }

  toEnd() {
    this.#sticks = true;
    this.#scroller.scrollTop = this.#scroller.scrollHeight;
  }

  /** The view of the last turn. */
  get last() {
    return this.views.get(path(this.app.chat).at(-1)?.id ?? 0);
  }

  /** @param {import("./chat.js").Turn} turn */
  #view(turn) {
    const known = this.views.get(turn.id);
    if (known?.turn === turn) return known;
    known?.element.remove();
    const view = new TurnView(this.app, turn);
    this.views.set(turn.id, view);
    return view;
  }

  /** Say to readers aloud that an answer has begun or ended. */
  #announce() {
    const isWriting = this.app.answer !== null;
    if (isWriting === this.#wasWriting) return;
    this.#wasWriting = isWriting;
    byId("announced").textContent = isWriting ? "An answer is being written." : "The answer has ended.";
  }
}

/** @param {HTMLElement} button */
async function copyCode(button) {
  if (button.dataset?.copies !== "code") return;
  const code = button.closest(".code")?.querySelector("pre");
  await navigator.clipboard?.writeText(code?.textContent ?? "");
  button.replaceWith(h("span", { class: "copy" }, "Copied"));
}
