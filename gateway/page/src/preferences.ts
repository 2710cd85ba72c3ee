// What this browser remembers: no more than how the terminal looks. A browser that keeps nothing is no error.

const KEY = "carrel.preferences";

export interface Preferences {
  fontSize: number;
  screenReader: boolean;
}

export function load(): Preferences {
  const preferences: Preferences = { fontSize: 15, screenReader: false };
  try {
    const stored: unknown = JSON.parse(localStorage.getItem(KEY) ?? "{}");
    if (typeof stored !== "object" || stored === null) return preferences;
    if ("fontSize" in stored && typeof stored.fontSize === "number") preferences.fontSize = stored.fontSize;
    if ("screenReader" in stored && typeof stored.screenReader === "boolean") preferences.screenReader = stored.screenReader;
  } catch {
    // Storage may be refused, or hold something else.
  }
  return preferences;
}

export function save(preferences: Preferences): void {
  try {
    localStorage.setItem(KEY, JSON.stringify(preferences));
  } catch {
    // As above.
  }
}
