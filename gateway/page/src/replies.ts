// What a terminal says by itself, as opposed to what somebody typed.

// Device attributes, status and cursor reports, mode reports, window reports, focus, colours (OSC 4, 10, 11, 12), DECRQSS and XTVERSION (DCS).
const REPLY = /^(?:\x1b\[[?>=]?[\d;]*(?:\$y|[cnRtIOx])|\x1b\](?:4|1[0-9]);[^\x07\x1b]*(?:\x07|\x1b\\)|\x1bP[^\x1b]*\x1b\\)$/;

/**
 * Is this an answer of the terminal to a program's question? Asked only while an old screen is drawn again: those questions were
 * answered when they were first asked, and a second answer would be typed into whatever runs now.
 */
export function isReply(data: string): boolean {
  return REPLY.test(data);
}
