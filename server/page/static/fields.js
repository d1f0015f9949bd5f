// The fields of a request that steer an answer, with what each means. Those left at their neutral value aren't sent.

/**
 * @typedef {object} Field
 * @property {string} name as it stands in a request
 * @property {string} label
 * @property {"number" | "lines" | "text" | "flag" | "choice"} kind
 * @property {string} about
 * @property {number} [low]
 * @property {number} [high] where the slider ends; a number typed in may be larger
 * @property {number} [step]
 * @property {number} [most] the largest number of all
 * @property {unknown} [neutral] what changes nothing
 * @property {unknown} [first] what a new visitor begins with, if another
 * @property {string[]} [options]
 *
 * @typedef {{title: string, about: string, fields: Field[]}} Group
 */

/**
 * @param {string} name @param {string} label @param {number} neutral @param {number[]} range low, high, step, most
 * @param {string} about @param {number} [first]
 * @returns {Field}
 */
function number(name, label, neutral, [low, high, step, most = high], about, first) {
  return { name, label, kind: "number", neutral, low, high, step, most, about, first };
}

/** @type {Group[]} */
export const GROUPS = [
  {
    title: "Essentials",
    about: "How bold the choice of words is, and how long an answer may be.",
    fields: [
      number("temperature", "Temperature", 1, [0, 2, 0.05, 100],
        "Below 1 the likeliest words win more often, above 1 less often; 0 always takes the likeliest.", 0.8),
      number("top_p", "Top P", 1, [0, 1, 0.01],
        "Keep the likeliest tokens that together reach this share, and drop the rest; 1 is off."),
      number("top_k", "Top K", 0, [0, 200, 1, 1e6], "Keep this many of the likeliest tokens; 0 is off."),
      number("min_p", "Min P", 0, [0, 1, 0.01],
        "Drop tokens that are less than this many times as likely as the likeliest; 0 is off.", 0.05),
      number("max_tokens", "Longest answer", -1, [-1, 4096, 1, 1e9],
        "In tokens; −1 goes on to the end of the window.", 1024),
      number("seed", "Seed", -1, [-1, 9999, 1, Number.MAX_SAFE_INTEGER],
        "The same seed draws the same answer to the same prompt; −1 draws a new one each time."),
      { name: "stop", label: "Stop strings", kind: "lines", about: "Texts that end the answer, one a line; \\n is a line break." },
    ],
  },
  {
    title: "Which words are possible",
    about: "Other ways to cut off the unlikely ones.",
    fields: [
      number("typical_p", "Typical P", 1, [0, 1, 0.01],
        "Keep tokens about as surprising as this place expects, until they reach this share; 1 is off."),
      number("top_n_sigma", "Top nσ", 0, [0, 5, 0.1, 1e3],
        "Keep tokens whose score lies within this many standard deviations of the best; 0 is off."),
      number("top_a", "Top A", 0, [0, 1, 0.01],
        "Keep tokens of at least this many times the square of the best one's probability; 0 is off."),
      number("tfs", "Tail free", 1, [0, 1, 0.01], "Cut the tail where the curve of probabilities has become flat; 1 is off."),
      number("epsilon_cutoff", "Epsilon cutoff", 0, [0, 100, 0.5, 9999], "Drop tokens below this probability, in ten-thousandths; 0 is off."),
      number("eta_cutoff", "Eta cutoff", 0, [0, 100, 0.5, 9999],
        "The same, but lower where many words are possible, in ten-thousandths; 0 is off."),
      number("xtc_probability", "XTC probability", 0, [0, 1, 0.05],
        "How often the obvious is left out: of the tokens above the threshold all but the least likely go; 0 is never."),
      number("xtc_threshold", "XTC threshold", 0.1, [0, 0.5, 0.01, 1], "What counts as obvious; above a half nothing does."),
    ],
  },
  {
    title: "How they are weighed",
    about: "The shape of the probabilities before one is drawn.",
    fields: [
      number("dynatemp_range", "Dynamic temperature", 0, [0, 2, 0.05, 100],
        "The temperature moves up and down by this much: higher where many words are possible; 0 is off."),
      number("dynatemp_exponent", "Its exponent", 1, [0.1, 5, 0.1, 100], "Above 1 it stays low for longer."),
      number("smoothing_factor", "Smoothing", 0, [0, 5, 0.05, 1000], "Lowers unlikely tokens by a curve, and evens out likely ones; 0 is off."),
      number("smoothing_curve", "Its curve", 1, [1, 10, 0.1, 100], "Above 1 the curve is steeper."),
      { name: "mirostat_mode", label: "Mirostat", kind: "choice", neutral: 0, options: ["0", "1", "2"],
        about: "Holds the surprise of the text at a level: 2 is the usual version, 1 the first, 0 off." },
      number("mirostat_tau", "Mirostat's level", 5, [0.1, 10, 0.1, 100], "Bits of surprise in each token; lower is more predictable."),
      number("mirostat_eta", "Mirostat's rate", 0.1, [0.01, 1, 0.01], "How fast it corrects what it missed."),
      number("adaptive_target", "Adaptive P", -1, [-1, 1, 0.01], "Prefers tokens of about this probability; below 0 is off. Use it with Min P."),
    ],
  },
  {
    title: "Repetition",
    about: "What holds a model back from saying the same again.",
    fields: [
      number("repetition_penalty", "Repetition penalty", 1, [0.8, 1.5, 0.01, 100],
        "Above 1 everything that stands in the chat already becomes less likely, once."),
      number("frequency_penalty", "Frequency penalty", 0, [-2, 2, 0.05], "Lowers a token each time that the answer has used it; 0 is off."),
      number("presence_penalty", "Presence penalty", 0, [-2, 2, 0.05], "Lowers a token once the answer has used it; 0 is off."),
      number("repetition_penalty_range", "Their range", 0, [0, 8192, 16, 1e9], "These look at the last so many tokens alone; 0 is all of them."),
      number("no_repeat_ngram_size", "Longest repetition", 0, [0, 20, 1, 256], "No run of so many tokens comes twice; 0 is off."),
      number("dry_multiplier", "DRY multiplier", 0, [0, 5, 0.05, 100],
        "Lowers a token that would go on with a phrase which stands in the chat already, the more the longer it is; 0 is off. 0.8 is usual."),
      number("dry_base", "DRY base", 1.75, [1, 4, 0.05, 100], "How fast that grows with each token of the phrase."),
      number("dry_allowed_length", "DRY allowed length", 2, [1, 20, 1, 256], "Phrases up to this long may come again."),
      number("dry_range", "DRY range", 0, [0, 8192, 16, 1e9], "It looks at the last so many tokens alone; 0 is all of them."),
      { name: "dry_sequence_breakers", label: "DRY breakers", kind: "lines",
        about: "No phrase reaches across these texts, one a line; empty means a line break, : \" and *." },
    ],
  },
  {
    title: "What must not come, and what must",
    about: "Bans, ends, and a text to keep away from.",
    fields: [
      { name: "banned_strings", label: "Banned texts", kind: "lines", about: "The answer never holds these, in upper or lower case, one a line." },
      number("min_tokens", "Shortest answer", 0, [0, 1024, 1, 1e9], "It may not end before so many tokens."),
      { name: "ignore_eos", label: "Never end by itself", kind: "flag", neutral: false, about: "Write on to the longest answer." },
      number("guidance_scale", "Guidance", 1, [0, 5, 0.1, 100],
        "Above 1 leads the answer away from the text below; takes twice the work. 1 is off."),
      { name: "negative_prompt", label: "Away from", kind: "text", about: "What guidance leads away from: a text in the model's own format." },
    ],
  },
  {
    title: "Thoughts and cache",
    about: "For models that think before they answer, and how exact the kept context is.",
    fields: [
      { name: "reasoning_effort", label: "Effort", kind: "choice", neutral: "", options: ["", "none", "low", "medium", "high"],
        about: "How much to think, where the model's template knows it; none is not at all." },
      number("thinking_token_budget", "Budget of thoughts", -1, [-1, 8192, 64, 1e9],
        "Thoughts end after so many tokens; −1 is no bound. Only for models that think."),
      { name: "cache_reuse", label: "Kept context", kind: "choice", neutral: "", options: ["", "exact"],
        about: "In a full window kept tokens are moved, which is nearly exact; exact computes them again instead." },
    ],
  },
];

export const FIELDS = GROUPS.flatMap((group) => group.fields);

/** What a new visitor begins with. @returns {Record<string, unknown>} */
export function firstValues() {
  return Object.fromEntries(FIELDS.filter(({ first }) => first !== undefined).map(({ name, first }) => [name, first]));
}

/**
 * A value as a request has it, from what was typed; undefined where it changes nothing or is none.
 *
 * @param {Field} field
 * @param {unknown} value
 * @returns {unknown}
 */
export function meant(field, value) {
  if (value === undefined || value === null || value === "" || value === field.neutral) return undefined;
  if (field.kind === "lines") {
    const lines = String(value).split("\n").filter(Boolean).map(unescaped);
    return lines.length ? lines : undefined;
  }
  if (field.kind === "choice" && typeof field.neutral === "number") return Number(value) || undefined;
  if (field.kind !== "number") return value;
  const given = Number(value);
  if (!Number.isFinite(given) || given === field.neutral) return undefined;
  const bounded = Math.min(Math.max(given, field.low ?? given), field.most ?? given);
  return Number.isInteger(field.step) ? Math.round(bounded) : bounded;
}

/** The part of a request that these values stand for. @param {Record<string, unknown>} values */
export function sampling(values) {
  const pairs = FIELDS.map((field) => [field.name, meant(field, values[field.name])]);
  return Object.fromEntries(pairs.filter(([, value]) => value !== undefined));
}

/** @param {string} text */
function unescaped(text) {
  const letters = /** @type {Record<string, string>} */ ({ n: "\n", t: "\t", r: "\r", "\\": "\\" });
  return text.replace(/\\([ntr\\])/g, (_, letter) => letters[letter]);
}
