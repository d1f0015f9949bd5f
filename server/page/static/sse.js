// Server-sent events from bytes. What is consumed is counted, so that a stream can be read on behind it.

const NEWLINE = 10;

export class EventReader {
  #rest = new Uint8Array(0);
  #decoder = new TextDecoder();
  /** Bytes of the events given out so far. */
  consumed = 0;

  /**
   * The events that are whole with these bytes.
   *
   * @param {Uint8Array} bytes
   * @returns {string[]} the data of each; comments, which have none, are left out
   */
  feed(bytes) {
    const all = new Uint8Array(this.#rest.length + bytes.length);
    all.set(this.#rest);
    all.set(bytes, this.#rest.length);
    const found = [];
    let begin = 0;
    let place = Math.max(0, this.#rest.length - 1); // A break may lie across two pieces.
    for (; place + 1 < all.length; place += 1) {
      if (all[place] !== NEWLINE || all[place + 1] !== NEWLINE) continue;
      const data = dataOf(this.#decoder.decode(all.subarray(begin, place)));
      begin = place + 2;
      place += 1;
      if (data !== null) found.push(data);
    }
    this.#rest = all.slice(begin);
    this.consumed += begin;
    return found;
  }
}

/** @param {string} event @returns {string | null} */
function dataOf(event) {
  const lines = event.split("\n").filter((line) => line.startsWith("data:"));
  return lines.length ? lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n") : null;
}
