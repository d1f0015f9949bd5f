// Which of an answer's tokens stands where in its text. No DOM here.

/** @typedef {import("./chat.js").Token} Token */
/** @typedef {import("./chat.js").TokenRun} TokenRun */
/** @typedef {{token: string, logprob: number, bytes: number[] | null, top_logprobs: {token: string, logprob: number}[]}} Listed */

const ANCHOR = 64; // The first letters of an answer are looked for among all that its tokens say.

/** Gathers the tokens of an answer as they come, thoughts and marks among them. */
export class Gatherer {
  /** @type {Token[]} */
  #tokens = [];
  #text = "";
  #decoder = new TextDecoder();

  /** @param {Listed[]} listed */
  add(listed) {
    for (const { token, logprob, bytes, top_logprobs } of listed) {
      // A token may hold a part of a letter: it is shown with the one that completes it.
      const text = bytes === null ? token : this.#decoder.decode(Uint8Array.from(bytes), { stream: true });
      this.#tokens.push([text, logprob, top_logprobs.map((other) => [other.token, other.logprob])]);
      this.#text += text;
    }
  }

  /**
   * The tokens of what is shown.
   *
   * @param {string} thought what came before, apart
   * @param {string} shown the answer so far
   * @param {number} at where the answer stands in its turn
   * @returns {TokenRun | null} null where they can't be told apart
   */
  run(thought, shown, at) {
    if (!shown) return null;
    const behind = thought ? this.#text.indexOf(thought) : -1;
    const begin = this.#text.indexOf(shown.slice(0, ANCHOR), behind < 0 ? 0 : behind + thought.length);
    if (begin < 0) return null;
    const tokens = [];
    let place = 0;
    let first = begin;
    for (const token of this.#tokens) {
      const next = place + token[0].length;
      if (place >= begin && next <= begin + shown.length && token[0]) tokens.push(token);
      else if (next > begin && place < begin) first = next; // It holds the end of the marks before, too.
      place = next;
    }
    return tokens.length ? { at: at + first - begin, tokens } : null;
  }
}

/**
 * Where each token of a turn stands.
 *
 * @param {TokenRun[]} runs
 * @returns {{begin: number, end: number, token: Token}[]} in the order of the text
 */
export function placed(runs) {
  return runs.flatMap(({ at, tokens }) => {
    let place = at;
    return tokens.map((token) => ({ begin: place, end: (place += token[0].length), token }));
  });
}

/** A log probability as a share in words. @param {number} logprob @returns {string} */
export function share(logprob) {
  const percent = 100 * Math.exp(logprob);
  if (percent >= 99.95) return "100%";
  return percent >= 0.1 ? `${percent.toFixed(1)}%` : "under 0.1%";
}

/** How unlikely a token was, from 0 (likely) to 3. @param {number} logprob */
export function rarity(logprob) {
  return [0.5, 0.2, 0.05].filter((bound) => Math.exp(logprob) < bound).length;
}

/** A token's text with its white space shown. @param {string} text */
export function visible(text) {
  return text.replace(/ /g, "·").replace(/\n/g, "⏎").replace(/\t/g, "⇥");
}
