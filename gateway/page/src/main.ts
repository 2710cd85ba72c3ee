// The candidate's page: trades its ticket, keeps a connection, draws what comes. Everything that decides lies in the modules it joins.
import "@xterm/xterm/css/xterm.css";
import "./style.css";
import { Clock } from "./clock";
import { Connection, type Final } from "./connection";
import { InputQueue } from "./input";
import { nonceStyles } from "./nonce";
import { load, save } from "./preferences";
import { type Attached, type Exit, type ServerFrame, type Status, type Termination, ack, input, resize } from "./protocol";
import { Screen } from "./screen";
import { View } from "./view";
import { heading } from "./words";

nonceStyles();

const session = /^\/session\/([0-9A-Fa-f-]{36})\/?$/.exec(location.pathname)?.[1]?.toLowerCase();
const view = new View();
const clock = new Clock();
const preferences = load();

let attached: Attached | undefined;
let exit: Exit | undefined;
let termination: Termination | undefined;
let over = false;
let retryAt: number | undefined;
let queue = new InputQueue(() => undefined);
let draw: ((bytes: Uint8Array) => void) | undefined;

const screen = new Screen(view.terminal, preferences.fontSize, {
  input(bytes, inPaste) {
    if (attached === undefined || attached.watching) return;
    if (!queue.push(bytes, inPaste)) {
      view.notice("That is too much to paste at once: nothing of it was sent.", { label: "OK", run: () => view.notice(undefined) });
    }
  },
  resized(cols, rows) {
    if (attached !== undefined && !attached.watching) connection.send(resize(cols, rows));
  },
  title(title) {
    // Written by whatever runs in the environment.
    view.title(title.replace(/[\u0000-\u001f\u007f-\u009f\u200e\u200f\u202a-\u202e\u2066-\u2069]/g, "").slice(0, 60));
  },
});
screen.screenReader = preferences.screenReader;

const scheme = location.protocol === "https:" ? "wss:" : "ws:";
const connection = new Connection(`${scheme}//${location.host}/v1/sessions/${session ?? ""}/terminal`, {
  connecting() {
    retryAt = undefined;
    if (document.body.dataset["state"] === "reconnecting") view.notice("Reconnecting…");
    else view.badge("connecting");
  },
  open() {
    // The first frame: the terminal is made or joined in this size.
    connection.send(resize(screen.cols, screen.rows));
  },
  frame: received,
  down(at, _detail) {
    detach();
    retryAt = at;
    view.badge("reconnecting");
    tick();
  },
  final,
});

function received(frame: ServerFrame): void {
  switch (frame.type) {
    case "output":
      return draw?.(frame.bytes);
    case "input_taken":
      return queue.taken(frame.bytes);
    case "status":
      return status(frame.status);
    case "attached":
      return attach(frame.attached);
    case "exit":
      exit = frame.exit;
      return;
    case "termination":
      termination = frame.termination;
      return;
    case "unknown":
      return;
  }
}

function status(status: Status): void {
  if (status.exam_id !== undefined) view.exam(status.exam_id);
  clock.report(status.remaining_seconds, status.state === "running", performance.now());
  tick();
  if (attached === undefined && status.progress !== undefined && (status.state === "created" || status.state === "initializing")) {
    view.notice(undefined);
    view.badge("starting");
    view.progress(status.progress);
  }
}

function attach(now: Attached): void {
  attached = now;
  exit = undefined;
  queue = new InputQueue((bytes) => connection.send(input(bytes)));
  draw = screen.begin(now.resumed, (bytes) => connection.send(ack(bytes)));
  view.notice(undefined);
  view.badge(now.watching ? "watching" : "connected");
  view.uncover();
  view.announce(now.watching ? "You are watching this terminal" : now.resumed ? "Connected again to your terminal" : "Connected");
  screen.typing = !now.watching;
  // The window may have changed while the connection was made.
  connection.send(resize(screen.cols, screen.rows));
  screen.focus();
}

function detach(): void {
  attached = undefined;
  draw = undefined;
  screen.typing = false;
  queue = new InputQueue(() => undefined);
}

function final(why: Final): void {
  detach();
  retryAt = undefined;
  view.notice(undefined);
  switch (why) {
    case "exited":
      view.badge("exited");
      return view.card({
        tone: exit?.reason === undefined ? "calm" : "problem",
        heading: "Your shell has ended",
        text: `${howItEnded(exit)} Your files are kept, and your time goes on.`,
        action: { label: "Open a new shell", run: () => connection.connect() },
      });
    case "crowded":
      view.badge("problem");
      return view.card({
        tone: "problem",
        heading: "This session is open in too many places",
        text: "Close some of the other windows or SSH connections, then try again.",
        action: { label: "Try again", run: () => connection.connect() },
      });
    case "ended": {
      over = true;
      const { text, tone } = heading(termination?.reason ?? "");
      view.badge("ended");
      view.hideTime();
      return view.card({
        tone,
        heading: text,
        text: termination?.message ?? "Nothing more can be done in this session.",
        reference: reference(termination?.reason),
      });
    }
    case "unauthenticated":
      view.badge("problem");
      return view.card({
        tone: "problem",
        heading: "This link is used up or too old",
        text: "A link to a session works once and for a short time. Go back to where you found it and open the terminal again from there; your work is not lost.",
        reference: reference(undefined),
      });
    case "denied":
      view.badge("problem");
      return view.card({
        tone: "problem",
        heading: "You have no access to this session",
        text: "It may not be yours, or there is no such session. Open the terminal again from where you found the link, or ask the exam staff.",
        reference: reference(undefined),
      });
  }
}

function howItEnded(exit: Exit | undefined): string {
  if (exit?.reason === "out_of_memory") return "It was stopped because the environment ran out of memory.";
  if (exit?.signal !== undefined) return `It was ended by signal ${exit.signal}.`;
  return exit?.code === undefined || exit.code === 0 ? "It exited normally." : `It exited with code ${exit.code}.`;
}

function reference(reason: string | undefined): string {
  return [reason, `session ${session ?? "?"}`].filter((part) => part !== undefined).join(" · ");
}

function tick(): void {
  const now = performance.now();
  if (!over) view.time(clock.remaining(now));
  if (retryAt === undefined) return;
  const seconds = Math.ceil((retryAt - now) / 1000);
  const wait = seconds > 0 ? ` Trying again in ${seconds} s.` : "";
  view.notice(`Connection lost. Your terminal keeps running.${wait}`, { label: "Try now", run: () => connection.hurry() });
}

function menu(): void {
  const on = (id: string, event: string, run: (element: HTMLInputElement) => void) => {
    const element = document.getElementById(id) as HTMLInputElement | null;
    element?.addEventListener(event, () => run(element));
  };
  const zoom = (step: number) => {
    preferences.fontSize = screen.zoom(step);
    save(preferences);
  };
  on("smaller", "click", () => zoom(-1));
  on("larger", "click", () => zoom(1));
  on("screen-reader", "change", (box) => {
    preferences.screenReader = box.checked;
    screen.screenReader = box.checked;
    save(preferences);
  });
  const box = document.getElementById("screen-reader") as HTMLInputElement | null;
  if (box !== null) box.checked = preferences.screenReader;
  const details = document.getElementById("menu") as HTMLDetailsElement | null;
  const close = () => {
    if (details?.open !== true) return;
    details.open = false;
    screen.focus();
  };
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && details?.contains(document.activeElement) === true) close();
  });
  document.addEventListener("pointerdown", (event) => {
    if (event.target instanceof Node && details?.contains(event.target) !== true) close();
  });
}

/** The ticket leaves the address and the history before anything else happens; then it is traded for a cookie. */
async function login(id: string): Promise<void> {
  const ticket = new URLSearchParams(location.hash.slice(1)).get("ticket");
  if (location.hash !== "") history.replaceState(null, "", location.pathname);
  if (ticket === null) return;
  for (let attempt = 0; attempt < 5; attempt += 1) {
    try {
      const answer = await fetch(`/session/${id}/login`, {
        method: "POST",
        headers: { "content-type": "application/json" },
        body: JSON.stringify({ ticket }),
        credentials: "same-origin",
      });
      // A refused ticket is not the end: the cookie of an earlier visit may still be good. The WebSocket has the last word.
      if (answer.status < 500) return;
    } catch {
      // No network: tried again below.
    }
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
}

menu();
setInterval(tick, 250);
window.addEventListener("online", () => connection.hurry());
document.addEventListener("visibilitychange", () => {
  if (document.visibilityState === "visible") connection.hurry();
});
// Ctrl-W deletes a word in a shell and closes the tab in a browser.
window.addEventListener("beforeunload", (event) => {
  if (attached !== undefined && !attached.watching) event.preventDefault();
});

if (session === undefined) final("denied");
else void login(session).then(() => connection.connect());
