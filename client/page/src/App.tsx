import { ArrowDown, KeyRound, Monitor, Moon, SlidersHorizontal, SquarePen, Sun } from 'lucide-react';
import { useCallback, useEffect, useRef, useState } from 'react';
import { Button } from 'react-aria-components';
import { ApiError, models } from './api';
import type { Answer } from './chat';
import { Composer, type ComposerHandle } from './components/Composer';
import { IconButton } from './components/IconButton';
import { KeyDialog } from './components/KeyDialog';
import { Popup } from './components/Popup';
import { SettingsPanel } from './components/SettingsPanel';
import { Turn } from './components/Turn';
import logo from './icon.svg';
import { keepKey, keepSettings, keepTheme, keptKey, keptSettings, keptTheme, type Theme } from './settings';
import { useChat } from './useChat';
import { useMatches, useStickToEnd } from './view';

const QUESTIONS = ['What is in the picture?', 'What happens in the video?', 'Which digits are spoken?', 'Who are you?'];
const THEMES: Record<Theme, { next: Theme; label: string; Icon: typeof Sun }> = {
  system: { next: 'light', label: 'Colours: as the system. Change to light', Icon: Monitor },
  light: { next: 'dark', label: 'Colours: light. Change to dark', Icon: Sun },
  dark: { next: 'system', label: 'Colours: dark. Change to the system’s', Icon: Moon },
};

/** The page. */
export function App() {
  const [settings, setSettings] = useState(keptSettings);
  const [theme, setTheme] = useState(keptTheme);
  const [apiKey, setApiKey] = useState(keptKey);
  const [keyWanted, setKeyWanted] = useState(apiKey !== '');
  const [askingKey, setAskingKey] = useState(false);
  const [model, setModel] = useState('');
  const [problem, setProblem] = useState('');
  const [attempt, setAttempt] = useState(0);
  const [said, setSaid] = useState('');
  const wide = useMatches('(min-width: 60rem)');
  const [panelShown, setPanelShown] = useState(wide);
  const composer = useRef<ComposerHandle>(null);

  useEffect(() => keepSettings(settings), [settings]);
  useEffect(() => {
    document.documentElement.dataset.theme = theme;
    keepTheme(theme);
  }, [theme]);
  useEffect(() => setPanelShown(wide), [wide]);
  useEffect(() => {
    const controller = new AbortController();
    models(apiKey, controller.signal).then(
      (names) => {
        setModel(names[0] ?? '');
        setProblem(names.length ? '' : 'The server has no model.');
        setAskingKey(false);
      },
      (error: Error) => {
        if (controller.signal.aborted) return;
        const denied = error instanceof ApiError && error.status === 401;
        setProblem(error.message);
        if (!denied) return;
        setKeyWanted(true);
        setAskingKey(true);
      },
    );
    return () => controller.abort();
  }, [apiKey, attempt]);

  const onEnd = useCallback((answer: Answer) => {
    const how = { done: 'Answer', stopped: 'Stopped', failed: '', running: '' }[answer.state];
    // a failure is an alert, which is read out by itself
    setSaid(how && `${how}: ${answer.text}`);
  }, []);
  const onDenied = useCallback(() => {
    setKeyWanted(true);
    setAskingKey(true);
  }, []);
  const chat = useChat({ model: model || 'default', apiKey, settings, onEnd, onDenied });
  const { turns, running } = chat;
  const end = useStickToEnd(turns);
  useEffect(() => {
    if (running) setSaid('Answering');
  }, [running]);

  const again = useCallback<typeof chat.again>(
    (id, question) => {
      chat.again(id, question);
      composer.current?.focus();
    },
    [chat.again],
  );
  const askKey = useCallback(() => setAskingKey(true), []);
  const { next, label, Icon } = THEMES[theme];
  const panel = <SettingsPanel settings={settings} onChange={setSettings} />;
  return (
    <div className="page">
      <header className="top">
        <img src={logo} alt="" className="logo" />
        <h1>Triptych</h1>
        <span className="model">{model}</span>
        <div className="top-tools">
          <IconButton
            label="New conversation"
            isDisabled={turns.length === 0}
            onPress={() => {
              chat.clear();
              setSaid('New conversation');
              composer.current?.focus();
            }}
          >
            <SquarePen aria-hidden />
          </IconButton>
          {keyWanted && (
            <IconButton label="API key" onPress={askKey}>
              <KeyRound aria-hidden />
            </IconButton>
          )}
          <IconButton label={label} onPress={() => setTheme(next)}>
            <Icon aria-hidden />
          </IconButton>
          <IconButton
            label="Settings"
            aria-expanded={panelShown}
            className={panelShown && wide ? 'pressed' : ''}
            onPress={() => setPanelShown(!panelShown)}
          >
            <SlidersHorizontal aria-hidden />
          </IconButton>
        </div>
      </header>
      <div className="middle">
        <main>
          <div className="scroller" ref={end.scroller} onScroll={end.onScroll}>
            {problem && !askingKey && (
              <div className="failure banner" role="alert">
                <p>{problem}</p>
                <Button className="button" onPress={() => setAttempt(attempt + 1)}>
                  Try again
                </Button>
              </div>
            )}
            {turns.length === 0 ? (
              <div className="welcome">
                <h2>Ask about a picture, a video or a sound</h2>
                <p>Drop files here, paste them, record from the microphone, or only write.</p>
                <ul>
                  {QUESTIONS.map((question) => (
                    <li key={question}>
                      <Button className="chip" onPress={() => composer.current?.setText(question)}>
                        {question}
                      </Button>
                    </li>
                  ))}
                </ul>
              </div>
            ) : (
              <ol className="turns" aria-label="Conversation">
                {turns.map((turn, index) => (
                  <Turn key={turn.id} turn={turn} last={index === turns.length - 1} onAgain={again} onKey={askKey} />
                ))}
              </ol>
            )}
          </div>
          {end.away && (
            <Button className="button to-end" onPress={end.toEnd}>
              <ArrowDown aria-hidden /> To the end
            </Button>
          )}
          <Composer ref={composer} running={running} onSend={chat.send} onStop={chat.stop} />
        </main>
        {wide && panelShown && (
          <aside className="panel" aria-label="Settings">
            <h2>Settings</h2>
            {panel}
          </aside>
        )}
      </div>
      {!wide && (
        <Popup title="Settings" isOpen={panelShown} onClose={() => setPanelShown(false)}>
          {panel}
        </Popup>
      )}
      <KeyDialog
        isOpen={askingKey}
        apiKey={apiKey}
        problem={problem}
        onClose={() => setAskingKey(false)}
        onSave={(key) => {
          keepKey(key);
          setApiKey(key);
          // the same key again: ask the server again
          setAttempt(attempt + 1);
        }}
      />
      <p className="visually-hidden" role="status">
        {said}
      </p>
    </div>
  );
}
