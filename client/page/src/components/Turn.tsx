import { Check, Copy, KeyRound, Pencil, RotateCw, TriangleAlert } from 'lucide-react';
import { memo, useEffect, useRef, useState } from 'react';
import { Button } from 'react-aria-components';
import type { Answer, Question, Turn as TurnState } from '../chat';
import { Attachments } from './Attachment';
import { IconButton } from './IconButton';
import { Markdown } from './Markdown';
import { Counts, Timing } from './Timing';

interface Props {
  turn: TurnState;
  last: boolean;
  onAgain: (id: number, question?: Question) => void;
  onKey: () => void;
}

/** A question and its answer. */
export const Turn = memo(function Turn({ turn, last, onAgain, onKey }: Props) {
  const [editing, setEditing] = useState(false);
  const { question, answer, id } = turn;
  const editButton = useRef<HTMLButtonElement>(null);
  const wasEditing = useRef(false);
  useEffect(() => {
    if (wasEditing.current && !editing) editButton.current?.focus();
    wasEditing.current = editing;
  }, [editing]);
  return (
    <li className="turn">
      <section className="question">
        <h2 className="visually-hidden">You</h2>
        {editing ? (
          <Edit
            question={question}
            onCancel={() => setEditing(false)}
            onSave={(changed) => {
              setEditing(false);
              onAgain(id, changed);
            }}
          />
        ) : (
          <>
            <Attachments media={question.media} />
            {question.text && <p className="bubble">{question.text}</p>}
            <div className="actions">
              <IconButton ref={editButton} label="Edit the question" onPress={() => setEditing(true)}>
                <Pencil aria-hidden />
              </IconButton>
            </div>
          </>
        )}
      </section>
      <section className="answer" data-state={answer.state} aria-busy={answer.state === 'running'}>
        <h2 className="visually-hidden">Answer</h2>
        {answer.reasoning && (
          <details className="reasoning" open={answer.state === 'running' && !answer.text}>
            <summary>Reasoning</summary>
            <Markdown text={answer.reasoning} />
          </details>
        )}
        {answer.text && <Markdown text={answer.text} />}
        {answer.state === 'running' && !answer.text && !answer.reasoning && <Waiting />}
        <Ending answer={answer} onRetry={() => onAgain(id)} onKey={onKey} />
        {answer.state !== 'running' && answer.state !== 'failed' && (
          <div className="actions">
            <CopyButton text={answer.text} />
            <IconButton
              label={last ? 'Answer again' : 'Answer again, and drop what follows'}
              onPress={() => onAgain(id)}
            >
              <RotateCw aria-hidden />
            </IconButton>
            <Counts answer={answer} />
          </div>
        )}
        {answer.timings && <Timing timings={answer.timings} />}
      </section>
    </li>
  );
});

function Waiting() {
  return (
    <p className="waiting" aria-hidden>
      <span />
      <span />
      <span />
    </p>
  );
}

function Ending({ answer, onRetry, onKey }: { answer: Answer; onRetry: () => void; onKey: () => void }) {
  const { state, failure, finish } = answer;
  if (failure) {
    return (
      <div className="failure" role="alert">
        <TriangleAlert aria-hidden />
        <div>
          <p>{failure.message}</p>
          {(failure.status > 0 || failure.requestId) && (
            <p className="small">
              {[failure.status > 0 && `status ${failure.status}`, failure.requestId && `request ${failure.requestId}`]
                .filter(Boolean)
                .join(', ')}
            </p>
          )}
          <div className="buttons">
            <Button className="button" onPress={onRetry}>
              <RotateCw aria-hidden /> Try again
            </Button>
            {failure.status === 401 && (
              <Button className="button" onPress={onKey}>
                <KeyRound aria-hidden /> Enter an API key
              </Button>
            )}
          </div>
        </div>
      </div>
    );
  }
  if (state === 'stopped') return <p className="note">Stopped.</p>;
  if (finish === 'length') return <p className="note">Ended at the limit of tokens.</p>;
  if (state === 'done' && !answer.text) return <p className="note">The model answered with no text.</p>;
  return null;
}

function CopyButton({ text }: { text: string }) {
  const [copied, setCopied] = useState(false);
  if (!text || !navigator.clipboard) return null;
  const copy = async () => {
    await navigator.clipboard.writeText(text);
    setCopied(true);
    setTimeout(() => setCopied(false), 2000);
  };
  return (
    <IconButton label={copied ? 'Copied' : 'Copy the answer'} onPress={() => void copy()}>
      {copied ? <Check aria-hidden /> : <Copy aria-hidden />}
    </IconButton>
  );
}

interface EditProps {
  question: Question;
  onSave: (question: Question) => void;
  onCancel: () => void;
}

function Edit({ question, onSave, onCancel }: EditProps) {
  const [text, setText] = useState(question.text);
  const [media, setMedia] = useState(question.media);
  const field = useRef<HTMLTextAreaElement>(null);
  useEffect(() => field.current?.focus(), []);
  const empty = !text.trim() && media.length === 0;
  const save = () => !empty && onSave({ text: text.trim(), media });
  return (
    <form
      className="edit"
      onSubmit={(event) => {
        event.preventDefault();
        save();
      }}
      onKeyDown={(event) => {
        if (event.key === 'Escape') onCancel();
      }}
    >
      <Attachments media={media} onRemove={(gone) => setMedia(media.filter((medium) => medium !== gone))} />
      <textarea
        ref={field}
        aria-label="Edit the question"
        value={text}
        rows={2}
        onChange={(event) => setText(event.target.value)}
        onKeyDown={(event) => {
          if (event.key !== 'Enter' || event.shiftKey || event.nativeEvent.isComposing) return;
          event.preventDefault();
          save();
        }}
      />
      <div className="buttons">
        <Button type="submit" className="button primary" isDisabled={empty}>
          Ask again
        </Button>
        <Button className="button" onPress={onCancel}>
          Cancel
        </Button>
      </div>
    </form>
  );
}
