// A chat that is longer than the window goes without its oldest turns, as few as it takes.

/** @typedef {import("./chat.js").Turn} Turn */

/**
 * The turns that fit.
 *
 * @param {Turn[]} turns the last one, at least, is kept
 * @param {number} room tokens for the prompt
 * @param {(turns: Turn[]) => Promise<number>} count the tokens of a prompt with these turns
 * @param {boolean} [isSure] whether the whole is known to fit
 * @returns {Promise<Turn[]>}
 */
export async function fitting(turns, room, count, isSure = false) {
  if (isSure || turns.length < 2 || (await count(turns)) <= room) return turns;
  const starts = turns.flatMap(({ role }, place) => (place && role === "user" ? [place] : []));
  if (starts.length === 0) return turns;
  let [low, high] = [0, starts.length - 1]; // Behind the last one nothing more can go.
  while (low < high) {
    const middle = (low + high) >> 1;
    if ((await count(turns.slice(starts[middle]))) <= room) high = middle;
    else low = middle + 1;
  }
  return turns.slice(starts[low]);
}

/**
 * Whether the prompt surely fits, so that nothing needs to be counted: by what the last answer told, and at most a
 * token for each byte since.
 *
 * @param {Turn[]} turns
 * @param {string} system
 * @param {number} room
 */
export function surelyFits(turns, system, room) {
  const known = turns.findLastIndex((turn) => turn.usage !== undefined);
  const bytes = (/** @type {string} */ text) => new TextEncoder().encode(text).length;
  const told = turns[known]?.usage;
  if (told?.isCut) return false;
  const before = told === undefined ? bytes(system) + 64 : told.prompt + told.written;
  const since = turns.slice(known + 1).reduce((sum, { text, thought }) => sum + bytes(text) + bytes(thought ?? "") + 16, 0);
  return before + since <= room;
}
