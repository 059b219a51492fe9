/** A picture, video or sound of a message: a file of the reader's, or the address of one that the server fetches. */
export type Kind = 'image' | 'video' | 'audio';

export interface Medium {
  id: string;
  kind: Kind;
  name: string;
  /** What the request holds: the file as a data: URL, or the address. */
  source: Promise<string>;
  /** Where the page itself shows it from; undefined for addresses, which only the server fetches. */
  preview?: string;
}

export const KIND_NAMES: Record<Kind, string> = { image: 'Picture', video: 'Video', audio: 'Sound' };

export const ACCEPTED = ['image/*', 'video/*', 'audio/*', '.mkv', '.flac', '.opus'];

// Browsers know no type of some files that the server reads.
const EXTENSIONS: Record<string, Kind> = {
  avif: 'image', bmp: 'image', gif: 'image', heic: 'image', jpeg: 'image', jpg: 'image', png: 'image', tif: 'image',
  tiff: 'image', webp: 'image',
  avi: 'video', m4v: 'video', mkv: 'video', mov: 'video', mp4: 'video', mpeg: 'video', mpg: 'video', webm: 'video',
  aac: 'audio', flac: 'audio', m4a: 'audio', mp3: 'audio', oga: 'audio', ogg: 'audio', opus: 'audio', wav: 'audio',
};

function kindOfName(name: string): Kind | undefined {
  return EXTENSIONS[name.slice(name.lastIndexOf('.') + 1).toLowerCase()];
}

function kindOf(file: File): Kind | undefined {
  const major = file.type.split('/')[0];
  return major === 'image' || major === 'video' || major === 'audio' ? major : kindOfName(file.name);
}

function dataUrl(file: Blob): Promise<string> {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result as string);
    reader.onerror = () => reject(new Error(reader.error?.message ?? 'the file cannot be read'));
    reader.readAsDataURL(file);
  });
}

/** The medium in a file, or undefined where it is none. */
export function fromFile(file: File): Medium | undefined {
  const kind = kindOf(file);
  if (kind === undefined) return undefined;
  const source = dataUrl(file);
  // looked at when it is sent
  source.catch(() => undefined);
  return { id: nextId(), kind, name: file.name, source, preview: URL.createObjectURL(file) };
}

/** The medium at an address. Its kind is that of its name where it has one. */
export function fromAddress(address: string, kind: Kind): Medium {
  return { id: nextId(), kind, name: address, source: Promise.resolve(address) };
}

/** What an address seems to name; a picture where nothing tells. */
export function kindOfAddress(address: string): Kind {
  try {
    return kindOfName(new URL(address).pathname) ?? 'image';
  } catch {
    return 'image';
  }
}

/** Frees what the page holds of them. */
export function release(media: readonly Medium[]): void {
  for (const medium of media) if (medium.preview !== undefined) URL.revokeObjectURL(medium.preview);
}

/** The content part of a request. */
export async function toPart(medium: Medium): Promise<object> {
  const type = `${medium.kind}_url`;
  return { type, [type]: { url: await medium.source } };
}

let made = 0;

function nextId(): string {
  made += 1;
  return `m${made}`;
}
