import { ChevronRight } from 'lucide-react';
import { useEffect, useRef, useState } from 'react';
import { Button, Disclosure, DisclosurePanel, Heading } from 'react-aria-components';
import type { Usage } from '../api';
import type { Answer } from '../chat';
import { bars, duration, type Bar, type Timings } from '../timings';

const place = ({ from, share }: Bar) => ({ left: `${100 * from}%`, width: `${100 * share}%` });

/** The stages of an answer: one line for all, a table with a line for each behind it. */
export function Timing({ timings }: { timings: Timings }) {
  const all = bars(timings);
  const shown = all.filter(({ ms }) => ms > 0);
  const element = useRef<HTMLDivElement>(null);
  const [open, setOpen] = useState(false);
  useEffect(() => {
    if (open) element.current?.scrollIntoView({ block: 'nearest' });
  }, [open]);
  const total = duration(all.reduce((sum, { ms }) => sum + ms, 0));
  return (
    <Disclosure className="timing" ref={element} onExpandedChange={setOpen}>
      <Heading level={3}>
        <Button slot="trigger" className="timing-trigger">
          <ChevronRight aria-hidden className="chevron" />
          <span>Time in the server: {total}</span>
          <span className="strip" aria-hidden>
            {shown.map((bar) => (
              <span key={bar.key} className="bar" data-stage={bar.key} style={place(bar)} />
            ))}
          </span>
        </Button>
      </Heading>
      <DisclosurePanel>
        <table className="stages">
          <caption className="visually-hidden">Milliseconds of each stage of this answer</caption>
          <thead className="visually-hidden">
            <tr>
              <th scope="col">Stage</th>
              <th scope="col">When</th>
              <th scope="col">Time</th>
            </tr>
          </thead>
          <tbody>
            {all.map((bar) => (
              <tr key={bar.key} data-stage={bar.key}>
                <th scope="row">
                  {bar.label} <span className="what">{bar.what}</span>
                </th>
                <td className="track">
                  <span className="visually-hidden">{Math.round(100 * bar.share)} % of the time</span>
                  <span className="lane" aria-hidden>
                    {bar.ms > 0 && <span className="bar" data-stage={bar.key} style={place(bar)} />}
                  </span>
                </td>
                <td className="ms">{duration(bar.ms)}</td>
              </tr>
            ))}
          </tbody>
        </table>
      </DisclosurePanel>
    </Disclosure>
  );
}

const OF_MEDIA = [
  ['image_tokens', 'of pictures'],
  ['video_tokens', 'of videos'],
  ['audio_tokens', 'of sounds'],
  ['cached_tokens', 'cached'],
] as const;

function promptTokens({ prompt_tokens, prompt_tokens_details: details }: Usage): string {
  const parts = OF_MEDIA.flatMap(([name, words]) => (details?.[name] ? [`${details[name]} ${words}`] : []));
  return `${prompt_tokens} tokens in${parts.length ? ` (${parts.join(', ')})` : ''}`;
}

/** Tokens of an answer, and how fast they came. */
export function Counts({ answer }: { answer: Answer }) {
  const { usage, timings, firstMs, totalMs } = answer;
  const speed = timings?.tokens_per_second;
  const counts = [
    ...(usage ? [promptTokens(usage), `${usage.completion_tokens} out`] : []),
    ...(firstMs === undefined ? [] : [`first text after ${duration(firstMs)}`]),
    ...(speed ? [`${speed < 10 ? speed.toFixed(1) : Math.round(speed)} tokens/s`] : []),
    ...(timings || totalMs === undefined ? [] : [`${duration(totalMs)} in all`]),
  ];
  if (counts.length === 0) return null;
  return (
    <ul className="counts" aria-label="Tokens and speed">
      {counts.map((count) => (
        <li key={count}>{count}</li>
      ))}
    </ul>
  );
}
