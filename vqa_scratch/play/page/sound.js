// A spoken question: from the microphone or a file to 16 kHz mono WAV.

const RATE = 16000;

/** Starts to record; the function it gives ends that and returns what was said. Throws an Error with one line. */
export async function record() {
  const refused = () => { throw new Error("The browser gives no microphone: allow it for this page, or use a sound file."); };
  const stream = await (navigator.mediaDevices?.getUserMedia({ audio: true }) ?? Promise.reject()).catch(refused), recorder = new MediaRecorder(stream), parts = [];
  recorder.addEventListener("dataavailable", (event) => parts.push(event.data));
  const ended = new Promise((end) => recorder.addEventListener("stop", end));
  recorder.start();
  return async () => {
    recorder.stop();
    await ended;
    stream.getTracks().forEach((track) => track.stop());
    return new Blob(parts, { type: recorder.mimeType });
  };
}

export const url = (blob) => new Promise((read) => { Object.assign(new FileReader(), { onload: ({ target }) => read(target.result) }).readAsDataURL(blob); });

/** A sound of any format that the browser decodes, as a WAV of 16-bit samples, mono, 16 kHz. */
export async function wav(blob) {
  const decoder = new OfflineAudioContext(1, 1, RATE); // decoding resamples to the rate of its context
  const sound = await decoder.decodeAudioData(await blob.arrayBuffer()).catch(() => { throw new Error("The browser cannot read that sound."); });
  const channels = Array.from({ length: sound.numberOfChannels }, (_, i) => sound.getChannelData(i));
  const file = new DataView(new ArrayBuffer(44 + 2 * sound.length)), write = (at, word) => [...word].forEach((c, i) => file.setUint8(at + i, c.charCodeAt(0)));
  write(0, "RIFF"); write(8, "WAVEfmt "); write(36, "data");
  [[4, 36 + 2 * sound.length], [16, 16], [24, RATE], [28, 2 * RATE], [40, 2 * sound.length]].forEach(([at, n]) => file.setUint32(at, n, true));
  [[20, 1], [22, 1], [32, 2], [34, 16]].forEach(([at, n]) => file.setUint16(at, n, true));
  for (let i = 0; i < sound.length; i += 1) {
    const mixed = channels.reduce((sum, channel) => sum + channel[i], 0) / channels.length;
    file.setInt16(44 + 2 * i, Math.round(32767 * Math.max(-1, Math.min(1, mixed))), true);
  }
  return new Blob([file.buffer], { type: "audio/wav" });
}
