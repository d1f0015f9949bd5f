// Chats as a file of JSON, out and in. What comes in may be anybody's: each value is looked at.

/** @typedef {import("./chat.js").Chat} Chat */
/** @typedef {import("./chat.js").Turn} Turn */

const FORMAT = "tightrope chats 1";
const MOST_BYTES = 64_000_000;

/** @param {Chat[]} chats @returns {string} */
export function exported(chats) {
  return JSON.stringify({ format: FORMAT, chats }, null, 1);
}

/**
 * The chats of a file. Throws an Error that says what is wrong with it.
 *
 * @param {string} text
 * @returns {Chat[]}
 */
export function imported(text) {
  if (text.length > MOST_BYTES) throw new Error("The file is too large.");
  let file;
  try {
    file = JSON.parse(text);
  } catch {
    throw new Error("The file is no JSON.");
  }
  if (file?.format !== FORMAT || !Array.isArray(file.chats)) throw new Error(`The file is none of this page's: its format isn't "${FORMAT}".`);
  return file.chats.map(chat);
}

/** @param {any} given @returns {Chat} */
function chat(given) {
  /** @type {Turn[]} */
  const turns = Array.isArray(given?.turns) ? given.turns.map(turn) : [];
  const ids = new Set([0]);
  for (const { id, parent } of turns) {
    if (ids.has(id) || !ids.has(parent)) throw new Error("A chat in the file has turns that don't follow each other.");
    ids.add(id);
  }
  const pairs = Object.entries(given?.chosen instanceof Object ? given.chosen : {});
  const chosen = pairs.filter(([parent, id]) => ids.has(Number(parent)) && turns.some((turn) => turn.id === id && String(turn.parent) === parent));
  return {
    id: crypto.randomUUID(), // It stands beside a chat that is here already, and replaces none.
    title: text(given?.title).slice(0, 200) || "Imported chat",
    system: text(given?.system),
    turns,
    chosen: Object.fromEntries(/** @type {[string, number][]} */ (chosen)),
    changed: Number.isSafeInteger(given?.changed) ? given.changed : Date.now(),
  };
}

/** @param {any} given @returns {Turn} */
function turn(given) {
  if (!Number.isSafeInteger(given?.id) || given.id < 1 || !Number.isSafeInteger(given.parent)) throw new Error("A turn in the file has no place.");
  if (given.role !== "user" && given.role !== "assistant") throw new Error("A turn in the file is nobody's.");
  /** @type {Turn} */
  const found = { id: given.id, parent: given.parent, role: given.role, text: text(given.text) };
  if (given.thought) found.thought = text(given.thought);
  if (given.end) found.end = text(given.end).slice(0, 20);
  if (Array.isArray(given.odds)) found.odds = given.odds.filter(isRun);
  return found;
}

/** @param {any} run */
function isRun(run) {
  const isPair = (/** @type {any} */ pair) => typeof pair?.[0] === "string" && typeof pair[1] === "number";
  const isToken = (/** @type {any} */ token) => isPair(token) && Array.isArray(token[2]) && token[2].every(isPair);
  return Number.isSafeInteger(run?.at) && Array.isArray(run.tokens) && run.tokens.every(isToken);
}

/** @param {unknown} value */
function text(value) {
  return typeof value === "string" ? value : "";
}
