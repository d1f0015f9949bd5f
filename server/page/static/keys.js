// What the keyboard does. Keys without Alt or Ctrl count only where nothing is being typed.

import { byId } from "./dom.js";

/** @typedef {import("./app.js").App} App */
/** @typedef {import("./thread.js").Thread} Thread */

/**
 * @param {App} app
 * @param {Thread} thread
 * @param {{newChat: () => void, closeDrawers: () => boolean, toggle: (id: string) => void}} page
 */
export function listenToKeys(app, thread, page) {
  document.addEventListener("keydown", (event) => {
    const target = /** @type {HTMLElement} */ (event.target);
    const isTyping = target.matches("input, textarea, select");
    if (document.querySelector("dialog[open]") !== null || event.isComposing) return;
    const name = `${event.altKey ? "Alt+" : ""}${event.ctrlKey || event.metaKey ? "Ctrl+" : ""}${event.key}`;
    const action = ANYWHERE[name] ?? (isTyping ? WHILE_TYPING[name] : ELSEWHERE[name]);
    if (action?.({ app, thread, page, target }) === true) event.preventDefault();
  });
}

/** @typedef {{app: App, thread: Thread, page: any, target: HTMLElement}} Context */
/** Each returns whether it did anything. @type {Record<string, (context: Context) => boolean>} */
const ANYWHERE = {
  Escape({ app, page }) {
    if (app.answer === null) return page.closeDrawers();
    app.stop();
    return true;
  },
  "Alt+ArrowLeft": (context) => swiped(context, -1),
  "Alt+ArrowRight": (context) => swiped(context, 1),
  "Alt+ArrowUp": (context) => moved(context, -1),
  "Alt+ArrowDown": (context) => moved(context, 1),
  "Alt+n"({ page }) {
    page.newChat();
    return true;
  },
  "Alt+s"({ page }) {
    page.toggle("settings");
    return true;
  },
  "Alt+c"({ page }) {
    page.toggle("chats");
    return true;
  },
};

/** @type {Record<string, (context: Context) => boolean>} */
const WHILE_TYPING = {
  ArrowUp({ app, thread, target }) {
    const views = [...thread.views.values()].filter(({ turn }) => turn.role === "user");
    if (target.id !== "say" || /** @type {HTMLTextAreaElement} */ (target).value || app.answer !== null || !views.length) return false;
    views[views.length - 1].edit();
    return true;
  },
};

/** @type {Record<string, (context: Context) => boolean>} */
const ELSEWHERE = {
  "/"() {
    byId("say").focus();
    return true;
  },
  "?"() {
    /** @type {HTMLDialogElement} */ (byId("help")).showModal();
    return true;
  },
  e({ thread, target }) {
    const view = viewOf(thread, target);
    view?.edit();
    return view !== undefined;
  },
  ArrowLeft: (context) => isTurn(context) && swiped(context, -1),
  ArrowRight: (context) => isTurn(context) && swiped(context, 1),
};

/** @param {Context} context */
function isTurn({ target }) {
  return target.matches("article");
}

/** @param {Thread} thread @param {HTMLElement} target */
function viewOf(thread, target) {
  const article = /** @type {HTMLElement | null} */ (target.closest("article"));
  return article === null ? undefined : thread.views.get(Number(article.dataset.turn));
}

/** Move within the alternatives of the turn that has the focus, or of the last. @param {Context} context @param {1 | -1} step */
function swiped({ app, thread, target }, step) {
  const view = viewOf(thread, target) ?? thread.last;
  if (view === undefined || target.matches("textarea.edit")) return false;
  app.swipe(view.turn, step);
  return true;
}

/** Put the focus on the turn above or below. @param {Context} context @param {1 | -1} step */
function moved({ thread, target }, step) {
  const all = [...document.querySelectorAll("#thread > article")];
  const here = target.closest("article");
  const next = /** @type {HTMLElement | undefined} */ (here === null ? all.at(-1) : all[all.indexOf(here) + step]);
  if (here !== null && next === undefined && step === 1) byId("say").focus();
  next?.focus();
  next?.scrollIntoView({ block: "nearest" });
  return thread.views.size > 0;
}
