import { useCallback, useEffect, useReducer, useRef } from 'react';
import { ApiError, answer as ask, type Piece } from './api';
import { UNANSWERED, messages, reduce, type Answer, type Question, type Turn } from './chat';
import { release } from './media';
import { fields, type Settings } from './settings';

// Text is drawn this often while it streams, however fast it comes.
const DRAW_MS = 40;

export interface Chat {
  turns: Turn[];
  running: boolean;
  send: (question: Question) => void;
  /** Asks a question of the conversation again, changed or not; what followed it is dropped. */
  again: (id: number, question?: Question) => void;
  stop: () => void;
  clear: () => void;
}

interface Options {
  model: string;
  apiKey: string;
  settings: Settings;
  onEnd: (answer: Answer) => void;
  onDenied: () => void;
}

/** A conversation with the server. */
export function useChat(options: Options): Chat {
  const [turns, dispatch] = useReducer(reduce, []);
  const current = useRef(options);
  const conversation = useRef(turns);
  const abort = useRef<AbortController | null>(null);
  const made = useRef(0);
  useEffect(() => {
    current.current = options;
    conversation.current = turns;
  });

  const run = useCallback(async (asked: Turn[]) => {
    abort.current?.abort();
    const controller = new AbortController();
    abort.current = controller;
    const { id } = asked[asked.length - 1] as Turn;
    dispatch({ type: 'ask', turns: asked });
    const { model, apiKey, settings } = current.current;
    const buffer = { text: '', reasoning: '' };
    const end: Answer = { ...UNANSWERED };
    let began = performance.now();
    const draw = () => {
      if (buffer.text || buffer.reasoning) dispatch({ type: 'more', id, ...buffer });
      buffer.text = buffer.reasoning = '';
    };
    const timer = setInterval(draw, DRAW_MS);
    const take = ({ text = '', reasoning = '', ...rest }: Piece) => {
      if (text || reasoning) end.firstMs ??= performance.now() - began;
      buffer.text += text;
      buffer.reasoning += reasoning;
      end.text += text;
      Object.assign(end, rest);
    };
    try {
      const body = { model, messages: await messages(asked, settings.system), return_timings: true, ...fields(settings) };
      began = performance.now();
      for await (const piece of ask(body, apiKey, controller.signal)) take(piece);
      end.state = 'done';
    } catch (error) {
      if (controller.signal.aborted) {
        end.state = 'stopped';
      } else {
        end.state = 'failed';
        const { status, requestId } = error instanceof ApiError ? error : { status: 0, requestId: '' };
        end.failure = { message: (error as Error).message, status, requestId };
      }
    } finally {
      clearInterval(timer);
    }
    draw();
    end.totalMs = performance.now() - began;
    const { text: _text, reasoning: _reasoning, ...change } = end;
    dispatch({ type: 'change', id, change });
    if (abort.current !== controller) return;
    abort.current = null;
    current.current.onEnd(end);
    if (end.failure?.status === 401) current.current.onDenied();
  }, []);

  const turn = (question: Question): Turn => ({ id: (made.current += 1), question, answer: UNANSWERED });
  const send = useCallback((question: Question) => void run([...conversation.current, turn(question)]), [run]);
  const again = useCallback(
    (id: number, question?: Question) => {
      const at = conversation.current.findIndex((item) => item.id === id);
      const old = conversation.current[at];
      if (old === undefined) return;
      const asked = question ?? old.question;
      const dropped = conversation.current.slice(at).flatMap((item) => item.question.media);
      release(dropped.filter((medium) => !asked.media.includes(medium)));
      void run([...conversation.current.slice(0, at), turn(asked)]);
    },
    [run],
  );
  const stop = useCallback(() => abort.current?.abort(), []);
  const clear = useCallback(() => {
    abort.current?.abort();
    abort.current = null;
    release(conversation.current.flatMap((item) => item.question.media));
    dispatch({ type: 'ask', turns: [] });
  }, []);
  const running = turns.at(-1)?.answer.state === 'running';
  return { turns, running, send, again, stop, clear };
}
