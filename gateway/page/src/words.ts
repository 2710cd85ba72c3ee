// What a candidate is told at the end. The server's message says what happened and what to do; this is its heading.

export type Tone = "calm" | "problem";

const HEADINGS: Record<string, [string, Tone]> = {
  submitted: ["Your exam is handed in", "calm"],
  time_expired: ["Time is up", "calm"],
  ended_by_staff: ["The exam staff ended your session", "calm"],
  ended_by_candidate: ["You ended your session", "calm"],
  never_started: ["This session was not started in time", "calm"],
  abandoned: ["This session was closed after a long time without use", "calm"],
  cancelled: ["This session was cancelled", "calm"],
  start_timeout: ["Your environment did not start in time", "problem"],
  image_pull_failed: ["Your environment could not be started", "problem"],
  unschedulable: ["There is no room for your environment", "problem"],
  quota_exceeded: ["There is no room for your environment", "problem"],
  environment_crashed: ["Your environment stopped unexpectedly", "problem"],
  environment_lost: ["Your environment was lost", "problem"],
  cluster_unavailable: ["The exam system cannot be reached", "problem"],
  out_of_memory: ["Your environment ran out of memory", "problem"],
  setup_failed: ["The exam could not be prepared", "problem"],
  internal: ["Something went wrong on our side", "problem"],
};

export function heading(reason: string): { text: string; tone: Tone } {
  const [text, tone] = HEADINGS[reason] ?? ["Your session has ended", "calm"];
  return { text, tone };
}
