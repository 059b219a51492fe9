/** What `return_timings` gives: milliseconds by stage, `total_ms`, and `tokens_per_second` where there were several. */
export type Timings = Record<string, number | null>;

export interface Stage {
  key: string;
  label: string;
  what: string;
}

/** The stages in the order in which a request passes them. */
export const STAGES: readonly Stage[] = [
  { key: 'fetch_ms', label: 'Fetch', what: 'media by address come from the network' },
  { key: 'decode_ms', label: 'Decode media', what: 'files become pixels and samples' },
  { key: 'preprocess_ms', label: 'Preprocess', what: 'chat template, tokens, patches' },
  { key: 'encode_ms', label: 'Encode', what: 'pictures, videos and sounds become embeddings' },
  { key: 'queue_ms', label: 'Queue', what: 'waiting for a place in the batch' },
  { key: 'prefill_ms', label: 'Prefill', what: 'the model reads the prompt' },
  { key: 'generate_ms', label: 'Generate', what: 'the model writes, token by token' },
];

// What none of the stages claims: the HTTP endpoint itself, and the way of the last token.
const REST: Stage = { key: 'rest_ms', label: 'Other', what: 'the HTTP endpoint, and the way between processes' };

export interface Bar extends Stage {
  ms: number;
  /** Where it begins and how long it is, as shares of the whole. */
  from: number;
  share: number;
}

/** One bar for each stage that took time, one after the other: the stages of a request do not overlap. */
export function bars(timings: Timings): Bar[] {
  const times = STAGES.map((stage) => ({ ...stage, ms: timings[stage.key] ?? 0 }));
  const sum = times.reduce((total, { ms }) => total + ms, 0);
  const whole = Math.max(sum, timings.total_ms ?? 0, Number.EPSILON);
  let passed = 0;
  return [...times, { ...REST, ms: whole - sum }].map((stage) => {
    const bar = { ...stage, from: passed / whole, share: stage.ms / whole };
    passed += stage.ms;
    return bar;
  });
}

/** Milliseconds as people read them. */
export function duration(ms: number): string {
  if (ms > 0 && ms < 10) return `${ms.toFixed(1)} ms`;
  return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(2)} s`;
}
