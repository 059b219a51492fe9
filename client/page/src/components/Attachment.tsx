import { FileAudio, FileVideo, Globe, ImageOff, X } from 'lucide-react';
import { useState } from 'react';
import { KIND_NAMES, type Medium } from '../media';
import { IconButton } from './IconButton';

function Preview({ medium, small }: { medium: Medium; small: boolean }) {
  const [broken, setBroken] = useState(false);
  const { kind, name, preview } = medium;
  const label = `${KIND_NAMES[kind]}: ${name}`;
  if (preview === undefined) {
    return (
      <span className="file">
        <Globe aria-hidden />
        <span className="file-name">{name}</span>
      </span>
    );
  }
  if (broken) {
    const Icon = { image: ImageOff, video: FileVideo, audio: FileAudio }[kind];
    return (
      <span className="file">
        <Icon aria-hidden />
        <span className="file-name">{name}</span>
      </span>
    );
  }
  const failed = () => setBroken(true);
  if (kind === 'image') return <img src={preview} alt={label} onError={failed} />;
  if (kind === 'video') {
    return <video src={preview} aria-label={label} controls={!small} muted playsInline onError={failed} />;
  }
  return <audio src={preview} aria-label={label} controls onError={failed} />;
}

/** Pictures, videos and sounds of a message: thumbnails and players. */
export function Attachments({ media, onRemove }: { media: Medium[]; onRemove?: (medium: Medium) => void }) {
  if (media.length === 0) return null;
  return (
    <ul className="attachments" aria-label="Attached">
      {media.map((medium) => (
        <li key={medium.id} className={`attachment ${medium.kind}`} data-kind={medium.kind}>
          <Preview medium={medium} small={onRemove !== undefined} />
          {onRemove && (
            <IconButton label={`Remove ${medium.name}`} className="remove" onPress={() => onRemove(medium)}>
              <X aria-hidden />
            </IconButton>
          )}
        </li>
      ))}
    </ul>
  );
}
