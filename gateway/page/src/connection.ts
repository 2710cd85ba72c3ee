// One WebSocket after another to the same session: opens, notices when it is dead, waits, opens again. Knows frames, no terminal and no DOM.
import { backoff } from "./backoff";
import { type ServerFrame, SUBPROTOCOL, decode } from "./protocol";

/** The server says something every 15 s; after three times that the connection is dead. */
const SILENCE_MS = 45_000;
const CONNECT_MS = 10_000;
/** A connection that was attached for so long starts again at the shortest wait. */
const STABLE_MS = 10_000;

/** Why there will be no further try by itself. */
export type Final = "ended" | "exited" | "unauthenticated" | "denied" | "crowded";

export interface Events {
  connecting(): void;
  open(): void;
  frame(frame: ServerFrame): void;
  /** Down; `retryAt` is the time of `performance.now()` at which the next try starts. */
  down(retryAt: number, detail: string): void;
  final(why: Final): void;
}

export class Connection {
  readonly #url: string;
  readonly #events: Events;
  #socket: WebSocket | undefined;
  #timer: ReturnType<typeof setTimeout> | undefined;
  #watchdog: ReturnType<typeof setTimeout> | undefined;
  #attempt = 0;
  #attachedAt: number | undefined;
  #exited = false;
  #terminated = false;
  #stopped = true;

  constructor(url: string, events: Events) {
    this.#url = url;
    this.#events = events;
  }

  /** Opens now, whether nothing was tried yet, a wait is under way, or the last end was final. */
  connect(): void {
    this.#discard();
    this.#stopped = false;
    this.#exited = false;
    this.#attachedAt = undefined;
    this.#events.connecting();
    const socket = new WebSocket(this.#url, SUBPROTOCOL);
    socket.binaryType = "arraybuffer";
    this.#socket = socket;
    this.#watch(CONNECT_MS);
    socket.onopen = () => {
      this.#watch(SILENCE_MS);
      this.#events.open();
    };
    socket.onmessage = (event: MessageEvent<unknown>) => {
      this.#watch(SILENCE_MS);
      if (event.data instanceof ArrayBuffer) this.#received(event.data);
    };
    socket.onclose = (event) => this.#closed(event.code, event.reason);
  }

  /** Sends if it can; what is sent while the connection is down is lost. */
  send(frame: Uint8Array<ArrayBuffer>): void {
    if (this.#socket?.readyState === WebSocket.OPEN) this.#socket.send(frame);
  }

  /** A wait under way ends now: the network is back, the page is looked at, or somebody pressed the button. */
  hurry(): void {
    if (this.#timer !== undefined && !this.#stopped) this.connect();
  }

  #received(data: ArrayBuffer): void {
    const frame = decode(data);
    if (frame.type === "attached") this.#attachedAt = performance.now();
    if (frame.type === "exit") this.#exited = true;
    if (frame.type === "termination") this.#terminated = true;
    this.#events.frame(frame);
  }

  #closed(code: number, reason: string): void {
    this.#discard();
    if (this.#terminated || code === 4006) return this.#finish("ended");
    if (code === 1000 && this.#exited) return this.#finish("exited");
    if (code === 4001) return this.#finish("unauthenticated");
    if (code === 4003) return this.#finish("denied");
    if (code === 4009) return this.#finish("crowded");
    if (this.#attachedAt !== undefined && performance.now() - this.#attachedAt > STABLE_MS) this.#attempt = 0;
    // A server that goes away says so: its successor is there already, and the first try is not put off.
    const wait = code === 1001 && this.#attempt === 0 ? Math.random() * 500 : backoff(this.#attempt, Math.random());
    this.#attempt += 1;
    this.#timer = setTimeout(() => this.connect(), wait);
    this.#events.down(performance.now() + wait, reason);
  }

  #finish(why: Final): void {
    this.#stopped = true;
    this.#attempt = 0;
    this.#events.final(why);
  }

  #watch(ms: number): void {
    clearTimeout(this.#watchdog);
    // Closing a dead socket waits for the other side for up to a minute: it is given up instead.
    this.#watchdog = setTimeout(() => this.#closed(1006, ""), ms);
  }

  #discard(): void {
    clearTimeout(this.#timer);
    clearTimeout(this.#watchdog);
    this.#timer = undefined;
    const socket = this.#socket;
    this.#socket = undefined;
    if (socket === undefined) return;
    socket.onopen = socket.onmessage = socket.onclose = null;
    socket.close();
  }
}
