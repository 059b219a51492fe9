import DOMPurify from 'dompurify';
import { Marked } from 'marked';
import { useMemo, type MouseEvent } from 'react';

const escape = (text: string) =>
  text.replace(/[&<>"']/g, (found) => `&#${found.charCodeAt(0)};`);

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    code({ text, lang }) {
      const language = escape(lang?.split(/\s/)[0] ?? '');
      const head = `<div class="code-head"><span>${language || 'code'}</span><button type="button" data-copy>Copy</button></div>`;
      // scrolls sideways, so the keyboard must reach it
      return `<div class="code">${head}<pre tabindex="0"><code>${escape(text)}</code></pre></div>`;
    },
    // below the page's own headings
    heading({ tokens, depth }) {
      const level = Math.min(depth + 2, 6);
      return `<h${level}>${this.parser.parseInline(tokens)}</h${level}>`;
    },
    // A picture by address would tell its owner that the answer was read, so it is a link.
    image({ href, text }) {
      return `<a href="${escape(href)}">${escape(text || href)}</a>`;
    },
    // HTML in an answer is text that the model wrote, and is shown as such.
    html({ text }) {
      return escape(text);
    },
  },
});

const purify = DOMPurify(window);
purify.addHook('afterSanitizeAttributes', (node) => {
  if (node.tagName !== 'A') return;
  node.setAttribute('target', '_blank');
  node.setAttribute('rel', 'noopener noreferrer nofollow');
});

function rendered(text: string): string {
  return purify.sanitize(marked.parse(text, { async: false }), {
    USE_PROFILES: { html: true },
    FORBID_TAGS: ['img', 'style', 'form', 'video', 'audio', 'source', 'picture'],
    FORBID_ATTR: ['style', 'id', 'name'],
  });
}

async function copy(event: MouseEvent<HTMLDivElement>) {
  const button = (event.target as Element).closest<HTMLButtonElement>('button[data-copy]');
  const code = button?.closest('.code')?.querySelector('code');
  if (!button || !code) return;
  try {
    await navigator.clipboard.writeText(code.textContent ?? '');
    button.textContent = 'Copied';
  } catch {
    // no clipboard without https: select it, so that Ctrl+C does
    getSelection()?.selectAllChildren(code);
    button.textContent = 'Press Ctrl+C';
  }
}

/** Markdown of an answer, as HTML that can do nothing but be read. */
export function Markdown({ text }: { text: string }) {
  const html = useMemo(() => rendered(text), [text]);
  return <div className="markdown" onClick={copy} dangerouslySetInnerHTML={{ __html: html }} />;
}
