// A chat is a tree: a turn that was written anew, or an answer beside another, begins a branch. No DOM here.

/**
 * @typedef {"user" | "assistant"} Role
 * @typedef {[text: string, logprob: number, others: [string, number][]]} Token its likeliest rivals stand in `others`
 * @typedef {{at: number, tokens: Token[]}} TokenRun the tokens whose texts stand in a turn's text from `at` on
 * @typedef {{prompt: number, cached: number, moved: number, written: number, window: number, isCut?: boolean}} Usage in
 *   tokens; isCut: older turns were left out of the prompt
 * @typedef {{id: string, from: number}} Stream an answer under way, of which `from` bytes have been read
 *
 * @typedef {object} Turn
 * @property {number} id from 1 on
 * @property {number} parent the turn before it; 0 is the beginning
 * @property {Role} role
 * @property {string} text
 * @property {string} [thought] what the model thought before it
 * @property {TokenRun[]} [odds]
 * @property {Usage} [usage]
 * @property {number} [firstS] seconds to the first token
 * @property {number} [rate] tokens a second behind it
 * @property {string} [end] why it ended: stop, length, stopped, cut
 * @property {string} [error]
 * @property {Stream} [stream]
 *
 * @typedef {object} Chat
 * @property {string} id
 * @property {string} title
 * @property {string} system
 * @property {Turn[]} turns in the order in which they were made
 * @property {Record<string, number>} chosen by a turn's id the one that follows it, where there are several
 * @property {number} changed milliseconds since 1970
 */

const TITLE_LENGTH = 60;
export const UNTITLED = "New chat";

/** @param {string} [system] @returns {Chat} */
export function newChat(system = "") {
  return { id: crypto.randomUUID(), title: UNTITLED, system, turns: [], chosen: {}, changed: Date.now() };
}

/**
 * The turns that stand one behind the other, as they are chosen now.
 *
 * @param {Chat} chat
 * @param {number} [last] end with this turn
 * @returns {Turn[]}
 */
export function path(chat, last) {
  /** @type {Map<number, Turn>} */
  const next = new Map();
  for (const turn of chat.turns) {
    if (!next.has(turn.parent) || chat.chosen[turn.parent] === turn.id) next.set(turn.parent, turn);
  }
  const found = [];
  for (let turn = next.get(0); turn !== undefined; turn = next.get(turn.id)) {
    found.push(turn);
    if (turn.id === last) break;
  }
  return found;
}

/** All turns that might stand where this one stands. @param {Chat} chat @param {Turn} turn @returns {Turn[]} */
export function siblings(chat, turn) {
  return chat.turns.filter((other) => other.parent === turn.parent);
}

/**
 * Put a turn behind `parent`, and choose it.
 *
 * @param {Chat} chat
 * @param {number} parent
 * @param {Role} role
 * @param {string} text
 * @returns {Turn}
 */
export function addTurn(chat, parent, role, text) {
  const turn = { id: 1 + Math.max(0, ...chat.turns.map((other) => other.id)), parent, role, text };
  chat.turns.push(turn);
  choose(chat, turn);
  if (chat.title === UNTITLED && role === "user" && text.trim()) chat.title = titleOf(text);
  return turn;
}

/** @param {Chat} chat @param {Turn} turn */
export function choose(chat, turn) {
  chat.chosen[turn.parent] = turn.id;
  chat.changed = Date.now();
}

/**
 * Take a turn out, and all that stands behind it; a sibling takes its place.
 *
 * @param {Chat} chat
 * @param {Turn} turn
 */
export function removeTurn(chat, turn) {
  const gone = new Set([turn.id]);
  for (const other of chat.turns) if (gone.has(other.parent)) gone.add(other.id); // Parents stand before.
  const rest = siblings(chat, turn).filter((other) => other !== turn);
  chat.turns = chat.turns.filter((other) => !gone.has(other.id));
  for (const id of gone) delete chat.chosen[id];
  delete chat.chosen[turn.parent];
  const beside = rest.filter((other) => other.id < turn.id).at(-1) ?? rest[0];
  if (beside !== undefined) choose(chat, beside);
  chat.changed = Date.now();
}

/**
 * Change a turn's text where it stands; of its tokens those stay that are still in it.
 *
 * @param {Chat} chat
 * @param {Turn} turn
 * @param {string} text
 */
export function rewrite(chat, turn, text) {
  let same = 0;
  while (same < text.length && text[same] === turn.text[same]) same += 1;
  const kept = (turn.odds ?? []).map((run) => ({ at: run.at, tokens: within(run, same) }));
  turn.odds = kept.filter((run) => run.tokens.length > 0);
  turn.text = text;
  forgetUsage(chat, turn.id);
}

/**
 * What was told of prompts with a turn in them isn't so any more.
 *
 * @param {Chat} chat
 * @param {number} id 0: with the system message
 */
export function forgetUsage(chat, id) {
  const touched = new Set([id]);
  for (const turn of chat.turns) {
    if (turn.id !== id && !touched.has(turn.parent)) continue;
    touched.add(turn.id);
    delete turn.usage;
  }
  chat.changed = Date.now();
}

/** The tokens of a run that end at or before a place. @param {TokenRun} run @param {number} end */
function within(run, end) {
  let place = run.at;
  return run.tokens.filter((token) => (place += token[0].length) <= end);
}

/**
 * The messages of a request.
 *
 * @param {string} system
 * @param {Turn[]} turns
 * @returns {{role: string, content: string, reasoning_content?: string}[]}
 */
export function messagesOf(system, turns) {
  const messages = turns.map(({ role, text, thought }) => ({
    role,
    content: text,
    ...(thought ? { reasoning_content: thought } : {}),
  }));
  return system.trim() ? [{ role: "system", content: system }, ...messages] : messages;
}

/** @param {string} text */
function titleOf(text) {
  const words = text.replace(/\s+/g, " ").trim();
  return words.length > TITLE_LENGTH ? `${words.slice(0, TITLE_LENGTH - 1).trimEnd()}…` : words;
}
