// Chats in this browser's own database. There is room for so many; none ever goes unasked.

/** @typedef {import("./chat.js").Chat} Chat */
/** @typedef {{id: string, title: string, changed: number}} Title */

export const MOST_CHATS = 500;
const MOST_LETTERS = 8_000_000; // Of one chat as JSON, probabilities left out.
const FULL_LETTERS = 2_000_000; // Beyond, the oldest answers lose their probabilities.

/** A chat can't be kept. */
export class NoRoom extends Error {}

export class ChatStore {
  /** @type {IDBDatabase | null} null where the browser keeps nothing: then chats last as long as the page */
  #database = null;
  /** @type {Map<string, Chat>} */
  #held = new Map();

  /** Whether chats outlive the page. */
  get isKept() {
    return this.#database !== null;
  }

  async open() {
    this.#database = await opened().catch(() => null);
  }

  /** All chats, the one that was changed last first. @returns {Promise<Title[]>} */
  async titles() {
    const isKept = this.#database !== null;
    /** @type {Title[]} */
    const found = isKept ? await this.#run("titles", "readonly", (store) => store.getAll()) : [...this.#held.values()];
    return found.map(({ id, title, changed }) => ({ id, title, changed })).sort((a, b) => b.changed - a.changed);
  }

  /** @param {string} id @returns {Promise<Chat | undefined>} */
  async get(id) {
    if (this.#database === null) return this.#held.get(id);
    const text = await this.#run("chats", "readonly", (store) => store.get(id));
    return text === undefined ? undefined : JSON.parse(text);
  }

  /** Keep a chat as it is now. Throws NoRoom. @param {Chat} chat */
  async put(chat) {
    const text = kept(chat);
    if (this.#database === null) {
      this.#held.set(chat.id, chat);
      return;
    }
    const titles = await this.#run("titles", "readonly", (store) => store.getAllKeys());
    if (titles.length >= MOST_CHATS && !titles.includes(chat.id)) {
      throw new NoRoom(`This browser keeps ${MOST_CHATS} chats at most: export some, and delete them.`);
    }
    const { id, title, changed } = chat;
    const work = this.#database.transaction(["titles", "chats"], "readwrite");
    work.objectStore("chats").put(text, id);
    work.objectStore("titles").put({ id, title, changed });
    await done(work);
  }

  /** @param {string} id */
  async remove(id) {
    this.#held.delete(id);
    if (this.#database === null) return;
    const work = this.#database.transaction(["titles", "chats"], "readwrite");
    work.objectStore("chats").delete(id);
    work.objectStore("titles").delete(id);
    await done(work);
  }

  /** @param {string} name @param {IDBTransactionMode} mode @param {(store: IDBObjectStore) => IDBRequest} ask */
  async #run(name, mode, ask) {
    const work = /** @type {IDBDatabase} */ (this.#database).transaction(name, mode);
    const request = ask(work.objectStore(name));
    await done(work);
    return request.result;
  }
}

/** A chat as JSON that isn't too long. @param {Chat} chat */
function kept(chat) {
  let text = JSON.stringify(chat);
  if (text.length <= FULL_LETTERS) return text;
  let over = text.length - FULL_LETTERS;
  const turns = chat.turns.map((turn) => {
    if (over <= 0 || turn.odds === undefined) return turn;
    over -= JSON.stringify(turn.odds).length;
    return { ...turn, odds: undefined };
  });
  text = JSON.stringify({ ...chat, turns });
  if (text.length > MOST_LETTERS) throw new NoRoom("This chat is too long to be kept here: export it.");
  return text;
}

/** @returns {Promise<IDBDatabase>} */
function opened() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open("tightrope", 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("chats");
      request.result.createObjectStore("titles", { keyPath: "id" });
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = request.onblocked = () => reject(request.error);
  });
}

/** @param {IDBTransaction} work @returns {Promise<void>} */
function done(work) {
  return new Promise((resolve, reject) => {
    work.oncomplete = () => resolve();
    work.onerror = work.onabort = () => reject(work.error ?? new NoRoom("This browser has no room for the chat."));
  });
}
