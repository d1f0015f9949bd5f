// Markdown within a line: emphasis, code, links. A pass over the text, whose time grows with its length alone.

/**
 * @typedef {{text: string, from: number}} Leaf text, and where it stands in the whole source
 * @typedef {{tag: string, children: Node[], href?: string}} Branch
 * @typedef {Leaf | Branch} Node
 * @typedef {{chars: string, at: number[]}} Source letters, and where each of them stands in the whole
 * @typedef {{left: number}} Budget how many more elements may be made
 * @typedef {{mark: string, begin: number, nodes: Node[]}[]} Open marks that wait for their end, each with what is in it
 * @typedef {{node: Node, end: number} | null} Found what begins at a place, and where it ends
 */

const DEEPEST = 12; // Marks that are open at a time.
const LINK = /\[([^[\]\n]{1,400})\]\(([^\s()[\]<>]{1,1000})(?:\s"[^"\n]{0,200}")?\)/y;
const BARE = /https?:\/\/[^\s<>()[\]"'`*]{1,1000}/y;
const SAFE = /^(?:https?:\/\/|mailto:)/i; // Of all addresses these alone become links.
const WORD = /[\p{L}\p{N}]/u;
const ESCAPED = /[!-/:-@[-`{-~]/;
const SPECIAL = /[\\`*_~[h!]/;

/**
 * @param {Source} source
 * @param {Budget} budget
 * @returns {Node[]}
 */
export function inline(source, budget) {
  const { chars } = source;
  /** @type {Open} */
  const open = [{ mark: "", begin: 0, nodes: [] }];
  const ticks = runsOfTicks(chars);
  let plain = 0; // What stands from here on is not yet in any node.
  let place = 0;
  const top = () => open[open.length - 1].nodes;
  const flush = (/** @type {number} */ end) => leaves(source, plain, end, top());

  while (place < chars.length) {
    const letter = chars[place];
    if (!SPECIAL.test(letter) || budget.left <= 0) {
      place += 1;
      continue;
    }
    if (letter === "\\" && ESCAPED.test(chars[place + 1] ?? "")) {
      flush(place);
      plain = place + 1;
      place += 2;
      continue;
    }
    const found = letter === "`" ? code(source, place, ticks) : link(source, place);
    if (found !== null) {
      flush(place);
      top().push(found.node);
      budget.left -= 1;
      place = plain = found.end;
      continue;
    }
    if (letter === "`") {
      while (chars[place] === "`") place += 1;
      continue;
    }
    if (letter !== "*" && letter !== "_" && letter !== "~") {
      place += 1;
      continue;
    }
    let end = place;
    while (chars[end] === letter) end += 1;
    if (end - place < 4 && (letter !== "~" || end - place === 2)) {
      flush(place);
      plain = emphasis(open, source, place, end, budget);
    }
    place = end;
  }
  flush(chars.length);
  while (open.length > 1) unopen(open, source);
  return open[0].nodes;
}

/**
 * What a run of marks closes and opens. Returns from where on it is text.
 *
 * @param {Open} open @param {Source} source @param {number} begin @param {number} end @param {Budget} budget
 */
function emphasis(open, source, begin, end, budget) {
  const { chars } = source;
  const { opens, closes } = sides(chars, begin, end, chars[begin]);
  const rest = begin + (closes ? close(open, chars[begin], end - begin, source, budget) : 0);
  if (rest === end || !opens || open.length >= DEEPEST) return rest;
  open.push({ mark: chars.slice(rest, end), begin: rest, nodes: [] });
  return end;
}

/**
 * Close as many open marks as a run of `length` letters ends. Returns how many of the letters that took.
 *
 * @param {Open} open @param {string} letter @param {number} length @param {Source} source @param {Budget} budget
 */
function close(open, letter, length, source, budget) {
  let left = length;
  while (left > 0) {
    const depth = open.findLastIndex(({ mark }) => mark[0] === letter && mark.length <= left);
    if (depth < 1) break;
    while (open.length > depth + 1) unopen(open, source);
    const { mark, nodes } = /** @type {Open[number]} */ (open.pop());
    const parent = open[open.length - 1].nodes;
    parent.push(marked(mark, nodes));
    budget.left -= 2;
    left -= mark.length;
  }
  return length - left;
}

/** What opened, and was never closed, is the text that it was. @param {Open} open @param {Source} source */
function unopen(open, source) {
  const { mark, begin, nodes } = /** @type {Open[number]} */ (open.pop());
  const parent = open[open.length - 1].nodes;
  leaves(source, begin, begin + mark.length, parent);
  for (const node of nodes) parent.push(node);
}

/** @param {string} mark @param {Node[]} children @returns {Node} */
function marked(mark, children) {
  if (mark === "~~") return { tag: "del", children };
  if (mark.length === 3) return { tag: "strong", children: [{ tag: "em", children }] };
  return { tag: mark.length === 2 ? "strong" : "em", children };
}

/**
 * Whether a run of marks may open or close: it clings to a word on that side.
 *
 * @param {string} chars @param {number} begin @param {number} end @param {string} letter
 */
function sides(chars, begin, end, letter) {
  const [before, after] = [chars[begin - 1] ?? " ", chars[end] ?? " "];
  const inWord = letter === "_" && WORD.test(before) && WORD.test(after);
  return { opens: /\S/.test(after) && !inWord, closes: /\S/.test(before) && !inWord };
}

/**
 * A link, or an address by itself. Images are links to them: nothing is ever loaded.
 *
 * @param {Source} source @param {number} place @returns {Found}
 */
function link(source, place) {
  const { chars } = source;
  const start = chars[place] === "!" ? place + 1 : place;
  LINK.lastIndex = start;
  const written = chars[start] === "[" ? LINK.exec(chars) : null;
  if (written !== null && SAFE.test(written[2])) {
    const children = leaves(source, start + 1, start + 1 + written[1].length, []);
    return { node: { tag: "a", href: written[2], children }, end: LINK.lastIndex };
  }
  BARE.lastIndex = place;
  const bare = chars[place] === "h" && !WORD.test(chars[place - 1] ?? " ") ? BARE.exec(chars) : null;
  if (bare === null) return null;
  const href = bare[0].replace(/[.,:;!?]+$/, "");
  const end = place + href.length;
  return { node: { tag: "a", href, children: leaves(source, place, end, []) }, end };
}

/**
 * Code between as many ticks as open it.
 *
 * @param {Source} source @param {number} place @param {Map<number, number[]>} ticks @returns {Found}
 */
function code(source, place, ticks) {
  const { chars } = source;
  let begin = place;
  while (chars[begin] === "`") begin += 1;
  const places = ticks.get(begin - place) ?? [];
  while (places.length && places[places.length - 1] < begin) places.pop();
  const close = places[places.length - 1];
  if (close === undefined) return null;
  const end = close + begin - place;
  const pads = chars[begin] === " " && chars[close - 1] === " " && close - begin > 2 ? 1 : 0;
  return { node: { tag: "code", children: leaves(source, begin + pads, close - pads, []) }, end };
}

/** Where runs of ticks begin, by their length, the last one first. @param {string} chars */
function runsOfTicks(chars) {
  /** @type {Map<number, number[]>} */
  const found = new Map();
  for (const match of chars.matchAll(/`+/g)) {
    const places = found.get(match[0].length) ?? [];
    found.set(match[0].length, places);
    places.push(match.index);
  }
  for (const places of found.values()) places.reverse();
  return found;
}

/**
 * Put letters begin .. end into leaves, one for each stretch that is one in the source as well.
 *
 * @param {Source} source @param {number} begin @param {number} end @param {Node[]} nodes @returns {Node[]}
 */
function leaves(source, begin, end, nodes) {
  const { chars, at } = source;
  for (let start = begin, next = begin + 1; start < end; next += 1) {
    if (next < end && at[next] === at[next - 1] + 1) continue;
    nodes.push({ text: chars.slice(start, next), from: at[start] });
    start = next;
  }
  return nodes;
}
