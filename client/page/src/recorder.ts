import { useCallback, useEffect, useRef, useState } from 'react';

// What sound models hear; a minute is 1.9 MB.
const RATE = 16_000;

export interface Recorder {
  /** Why it cannot record; undefined where it can. */
  unavailable: string | undefined;
  recording: boolean;
  seconds: number;
  start: () => Promise<void>;
  stop: () => void;
}

/** Records from the microphone; the sound comes as a WAV file, which every server and browser reads. */
export function useRecorder(onSound: (file: File) => void, onError: (message: string) => void): Recorder {
  const [recording, setRecording] = useState(false);
  const [seconds, setSeconds] = useState(0);
  const recorder = useRef<MediaRecorder | null>(null);
  const stop = useCallback(() => recorder.current?.state === 'recording' && recorder.current.stop(), []);

  useEffect(() => {
    if (!recording) return;
    const began = performance.now();
    const timer = setInterval(() => setSeconds((performance.now() - began) / 1000), 200);
    return () => clearInterval(timer);
  }, [recording]);
  useEffect(() => () => void stop(), [stop]);

  const start = useCallback(async () => {
    let stream: MediaStream;
    try {
      stream = await navigator.mediaDevices.getUserMedia({ audio: true });
    } catch (error) {
      onError(`The microphone cannot be used: ${(error as Error).message}`);
      return;
    }
    const chunks: Blob[] = [];
    const made = new MediaRecorder(stream);
    made.ondataavailable = (event) => chunks.push(event.data);
    made.onstop = async () => {
      setRecording(false);
      for (const track of stream.getTracks()) track.stop();
      try {
        onSound(await toWav(new Blob(chunks, { type: made.mimeType })));
      } catch (error) {
        onError(`The recording cannot be used: ${(error as Error).message}`);
      }
    };
    recorder.current = made;
    setSeconds(0);
    setRecording(true);
    made.start();
  }, [onSound, onError]);

  // browsers give microphones only to https and to pages of the same machine
  const unavailable = navigator.mediaDevices === undefined ? 'Recording needs https, or a server on this machine' : undefined;
  return { unavailable, recording, seconds, start, stop };
}

async function toWav(recorded: Blob): Promise<File> {
  const context = new OfflineAudioContext(1, 1, RATE);
  const sound = await context.decodeAudioData(await recorded.arrayBuffer());
  const channels = Array.from({ length: sound.numberOfChannels }, (_, index) => sound.getChannelData(index));
  const view = new DataView(new ArrayBuffer(44 + 2 * sound.length));
  const ascii = (at: number, text: string) => [...text].forEach((c, i) => view.setUint8(at + i, c.charCodeAt(0)));
  // RIFF header of 16-bit mono PCM (Microsoft, Multimedia Programming Interface 1.0)
  ascii(0, 'RIFF');
  view.setUint32(4, 36 + 2 * sound.length, true);
  ascii(8, 'WAVEfmt ');
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true);
  view.setUint16(22, 1, true);
  view.setUint32(24, RATE, true);
  view.setUint32(28, 2 * RATE, true);
  view.setUint16(32, 2, true);
  view.setUint16(34, 16, true);
  ascii(36, 'data');
  view.setUint32(40, 2 * sound.length, true);
  for (let i = 0; i < sound.length; i += 1) {
    const sample = channels.reduce((sum, channel) => sum + (channel[i] ?? 0), 0) / channels.length;
    view.setInt16(44 + 2 * i, Math.round(Math.max(-1, Math.min(1, sample)) * 32767), true);
  }
  return new File([view], 'recording.wav', { type: 'audio/wav' });
}
