import { useEffect, useState } from 'react';
import { Button, Input, Label, Text, TextField } from 'react-aria-components';
import { Popup } from './Popup';

interface Props {
  isOpen: boolean;
  apiKey: string;
  /** What the server said about the key so far. */
  problem: string;
  onClose: () => void;
  onSave: (key: string) => void;
}

/** Asks for the API key where the server wants one. */
export function KeyDialog({ isOpen, apiKey, problem, onClose, onSave }: Props) {
  const [key, setKey] = useState(apiKey);
  useEffect(() => {
    if (isOpen) setKey(apiKey);
  }, [isOpen, apiKey]);
  return (
    <Popup title="API key" isOpen={isOpen} onClose={onClose}>
      <form
        onSubmit={(event) => {
          event.preventDefault();
          onSave(key.trim());
        }}
      >
        {problem && (
          <p className="problem" role="alert">
            {problem}
          </p>
        )}
        <TextField className="field" type="password" autoComplete="off" autoFocus value={key} onChange={setKey}>
          <Label>Key</Label>
          <Input />
          <Text slot="description">Kept in this tab alone, and sent to this server alone.</Text>
        </TextField>
        <div className="buttons">
          <Button type="submit" className="button primary">
            Use it
          </Button>
          <Button className="button" onPress={onClose}>
            Cancel
          </Button>
        </div>
      </form>
    </Popup>
  );
}
