// Elements are made here and nowhere else: by createElement and text, never from markup.

const PROPERTIES = new Set(["textContent", "value", "checked", "disabled", "hidden", "open", "htmlFor", "id"]);

/**
 * An element with attributes, listeners and children.
 *
 * @param {string} tag
 * @param {Record<string, unknown>} [options] a name in PROPERTIES is a property, a function under `onX` a listener of
 *   the event X, and all others are attributes; undefined, null and false are left out
 * @param {...(Node | string | null | undefined | false)} children
 * @returns {HTMLElement}
 */
export function h(tag, options = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), /** @type {EventListener} */ (value));
    else if (PROPERTIES.has(name)) Reflect.set(element, name, value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(.../** @type {(Node | string)[]} */ (children.filter((child) => child || child === "")));
  return element;
}

/** Paths of icons on a field of 24 by 24, drawn by lines. */
const ICONS = {
  chats: "M4 6h16M4 12h10M4 18h13",
  settings: "M4 7h9m5 0h2M4 17h3m5 0h8M13 4.5v5M9 14.5v5",
  send: "M12 19V5m-6 6 6-6 6 6",
  stop: "M7 7h10v10H7z",
  left: "m14.5 6-6 6 6 6",
  right: "m9.5 6 6 6-6 6",
  edit: "M4 20h4L19 9l-4-4L4 16zM13 7l4 4",
  copy: "M9 9h11v11H9zM15 9V4H4v11h5",
  go: "M5 6l7 6-7 6zM13 6l7 6-7 6z",
  odds: "M5 20v-6m5 6V4m5 16v-9m5 9V9",
  remove: "M5 7h14M10 7V4h4v3m-7 0 1 13h8l1-13",
  plus: "M12 5v14M5 12h14",
  close: "m6 6 12 12M18 6 6 18",
  light: "M12 3v2m0 14v2M3 12h2m14 0h2M5.6 5.6 7 7m10 10 1.4 1.4M5.6 18.4 7 17M17 7l1.4-1.4M16 12a4 4 0 1 1-8 0 4 4 0 0 1 8 0z",
  dark: "M20 14.5A8.5 8.5 0 0 1 9.5 4a8.5 8.5 0 1 0 10.5 10.5z",
  auto: "M12 4a8 8 0 1 0 0 16zM12 4a8 8 0 1 1 0 16",
  down: "M12 5v14m6-6-6 6-6-6",
};

/**
 * @param {keyof typeof ICONS} name
 * @returns {SVGElement}
 */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

/**
 * A button that shows an icon alone; its label is for readers aloud, and shown where the pointer rests.
 *
 * @param {keyof typeof ICONS} name
 * @param {string} label
 * @param {(event: Event) => void} onclick
 * @param {Record<string, unknown>} [options]
 * @returns {HTMLButtonElement}
 */
export function iconButton(name, label, onclick, options = {}) {
  const all = { type: "button", class: "quiet", "aria-label": label, title: label, onclick, ...options };
  return /** @type {HTMLButtonElement} */ (h("button", all, icon(name)));
}

/**
 * The element of the page with this id.
 *
 * @template {HTMLElement} [T=HTMLElement]
 * @param {string} id
 * @returns {T}
 */
export function byId(id) {
  const element = document.getElementById(id);
  if (element === null) throw new Error(`the page has no #${id}`);
  return /** @type {T} */ (element);
}
