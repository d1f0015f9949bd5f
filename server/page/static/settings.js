// The drawer of settings: the system message, and every field of sampling with its meaning.

import { forgetUsage } from "./chat.js";
import { byId, h } from "./dom.js";
import { GROUPS, firstValues, meant } from "./fields.js";
import { Memory } from "./memory.js";

/** @typedef {import("./app.js").App} App */
/** @typedef {import("./fields.js").Field} Field */

export class Settings {
  #chat = "";
  #system = /** @type {HTMLTextAreaElement} */ (byId("system"));
  /** Each field's own part of the page, and what shows its value there. @type {Map<Field, {show: () => void}>} */
  #parts = new Map();
  #counts = /** @type {(() => void)[]} */ ([]);

  /** @param {App} app */
  constructor(app) {
    this.app = app;
    this.memory = new Memory(byId("memory"));
    this.#system.addEventListener("input", () => {
      app.chat.system = this.#system.value;
      app.prefer({ system: this.#system.value });
      forgetUsage(app.chat, 0);
    });
    this.#system.addEventListener("change", () => void app.save());
    byId("fields").append(...GROUPS.map((group, place) => this.#group(group, place === 0)));
    byId("odds-count").append(...this.#oddsSettings());
    byId("reset").addEventListener("click", () => {
      app.prefer({ values: firstValues() });
      this.#showAll();
    });
    app.listen(() => {
      if (app.chat.id === this.#chat) return;
      this.#chat = app.chat.id;
      this.#system.value = app.chat.system;
    });
    this.#showAll();
  }

  #showAll() {
    for (const part of this.#parts.values()) part.show();
    for (const count of this.#counts) count();
  }

  /** @param {import("./fields.js").Group} group @param {boolean} isOpen */
  #group(group, isOpen) {
    const set = h("span", { class: "set" });
    this.#counts.push(() => {
      const number = group.fields.filter((field) => meant(field, this.app.preferences.values[field.name]) !== undefined).length;
      set.textContent = number ? `${number} set` : "";
    });
    const parts = group.fields.map((field) => this.#field(field));
    return h("details", { open: isOpen }, h("summary", {}, group.title, set), h("p", { class: "about" }, group.about), ...parts);
  }

  /** @param {Field} field */
  #field(field) {
    const { values } = this.app.preferences;
    const id = `field-${field.name}`;
    const inputs = field.kind === "number" ? numberInputs(field, id) : [otherInput(field, id)];
    const part = h(
      "div",
      { class: `field ${field.kind}` },
      h("label", { htmlFor: id }, field.label, " ", h("code", {}, field.name)),
      ...inputs,
      h("p", { class: "about", id: `${id}-about` }, field.about),
    );
    const show = () => {
      const value = this.app.preferences.values[field.name] ?? field.neutral ?? "";
      for (const input of inputs) {
        if (field.kind === "flag") /** @type {HTMLInputElement} */ (input).checked = value === true;
        else if (input !== document.activeElement) input.value = String(value);
      }
      part.classList.toggle("is-set", meant(field, this.app.preferences.values[field.name]) !== undefined);
    };
    for (const input of inputs) {
      input.addEventListener("input", () => {
        const given = field.kind === "flag" ? /** @type {HTMLInputElement} */ (input).checked : input.value;
        this.app.preferences.values[field.name] = field.kind === "number" && given !== "" ? Number(given) : given;
        this.app.prefer({});
        show();
        for (const count of this.#counts) count();
      });
    }
    this.#parts.set(field, { show });
    return part;
  }

  #oddsSettings() {
    const { app } = this;
    const count = /** @type {HTMLInputElement} */ (
      h("input", { type: "number", id: "odds-number", min: 0, max: 20, step: 1, value: String(app.preferences.odds) })
    );
    count.addEventListener("input", () => app.prefer({ odds: Math.min(Math.max(Math.round(Number(count.value)), 0), 20) }));
    const marks = /** @type {HTMLInputElement} */ (h("input", { type: "checkbox", id: "odds-marks", checked: app.preferences.marks }));
    const mark = () => byId("thread").classList.toggle("marked", app.preferences.marks);
    marks.addEventListener("change", () => {
      app.prefer({ marks: marks.checked });
      mark();
    });
    mark();
    return [
      h("div", { class: "field number" }, h("label", { htmlFor: "odds-number" }, "Rivals shown for each token"), count,
        h("p", { class: "about" }, "Rest the pointer on a word to see its probability; 0 asks for none.")),
      h("div", { class: "field flag" }, h("label", { htmlFor: "odds-marks" }, "Underline unlikely words"), marks),
    ];
  }
}

/** A slider, and a number that may go beyond it. @param {Field} field @param {string} id */
function numberInputs(field, id) {
  const bounds = { min: field.low, step: field.step, "aria-describedby": `${id}-about` };
  const slider = h("input", { type: "range", ...bounds, max: field.high, "aria-label": field.label, tabindex: "-1" });
  const number = h("input", { type: "number", ...bounds, step: "any", max: field.most, id, inputmode: "decimal" });
  return /** @type {HTMLInputElement[]} */ ([slider, number]);
}

/** @param {Field} field @param {string} id @returns {HTMLInputElement | HTMLTextAreaElement | HTMLSelectElement} */
function otherInput(field, id) {
  const shared = { id, "aria-describedby": `${id}-about` };
  if (field.kind === "flag") return /** @type {HTMLInputElement} */ (h("input", { type: "checkbox", ...shared }));
  if (field.kind === "choice") {
    const options = (field.options ?? []).map((value) => h("option", { value }, value || "as the model has it"));
    return /** @type {HTMLSelectElement} */ (h("select", shared, ...options));
  }
  return /** @type {HTMLTextAreaElement} */ (h("textarea", { ...shared, rows: 2, spellcheck: "false" }));
}
