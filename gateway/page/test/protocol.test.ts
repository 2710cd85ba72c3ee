import assert from "node:assert/strict";
import { test } from "node:test";
import { ack, decode, input, resize } from "../src/protocol";

const frame = (type: number, payload: Uint8Array | string): ArrayBuffer => {
  const body = typeof payload === "string" ? new TextEncoder().encode(payload) : payload;
  const bytes = new Uint8Array(body.length + 1);
  bytes[0] = type;
  bytes.set(body, 1);
  return bytes.buffer;
};

test("frames to the server are the bytes that docs/websocket.md shows", () => {
  assert.deepEqual([...input(new Uint8Array([0x6c, 0x73]))], [0, 0x6c, 0x73]);
  assert.deepEqual([...resize(120, 300)], [1, 0, 120, 1, 44]);
  assert.deepEqual([...ack(0x00010203)], [2, 0, 1, 2, 3]);
});

test("output is given through byte for byte, also where it is no UTF-8", () => {
  const read = decode(frame(0, new Uint8Array([0xff, 0x00, 0xc3])));
  assert.equal(read.type, "output");
  assert.deepEqual(read.type === "output" && [...read.bytes], [0xff, 0x00, 0xc3]);
});

test("status, termination, attached and exit are JSON", () => {
  assert.deepEqual(decode(frame(1, '{"state":"running","remaining_seconds":7}')), { type: "status", status: { state: "running", remaining_seconds: 7 } });
  assert.deepEqual(decode(frame(2, '{"reason":"time_expired","message":"é"}')), { type: "termination", termination: { reason: "time_expired", message: "é" } });
  assert.deepEqual(decode(frame(3, '{"resumed":true,"watching":false}')), { type: "attached", attached: { resumed: true, watching: false } });
  assert.deepEqual(decode(frame(5, '{"code":3}')), { type: "exit", exit: { code: 3 } });
});

test("an acknowledgement of input is four bytes, most significant first, and nothing else is", () => {
  assert.deepEqual(decode(frame(4, new Uint8Array([0, 1, 0, 0]))), { type: "input_taken", bytes: 65536 });
  assert.throws(() => decode(frame(4, new Uint8Array([1]))));
});

test("a frame of a later version is no error", () => {
  assert.deepEqual(decode(frame(0x7f, "x")), { type: "unknown" });
  assert.deepEqual(decode(new ArrayBuffer(0)), { type: "unknown" });
});
