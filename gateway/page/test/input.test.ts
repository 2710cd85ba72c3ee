import assert from "node:assert/strict";
import { test } from "node:test";
import { InputQueue, INPUT_LIMIT } from "../src/input";
import { INPUT_CHUNK, INPUT_WINDOW } from "../src/protocol";

const text = (bytes: Uint8Array) => new TextDecoder().decode(bytes);
const KEY = (key: string) => new TextEncoder().encode(key);

test("a key goes out at once", () => {
  const sent: string[] = [];
  new InputQueue((bytes) => sent.push(text(bytes))).push(KEY("a"), false);
  assert.deepEqual(sent, ["a"]);
});

test("a large paste arrives whole and in order, never with more than the window under way", () => {
  const sent: Uint8Array[] = [];
  const queue = new InputQueue((bytes) => sent.push(bytes));
  const paste = Uint8Array.from({ length: 1_000_003 }, (_, index) => index % 251);
  assert.equal(queue.push(paste, false), true);
  let acknowledged = 0;
  let seen = 0;
  while (seen < sent.length) {
    assert.ok(sent.reduce((sum, bytes) => sum + bytes.length, 0) - acknowledged <= INPUT_WINDOW);
    const bytes = sent[seen++];
    assert.ok(bytes !== undefined && bytes.length <= INPUT_CHUNK);
    acknowledged += bytes.length;
    queue.taken(bytes.length);
  }
  assert.deepEqual(Buffer.concat(sent), Buffer.from(paste));
});

test("Ctrl-C throws away what has not been sent and ends a bracketed paste", () => {
  for (const inPaste of [false, true]) {
    const sent: Uint8Array[] = [];
    const queue = new InputQueue((bytes) => sent.push(bytes));
    queue.push(new Uint8Array(INPUT_WINDOW + 5000).fill(0x78), inPaste);
    queue.push(KEY("\x03"), inPaste);
    queue.taken(INPUT_WINDOW);
    const all = text(Buffer.concat(sent));
    assert.equal(all.slice(INPUT_WINDOW), inPaste ? "\x1b[201~\x03" : "\x03");
  }
});

test("more than the limit is refused whole, and what waits stays", () => {
  const queue = new InputQueue(() => undefined);
  queue.push(new Uint8Array(INPUT_LIMIT), false);
  const waiting = queue.waitingBytes;
  assert.equal(queue.push(new Uint8Array(INPUT_WINDOW + 1), false), false);
  assert.equal(queue.waitingBytes, waiting);
});
