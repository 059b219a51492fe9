import { useCallback, useEffect, useLayoutEffect, useRef, useState, type RefObject } from 'react';

/** Whether a media query holds now. */
export function useMatches(query: string): boolean {
  const [matches, setMatches] = useState(() => matchMedia(query).matches);
  useEffect(() => {
    const list = matchMedia(query);
    const listen = () => setMatches(list.matches);
    listen();
    list.addEventListener('change', listen);
    return () => list.removeEventListener('change', listen);
  }, [query]);
  return matches;
}

// Nearer to the end than this counts as there, in px.
const NEAR = 80;

interface End {
  scroller: RefObject<HTMLDivElement | null>;
  /** Whether the reader scrolled back. */
  away: boolean;
  onScroll: () => void;
  toEnd: () => void;
}

/** Keeps the end of what grows in view, unless the reader scrolled back. */
export function useStickToEnd(content: readonly unknown[]): End {
  const scroller = useRef<HTMLDivElement>(null);
  const [away, setAway] = useState(false);
  const length = useRef(content.length);
  const toEnd = useCallback(() => {
    const element = scroller.current;
    if (element) element.scrollTop = element.scrollHeight;
    setAway(false);
  }, []);
  const onScroll = useCallback(() => {
    const element = scroller.current;
    if (element) setAway(element.scrollHeight - element.scrollTop - element.clientHeight > NEAR);
  }, []);
  useEffect(() => {
    // pictures and players get their size late, and windows change theirs
    const settle = () => !away && toEnd();
    const element = scroller.current;
    const events = ['load', 'loadedmetadata'];
    for (const name of events) element?.addEventListener(name, settle, true);
    addEventListener('resize', settle);
    return () => {
      for (const name of events) element?.removeEventListener(name, settle, true);
      removeEventListener('resize', settle);
    };
  }, [away, toEnd]);
  useLayoutEffect(() => {
    // a new question is always shown
    if (!away || content.length > length.current) toEnd();
    length.current = content.length;
  }, [content, away, toEnd]);
  return { scroller, away, onScroll, toEnd };
}
