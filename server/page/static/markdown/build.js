// From the tree to elements. Blocks that have not changed keep theirs, so that a stream draws its last one alone.

import { h } from "../dom.js";
import { rarity } from "../tokens.js";
import { blocks } from "./blocks.js";

/** @typedef {import("./blocks.js").Block} Block */
/** @typedef {import("./inline.js").Node} Node */
/** @typedef {{begin: number, end: number, token: import("../chat.js").Token}} Placed */

const TAGS = new Set(
  "p h2 h3 h4 h5 h6 hr blockquote ul ol li table thead tbody tr th td pre em strong del code a".split(" "),
);
const SAFE = /^(?:https?:\/\/|mailto:)/i;

/**
 * Show a text in an element.
 *
 * @param {HTMLElement} element
 * @param {string} text
 * @param {Placed[]} tokens in the order of the text; each becomes a span with its number
 */
export function showMarkdown(element, text, tokens) {
  const found = blocks(text);
  found.forEach((block, place) => {
    const key = `${block.begin} ${tokens.length ? numTokens(tokens, block) : 0} ${text.slice(block.begin, block.end)}`;
    const old = element.children[place];
    if (old !== undefined && KEYS.get(old) === key) return;
    const fresh = built(block, tokens);
    KEYS.set(fresh, key);
    if (old === undefined) element.append(fresh);
    else old.replaceWith(fresh);
  });
  while (element.children.length > found.length) element.lastElementChild?.remove();
}

/** What each block's element was made of. @type {WeakMap<Element, string>} */
const KEYS = new WeakMap();

/** @param {Placed[]} tokens @param {Block} block */
function numTokens(tokens, block) {
  return firstBehind(tokens, block.end) - firstBehind(tokens, block.begin);
}

/** The first token that ends behind a place. @param {Placed[]} tokens @param {number} place */
function firstBehind(tokens, place) {
  let [low, high] = [0, tokens.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (tokens[middle].end > place) high = middle;
    else low = middle + 1;
  }
  return low;
}

/** @param {Block} block @param {Placed[]} tokens @returns {HTMLElement} */
function built(block, tokens) {
  if (!TAGS.has(block.tag)) throw new Error(`no element of Markdown: ${block.tag}`);
  if (block.tag === "pre") return codeBlock(block, tokens);
  const attributes = /** @type {Record<string, unknown>} */ ({});
  if (block.tag === "a") Object.assign(attributes, linked(/** @type {any} */ (block).href));
  if (block.tag === "ol" && block.start !== 1) attributes.start = block.start;
  if (block.align) attributes.class = block.align;
  const element = h(block.tag, attributes, ...block.children.flatMap((child) => pieces(child, tokens)));
  return block.tag === "table" ? h("div", { class: "wide" }, element) : element;
}

/** @param {string} href */
function linked(href) {
  return SAFE.test(href) ? { href, target: "_blank", rel: "noopener noreferrer nofollow", title: href } : {};
}

/** @param {Block} block @param {Placed[]} tokens */
function codeBlock(block, tokens) {
  const code = h("code", {}, ...block.children.flatMap((child) => pieces(child, tokens)));
  const copy = h("button", { type: "button", class: "copy quiet", "data-copies": "code" }, "Copy");
  return h("div", { class: "code" }, h("div", { class: "bar" }, h("span", {}, block.info || "text"), copy), h("pre", {}, code));
}

/** A node's elements; a leaf is cut where its tokens meet. @param {Block | Node} node @param {Placed[]} tokens */
function pieces(node, tokens) {
  if (!("text" in node)) return [built(/** @type {Block} */ (node), tokens)];
  if (tokens.length === 0) return [node.text];
  const found = [];
  const end = node.from + node.text.length;
  let place = node.from;
  for (let number = firstBehind(tokens, place); place < end; number += 1) {
    const token = tokens[number];
    if (token === undefined || token.begin >= end) break;
    if (token.begin > place) found.push(node.text.slice(place - node.from, token.begin - node.from));
    const [begin, stop] = [Math.max(place, token.begin), Math.min(end, token.end)];
    const text = node.text.slice(begin - node.from, stop - node.from);
    found.push(h("span", { class: `token rare${rarity(token.token[1])}`, "data-token": number }, text));
    place = stop;
  }
  if (place < end) found.push(node.text.slice(place - node.from));
  return found;
}
