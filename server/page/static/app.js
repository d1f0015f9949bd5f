// What a visitor does, and what comes of it. The views call these, and are told when something has changed.

import { Answer } from "./answer.js";
import * as api from "./api.js";
import * as chats from "./chat.js";
import { sampling } from "./fields.js";
import { fitting, surelyFits } from "./fit.js";
import { loadPreferences, savePreferences } from "./preferences.js";
import { ChatStore } from "./store.js";

/** @typedef {import("./chat.js").Turn} Turn */

const SAVE_MS = 1000; // While an answer comes, it is kept this often.
const RETRY_MS = 2000;
const LATEST_MS = 250; // A page that isn't seen has no frames.
const LEAST_ROOM = 64; // So many tokens at least are left for an answer.

export class App {
  preferences = loadPreferences();
  store = new ChatStore();
  chat = chats.newChat(this.preferences.system);
  /** @type {import("./api.js").Model[]} */
  models = [];
  /** @type {Answer | null} */
  answer = null;
  /** The first turn of the last prompt, where older ones had no room; 0 where all had. */
  firstKept = 0;
  /** What there is to say to the visitor, and whether it is a failure. @type {{text: string, isBad: boolean} | null} */
  notice = null;
  #listeners = /** @type {(() => void)[]} */ ([]);
  #isDue = false;
  #savedMs = 0;

  /** @param {() => void} listener is called once for all changes of a frame */
  listen(listener) {
    this.#listeners.push(listener);
  }

  changed = () => {
    if (this.#isDue) return;
    this.#isDue = true;
    const show = () => {
      if (!this.#isDue) return;
      this.#isDue = false;
      for (const listener of this.#listeners) listener();
    };
    requestAnimationFrame(show);
    setTimeout(show, LATEST_MS);
  };

  /** @param {string} text @param {boolean} [isBad] */
  tell(text, isBad = false) {
    this.notice = text ? { text, isBad } : null;
    this.changed();
  }

  // ---- the server ----

  /** The model that the next answer is asked of. */
  get model() {
    return this.models.find(({ id }) => id === this.preferences.model) ?? this.models[0];
  }

  /** Read the list of models, as often as it takes. @param {() => Promise<void>} askKey opens when a key is wanted */
  async connect(askKey) {
    for (;;) {
      try {
        this.models = await api.models();
        this.tell("");
        return;
      } catch (error) {
        const { status, message } = /** @type {api.Refused} */ (error);
        if (status === 401) await askKey();
        else {
          this.tell(status === 503 ? "The model is loading …" : message, status !== 503);
          await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
        }
      }
    }
  }

  /** Read it again: with several models an answer may have loaded one, and unloaded another. */
  async relist() {
    this.models = await api.models().catch(() => this.models);
    this.changed();
  }

  /** @param {Partial<import("./preferences.js").Preferences>} changes */
  prefer(changes) {
    Object.assign(this.preferences, changes);
    savePreferences(this.preferences);
    this.changed();
  }

  // ---- chats ----

  /** @param {chats.Chat} chat */
  show(chat) {
    this.answer?.leave(); // It is written on for a while, and read on when its chat is opened again.
    this.chat = chat;
    this.firstKept = 0;
    this.notice = null;
    const open = chats.path(chat).at(-1);
    if (open?.role === "assistant") open.end ??= "cut"; // The page went away while it came.
    if (open?.stream !== undefined) void this.#run(open, (answer) => answer.readOn());
    this.changed();
  }

  /** Keep the chat as it is; one without a word isn't worth it. */
  async save() {
    this.#savedMs = performance.now();
    if (this.chat.turns.length === 0 && !this.chat.system) return;
    await this.store.put(this.chat).catch((error) => this.tell(String(error.message), true));
    this.changed();
  }

  // ---- turns ----

  /** Say something, and have it answered. @param {string} text */
  async send(text) {
    const last = chats.path(this.chat).at(-1);
    const turn = text.trim() ? chats.addTurn(this.chat, last?.id ?? 0, "user", text) : last;
    if (turn !== undefined) await this.reply(turn);
  }

  /** Another answer to a turn of the visitor's. @param {Turn} turn */
  async reply(turn) {
    if (this.answer !== null) return;
    await this.#ask(chats.addTurn(this.chat, turn.id, "assistant", ""));
  }

  /** Another answer beside this one. @param {Turn} turn */
  async again(turn) {
    const before = this.chat.turns.find(({ id }) => id === turn.parent);
    if (before !== undefined) await this.reply(before);
  }

  /** Write on at the end of an answer; one that failed without a word is asked for once more. @param {Turn} turn */
  async goOn(turn) {
    if (this.answer === null) await this.#ask(turn);
  }

  /** A turn of the visitor's in other words, as a branch. @param {Turn} turn @param {string} text */
  async sayOtherwise(turn, text) {
    if (this.answer === null) await this.reply(chats.addTurn(this.chat, turn.parent, "user", text));
  }

  /** Move to the alternative beside; to the right of the last answer a new one is written. @param {Turn} turn @param {1 | -1} step */
  swipe(turn, step) {
    if (this.answer !== null) return;
    const all = chats.siblings(this.chat, turn);
    const next = all[all.indexOf(turn) + step];
    if (next === undefined) {
      if (step === 1 && turn.role === "assistant") void this.again(turn);
      return;
    }
    chats.choose(this.chat, next);
    void this.save();
  }

  stop() {
    this.answer?.stop();
  }

  /** @param {Turn} turn of the assistant, at the end of its branch */
  async #ask(turn) {
    if (!turn.text) Object.assign(turn, { thought: undefined, odds: undefined });
    await this.#run(turn, async (answer) => {
      if (this.model === undefined) throw new api.Refused(0, "No model is there yet.");
      const before = chats.path(this.chat, turn.id);
      const turns = turn.text ? before : before.slice(0, -1);
      const kept = await this.#fit(turns);
      this.firstKept = kept.length < turns.length ? kept[0].id : 0;
      const { odds, values } = this.preferences;
      await answer.write({
        model: this.model.id,
        messages: chats.messagesOf(this.chat.system, kept),
        ...sampling(values),
        ...(odds ? { logprobs: true, top_logprobs: odds } : {}),
        ...(turn.text ? { continue_final_message: true, add_generation_prompt: false } : {}),
        stream: true,
        stream_options: { include_usage: true },
        return_progress: true,
      });
      if (this.firstKept && turn.usage !== undefined) turn.usage.isCut = true;
    });
  }

  /** @param {Turn[]} turns */
  async #fit(turns) {
    const { id, max_model_len: window } = this.model;
    if (!window) return turns; // A model that isn't loaded yet hasn't told.
    const longest = Number(sampling(this.preferences.values).max_tokens ?? window);
    const room = window - Math.max(LEAST_ROOM, Math.min(longest, window >> 2));
    const { system } = this.chat;
    const count = (/** @type {Turn[]} */ some) => api.count(id, chats.messagesOf(system, some));
    return fitting(turns, room, count, surelyFits(turns, system, room));
  }

  /** @param {Turn} turn @param {(answer: Answer) => Promise<void>} write */
  async #run(turn, write) {
    let kept = turn.stream?.id;
    const answer = new Answer(turn, this.model?.max_model_len ?? 0, () => {
      const isNew = turn.stream?.id !== kept; // From now on it could be read on after a reload.
      if (isNew || performance.now() - this.#savedMs > SAVE_MS) void this.save();
      kept = turn.stream?.id;
      this.changed();
    });
    this.answer = answer;
    const { chat } = this;
    const isLoaded = this.model?.status.value === "loaded";
    const listing = isLoaded ? undefined : setInterval(() => void this.relist(), RETRY_MS); // It tells that it loads.
    this.changed();
    try {
      await this.save();
      await write(answer);
    } catch (error) {
      turn.error = /** @type {Error} */ (error).message;
      turn.end = "error";
      if (error instanceof api.Refused && error.status === 401) this.onlocked();
    } finally {
      clearInterval(listing);
      if (this.answer === answer) this.answer = null;
      if (this.models.some(({ status }) => status.value !== "loaded")) await this.relist();
      chat.changed = Date.now();
      if (chat === this.chat) await this.save();
      else await this.store.put(chat).catch(() => {});
      this.changed();
    }
  }

  /** What is done when the server asks for a key in the middle. */
  onlocked = () => {};
}
