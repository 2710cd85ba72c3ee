import assert from "node:assert/strict";
import { test } from "node:test";
import { backoff } from "../src/backoff";
import { isReply } from "../src/replies";

test("answers of a terminal are told from keys", () => {
  for (const reply of ["\x1b[?1;2c", "\x1b[>0;276;0c", "\x1b[0n", "\x1b[24;80R", "\x1b[?2004;1$y", "\x1b[8;24;80t", "\x1b[I", "\x1b[O", "\x1b]11;rgb:1010/1313/1818\x1b\\", "\x1b]4;1;rgb:ffff/0000/0000\x07", "\x1bP1$r0m\x1b\\", "\x1bP>|xterm.js(6.0.0)\x1b\\"])
    assert.ok(isReply(reply), JSON.stringify(reply));
  for (const key of ["a", "\x1b", "\x1b[A", "\x1bOA", "\x1b[1;5C", "\x1b[3~", "\x1b[200~c\x1b[201~", "\x1b[M !!", "\x1b[<0;1;1M", "c", "\r"])
    assert.ok(!isReply(key), JSON.stringify(key));
});

test("waits double, are capped, and are spread", () => {
  assert.equal(backoff(0, 0), 250);
  assert.equal(backoff(0, 1), 500);
  assert.equal(backoff(3, 1), 4000);
  assert.equal(backoff(100, 1), 15_000);
  assert.equal(backoff(100, 0), 7500);
});
