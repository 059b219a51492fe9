import { ApiError } from './api';

export type Form = 'text' | 'json_object' | 'json_schema' | 'regex' | 'ebnf';

/** What the reader chose. A number that is null is left to the server. */
export interface Settings {
  system: string;
  temperature: number | null;
  topP: number | null;
  topK: number | null;
  maxTokens: number | null;
  seed: number | null;
  form: Form;
  /** The schema, expression or grammar, by form. */
  grammars: Partial<Record<Form, string>>;
}

export const DEFAULTS: Settings = {
  system: '',
  temperature: null,
  topP: null,
  topK: null,
  maxTokens: null,
  seed: null,
  form: 'text',
  grammars: {},
};

/** The fields of a request; throws ApiError where the reader's JSON schema is no JSON. */
export function fields(settings: Settings): Record<string, unknown> {
  const numbers = {
    temperature: settings.temperature,
    top_p: settings.topP,
    top_k: settings.topK,
    max_tokens: settings.maxTokens,
    seed: settings.seed,
  };
  const given = Object.fromEntries(Object.entries(numbers).filter(([, value]) => value !== null));
  return { ...given, ...answerForm(settings) };
}

function answerForm({ form, grammars }: Settings): Record<string, unknown> {
  const grammar = grammars[form] ?? '';
  switch (form) {
    case 'text':
      return {};
    case 'json_object':
      return { response_format: { type: 'json_object' } };
    case 'json_schema':
      return { response_format: { type: 'json_schema', json_schema: { name: 'answer', schema: parsed(grammar) } } };
    default:
      return { [form]: grammar };
  }
}

function parsed(schema: string): unknown {
  try {
    return JSON.parse(schema);
  } catch (error) {
    throw new ApiError(`The JSON schema in the settings is no JSON: ${(error as Error).message}`);
  }
}

const SETTINGS = 'triptych.settings';
const KEY = 'triptych.key';

/** A value kept by the browser; undefined where there is none, or where it keeps nothing. */
function kept(storage: () => Storage, name: string): string | undefined {
  try {
    return storage().getItem(name) ?? undefined;
  } catch {
    return undefined;
  }
}

function keep(storage: () => Storage, name: string, value: string): void {
  try {
    storage().setItem(name, value);
  } catch {
    // a browser that keeps nothing: they hold until the page is closed
  }
}

/** The settings of the last visit. */
export function keptSettings(): Settings {
  try {
    return { ...DEFAULTS, ...(JSON.parse(kept(() => localStorage, SETTINGS) ?? '{}') as Partial<Settings>) };
  } catch {
    return DEFAULTS;
  }
}

export function keepSettings(settings: Settings): void {
  keep(() => localStorage, SETTINGS, JSON.stringify(settings));
}

/** The API key of this tab: it is forgotten when the tab is closed. */
export function keptKey(): string {
  return kept(() => sessionStorage, KEY) ?? '';
}

export function keepKey(key: string): void {
  keep(() => sessionStorage, KEY, key);
}

export type Theme = 'system' | 'light' | 'dark';
const THEME = 'triptych.theme';

export function keptTheme(): Theme {
  const theme = kept(() => localStorage, THEME);
  return theme === 'light' || theme === 'dark' ? theme : 'system';
}

export function keepTheme(theme: Theme): void {
  keep(() => localStorage, THEME, theme);
}
