// What was typed or pasted and has not been taken by the server yet. Knows no socket: `send` is given.
import { INPUT_CHUNK, INPUT_WINDOW } from "./protocol";

const INTERRUPT = 0x03;
const END_OF_PASTE = new TextEncoder().encode("\x1b[201~");

/** What one page keeps waiting at most, bytes; a paste above it is refused as a whole. */
export const INPUT_LIMIT = 8 * 1024 * 1024;

/**
 * Sends in chunks, with at most INPUT_WINDOW bytes not yet taken by the server. The window is not for speed: without it a
 * large paste fills the connection, the acknowledgements of output wait behind it, and both directions stop for ever.
 */
export class InputQueue {
  readonly #send: (bytes: Uint8Array) => void;
  #waiting: Uint8Array[] = [];
  #waitingBytes = 0;
  #underWay = 0;

  constructor(send: (bytes: Uint8Array) => void) {
    this.#send = send;
  }

  get waitingBytes(): number {
    return this.#waitingBytes;
  }

  /**
   * False when there is too much to keep: nothing of it is sent then. Ctrl-C throws away what is still waiting, as a terminal
   * flushes its input; `inPaste` says that the program would otherwise wait for the end of a bracketed paste.
   */
  push(bytes: Uint8Array, inPaste: boolean): boolean {
    if (bytes.length === 0) return true;
    if (bytes.length === 1 && bytes[0] === INTERRUPT && this.#waitingBytes > 0) {
      this.#waiting = inPaste ? [END_OF_PASTE] : [];
      this.#waitingBytes = inPaste ? END_OF_PASTE.length : 0;
    } else if (this.#waitingBytes + bytes.length > INPUT_LIMIT) {
      return false;
    }
    this.#waiting.push(bytes);
    this.#waitingBytes += bytes.length;
    this.#pump();
    return true;
  }

  /** The server has taken `bytes` more. */
  taken(bytes: number): void {
    this.#underWay = Math.max(0, this.#underWay - bytes);
    this.#pump();
  }

  #pump(): void {
    while (this.#underWay < INPUT_WINDOW) {
      const first = this.#waiting[0];
      if (first === undefined) return;
      const size = Math.min(INPUT_CHUNK, INPUT_WINDOW - this.#underWay, first.length);
      if (size === first.length) this.#waiting.shift();
      else this.#waiting[0] = first.subarray(size);
      this.#waitingBytes -= size;
      this.#underWay += size;
      this.#send(first.subarray(0, size));
    }
  }
}
