// Puts the page together.

import { key } from "./api.js";
import { App } from "./app.js";
import { Composer } from "./composer.js";
import { byId, h, icon } from "./dom.js";
import { listenToKeys } from "./keys.js";
import { Meter } from "./meter.js";
import { Odds } from "./odds.js";
import { Settings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { Thread } from "./thread.js";

const DRAWERS = ["chats", "settings"];
const wide = matchMedia("(min-width: 72rem)");
const app = new App();
const thread = new Thread(app);
const settings = new Settings(app);
const sidebar = new Sidebar(app, () => wide.matches || closeDrawers());
new Composer(app, thread);
new Meter(app);
new Odds(thread);

// ---- drawers ----

/** @param {string} id @param {boolean} isOpen */
function setDrawer(id, isOpen) {
  document.body.classList.toggle(`with-${id}`, isOpen);
  byId(id).inert = !isOpen;
  byId(`open-${id}`).setAttribute("aria-expanded", String(isOpen));
  if (isOpen && id === "settings") void settings.memory.update(app.model);
}

/** @param {string} id */
function toggle(id) {
  const isOpen = !document.body.classList.contains(`with-${id}`);
  if (isOpen && !wide.matches) closeDrawers();
  setDrawer(id, isOpen);
  if (isOpen) byId(id).focus();
}

/** Close those that lie over the chat. Returns whether there was one. */
function closeDrawers() {
  const open = DRAWERS.filter((id) => document.body.classList.contains(`with-${id}`));
  for (const id of open) setDrawer(id, false);
  return open.length > 0;
}

for (const id of DRAWERS) {
  byId(`open-${id}`).append(icon(id === "chats" ? "chats" : "settings"));
  byId(`open-${id}`).addEventListener("click", () => toggle(id));
  byId(`close-${id}`).append(icon("close"));
  byId(`close-${id}`).addEventListener("click", () => setDrawer(id, false));
  setDrawer(id, id === "chats" && wide.matches);
}
byId("shade").addEventListener("click", closeDrawers);
byId("new-chat").prepend(icon("plus"));
byId("to-end").append(icon("down"));

// ---- light and dark ----

const THEMES = /** @type {const} */ (["auto", "light", "dark"]);

function showTheme() {
  const theme = document.documentElement.dataset.theme ?? "auto";
  const button = byId("theme");
  button.replaceChildren(icon(/** @type {"auto" | "light" | "dark"} */ (theme)));
  button.title = `Colours: ${theme}`;
  button.setAttribute("aria-label", `Colours: ${theme}`);
}

byId("theme").addEventListener("click", () => {
  const now = THEMES.indexOf(/** @type {any} */ (document.documentElement.dataset.theme ?? "auto"));
  const next = THEMES[(now + 1) % THEMES.length];
  if (next === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = next;
  localStorage.setItem("tightrope.theme", next);
  showTheme();
});
showTheme();

// ---- the model, and the key ----

const choice = /** @type {HTMLSelectElement} */ (byId("model"));
choice.addEventListener("change", () => app.prefer({ model: choice.value }));
choice.addEventListener("focus", () => void app.relist());
let listed = "";
app.listen(() => {
  const options = app.models.map((model) => ({ id: model.id, text: `${model.parent ? "+ " : ""}${model.id}${stateOf(model)}` }));
  const names = JSON.stringify(options);
  if (names !== listed) choice.replaceChildren(...options.map(({ id, text }) => h("option", { value: id }, text)));
  listed = names;
  choice.disabled = options.length === 0;
  if (app.model !== undefined) choice.value = app.model.id;
});

/** What the list says of a model that isn't loaded. @param {import("./api.js").Model} model */
function stateOf({ status }) {
  return status.value === "loaded" ? "" : ` (${status.value})`;
}

/** Ask for the key until one is given. @returns {Promise<void>} */
function askKey() {
  const dialog = /** @type {HTMLDialogElement} */ (byId("key-dialog"));
  const input = /** @type {HTMLInputElement} */ (byId("key"));
  byId("key-wrong").hidden = !key.get();
  input.value = "";
  if (!dialog.open) dialog.showModal();
  return new Promise((resolve) => {
    byId("key-form").addEventListener(
      "submit",
      (event) => {
        event.preventDefault();
        key.set(input.value.trim());
        dialog.close();
        resolve();
      },
      { once: true },
    );
  });
}
byId("key-dialog").addEventListener("cancel", (event) => event.preventDefault());
app.onlocked = () => void askKey().then(() => app.connect(askKey));
const help = /** @type {HTMLDialogElement} */ (byId("help"));
byId("help-open").addEventListener("click", () => help.showModal());
byId("help-close").addEventListener("click", () => help.close());

listenToKeys(app, thread, { newChat: () => sidebar.begin(), closeDrawers, toggle });

// ---- begin ----

await app.store.open();
const [latest] = await app.store.titles();
app.chat = (latest && (await app.store.get(latest.id))) ?? app.chat; // It is there to read, whatever the server does.
app.changed();
await app.connect(askKey);
app.show(app.chat); // An answer that was under way is read on.
byId("say").focus({ preventScroll: true });
document.body.dataset.ready = "true";
if (byId("settings").inert === false) void settings.memory.update(app.model);
