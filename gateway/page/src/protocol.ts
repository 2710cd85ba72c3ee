// The frames of the subprotocol carrel.v1, as docs/websocket.md describes them. Knows bytes only: no socket, no terminal.

export const SUBPROTOCOL = "carrel.v1";

/** Bytes of input that may be under way: sent, and not yet taken by the server (server frame 0x04). */
export const INPUT_WINDOW = 64 * 1024;

/** Largest input frame the page sends, bytes of payload. The server refuses frames above 64 KiB. */
export const INPUT_CHUNK = 16 * 1024;

const INPUT = 0x00;
const RESIZE = 0x01;
const ACK = 0x02;

const OUTPUT = 0x00;
const STATUS = 0x01;
const TERMINATION = 0x02;
const ATTACHED = 0x03;
const INPUT_TAKEN = 0x04;
const EXIT = 0x05;

export type State = "created" | "initializing" | "ready" | "running" | "terminated" | "failed";

export interface Progress {
  /** Counts from 1. */
  current_step: number;
  total_steps: number;
  step_description: string;
  /** Every step's text, in order. */
  steps?: string[];
}

export interface Status {
  state: State;
  /** Whole seconds by the server's clock. */
  remaining_seconds: number;
  exam_id?: string;
  progress?: Progress;
}

export interface Termination {
  /** A code of the closed list in docs/api.md. */
  reason: string;
  /** One sentence for the candidate. */
  message: string;
}

export interface Attached {
  /** An existing terminal was joined: its screen follows, in the first piece of output. */
  resumed: boolean;
  /** A member of staff looks on: what is typed is dropped. */
  watching: boolean;
}

export interface Exit {
  code?: number;
  signal?: string;
  reason?: string;
}

export type ServerFrame =
  | { type: "output"; bytes: Uint8Array }
  | { type: "status"; status: Status }
  | { type: "termination"; termination: Termination }
  | { type: "attached"; attached: Attached }
  | { type: "input_taken"; bytes: number }
  | { type: "exit"; exit: Exit }
  | { type: "unknown" };

/** Reads one binary frame. Throws on a frame that no server sends; a type this page does not know is `unknown`. */
export function decode(frame: ArrayBuffer): ServerFrame {
  const bytes = new Uint8Array(frame);
  const payload = bytes.subarray(1);
  switch (bytes[0]) {
    case OUTPUT:
      return { type: "output", bytes: payload };
    case STATUS:
      return { type: "status", status: json(payload) as Status };
    case TERMINATION:
      return { type: "termination", termination: json(payload) as Termination };
    case ATTACHED:
      return { type: "attached", attached: json(payload) as Attached };
    case INPUT_TAKEN:
      if (payload.length !== 4) throw new Error("an acknowledgement has four bytes");
      return { type: "input_taken", bytes: new DataView(frame).getUint32(1) };
    case EXIT:
      return { type: "exit", exit: json(payload) as Exit };
    default:
      return { type: "unknown" };
  }
}

export function input(bytes: Uint8Array): Uint8Array<ArrayBuffer> {
  const frame = new Uint8Array(bytes.length + 1);
  frame[0] = INPUT;
  frame.set(bytes, 1);
  return frame;
}

export function resize(cols: number, rows: number): Uint8Array<ArrayBuffer> {
  const frame = new Uint8Array(5);
  const view = new DataView(frame.buffer);
  view.setUint8(0, RESIZE);
  view.setUint16(1, cols);
  view.setUint16(3, rows);
  return frame;
}

/** `bytes` more of the output are on the screen. */
export function ack(bytes: number): Uint8Array<ArrayBuffer> {
  const frame = new Uint8Array(5);
  const view = new DataView(frame.buffer);
  view.setUint8(0, ACK);
  view.setUint32(1, bytes);
  return frame;
}

function json(payload: Uint8Array): unknown {
  return JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(payload));
}
