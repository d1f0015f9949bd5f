// What a visitor has set, kept in this browser: sampling, the model, how the page looks. Not the key: see api.js.

import { FIELDS, firstValues } from "./fields.js";

const PLACE = "tightrope.preferences";

/**
 * @typedef {object} Preferences
 * @property {Record<string, unknown>} values by a field's name, as it was typed
 * @property {string} model the name of a model or adapter; "" is whatever is served
 * @property {string} system what a new chat begins with
 * @property {number} odds rivals listed for each token; 0 asks for none
 * @property {boolean} marks whether unlikely tokens are underlined
 */

/** @returns {Preferences} */
export function loadPreferences() {
  /** @type {Preferences} */
  const found = { values: firstValues(), model: "", system: "", odds: 5, marks: false };
  try {
    const kept = JSON.parse(localStorage.getItem(PLACE) ?? "{}");
    if (typeof kept.model === "string") found.model = kept.model;
    if (typeof kept.system === "string") found.system = kept.system;
    if (typeof kept.marks === "boolean") found.marks = kept.marks;
    if (Number.isInteger(kept.odds)) found.odds = Math.min(Math.max(kept.odds, 0), 20);
    if (kept.values instanceof Object) found.values = knownValues(kept.values);
  } catch {
    // What is there is none of ours, or nothing may be kept here.
  }
  return found;
}

/** @param {Preferences} preferences */
export function savePreferences(preferences) {
  try {
    localStorage.setItem(PLACE, JSON.stringify(preferences));
  } catch {
    // A browser that keeps nothing still chats.
  }
}

/** Those of fields that there are, of kinds that they take. @param {Record<string, unknown>} values */
function knownValues(values) {
  const kinds = ["number", "string", "boolean"];
  const known = FIELDS.filter(({ name }) => kinds.includes(typeof values[name]));
  return Object.fromEntries(known.map(({ name }) => [name, values[name]]));
}
