import { Minus, Plus } from 'lucide-react';
import { Button, Group, Input, Label, NumberField, Text, TextArea, TextField } from 'react-aria-components';
import { DEFAULTS, type Form, type Settings } from '../settings';

const FORMS: Record<Form, string> = {
  text: 'Free text',
  json_object: 'JSON',
  json_schema: 'JSON of a schema',
  regex: 'Regular expression',
  ebnf: 'EBNF grammar',
};

const GRAMMARS: Partial<Record<Form, { label: string; placeholder: string }>> = {
  json_schema: { label: 'JSON schema', placeholder: '{"type": "object", "properties": {"colour": {"type": "string"}}}' },
  regex: { label: 'Regular expression', placeholder: '(red|green|blue), [0-9]' },
  ebnf: { label: 'Grammar', placeholder: 'root ::= "yes" | "no"' },
};

interface Props {
  settings: Settings;
  onChange: (settings: Settings) => void;
}

/** How answers are made. */
export function SettingsPanel({ settings, onChange }: Props) {
  const set = (change: Partial<Settings>) => onChange({ ...settings, ...change });
  const grammar = GRAMMARS[settings.form];
  return (
    <div className="settings">
      <TextField className="field" value={settings.system} onChange={(system) => set({ system })}>
        <Label>System prompt</Label>
        <TextArea rows={3} placeholder="None" />
      </TextField>
      <p className="small">Numbers that are left empty are the server’s defaults.</p>
      <div className="numbers">
        <Number label="Temperature" hint="0 to 2" value={settings.temperature} min={0} max={2} step={0.1}
          onChange={(temperature) => set({ temperature })} />
        <Number label="Top p" hint="up to 1" value={settings.topP} min={0.05} max={1} step={0.05}
          onChange={(topP) => set({ topP })} />
        <Number label="Top k" hint="candidates" value={settings.topK} min={1} step={1} onChange={(topK) => set({ topK })} />
        <Number label="Max tokens" hint="of the answer" value={settings.maxTokens} min={1} step={1}
          onChange={(maxTokens) => set({ maxTokens })} />
        <Number label="Seed" hint="repeats an answer" value={settings.seed} min={0} step={1}
          onChange={(seed) => set({ seed })} />
      </div>
      <div className="field">
        <label htmlFor="form">Form of the answer</label>
        <select id="form" value={settings.form} onChange={(event) => set({ form: event.target.value as Form })}>
          {Object.entries(FORMS).map(([form, label]) => (
            <option key={form} value={form}>
              {label}
            </option>
          ))}
        </select>
      </div>
      {grammar && (
        <TextField
          className="field"
          value={settings.grammars[settings.form] ?? ''}
          onChange={(text) => set({ grammars: { ...settings.grammars, [settings.form]: text } })}
        >
          <Label>{grammar.label}</Label>
          <TextArea className="code-field" rows={5} placeholder={grammar.placeholder} spellCheck={false} />
          <Text slot="description">Answers keep to it, token by token.</Text>
        </TextField>
      )}
      <Button className="button" onPress={() => onChange(DEFAULTS)}>
        Back to the defaults
      </Button>
    </div>
  );
}

interface NumberProps {
  label: string;
  hint: string;
  value: number | null;
  min: number;
  max?: number;
  step: number;
  onChange: (value: number | null) => void;
}

function Number({ label, hint, value, min, max, step, onChange }: NumberProps) {
  return (
    <NumberField
      className="field number"
      value={value ?? NaN}
      minValue={min}
      {...(max === undefined ? {} : { maxValue: max })}
      step={step}
      formatOptions={{ useGrouping: false, maximumFractionDigits: step < 1 ? 2 : 0 }}
      onChange={(given) => onChange(isNaN(given) ? null : given)}
    >
      <Label>{label}</Label>
      <Group className="stepper">
        <Button slot="decrement">
          <Minus aria-hidden />
        </Button>
        <Input placeholder="default" />
        <Button slot="increment">
          <Plus aria-hidden />
        </Button>
      </Group>
      <Text slot="description">{hint}</Text>
    </NumberField>
  );
}
