import { useState } from 'react';
import { Button, Input, Label, Radio, RadioGroup, Text, TextField } from 'react-aria-components';
import { KIND_NAMES, fromAddress, kindOfAddress, type Kind, type Medium } from '../media';
import { Popup } from './Popup';

const KINDS = Object.entries(KIND_NAMES) as [Kind, string][];

interface Props {
  isOpen: boolean;
  onClose: () => void;
  onAdd: (medium: Medium) => void;
}

/** Asks for the address of a medium, which the server then fetches. */
export function AddressDialog({ isOpen, onClose, onAdd }: Props) {
  const [address, setAddress] = useState('');
  const [kind, setKind] = useState<Kind>('image');
  return (
    <Popup title="Attach by web address" isOpen={isOpen} onClose={onClose}>
      <form
        onSubmit={(event) => {
          event.preventDefault();
          onAdd(fromAddress(address.trim(), kind));
          setAddress('');
          onClose();
        }}
      >
        <TextField
          className="field"
          type="url"
          isRequired
          autoFocus
          value={address}
          onChange={(given) => {
            setAddress(given);
            setKind(kindOfAddress(given));
          }}
        >
          <Label>Address</Label>
          <Input placeholder="https://…" />
          <Text slot="description">The server fetches it, not this page. It refuses addresses of private networks.</Text>
        </TextField>
        <RadioGroup className="field radios" value={kind} onChange={(given) => setKind(given as Kind)}>
          <Label>It is a</Label>
          <div className="options">
            {KINDS.map(([value, label]) => (
              <Radio key={value} value={value} className="radio">
                {label}
              </Radio>
            ))}
          </div>
        </RadioGroup>
        <div className="buttons">
          <Button type="submit" className="button primary">
            Attach
          </Button>
          <Button className="button" onPress={onClose}>
            Cancel
          </Button>
        </div>
      </form>
    </Popup>
  );
}
