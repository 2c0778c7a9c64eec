// Sounds and other media beside images: of files, as they are shown, and what they are called.

import { element } from "./dom.js";

// Samples of a sound in a second, as the server has them.
export const RATE = 16_000;
const WAV_HEAD = 44;
const WINDOW = 1024;
const HOP = 256;
const BANDS = 80;
// Of a spectrogram that is drawn. A longer sound is drawn in larger hops.
const MOST_FRAMES = 400;
// What is fainter than the loudest by so much is not seen.
const DECIBELS = 60;
// What the server reads as it is.
const READ = /^data:audio\/(?:x-|vnd\.)?(?:wave?|flac)[;,]/;

export const isSound = (part) => part.media.startsWith("data:audio/");

// What the server does not read, as a WAV.
export async function readable(url) {
  return READ.test(url) ? url : wavUrl(await samplesOf(url));
}

// A sound to be heard, or the picture of another file.
export function shown(part, name) {
  if (!isSound(part)) return picture(part);
  const audio = element("audio", { controls: true, src: part.media, "aria-label": name });
  return element("div", { class: "sound" }, spectrogram(part), audio);
}

// The spectrogram of a sound, or the name of what it is.
export function picture(part) {
  return isSound(part) ? spectrogram(part) : element("span", { class: "file" }, part.modality);
}

// The ending of the file's name.
export function suffix(part) {
  if (!isSound(part)) return "npy";
  return /^data:audio\/(x-)?flac/.test(part.media) ? "flac" : "wav";
}

// How long a sound is that the server made, and how large another file.
export function extent(part) {
  const encoded = part.media.slice(part.media.indexOf(",") + 1);
  const bytes = (encoded.length * 3) / 4 - encoded.match(/=*$/)[0].length;
  return isSound(part) ? `${((bytes - WAV_HEAD) / 2 / RATE).toFixed(1)} s` : `${bytes.toLocaleString()} bytes`;
}

// One channel, whatever the file has.
async function samplesOf(url) {
  const data = Uint8Array.from(atob(url.slice(url.indexOf(",") + 1)), (letter) => letter.charCodeAt(0));
  const decoded = await new OfflineAudioContext(1, 1, RATE).decodeAudioData(data.buffer);
  const channels = Array.from({ length: decoded.numberOfChannels }, (_, number) => decoded.getChannelData(number));
  return channels[0].map((_, place) => channels.reduce((sum, channel) => sum + channel[place], 0) / channels.length);
}

// As 16 bits.
function wavUrl(samples) {
  const view = new DataView(new ArrayBuffer(WAV_HEAD + 2 * samples.length));
  const write = (at, text) => [...text].forEach((letter, place) => view.setUint8(at + place, letter.charCodeAt(0)));
  write(0, "RIFF");
  view.setUint32(4, WAV_HEAD - 8 + 2 * samples.length, true);
  write(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true);
  view.setUint16(22, 1, true);
  view.setUint32(24, RATE, true);
  view.setUint32(28, 2 * RATE, true);
  view.setUint16(32, 2, true);
  view.setUint16(34, 16, true);
  write(36, "data");
  view.setUint32(40, 2 * samples.length, true);
  samples.forEach((value, place) => view.setInt16(WAV_HEAD + 2 * place, 32767 * Math.max(-1, Math.min(1, value)), true));
  return new Promise((done) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.readAsDataURL(new Blob([view], { type: "audio/wav" }));
  });
}

// Loudness by time and pitch, on the mel scale as the model has it.
function spectrogram(part) {
  const canvas = element("canvas", { width: 1, height: BANDS, "aria-hidden": "true" });
  samplesOf(part.media).then((samples) => draw(canvas, samples)).catch(() => canvas.remove());
  return canvas;
}

function draw(canvas, samples) {
  const hop = Math.max(HOP, Math.ceil(samples.length / MOST_FRAMES));
  const frames = [];
  for (let first = 0; first < samples.length; first += hop) frames.push(bandsOf(samples.subarray(first, first + WINDOW)));
  const loudest = Math.max(...frames.flat(), 1e-9);
  canvas.width = frames.length;
  const context = canvas.getContext("2d");
  context.fillStyle = getComputedStyle(document.body).getPropertyValue("--text-series");
  frames.forEach((bands, time) =>
    bands.forEach((value, band) => {
      context.globalAlpha = Math.max(0, 1 + (20 * Math.log10(value / loudest + 1e-9)) / DECIBELS);
      context.fillRect(time, BANDS - 1 - band, 1, 1);
    }),
  );
}

const toMel = (hertz) => 2595 * Math.log10(1 + hertz / 700);
const toHertz = (mel) => 700 * (10 ** (mel / 2595) - 1);
// The frequency of the transform at which each band begins, and the last ends.
const EDGES = Array.from({ length: BANDS + 1 }, (_, band) =>
  Math.round((toHertz((band * toMel(RATE / 2)) / BANDS) * WINDOW) / RATE),
);

// The loudest frequency of each band.
function bandsOf(samples) {
  const real = new Float32Array(WINDOW);
  const imaginary = new Float32Array(WINDOW);
  samples.forEach((value, place) => (real[place] = value * (0.5 - 0.5 * Math.cos((2 * Math.PI * place) / WINDOW))));
  transform(real, imaginary);
  const loud = real.map((value, frequency) => Math.hypot(value, imaginary[frequency]));
  return EDGES.slice(1).map((end, band) => Math.max(...loud.subarray(EDGES[band], Math.max(end, EDGES[band] + 1))));
}

// In its place (Cooley and Tukey, 1965).
function transform(real, imaginary) {
  const length = real.length;
  for (let one = 1, other = 0; one < length; one += 1) {
    let bit = length >> 1;
    for (; other & bit; bit >>= 1) other ^= bit;
    other ^= bit;
    if (one < other) [real[one], real[other]] = [real[other], real[one]];
  }
  for (let size = 2; size <= length; size *= 2) {
    const half = size / 2;
    for (let turn = 0; turn < half; turn += 1) {
      const [cosine, sine] = [Math.cos((2 * Math.PI * turn) / size), -Math.sin((2 * Math.PI * turn) / size)];
      for (let at = turn; at < length; at += size) {
        const turnedReal = real[at + half] * cosine - imaginary[at + half] * sine;
        const turnedImaginary = real[at + half] * sine + imaginary[at + half] * cosine;
        [real[at + half], imaginary[at + half]] = [real[at] - turnedReal, imaginary[at] - turnedImaginary];
        [real[at], imaginary[at]] = [real[at] + turnedReal, imaginary[at] + turnedImaginary];
      }
    }
  }
}
