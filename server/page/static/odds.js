// The probabilities of a token: where the pointer rests on it, where it is tapped, and by arrow keys.

import { byId, h } from "./dom.js";
import { share, visible } from "./tokens.js";

/** @typedef {import("./thread.js").Thread} Thread */
/** @typedef {import("./chat.js").Token} Token */

const GAP = 8;

export class Odds {
  #card = byId("odds");
  #list = byId("thread");
  /** @type {HTMLElement | null} */
  #at = null;

  /** @param {Thread} thread */
  constructor(thread) {
    this.thread = thread;
    this.#list.addEventListener("pointerover", (event) => {
      if (/** @type {PointerEvent} */ (event).pointerType !== "touch") this.#point(event.target);
    });
    this.#list.addEventListener("pointerleave", () => this.hide());
    this.#list.addEventListener("click", (event) => this.#click(/** @type {HTMLElement} */ (event.target)));
    this.#list.addEventListener("keydown", (event) => this.#key(event));
    byId("scroller").addEventListener("scroll", () => this.hide(), { passive: true });
  }

  hide() {
    this.#card.hidden = true;
    this.#at?.classList.remove("shown");
    this.#at = null;
  }

  /** @param {EventTarget | null} target */
  #point(target) {
    const token = target instanceof HTMLElement ? target.closest(".token") : null;
    if (token === null) this.hide();
    else if (token !== this.#at) this.#show(/** @type {HTMLElement} */ (token));
  }

  /** @param {HTMLElement} target */
  #click(target) {
    const button = /** @type {HTMLElement | null} */ (target.closest("[data-odds]"));
    if (button === null) return this.#point(target);
    const article = /** @type {HTMLElement} */ (button.closest("article"));
    const isOn = article.classList.toggle("marked");
    button.setAttribute("aria-pressed", String(isOn));
    const first = /** @type {HTMLElement | null} */ (article.querySelector(".token"));
    if (isOn && first !== null) this.#show(first);
    else this.hide();
  }

  /** On the button arrows go from token to token. @param {KeyboardEvent} event */
  #key(event) {
    const button = /** @type {HTMLElement} */ (event.target).closest("[data-odds]");
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (button === null || step === undefined || this.#at === null) return;
    const all = /** @type {HTMLElement[]} */ ([...(button.closest("article")?.querySelectorAll(".token") ?? [])]);
    const next = all[all.indexOf(this.#at) + step];
    if (next !== undefined) this.#show(next);
    event.preventDefault();
    event.stopPropagation();
  }

  /** @param {HTMLElement} element */
  #show(element) {
    const article = /** @type {HTMLElement} */ (element.closest("article"));
    const found = this.thread.views.get(Number(article.dataset.turn))?.tokens[Number(element.dataset.token)];
    if (found === undefined) return;
    this.hide();
    this.#at = element;
    element.classList.add("shown");
    this.#card.replaceChildren(...rows(found.token));
    this.#card.hidden = false;
    const box = element.getBoundingClientRect();
    const card = this.#card.getBoundingClientRect();
    const left = Math.max(GAP, Math.min(box.left, innerWidth - card.width - GAP));
    const isAbove = box.top - card.height - GAP > 0;
    this.#card.style.left = `${left}px`;
    this.#card.style.top = `${isAbove ? box.top - card.height - GAP : box.bottom + GAP}px`;
  }
}

/** The token and its rivals, the likeliest first. @param {Token} token */
function rows([text, logprob, others]) {
  const all = others.some(([other]) => other === text) ? others : [...others, /** @type {[string, number]} */ ([text, logprob])];
  return [...all].sort((a, b) => b[1] - a[1]).map(([other, own]) => {
    const bar = h("span", { class: "bar" });
    bar.style.setProperty("--share", String(Math.exp(own)));
    return h("div", { class: other === text ? "row chosen" : "row" }, bar, h("code", {}, visible(other)), h("span", {}, share(own)));
  });
}
