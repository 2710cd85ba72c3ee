// How long to wait before the next try.

const FIRST_MS = 500;
const MOST_MS = 15_000;

/** Doubles from half a second to 15 s; each between half and all of that, so that an exam hall does not come back as one. `random` is in [0, 1). */
export function backoff(attempt: number, random: number): number {
  const most = Math.min(MOST_MS, FIRST_MS * 2 ** Math.min(attempt, 10));
  return Math.round(most * (0.5 + random / 2));
}
