import { EventSourceParserStream } from 'eventsource-parser/stream';
import type { Timings } from './timings';

/** An error that is shown where the answer would be. */
export class ApiError extends Error {
  /** HTTP status; 0 where there was no answer, or where the error came inside a stream. */
  readonly status: number;
  /** The server's id of the request, to find it in its log. */
  readonly requestId: string;

  constructor(message: string, status = 0, requestId = '') {
    super(message);
    this.status = status;
    this.requestId = requestId;
  }
}

export interface Usage {
  prompt_tokens: number;
  completion_tokens: number;
  prompt_tokens_details?: Partial<Record<'cached_tokens' | 'image_tokens' | 'video_tokens' | 'audio_tokens', number>>;
}

/** What one chunk of a streamed answer adds. */
export interface Piece {
  text?: string;
  reasoning?: string;
  finish?: string;
  usage?: Usage;
  timings?: Timings;
}

interface ErrorBody {
  error?: { message?: string };
}

interface Chunk extends ErrorBody {
  choices?: { delta?: { content?: string | null; reasoning_content?: string | null }; finish_reason?: string | null }[];
  usage?: Usage | null;
  timings?: Timings | null;
}

// Beside the page, so that a proxy's prefix holds for both.
const endpoint = new URL('v1/', document.baseURI);

async function request(path: string, key: string, init: RequestInit): Promise<Response> {
  const headers = new Headers(init.headers);
  if (key) headers.set('Authorization', `Bearer ${key}`);
  let response: Response;
  try {
    response = await fetch(new URL(path, endpoint), { ...init, headers });
  } catch (error) {
    if (init.signal?.aborted) throw error;
    throw new ApiError('The server cannot be reached. Is it still running?');
  }
  if (response.ok) return response;
  const id = response.headers.get('x-request-id') ?? '';
  const body = (await response.json().catch(() => ({}))) as ErrorBody;
  throw new ApiError(body.error?.message ?? `The server answered with status ${response.status}.`, response.status, id);
}

/** The names of the models that the server has. */
export async function models(key: string, signal: AbortSignal): Promise<string[]> {
  const response = await request('models', key, { signal });
  const body = (await response.json()) as { data: { id: string }[] };
  return body.data.map((model) => model.id);
}

/** Asks for an answer and gives its pieces as they come; throws ApiError, or what an abort throws. */
export async function* answer(body: object, key: string, signal: AbortSignal): AsyncGenerator<Piece> {
  const response = await request('chat/completions', key, {
    method: 'POST',
    headers: { 'Content-Type': 'application/json' },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (response.body === null) throw new ApiError('The answer has no body.', response.status);
  const id = response.headers.get('x-request-id') ?? '';
  const events = response.body
    .pipeThrough(new TextDecoderStream() as ReadableWritablePair<string, Uint8Array<ArrayBuffer>>)
    .pipeThrough(new EventSourceParserStream())
    .getReader();
  for (;;) {
    const { done, value } = await events.read().catch((error: unknown) => {
      throw signal.aborted ? error : new ApiError('The connection broke off before the answer was complete.', 0, id);
    });
    if (done) throw new ApiError('The answer ended before it was complete.', 0, id);
    if (value.data === '[DONE]') return;
    const chunk = JSON.parse(value.data) as Chunk;
    if (chunk.error) throw new ApiError(chunk.error.message ?? 'The server failed.', 0, id);
    yield piece(chunk);
  }
}

function piece(chunk: Chunk): Piece {
  const choice = chunk.choices?.[0];
  return {
    ...(choice?.delta?.content ? { text: choice.delta.content } : {}),
    ...(choice?.delta?.reasoning_content ? { reasoning: choice.delta.reasoning_content } : {}),
    ...(choice?.finish_reason ? { finish: choice.finish_reason } : {}),
    ...(chunk.usage ? { usage: chunk.usage } : {}),
    ...(chunk.timings ? { timings: chunk.timings } : {}),
  };
}
