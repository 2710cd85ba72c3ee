// Everything around the terminal: header, progress, messages. Text only ever goes in as text.
import { clockFace, markPassed, spoken } from "./clock";
import type { Progress } from "./protocol";
import type { Tone } from "./words";

export type Badge = "connecting" | "starting" | "connected" | "watching" | "reconnecting" | "exited" | "ended" | "problem";

const BADGES: Record<Badge, string> = {
  connecting: "Connecting",
  starting: "Starting",
  connected: "Connected",
  watching: "Watching",
  reconnecting: "Reconnecting",
  exited: "Shell ended",
  ended: "Ended",
  problem: "Problem",
};

export interface Card {
  tone: Tone;
  heading: string;
  text: string;
  /** Small print for whoever helps. */
  reference?: string;
  action?: { label: string; run: () => void };
}

function element<T extends HTMLElement>(id: string): T {
  const found = document.getElementById(id);
  if (found === null) throw new Error(`the page has no #${id}`);
  return found as T;
}

export class View {
  readonly terminal = element("terminal");
  readonly #badge = element("badge");
  readonly #exam = element("exam");
  readonly #time = element("time");
  readonly #timeLeft = element("time-left");
  readonly #notice = element("notice");
  readonly #noticeText = element("notice-text");
  readonly #noticeButton = element<HTMLButtonElement>("notice-button");
  readonly #overlay = element("overlay");
  readonly #progress = element("progress");
  readonly #steps = element("steps");
  readonly #card = element("card");
  readonly #announcer = element("announcer");
  #shown: number | undefined;
  #announced = "";

  badge(badge: Badge): void {
    this.#badge.dataset["state"] = badge;
    this.#badge.textContent = BADGES[badge];
    document.body.dataset["state"] = badge;
  }

  exam(id: string): void {
    this.#exam.textContent = id;
  }

  title(text: string): void {
    document.title = text === "" ? "Carrel" : `${text} · Carrel`;
  }

  time(seconds: number | undefined): void {
    if (seconds === undefined || seconds === this.#shown) return;
    const mark = markPassed(this.#shown, seconds);
    if (mark !== undefined && seconds > 0) this.announce(`${spoken(seconds)} left`);
    this.#shown = seconds;
    this.#time.hidden = false;
    this.#time.dataset["urgency"] = seconds <= 60 ? "last" : seconds <= 600 ? "soon" : "none";
    this.#timeLeft.textContent = clockFace(seconds);
  }

  hideTime(): void {
    this.#time.hidden = true;
  }

  /** A strip above the terminal, which stays visible. `undefined` takes it away. */
  notice(text: string | undefined, action?: { label: string; run: () => void }): void {
    this.#notice.hidden = text === undefined;
    this.#noticeText.textContent = text ?? "";
    this.#noticeButton.hidden = action === undefined;
    this.#noticeButton.textContent = action?.label ?? "";
    this.#noticeButton.onclick = action === undefined ? null : action.run;
  }

  /** The steps of starting, the present one marked. */
  progress(progress: Progress): void {
    const texts = progress.steps ?? [progress.step_description];
    const current = progress.steps === undefined ? 0 : progress.current_step - 1;
    this.#steps.replaceChildren(
      ...texts.map((text, index) => {
        const item = document.createElement("li");
        item.textContent = text;
        item.className = index < current ? "done" : index === current ? "current" : "todo";
        if (index === current) item.setAttribute("aria-current", "step");
        return item;
      }),
    );
    this.#cover(this.#progress);
    this.announce(`Step ${progress.current_step} of ${progress.total_steps}: ${progress.step_description}`);
  }

  card(card: Card): void {
    const heading = document.createElement("h1");
    heading.textContent = card.heading;
    heading.tabIndex = -1;
    const text = document.createElement("p");
    text.textContent = card.text;
    const parts: HTMLElement[] = [heading, text];
    let button: HTMLButtonElement | undefined;
    if (card.action !== undefined) {
      button = document.createElement("button");
      button.textContent = card.action.label;
      button.className = "primary";
      button.onclick = card.action.run;
      parts.push(button);
    }
    if (card.reference !== undefined) {
      const reference = document.createElement("p");
      reference.className = "reference";
      reference.textContent = card.reference;
      parts.push(reference);
    }
    this.#card.dataset["tone"] = card.tone;
    this.#card.replaceChildren(...parts);
    this.#cover(this.#card);
    this.announce(`${card.heading}. ${card.text}`);
    (button ?? heading).focus();
  }

  /** Only the terminal. */
  uncover(): void {
    this.#cover(undefined);
  }

  /** Said to a screen reader, once. */
  announce(text: string): void {
    if (text === this.#announced) return;
    this.#announced = text;
    this.#announcer.textContent = text;
  }

  #cover(shown: HTMLElement | undefined): void {
    this.#overlay.hidden = shown === undefined;
    this.#progress.hidden = shown !== this.#progress;
    this.#card.hidden = shown !== this.#card;
    // What lies under a card takes no focus and is not read out.
    this.terminal.inert = shown !== undefined;
  }
}
