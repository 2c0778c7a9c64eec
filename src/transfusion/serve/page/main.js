// The page: what is asked goes to the server, what is answered comes into the thread.

import { getSchema } from "./api.js";
import { Controls } from "./controls.js";
import { $, element, quietButton, readableName, say } from "./dom.js";
import { RATE, picture, readable } from "./media.js";
import { Past } from "./past.js";
import { openSequence } from "./sequence.js";
import { Turn } from "./turn.js";

const KINDS = ["image/png", "image/jpeg", "image/webp"];
// A preview is sent at least so often in the making of an image.
const PREVIEWS = 12;
// Before the name of a modality: an answer that is one of it.
const DRAWN = "draws ";
const THUMBNAIL = 64;

let schema;
let controls;
let past;
// Parts of the prompt that are no text.
let attached = [];
// The prompt of a former request, and how it is shown, until it is changed.
let restored = null;
const turns = [];

async function start() {
  try {
    schema = await getSchema();
  } catch (error) {
    $("welcome").replaceChildren(element("p", { class: "error", role: "alert" }, error.message));
    return;
  }
  document.title = `${schema.model} \u00b7 Transfusion`;
  $("model").textContent = schema.model;
  $("facts").textContent = facts().join(" \u00b7 ");
  controls = new Controls(schema);
  offerModalities();
  past = new Past(restore);
  $("reset-settings").addEventListener("click", () => controls.reset());
  $("examples").replaceChildren(...schema.examples.map((text) => element("li", {}, quietButton(text, () => ask(text)))));
  $("composer").addEventListener("submit", submit);
  $("prompt").addEventListener("keydown", submitOnEnter);
  $("prompt").addEventListener("input", fit);
  $("file").addEventListener("change", (event) => addFiles([...event.target.files]));
  $("close-sequence").addEventListener("click", () => $("sequence").close());
  $("prompt").focus();
  takeDrops();
  PANELS.forEach(panel);
  document.querySelector("main").addEventListener("pointerdown", () => PANELS.forEach(close));
  document.addEventListener("keydown", leaveOnEscape);
}

function facts() {
  const sizes = schema.sizes.map((size) => size.replace("x", " \u00d7 ")).join(", ");
  const others = modalities().map(({ name, kind, shapes }) => {
    const most = Math.max(...shapes.map((shape) => Number(shape.split("x")[0])));
    return kind === "mel" ? `${name} of up to ${Number((most / RATE).toPrecision(2))} s` : name;
  });
  return [`images of ${sizes}`, ...others, `sequences of ${schema.sequence_length.toLocaleString()} tokens and patches`];
}

// Beside text and images, as the server names them.
const modalities = () => schema.modalities ?? [];
const sound = () => modalities().find(({ kind }) => kind === "mel")?.name;
const arrays = () => modalities().filter(({ kind }) => kind === "latents").map(({ name }) => name);

// What a model has beside text and images can be drawn, and files of it be added.
function offerModalities() {
  if (!modalities().length) return;
  $("both").textContent = "Text and media";
  $("text-alone").before(
    ...modalities().map(({ name }) =>
      element("label", {}, element("input", { type: "radio", name: "mode", value: DRAWN + name }), element("span", {}, readableName(name))),
    ),
  );
  const names = modalities().map(({ name }) => name);
  $("kinds").textContent = `${["Text", "images", ...names.slice(0, -1)].join(", ")} and ${names.at(-1)}, from one model`;
  $("add").textContent = "Add a file";
  $("file").accept += (sound() ? ",audio/*" : "") + (arrays().length ? ",.npy" : "");
}

// Asking

const mode = () => document.querySelector("input[name=mode]:checked").value;

function submitOnEnter(event) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("composer").requestSubmit();
}

function submit(event) {
  event.preventDefault();
  const text = $("prompt").value.trim();
  if (!text && !attached.length) return;
  ask(text);
  $("prompt").value = "";
  fit();
  attached = [];
  showAttached();
  $("unread").hidden = true;
}

function ask(text) {
  controls.renewSeed();
  const asked = [...attached, ...(text ? [text] : [])];
  const isRestored = restored?.shown === shownPrompt(text);
  const prompt = $("whole-thread").checked ? joined([...thread(), "\n", ...asked]) : isRestored ? restored.parts : asked;
  const body = { prompt: prompt.length === 1 && typeof prompt[0] === "string" ? prompt[0] : prompt, ...controls.values() };
  if (mode() !== "both") delete body.modalities;
  if (mode() === "text") body.max_images = 0;
  else if (mode() !== "both") body.draws = true;
  if (mode().startsWith(DRAWN)) body.modalities = [mode().slice(DRAWN.length)];
  run(body, text || (attached[0].image ? "An image" : readableName(attached[0].modality)));
}

const shownPrompt = (text) => JSON.stringify([text, attached, $("whole-thread").checked]);

// What was said so far, as one document.
function thread() {
  const last = turns.findLast((turn) => turn.done);
  return last ? last.document() : [];
}

// So that one text follows no other, and no new line stands at the beginning.
function joined(parts) {
  const found = [];
  for (const part of parts) {
    if (typeof part === "string" && typeof found.at(-1) === "string") found[found.length - 1] += part;
    else if (part !== "\n") found.push(part);
  }
  return found;
}

function run(body, title, expected = null) {
  $("welcome").hidden = true;
  const sent = schema.has_previews ? { ...body, preview_every: previewEvery(body) } : body;
  const known = { fields: controls.fields, sizes: schema.sizes };
  const turn = new Turn(sent, title, { inspect: show, use: attach, replay, finished, schema: known });
  turns.push(turn);
  $("thread").append(turn.article);
  turn.article.scrollIntoView({ block: "end" });
  follow(turn);
  turn.run(expected);
}

const previewEvery = (body) => Math.max(1, Math.floor((body.steps ?? controls.fields.steps.default) / PREVIEWS));

// Keeps the end of an answer in sight, for whoever has not scrolled away from it.
function follow(turn) {
  const root = $("thread");
  const watcher = new ResizeObserver(() => {
    if (root.scrollHeight - root.scrollTop - root.clientHeight < 400) root.scrollTop = root.scrollHeight;
    if (turn.article.getAttribute("aria-busy") === "false") watcher.disconnect();
  });
  watcher.observe(turn.article);
}

function replay(turn) {
  const { preview_every, ...body } = turn.body;
  run(body, turn.title, turn.done ? turn : null);
}

async function finished(turn) {
  if (!turn.done) return;
  const { preview_every, ...body } = turn.body;
  const drawn = turn.parts.find((part) => part?.image);
  past.add({ body, title: turn.title, when: Date.now(), thumbnail: drawn ? await thumbnail(drawn.image) : null });
}

async function show(document) {
  try {
    await openSequence(document);
  } catch (error) {
    say(error.message);
    window.alert(error.message);
  }
}

// Escape leaves what lies over the thread, and else stops the answer that was asked for last.
function leaveOnEscape(event) {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  const open = PANELS.find((name) => $(name).classList.contains("open"));
  if (open) {
    close(open);
    $(`show-${open}`).focus();
    return;
  }
  turns.findLast((turn) => turn.article.getAttribute("aria-busy") === "true")?.stop();
}

// A former request, to be sent again or changed.
function restore({ body }) {
  const parts = Array.isArray(body.prompt) ? body.prompt : [body.prompt];
  attached = parts.filter((part) => typeof part !== "string");
  $("prompt").value = parts.filter((part) => typeof part === "string").join("");
  const drawn = body.modalities ? DRAWN + body.modalities[0] : "image";
  const asked = body.draws ? drawn : body.max_images === 0 ? "text" : "both";
  document.querySelector(`input[name=mode][value="${asked}"]`).checked = true;
  $("whole-thread").checked = false;
  // Texts and images keep their order, which the composer does not show.
  restored = { parts, shown: shownPrompt($("prompt").value.trim()) };
  const { max_images, modalities: held = ["image"], ...others } = body;
  controls.restore({ ...others, max_images: max_images || undefined, modalities: asked === "both" ? held : undefined });
  showAttached();
  fit();
  close("history");
  $("prompt").focus();
}

// Files of the prompt

function attach(part) {
  attached.push(part);
  showAttached();
  $("prompt").focus();
}

async function addFiles(files) {
  const unread = [];
  for (const file of files) {
    try {
      attach(await partOf(file));
    } catch {
      unread.push(file.name);
    }
  }
  $("unread").hidden = !unread.length;
  $("unread").textContent = `Neither this browser nor this model reads ${unread.join(", ")}.`;
  $("file").value = "";
}

async function partOf(file) {
  if (sound() && file.type.startsWith("audio/")) return { media: await readable(await read(file)), modality: sound() };
  const array = file.name.endsWith(".npy") && arrayOf(file.name);
  if (array) return { media: await read(new Blob([file], { type: "application/octet-stream" })), modality: array };
  return { image: KINDS.includes(file.type) ? await read(file) : await converted(file) };
}

// The name KEY.MODALITY.npy tells whose it is. Where one modality alone has arrays, any name will do.
function arrayOf(file) {
  const known = arrays();
  const named = file.split(".").at(-2);
  return known.includes(named) ? named : known.length === 1 ? known[0] : null;
}

function read(file) {
  return new Promise((done, fail) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = fail;
    reader.readAsDataURL(file);
  });
}

// What the server does not read, as a PNG.
async function converted(file) {
  const image = await createImageBitmap(file);
  return drawn(image, image.width, image.height);
}

async function thumbnail(url) {
  const image = element("img", { src: url });
  await image.decode();
  const scale = Math.min(1, THUMBNAIL / Math.max(image.naturalWidth, image.naturalHeight));
  return drawn(image, image.naturalWidth * scale, image.naturalHeight * scale);
}

function drawn(image, width, height) {
  const canvas = element("canvas", { width: Math.round(width), height: Math.round(height) });
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/png");
}

function showAttached() {
  $("attached").replaceChildren(
    ...attached.map((part, place) => {
      const remove = () => {
        attached.splice(place, 1);
        showAttached();
        $("prompt").focus();
      };
      const name = `${part.image ? "Image" : readableName(part.modality)} ${place + 1} of the prompt`;
      return element(
        "li", {}, part.image ? element("img", { src: part.image, alt: name, class: "pixels" }) : picture(part),
        element("button", { type: "button", "aria-label": `Remove: ${name}`, onclick: remove }, "\u00d7"),
      );
    }),
  );
  const asks = attached.length ? "Say what shall be changed, or choose Text to have it described" : "Ask for an image, or begin a text";
  $("prompt").placeholder = asks;
}

function takeDrops() {
  const composer = $("composer");
  const hasFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  document.addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    composer.classList.add("over");
  });
  document.addEventListener("dragleave", (event) => event.relatedTarget ?? composer.classList.remove("over"));
  document.addEventListener("drop", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    composer.classList.remove("over");
    addFiles([...event.dataTransfer.files]);
  });
  $("prompt").addEventListener("paste", (event) => {
    const files = [...event.clipboardData.files];
    if (!files.length) return;
    event.preventDefault();
    addFiles(files);
  });
}

// The room of the page

function fit() {
  const prompt = $("prompt");
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
}

const PANELS = ["history", "settings"];

// On a narrow page these lie over the thread.
function panel(name) {
  $(`show-${name}`).addEventListener("click", () => {
    const opens = !$(name).classList.contains("open");
    PANELS.forEach(close);
    if (!opens) return;
    $(name).classList.add("open");
    $(`show-${name}`).setAttribute("aria-expanded", "true");
    $(name).querySelector("button:not([hidden]), input")?.focus();
  });
}

function close(name) {
  $(name).classList.remove("open");
  $(`show-${name}`).setAttribute("aria-expanded", "false");
}

start();
