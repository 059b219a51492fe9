import type { Usage } from './api';
import { toPart, type Medium } from './media';
import type { Timings } from './timings';

export interface Question {
  text: string;
  media: Medium[];
}

export interface Failure {
  message: string;
  status: number;
  requestId: string;
}

export interface Answer {
  text: string;
  reasoning: string;
  state: 'running' | 'done' | 'stopped' | 'failed';
  failure?: Failure;
  finish?: string;
  usage?: Usage;
  timings?: Timings;
  /** As the page saw it, in ms: until the first text, and until the end. */
  firstMs?: number;
  totalMs?: number;
}

export interface Turn {
  id: number;
  question: Question;
  answer: Answer;
}

export type Action =
  | { type: 'ask'; turns: Turn[] }
  | { type: 'more'; id: number; text: string; reasoning: string }
  | { type: 'change'; id: number; change: Partial<Answer> };

export const UNANSWERED: Answer = { text: '', reasoning: '', state: 'running' };

/** The conversation after something happened. */
export function reduce(turns: Turn[], action: Action): Turn[] {
  if (action.type === 'ask') return action.turns;
  return turns.map((turn) => {
    if (turn.id !== action.id) return turn;
    const { answer } = turn;
    if (action.type === 'change') return { ...turn, answer: { ...answer, ...action.change } };
    const text = answer.text + action.text;
    return { ...turn, answer: { ...answer, text, reasoning: answer.reasoning + action.reasoning } };
  });
}

/** The messages of a request: turns without an answer are left out, but for the last, which asks for one. */
export async function messages(turns: readonly Turn[], system: string): Promise<object[]> {
  const out: object[] = system.trim() ? [{ role: 'system', content: system }] : [];
  for (const [index, { question, answer }] of turns.entries()) {
    const last = index === turns.length - 1;
    if (!last && !answer.text) continue;
    const parts = await Promise.all(question.media.map(toPart));
    if (question.text) parts.push({ type: 'text', text: question.text });
    out.push({ role: 'user', content: question.media.length ? parts : question.text });
    if (!last) out.push({ role: 'assistant', content: answer.text });
  }
  return out;
}
