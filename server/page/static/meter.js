// The window as a line: what was kept of the last prompt, what was moved, what was new, the answer, and the room left.

import { path } from "./chat.js";
import { byId, h } from "./dom.js";

/** @typedef {import("./app.js").App} App */

/** Parts of the line, with what each is called and means. */
const PARTS = /** @type {const} */ ([
  ["kept", "kept", "computed before, and used as it was"],
  ["moved", "moved", "computed before at another place, and moved: nearly exact"],
  ["new", "new", "computed for this answer"],
  ["written", "answered", "written by the model"],
]);

export class Meter {
  #line = byId("rope");
  #legend = byId("legend");
  #shown = "";

  /** @param {App} app */
  constructor(app) {
    this.app = app;
    for (const [part] of PARTS) this.#line.append(h("span", { class: part }));
    app.listen(() => this.update());
  }

  update() {
    const usage = path(this.app.chat).findLast((turn) => turn.usage !== undefined)?.usage;
    const window = usage?.window || this.app.model?.max_model_len || 0;
    const key = JSON.stringify([usage, window]);
    if (key === this.#shown) return;
    this.#shown = key;
    const sizes = {
      kept: usage === undefined ? 0 : usage.cached - usage.moved,
      moved: usage?.moved ?? 0,
      new: usage === undefined ? 0 : usage.prompt - usage.cached,
      written: usage?.written ?? 0,
    };
    PARTS.forEach(([part], place) => {
      const piece = /** @type {HTMLElement} */ (this.#line.children[place]);
      piece.style.width = `${window ? (100 * sizes[part]) / window : 0}%`;
    });
    const sum = sizes.kept + sizes.moved + sizes.new + sizes.written;
    const shown = PARTS.filter(([part]) => sizes[part] > 0);
    const all = window ? `${sum.toLocaleString()} of ${window.toLocaleString()} tokens` : "";
    this.#line.setAttribute("aria-label", [`Context: ${all}`, ...shown.map(([part, name]) => `${sizes[part]} ${name}`)].join(", "));
    this.#legend.replaceChildren(
      h("span", { class: "sum" }, all),
      ...shown.map(([part, name, meaning]) =>
        h("span", { title: meaning }, h("i", { class: part }), `${sizes[part].toLocaleString()} ${name}`),
      ),
    );
  }
}
