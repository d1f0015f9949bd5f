// One turn on the page: its words, thoughts folded, alternatives, and what can be done with it.

import { forgetUsage, removeTurn, rewrite } from "./chat.js";
import { h, icon, iconButton } from "./dom.js";
import { showMarkdown } from "./markdown/build.js";
import { placed } from "./tokens.js";

/** @typedef {import("./app.js").App} App */
/** @typedef {import("./chat.js").Turn} Turn */
/** @typedef {{place: number, count: number, isLast: boolean, isCut: boolean}} Where among its alternatives, and in the chat */

const ENDS = /** @type {Record<string, string>} */ ({ length: "cut at the longest answer", stopped: "stopped", cut: "cut off" });

export class TurnView {
  #shown = "";
  #text = "";
  /** Where its tokens stand. @type {ReturnType<typeof placed>} */
  tokens = [];

  /** @param {App} app @param {Turn} turn */
  constructor(app, turn) {
    this.app = app;
    this.turn = turn;
    const isAnswer = turn.role === "assistant";
    this.thought = h("div", { class: "thought-text" });
    this.summary = h("summary");
    this.folded = h("details", { class: "thought", hidden: true }, this.summary, this.thought);
    this.words = h("div", { class: isAnswer ? "words markdown" : "words plain" });
    this.problem = h("p", { class: "problem", role: "alert", hidden: true });
    this.foot = h("footer", {});
    this.cut = h("p", { class: "cut", hidden: true }, "What stands above has no room in the window, and isn't sent.");
    this.body = h("div", { class: "body" }, this.folded, this.words, this.problem, this.foot);
    const label = isAnswer ? "Answer" : "You";
    this.element = h("article", { class: turn.role, tabindex: "-1", "aria-label": label, "data-turn": turn.id }, this.cut, this.body);
  }

  /** @param {Where} where */
  update(where) {
    const { turn, app } = this;
    const answer = app.answer?.turn === turn ? app.answer : null;
    const isFree = app.answer === null;
    const key = [
      ...[turn.thought?.length, turn.end, turn.error, turn.odds?.length, turn.usage?.written, app.preferences.marks],
      ...[where.place, where.count, where.isLast, where.isCut, isFree],
    ].join("|");
    if (answer === null && key === this.#shown && turn.text === this.#text) return;
    this.#shown = key;
    this.#text = turn.text;
    this.cut.hidden = !where.isCut;
    this.element.classList.toggle("writing", answer !== null);
    this.element.classList.toggle("last", where.isLast);
    this.#showThought(answer !== null && !turn.text);
    this.tokens = placed(turn.odds ?? []);
    if (turn.role === "assistant") showMarkdown(this.words, turn.text, this.tokens);
    else this.words.textContent = turn.text;
    this.words.dataset.waits = answer !== null && !turn.text && !turn.thought ? waiting(answer.progress) : "";
    this.problem.hidden = turn.error === undefined;
    this.problem.textContent = turn.error ?? "";
    if (!this.element.classList.contains("editing")) this.foot.replaceChildren(...this.#footer(where, answer, isFree));
  }

  /** @param {boolean} isThinking */
  #showThought(isThinking) {
    const text = this.turn.thought ?? "";
    this.folded.hidden = !text;
    this.summary.textContent = isThinking ? "Thinking …" : `Thoughts · ${text.split(/\s+/).filter(Boolean).length} words`;
    if (this.thought.textContent !== text) this.thought.textContent = text;
  }

  /** @param {Where} where @param {import("./answer.js").Answer | null} answer @param {boolean} isFree */
  #footer(where, answer, isFree) {
    const { turn, app } = this;
    const isAnswer = turn.role === "assistant";
    const swipes = isAnswer || where.count > 1;
    const right = where.place === where.count ? "Another answer" : "Next";
    const swipe = h(
      "span",
      { class: "swipe", role: "group", "aria-label": "Alternatives" },
      iconButton("left", "Previous", () => app.swipe(turn, -1), { disabled: !isFree || where.place === 1 }),
      h("span", { class: "place" }, `${where.place} / ${where.count}`),
      iconButton("right", right, () => app.swipe(turn, 1), { disabled: !isFree || (!isAnswer && where.place === where.count) }),
    );
    const facts = h("span", { class: "facts" }, answer === null ? told(turn) : live(answer));
    const actions = h(
      "span",
      { class: "actions", role: "group", "aria-label": "Actions" },
      isAnswer && turn.error !== undefined && isFree && h("button", { type: "button", class: "word", onclick: () => app.goOn(turn) }, "Try again"),
      isAnswer && where.isLast && isFree && turn.error === undefined && iconButton("go", "Go on", () => app.goOn(turn)),
      isAnswer && this.tokens.length > 0 && iconButton("odds", "Probabilities", () => {}, { "data-odds": turn.id, "aria-pressed": "false" }),
      iconButton("copy", "Copy", () => navigator.clipboard?.writeText(turn.text)),
      isFree && iconButton("edit", "Edit", () => this.edit()),
      isFree && iconButton("remove", "Delete", () => this.#remove()),
    );
    return swipes ? [swipe, facts, actions] : [facts, actions];
  }

  /** Let the words be changed where they stand. */
  edit() {
    const { turn, app } = this;
    if (app.answer !== null || this.element.classList.contains("editing")) return;
    const box = /** @type {HTMLTextAreaElement} */ (h("textarea", { class: "edit", "aria-label": "Edited words", value: turn.text, rows: 3 }));
    const close = (/** @type {boolean} */ isKept) => {
      if (isKept && box.value !== turn.text) rewrite(app.chat, turn, box.value);
      this.element.classList.remove("editing");
      this.#shown = "";
      box.replaceWith(this.words);
      void app.save();
      this.element.focus();
    };
    const goOn = () => {
      const text = box.value;
      close(turn.role === "assistant");
      if (turn.role === "assistant") void app.goOn(turn);
      else void app.sayOtherwise(turn, text);
    };
    const isEnd = turn.role === "user" || this.element.classList.contains("last");
    const goes = turn.role === "assistant" ? "Keep and go on" : "Send as another branch";
    this.foot.replaceChildren(
      h("button", { type: "button", class: "word", onclick: () => close(true) }, "Keep"),
      isEnd ? h("button", { type: "button", class: "word main", onclick: goOn }, icon("go"), goes) : "",
      h("button", { type: "button", class: "word", onclick: () => close(false) }, "Cancel"),
    );
    box.addEventListener("keydown", (event) => {
      if (event.key === "Escape") close(false);
      else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) (isEnd ? goOn : () => close(true))();
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    this.element.classList.add("editing");
    this.words.replaceWith(box);
    box.style.height = `${box.scrollHeight}px`;
    box.focus();
    box.setSelectionRange(box.value.length, box.value.length);
  }

  #remove() {
    const behind = this.app.chat.turns.filter(({ parent }) => parent === this.turn.id).length;
    if (behind && !confirm("Delete this, and what stands behind it?")) return;
    forgetUsage(this.app.chat, this.turn.id);
    removeTurn(this.app.chat, this.turn);
    void this.app.save();
  }
}

/** What a finished answer's line says. @param {Turn} turn */
function told({ usage, rate, firstS, end, error }) {
  const parts = [];
  if (usage !== undefined) parts.push(`${usage.written.toLocaleString()} tokens`);
  if (rate !== undefined) parts.push(`${rate.toFixed(1)} a second`);
  if (firstS !== undefined) parts.push(`first after ${firstS.toFixed(2)} s`);
  if (end !== undefined && error === undefined && ENDS[end]) parts.push(ENDS[end]);
  return parts.join(" · ");
}

/** @param {import("./answer.js").Answer} answer */
function live(answer) {
  return answer.rate ? `${answer.rate.toFixed(1)} tokens a second` : "";
}

/** @param {{total: number, processed: number} | null} progress */
function waiting(progress) {
  return progress === null ? "…" : `reading ${progress.processed.toLocaleString()} of ${progress.total.toLocaleString()} tokens …`;
}
