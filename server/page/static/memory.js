// Where the memory goes, as a bar: weights, context, workspace, finished chats, and what is left.

import { plan } from "./api.js";
import { h } from "./dom.js";

const GIB = 1 << 30;

/** Parts of the bar: a field of the plan, its name, and what it is. */
const PARTS = /** @type {const} */ ([
  ["weight_bytes", "weights", "the model itself, and its adapters"],
  ["cache_bytes", "context", "keys and values of the tokens in the cache"],
  ["workspace_bytes", "workspace", "what a step needs beside them, at most"],
  ["run_bytes", "finished chats", "chats that have left the cache, in the machine's own memory"],
]);

export class Memory {
  /** @param {HTMLElement} element */
  constructor(element) {
    this.element = element;
  }

  /** Ask for a model's plan, and draw it. @param {import("./api.js").Model | undefined} model */
  async update(model) {
    if (model?.status.value !== "loaded") {
      this.element.replaceChildren(h("p", { class: "about" }, "It is told once the model is loaded."));
      return;
    }
    try {
      this.element.replaceChildren(...drawn(await plan(model.id)));
    } catch (error) {
      this.element.replaceChildren(h("p", { class: "about" }, /** @type {Error} */ (error).message));
    }
  }
}

/** @param {Record<string, any>} found */
function drawn(found) {
  const isCard = found.device !== "cpu";
  const parts = PARTS.filter(([name]) => found[name] > 0 && !(isCard && name === "run_bytes"));
  const taken = parts.reduce((sum, [name]) => sum + found[name], 0);
  const all = Math.max(found.memory_bytes, taken);
  const pieces = parts.map(([name, title]) => piece(name, `${title}: ${size(found[name])}`, found[name] / all));
  const bar = h("div", { class: "plan", role: "img", "aria-label": `Memory: ${size(taken)} of ${size(all)} planned` }, ...pieces);
  const rows = parts.map(([name, title, meaning]) => row(name, title, size(found[name]), meaning));
  const used = found.used_tokens + found.reusable_tokens;
  const notes = [
    `${found.cache_tokens.toLocaleString()} tokens as ${found.cache}: ${found.used_tokens.toLocaleString()} in use, ` +
      `${found.reusable_tokens.toLocaleString()} kept of finished chats, ${(found.cache_tokens - used).toLocaleString()} free.`,
    `A chat may have ${found.window.toLocaleString()} tokens; the model was made for ${found.trained_len.toLocaleString()}.`,
    found.host_bytes > 0 ? `${size(found.host_bytes)} of weights lie in the machine's own memory.` : "",
  ];
  return [
    h("p", { class: "about" }, `${found.model} · ${found.architecture}, ${found.format} · ${isCard ? `on ${found.device}` : "on the processor"}`),
    bar,
    h("dl", {}, ...rows.flat(), ...row("free", "left", size(all - taken), "of what may be used here")),
    ...notes.filter(Boolean).map((note) => h("p", { class: "about" }, note)),
  ];
}

/** @param {string} name @param {string} title @param {number} share */
function piece(name, title, share) {
  const element = h("span", { class: name, title });
  element.style.width = `${100 * share}%`;
  return element;
}

/** @param {string} name @param {string} title @param {string} amount @param {string} meaning */
function row(name, title, amount, meaning) {
  return [h("dt", {}, h("i", { class: name }), title, h("small", {}, meaning)), h("dd", {}, amount)];
}

/** @param {number} bytes */
function size(bytes) {
  return bytes >= GIB ? `${(bytes / GIB).toFixed(2)} GiB` : `${Math.round(bytes / (1 << 20))} MiB`;
}
