// Markdown as a tree of plain objects: paragraphs, headings, lists, quotes, tables, code. No DOM here.

import { inline } from "./inline.js";

/** @typedef {import("./inline.js").Node} Node */
/** @typedef {import("./inline.js").Budget} Budget */
/** @typedef {{tag: string, children: (Block | Node)[], begin: number, end: number, info?: string, start?: number, align?: string}} Block */
/** @typedef {{text: string, from: number}} Line its letters, and where the first of them stands in the source */
/** @typedef {{tag: string, children: any[], info?: string, start?: number, align?: string}} Part a block without its place */
/**
 * @typedef {object} Kind of blocks
 * @property {(lines: Line[], place: number, depth: number) => boolean} begins
 * @property {(lines: Line[], place: number) => number} end
 * @property {(lines: Line[], budget: Budget, depth: number) => Part} block
 */

const DEEPEST = 6; // Lists and quotes within each other.
const MOST_ELEMENTS = 20_000; // What a text asks for beyond stays text.
const MOST_LETTERS = 400_000;
const MOST_COLUMNS = 40;
const LONGEST_FENCE = 200; // Letters of a line that opens code: its pattern may look at each of them again.
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]{0,30})[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]|$)/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,8})([-*+]|\d{1,9}[.)])(?:[ \t]+|$)/;
const DIVIDER = /^:?-+:?$/; // Each cell of a table's second line.

/**
 * @param {string} source
 * @returns {Block[]}
 */
export function blocks(source) {
  if (source.length > MOST_LETTERS) return [plain(source)];
  let from = 0;
  const lines = source.split("\n").map((text) => {
    const line = { text, from };
    from += text.length + 1;
    return line;
  });
  return parse(lines, { left: MOST_ELEMENTS }, 0);
}

/** @param {string} source @returns {Block} */
function plain(source) {
  return { tag: "p", children: [{ text: source, from: 0 }], begin: 0, end: source.length };
}

/** @param {Line[]} lines @param {Budget} budget @param {number} depth @returns {Block[]} */
function parse(lines, budget, depth) {
  /** @type {Block[]} */
  const found = [];
  for (let place = 0; place < lines.length; ) {
    if (!lines[place].text.trim()) {
      place += 1;
      continue;
    }
    const kind = budget.left > 0 ? KINDS.find((kind) => kind.begins(lines, place, depth)) : undefined;
    let end = place + 1;
    if (kind !== undefined) end = kind.end(lines, place);
    else if (budget.left <= 0) end = lines.length; // What is beyond the budget is one paragraph.
    else while (end < lines.length && lines[end].text.trim() && !interrupts(lines, end, depth)) end += 1;
    const own = lines.slice(place, end);
    budget.left -= 1;
    const block = kind === undefined ? paragraph(own, budget) : kind.block(own, budget, depth);
    const last = own[own.length - 1];
    found.push({ ...block, begin: own[0].from, end: last.from + last.text.length });
    place = end;
  }
  return found;
}

/** Whether a line ends the paragraph before it. @param {Line[]} lines @param {number} place @param {number} depth */
function interrupts(lines, place, depth) {
  return KINDS.some((kind) => kind.begins(lines, place, depth));
}

/** @param {Line[]} lines @param {Budget} budget @returns {Part} */
function paragraph(lines, budget) {
  return { tag: "p", children: inline(joined(lines), budget) };
}

/** Lines as one text, with the place of each letter. @param {Line[]} lines */
function joined(lines) {
  const at = [];
  for (const { text, from } of lines) for (let i = 0; i <= text.length; i += 1) at.push(from + i);
  return { chars: lines.map(({ text }) => text).join("\n"), at: at.slice(0, -1) };
}

/** The line without its first `count` letters. @param {Line} line @param {number} count */
function cut({ text, from }, count) {
  return { text: text.slice(count), from: from + Math.min(count, text.length) };
}

const isFence = (/** @type {string} */ text) => text.length <= LONGEST_FENCE && FENCE.test(text);
const indent = (/** @type {string} */ text) => text.length - text.trimStart().length;

/** What a pattern finds in a text that it is known to fit. @param {RegExp} pattern @param {string} text */
const parts = (pattern, text) => /** @type {RegExpExecArray} */ (pattern.exec(text));

/** How each kind of block begins, where it ends, and what it is; the first that fits counts. @type {Kind[]} */
const KINDS = [
  {
    begins: (lines, place) => isFence(lines[place].text),
    end(lines, place) {
      const [, fence] = parts(FENCE, lines[place].text);
      const close = new RegExp(`^ {0,3}${fence[0]}{${fence.length},}\\s*$`);
      for (let end = place + 1; end < lines.length; end += 1) if (close.test(lines[end].text)) return end + 1;
      return lines.length; // It is still being written.
    },
    block(lines) {
      const [, fence, info] = parts(FENCE, lines[0].text);
      const isClosed = lines.length > 1 && lines[lines.length - 1].text.trim().startsWith(fence);
      const inner = lines.slice(1, isClosed ? -1 : undefined);
      return { tag: "pre", info, children: inner.map(({ text, from }) => ({ text: `${text}\n`, from })) };
    },
  },
  {
    begins: (lines, place) => HEADING.test(lines[place].text),
    end: (_, place) => place + 1,
    block([line], budget) {
      const [, marks] = parts(HEADING, line.text);
      const behind = cut(line, line.text.indexOf(marks) + marks.length);
      const children = inline(joined([cut({ ...behind, text: behind.text.trimEnd() }, indent(behind.text))]), budget);
      return { tag: `h${Math.min(6, marks.length + 1)}`, children }; // The page's own heading is the first.
    },
  },
  {
    begins: (lines, place) => RULE.test(lines[place].text),
    end: (_, place) => place + 1,
    block: () => ({ tag: "hr", children: [] }),
  },
  {
    begins: (lines, place, depth) => depth < DEEPEST && QUOTE.test(lines[place].text),
    end(lines, place) {
      let end = place + 1;
      while (end < lines.length && QUOTE.test(lines[end].text)) end += 1;
      return end;
    },
    block(lines, budget, depth) {
      const inner = lines.map((line) => cut(line, parts(QUOTE, line.text)[0].length));
      return { tag: "blockquote", children: parse(inner, budget, depth + 1) };
    },
  },
  {
    begins: (lines, place, depth) => depth < DEEPEST && ITEM.test(lines[place].text),
    end(lines, place) {
      const outer = indent(lines[place].text);
      const isNumbered = /\d/.test(parts(ITEM, lines[place].text)[2]);
      let end = place + 1;
      for (; end < lines.length; end += 1) {
        const { text } = lines[end];
        if (!text.trim()) continue;
        if (indent(text) >= outer + 2) continue;
        const item = ITEM.exec(text);
        if (item !== null && indent(text) >= outer && /\d/.test(item[2]) === isNumbered && !RULE.test(text)) continue;
        if (lines[end - 1].text.trim() && item === null && !isFence(text) && !HEADING.test(text) && !RULE.test(text)) continue;
        break;
      }
      return end;
    },
    block: list,
  },
  {
    begins: (lines, place) =>
      lines[place].text.includes("|") && place + 1 < lines.length && isDivider(lines[place + 1], cells(lines[place]).length),
    end(lines, place) {
      let end = place + 2;
      while (end < lines.length && lines[end].text.includes("|")) end += 1;
      return end;
    },
    block: table,
  },
];

/** @param {Line[]} lines @param {Budget} budget @param {number} depth @returns {Part} */
function list(lines, budget, depth) {
  const [, , first] = parts(ITEM, lines[0].text);
  const outer = indent(lines[0].text);
  /** @type {Line[][]} */
  const items = [];
  let width = 0;
  for (const line of lines) {
    const item = indent(line.text) < outer + 2 ? ITEM.exec(line.text) : null;
    if (item !== null) {
      width = item[0].trimEnd().length + 1;
      items.push([cut(line, item[0].length)]);
    } else items[items.length - 1].push(cut(line, Math.min(width, indent(line.text))));
  }
  const children = [];
  for (let place = 0; place < items.length; place += 1) {
    budget.left -= 1;
    const item = budget.left > 0 ? items[place] : items.slice(place).flat();
    children.push({ tag: "li", children: parse(item, budget, depth + 1) });
    if (budget.left <= 0) break;
  }
  return /\d/.test(first) ? { tag: "ol", start: Number.parseInt(first, 10), children } : { tag: "ul", children };
}

/** @param {Line[]} lines @param {Budget} budget @returns {Part} */
function table(lines, budget) {
  const aligns = cells(lines[1]).map(({ text }) => (text.endsWith(":") ? (text.startsWith(":") ? "center" : "right") : ""));
  const row = (/** @type {Line[][]} */ found, /** @type {string} */ tag) => {
    budget.left -= aligns.length + 1;
    const children = found.map((cell, column) => ({ tag, align: aligns[column], children: inline(joined(cell), budget) }));
    return { tag: "tr", children };
  };
  const inRow = (/** @type {Line} */ line) => cells(line).slice(0, aligns.length).map((cell) => [cell]);
  const head = row(inRow(lines[0]), "th");
  const body = [];
  for (let place = 2; place < lines.length && budget.left > 0; place += 1) body.push(row(inRow(lines[place]), "td"));
  if (body.length + 2 < lines.length) body.push(row([lines.slice(body.length + 2)], "td"));
  return {
    tag: "table",
    children: [{ tag: "thead", children: [head] }, { tag: "tbody", children: body }],
  };
}

/** @param {Line} line @param {number} columns */
function isDivider(line, columns) {
  const found = line.text.includes("-") ? cells(line) : [];
  return found.length === columns && found.every(({ text }) => DIVIDER.test(text));
}

/** The cells of a row, without the blanks around them. @param {Line} line @returns {Line[]} */
function cells(line) {
  const found = [];
  let begin = /^\s*\|/.test(line.text) ? line.text.indexOf("|") + 1 : 0;
  for (let place = begin; place <= line.text.length && found.length < MOST_COLUMNS; place += 1) {
    if (place < line.text.length && (line.text[place] !== "|" || line.text[place - 1] === "\\")) continue;
    const text = line.text.slice(begin, place);
    if (place < line.text.length || text.trim()) found.push({ text: text.trim(), from: line.from + begin + indent(text) });
    begin = place + 1;
  }
  return found;
}
