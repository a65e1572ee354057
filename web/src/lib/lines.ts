/** Splits a stream of bytes into lines; a blank line is a heartbeat and comes out as "". */
export class Lines {
  #decoder = new TextDecoder();
  #rest = "";

  push(bytes: Uint8Array): string[] {
    const parts = (this.#rest + this.#decoder.decode(bytes, { stream: true })).split("\n");
    this.#rest = parts.pop() ?? "";
    return parts;
  }
}
