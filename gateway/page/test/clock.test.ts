import assert from "node:assert/strict";
import { test } from "node:test";
import { Clock, clockFace, markPassed, spoken } from "../src/clock";

test("nothing is shown before the server has said something", () => {
  assert.equal(new Clock().remaining(0), undefined);
});

test("the clock counts down from the server's number and never shows more", () => {
  const clock = new Clock();
  clock.report(100, true, 0);
  assert.equal(clock.remaining(0), 100);
  assert.equal(clock.remaining(1), 99);
  assert.equal(clock.remaining(10_000), 90);
  assert.equal(clock.remaining(500_000), 0);
});

test("a report that was late on its way does not turn the clock back", () => {
  const clock = new Clock();
  clock.report(100, true, 0);
  clock.report(91, true, 10_500);
  assert.equal(clock.remaining(10_500), 89);
});

test("a lower report counts at once, and so does an extension", () => {
  const clock = new Clock();
  clock.report(100, true, 0);
  clock.report(50, true, 1000);
  assert.equal(clock.remaining(1000), 50);
  clock.report(650, true, 2000);
  assert.equal(clock.remaining(2000), 650);
});

test("before the exam runs the clock stands", () => {
  const clock = new Clock();
  clock.report(7200, false, 0);
  assert.equal(clock.remaining(60_000), 7200);
  clock.report(7199, true, 61_000);
  assert.equal(clock.remaining(62_000), 7198);
});

test("times are written for eyes and for ears", () => {
  assert.equal(clockFace(7509), "2:05:09");
  assert.equal(clockFace(245), "4:05");
  assert.equal(clockFace(9), "0:09");
  assert.equal(spoken(3900), "1 hour 5 minutes");
  assert.equal(spoken(600), "10 minutes");
  assert.equal(spoken(1), "1 second");
});

test("a mark is said when it is passed, and not at the first reading", () => {
  assert.equal(markPassed(undefined, 500), undefined);
  assert.equal(markPassed(601, 600), 600);
  assert.equal(markPassed(600, 599), undefined);
  assert.equal(markPassed(310, 280), 300);
});
