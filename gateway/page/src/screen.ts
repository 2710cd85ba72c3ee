// The terminal: xterm.js with its flow control. Knows no socket and nothing of sessions.
import { FitAddon } from "@xterm/addon-fit";
import { Unicode11Addon } from "@xterm/addon-unicode11";
import { Terminal } from "@xterm/xterm";
import { isReply } from "./replies";

const FONT = 'ui-monospace, "Cascadia Mono", "JetBrains Mono", "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", "Liberation Mono", monospace';
const SMALLEST = 9;
const LARGEST = 28;
/** Output is acknowledged in steps of this size: far below what the server lets be under way, and few frames. */
const ACK_STEP = 64 * 1024;
/** CAN ends an unfinished sequence of the last connection, RIS resets everything. */
const FULL_RESET = new Uint8Array([0x18, 0x1b, 0x63]);

const THEME = {
  background: "#0d1117",
  foreground: "#dbe2ea",
  cursor: "#7ee0c3",
  cursorAccent: "#0d1117",
  selectionBackground: "#2f4f6b",
  selectionInactiveBackground: "#263747",
  scrollbarSliderBackground: "#3a465466",
  scrollbarSliderHoverBackground: "#4c5a6b99",
  scrollbarSliderActiveBackground: "#5d6d80cc",
  black: "#1b222b",
  red: "#ff7b72",
  green: "#6fdd8b",
  yellow: "#e8c15a",
  blue: "#79b8ff",
  magenta: "#d2a8ff",
  cyan: "#6fd8e0",
  white: "#c9d1d9",
  brightBlack: "#7d8896",
  brightRed: "#ffa198",
  brightGreen: "#8ef0a6",
  brightYellow: "#f5d97f",
  brightBlue: "#a5d0ff",
  brightMagenta: "#e2c5ff",
  brightCyan: "#9aecf2",
  brightWhite: "#ffffff",
};

export interface ScreenEvents {
  /** Keys, pastes and the terminal's own answers. `inPaste`: the program has asked for bracketed pastes. */
  input(bytes: Uint8Array, inPaste: boolean): void;
  resized(cols: number, rows: number): void;
  title(title: string): void;
}

export class Screen {
  readonly #terminal: Terminal;
  readonly #fit = new FitAddon();
  readonly #encoder = new TextEncoder();
  #replaying = false;
  #fitting = 0;

  constructor(parent: HTMLElement, fontSize: number, events: ScreenEvents) {
    const terminal = new Terminal({
      // The width tables of Unicode 11 are proposed API.
      allowProposedApi: true,
      fontFamily: FONT,
      fontSize: clampFont(fontSize),
      minimumContrastRatio: 4.5,
      scrollback: 5000,
      disableStdin: true,
      logLevel: "off",
      theme: THEME,
      // An address in the output is text here: nothing a program prints makes the browser go anywhere.
      linkHandler: { activate: () => undefined },
    });
    this.#terminal = terminal;
    terminal.loadAddon(this.#fit);
    terminal.loadAddon(new Unicode11Addon());
    terminal.unicode.activeVersion = "11";
    terminal.onData((data) => {
      if (this.#replaying && isReply(data)) return;
      events.input(this.#encoder.encode(data), terminal.modes.bracketedPasteMode);
    });
    // Old mouse reports are bytes, not text.
    terminal.onBinary((data) => events.input(Uint8Array.from(data, (character) => character.charCodeAt(0) & 0xff), false));
    terminal.onResize(({ cols, rows }) => events.resized(cols, rows));
    terminal.onTitleChange((title) => events.title(title));
    terminal.attachCustomKeyEventHandler((event) => this.#key(event));
    terminal.open(parent);
    this.#fit.fit();
    new ResizeObserver(() => {
      cancelAnimationFrame(this.#fitting);
      this.#fitting = requestAnimationFrame(() => this.fit());
    }).observe(parent);
  }

  get cols(): number {
    return this.#terminal.cols;
  }

  get rows(): number {
    return this.#terminal.rows;
  }

  get fontSize(): number {
    return this.#terminal.options.fontSize ?? 14;
  }

  fit(): void {
    const size = this.#fit.proposeDimensions();
    if (size === undefined || Number.isNaN(size.cols) || Number.isNaN(size.rows)) return;
    this.#terminal.resize(Math.min(500, Math.max(2, size.cols)), Math.min(300, Math.max(1, size.rows)));
  }

  zoom(step: number): number {
    this.#terminal.options.fontSize = clampFont(this.fontSize + step);
    this.fit();
    return this.fontSize;
  }

  set screenReader(on: boolean) {
    this.#terminal.options.screenReaderMode = on;
  }

  set typing(allowed: boolean) {
    this.#terminal.options.disableStdin = !allowed;
  }

  focus(): void {
    this.#terminal.focus();
  }

  /**
   * A new connection's output begins: everything on the screen goes, and the first piece draws the old one if it was `resumed`. The
   * returned function takes output; `acknowledge` is called with byte counts once they are drawn.
   */
  begin(resumed: boolean, acknowledge: (bytes: number) => void): (bytes: Uint8Array) => void {
    let first = true;
    let drawn = 0;
    this.#terminal.write(FULL_RESET, () => {
      this.#replaying = resumed;
    });
    return (bytes) => {
      const redraw = first;
      first = false;
      this.#terminal.write(bytes, () => {
        if (redraw) this.#replaying = false;
        drawn += bytes.length;
        if (drawn < ACK_STEP) return;
        acknowledge(drawn);
        drawn = 0;
      });
    };
  }

  #key(event: KeyboardEvent): boolean {
    if (event.type !== "keydown" || !event.ctrlKey || !event.shiftKey) return true;
    if (event.code === "KeyC") {
      // Without this it opens the browser's developer tools.
      event.preventDefault();
      const selection = this.#terminal.getSelection();
      if (selection !== "") void navigator.clipboard?.writeText(selection).catch(() => document.execCommand("copy"));
      return false;
    }
    // The browser's own paste follows, which the terminal takes.
    if (event.code === "KeyV") return false;
    if (event.code === "F6") {
      // The way out for somebody who has no mouse: the terminal takes the Tab key.
      event.preventDefault();
      this.#terminal.blur();
      document.querySelector<HTMLElement>("#menu summary")?.focus();
      return false;
    }
    return true;
  }
}

function clampFont(size: number): number {
  return Math.min(LARGEST, Math.max(SMALLEST, Math.round(size)));
}
