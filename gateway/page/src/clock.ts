// Time left, as the server told it. Knows no DOM and no timer.

/** A report this much above what is shown is news (an extension); less is the network's delay. Seconds. */
const JITTER = 2;

/** Counts down from the server's number and never shows more than the server reported. */
export class Clock {
  #reported = Number.POSITIVE_INFINITY;
  #at = 0;
  #ticking = false;

  /** `now` in ms of a clock that only goes forward. The time runs only while the session does. */
  report(seconds: number, ticking: boolean, now: number): void {
    const shown = this.remaining(now);
    if (ticking && this.#ticking && shown !== undefined && seconds > shown && seconds - shown <= JITTER) return;
    this.#reported = seconds;
    this.#at = now;
    this.#ticking = ticking;
  }

  /** Whole seconds, or undefined before the first report. */
  remaining(now: number): number | undefined {
    if (this.#reported === Number.POSITIVE_INFINITY) return undefined;
    const elapsed = this.#ticking ? Math.ceil(Math.max(0, now - this.#at) / 1000) : 0;
    return Math.max(0, this.#reported - elapsed);
  }
}

/** `2:05:09`, `4:05`, `0:09`. */
export function clockFace(seconds: number): string {
  const two = (value: number) => String(value).padStart(2, "0");
  const hours = Math.floor(seconds / 3600);
  const minutes = Math.floor((seconds % 3600) / 60);
  const rest = two(seconds % 60);
  return hours > 0 ? `${hours}:${two(minutes)}:${rest}` : `${minutes}:${rest}`;
}

/** For a voice: `1 hour 5 minutes`, `40 seconds`. */
export function spoken(seconds: number): string {
  const plural = (count: number, unit: string) => `${count} ${unit}${count === 1 ? "" : "s"}`;
  const hours = Math.floor(seconds / 3600);
  const minutes = Math.floor((seconds % 3600) / 60);
  if (hours > 0) return minutes > 0 ? `${plural(hours, "hour")} ${plural(minutes, "minute")}` : plural(hours, "hour");
  return minutes > 0 ? plural(minutes, "minute") : plural(seconds, "second");
}

const MARKS = [1800, 600, 300, 60];

/** The mark of 30, 10, 5 and 1 minutes that lies between two readings, to be said aloud once. */
export function markPassed(before: number | undefined, after: number): number | undefined {
  if (before === undefined) return undefined;
  return MARKS.find((mark) => before > mark && after <= mark);
}
