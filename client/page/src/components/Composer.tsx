import { ArrowUp, Link, Mic, Paperclip, Square } from 'lucide-react';
import { useCallback, useEffect, useImperativeHandle, useRef, useState, type Ref } from 'react';
import { FileTrigger } from 'react-aria-components';
import type { Question } from '../chat';
import { ACCEPTED, fromFile, release, type Medium } from '../media';
import { useRecorder } from '../recorder';
import { AddressDialog } from './AddressDialog';
import { Attachments } from './Attachment';
import { IconButton } from './IconButton';

export interface ComposerHandle {
  focus: () => void;
  setText: (text: string) => void;
}

interface Props {
  running: boolean;
  onSend: (question: Question) => void;
  onStop: () => void;
  ref: Ref<ComposerHandle>;
}

/** Where a message is written: text, and media from files, the clipboard, the microphone or an address. */
export function Composer({ running, onSend, onStop, ref }: Props) {
  const [text, setText] = useState('');
  const [media, setMedia] = useState<Medium[]>([]);
  const [problem, setProblem] = useState('');
  const [dropping, setDropping] = useState(false);
  const [asking, setAsking] = useState(false);
  const field = useRef<HTMLTextAreaElement>(null);
  const focus = useCallback(() => field.current?.focus(), []);
  useImperativeHandle(ref, () => ({
    focus,
    setText: (given) => {
      setText(given);
      focus();
    },
  }));

  const add = useCallback(
    (files: Iterable<File>) => {
      const found: Medium[] = [];
      const others: string[] = [];
      for (const file of files) {
        const medium = fromFile(file);
        if (medium === undefined) others.push(`${file.name} is no picture, video or sound.`);
        else found.push(medium);
      }
      setProblem(others.join(' '));
      setMedia((before) => [...before, ...found]);
      focus();
    },
    [focus],
  );
  const addOne = useCallback((file: File) => add([file]), [add]);
  const recorder = useRecorder(addOne, setProblem);
  useFilesOfWindow(add, setDropping);

  const empty = !text.trim() && media.length === 0;
  const send = () => {
    if (empty || running || recorder.recording) return;
    onSend({ text: text.trim(), media });
    setText('');
    setMedia([]);
    setProblem('');
    focus();
  };
  const remove = (gone: Medium) => {
    release([gone]);
    setMedia(media.filter((medium) => medium !== gone));
    focus();
  };
  return (
    <>
      <form
        className="composer"
        aria-label="Message"
        data-dropping={dropping}
        onSubmit={(event) => {
          event.preventDefault();
          send();
        }}
      >
        <Attachments media={media} onRemove={remove} />
        {problem && (
          <p className="problem" role="alert">
            {problem}
          </p>
        )}
        <textarea
          ref={field}
          aria-label="Message"
          placeholder={dropping ? 'Drop it here' : 'Ask something, or drop a picture, a video or a sound'}
          rows={1}
          value={text}
          autoFocus
          onChange={(event) => setText(event.target.value)}
          onKeyDown={(event) => {
            if (event.key === 'Escape' && running) onStop();
            if (event.key !== 'Enter' || event.shiftKey || event.nativeEvent.isComposing) return;
            event.preventDefault();
            send();
          }}
        />
        <div className="tools">
          <FileTrigger allowsMultiple acceptedFileTypes={ACCEPTED} onSelect={(files) => files && add(files)}>
            <IconButton label="Attach files">
              <Paperclip aria-hidden />
            </IconButton>
          </FileTrigger>
          <IconButton label="Attach by web address" onPress={() => setAsking(true)}>
            <Link aria-hidden />
          </IconButton>
          {recorder.recording ? (
            <>
              <IconButton label="Stop recording" className="recording" onPress={recorder.stop}>
                <Square aria-hidden />
              </IconButton>
              <span className="seconds" role="timer" aria-label="Recorded">
                {recorder.seconds.toFixed(1)} s
              </span>
            </>
          ) : (
            <IconButton
              label={recorder.unavailable ?? 'Record from the microphone'}
              isDisabled={recorder.unavailable !== undefined}
              onPress={() => void recorder.start()}
            >
              <Mic aria-hidden />
            </IconButton>
          )}
          <span className="hint">Enter sends, Shift+Enter is a new line</span>
          {running ? (
            <IconButton label="Stop the answer" className="send" onPress={onStop}>
              <Square aria-hidden />
            </IconButton>
          ) : (
            <IconButton label="Send" className="send" type="submit" isDisabled={empty || recorder.recording}>
              <ArrowUp aria-hidden />
            </IconButton>
          )}
        </div>
      </form>
      {/* not inside the form: its events would reach it */}
      <AddressDialog
        isOpen={asking}
        onClose={() => setAsking(false)}
        onAdd={(medium) => setMedia((before) => [...before, medium])}
      />
    </>
  );
}

/** Files that are dropped or pasted anywhere on the page. */
function useFilesOfWindow(add: (files: Iterable<File>) => void, setDropping: (dropping: boolean) => void) {
  useEffect(() => {
    // enter and leave come for every element on the way
    let depth = 0;
    const hasFiles = (event: DragEvent) => event.dataTransfer?.types.includes('Files') ?? false;
    const on = <K extends keyof WindowEventMap>(name: K, listener: (event: WindowEventMap[K]) => void) => {
      addEventListener(name, listener);
      return () => removeEventListener(name, listener);
    };
    const off = [
      on('dragenter', (event) => hasFiles(event) && setDropping((depth += 1) > 0)),
      on('dragleave', (event) => hasFiles(event) && setDropping((depth -= 1) > 0)),
      on('dragover', (event) => hasFiles(event) && event.preventDefault()),
      on('drop', (event) => {
        if (!hasFiles(event)) return;
        event.preventDefault();
        depth = 0;
        setDropping(false);
        add(event.dataTransfer?.files ?? []);
      }),
      on('paste', (event) => {
        const files = event.clipboardData?.files;
        if (!files?.length) return;
        event.preventDefault();
        add(files);
      }),
    ];
    return () => off.forEach((remove) => remove());
  }, [add, setDropping]);
}
