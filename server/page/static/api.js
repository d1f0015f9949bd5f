// Requests to the server that this page came from, and to no other.

/** @typedef {{id: string, parent: string | null, max_model_len: number | null, status: {value: string}}} Model */

const KEY = "tightrope.key";

/** An answer that is none, in the server's words. */
export class Refused extends Error {
  /** @param {number} status 0: nobody answered @param {string} message */
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** The key, kept for as long as this tab is open. */
export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  /** @param {string} value */
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/**
 * The server's reply. Throws Refused where it is no success.
 *
 * @param {string} path
 * @param {{method?: string, body?: unknown, signal?: AbortSignal, headers?: Record<string, string>}} [options]
 * @returns {Promise<Response>}
 */
export async function call(path, { method = "GET", body, signal, headers = {} } = {}) {
  const all = new Headers(headers);
  if (key.get()) all.set("Authorization", `Bearer ${key.get()}`);
  if (body !== undefined) all.set("Content-Type", "application/json");
  const content = body === undefined ? undefined : JSON.stringify(body);
  let reply;
  try {
    reply = await fetch(path, { method, body: content, signal, headers: all, credentials: "omit", cache: "no-store" });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Refused(0, "The server can't be reached.");
  }
  if (reply.ok) return reply;
  throw new Refused(reply.status, told(await reply.text().catch(() => ""), reply.status));
}

/** The message of an error's body. @param {string} text @param {number} status */
function told(text, status) {
  try {
    const { error } = JSON.parse(text);
    return String(error?.message ?? error);
  } catch {
    return `The server answered ${status}.`;
  }
}

/** The models and adapters. @returns {Promise<Model[]>} */
export async function models() {
  return (await (await call("/v1/models")).json()).data;
}

/** Where the memory of a model goes; see docs/page.md. @param {string} model */
export async function plan(model) {
  return (await call(`/plan?model=${encodeURIComponent(model)}`)).json();
}

/**
 * How many tokens a chat's prompt has.
 *
 * @param {string} model
 * @param {{role: string, content: string}[]} messages
 * @returns {Promise<number>}
 */
export async function count(model, messages) {
  return (await (await call("/tokenize", { method: "POST", body: { model, messages } })).json()).count;
}
