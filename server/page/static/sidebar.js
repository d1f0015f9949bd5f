// The list of chats: open, rename, delete, and all of them as a file.

import { newChat } from "./chat.js";
import { byId, h, iconButton } from "./dom.js";
import { exported, imported } from "./transfer.js";

/** @typedef {import("./app.js").App} App */
/** @typedef {import("./store.js").Title} Title */

export class Sidebar {
  #list = byId("chat-list");
  #shown = "";

  /** @param {App} app @param {() => void} opened a chat was chosen */
  constructor(app, opened) {
    this.app = app;
    this.opened = opened;
    byId("new-chat").addEventListener("click", () => this.begin());
    byId("export").addEventListener("click", () => void this.#export());
    const file = byId("import-file");
    byId("import").addEventListener("click", () => file.click());
    file.addEventListener("change", () => void this.#import(/** @type {HTMLInputElement} */ (file)));
    app.listen(() => void this.update());
  }

  /** A chat without a word. */
  begin() {
    this.app.show(newChat(this.app.preferences.system));
    this.opened();
    byId("say").focus();
  }

  async update() {
    const titles = await this.app.store.titles();
    const key = JSON.stringify([titles.map(({ id, title }) => [id, title]), this.app.chat.id, this.app.store.isKept]);
    if (key === this.#shown) return;
    this.#shown = key;
    this.#list.replaceChildren(...titles.map((title) => this.#row(title)));
    byId("not-kept").hidden = this.app.store.isKept;
    document.title = titles.find(({ id }) => id === this.app.chat.id)?.title ?? "tightrope";
  }

  /** @param {Title} title */
  #row({ id, title }) {
    const isOpen = id === this.app.chat.id;
    return h(
      "li",
      { class: isOpen ? "open" : "" },
      h("button", { type: "button", class: "title", "aria-current": isOpen ? "page" : null, onclick: () => this.#open(id) }, title),
      iconButton("edit", "Rename", () => void this.#rename(id, title)),
      iconButton("remove", "Delete chat", () => void this.#remove(id, title)),
    );
  }

  /** @param {string} id */
  async #open(id) {
    const chat = id === this.app.chat.id ? this.app.chat : await this.app.store.get(id);
    if (chat !== undefined && chat !== this.app.chat) this.app.show(chat);
    this.opened();
  }

  /** @param {string} id @param {string} title */
  async #rename(id, title) {
    const given = prompt("What should it be called?", title)?.trim().slice(0, 200);
    const chat = id === this.app.chat.id ? this.app.chat : await this.app.store.get(id);
    if (!given || chat === undefined) return;
    chat.title = given;
    await this.app.store.put(chat);
    this.app.changed();
  }

  /** @param {string} id @param {string} title */
  async #remove(id, title) {
    if (!confirm(`Delete "${title}"?`)) return;
    if (id === this.app.chat.id) {
      this.app.stop();
      this.app.show(newChat(this.app.preferences.system));
    }
    await this.app.store.remove(id);
    this.app.changed();
  }

  async #export() {
    const titles = await this.app.store.titles();
    const chats = (await Promise.all(titles.map(({ id }) => this.app.store.get(id)))).filter((chat) => chat !== undefined);
    const url = URL.createObjectURL(new Blob([exported(chats)], { type: "application/json" }));
    h("a", { href: url, download: `tightrope-chats-${new Date().toISOString().slice(0, 10)}.json` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 60_000);
  }

  /** @param {HTMLInputElement} input */
  async #import(input) {
    const file = input.files?.[0];
    input.value = "";
    if (file === undefined) return;
    try {
      const chats = imported(await file.text());
      for (const chat of chats) await this.app.store.put(chat);
      this.app.tell(chats.length === 1 ? "One chat is here now." : `${chats.length} chats are here now.`);
    } catch (error) {
      this.app.tell(/** @type {Error} */ (error).message, true);
    }
  }
}
