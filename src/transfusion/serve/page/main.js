// The page: what is asked goes to the server, what is answered comes into the thread.

import { getSchema } from "./api.js";
import { Controls } from "./controls.js";
import { $, element, quietButton, say } from "./dom.js";
import { Past } from "./past.js";
import { openSequence } from "./sequence.js";
import { Turn } from "./turn.js";

const KINDS = ["image/png", "image/jpeg", "image/webp"];
// A preview is sent at least so often in the making of an image.
const PREVIEWS = 12;
const THUMBNAIL = 64;

let schema;
let controls;
let past;
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
  const sizes = schema.sizes.map((size) => size.replace("x", " \u00d7 ")).join(", ");
  $("facts").textContent = `images of ${sizes} \u00b7 sequences of ${schema.sequence_length.toLocaleString()} tokens and patches`;
  controls = new Controls(schema);
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
}

function ask(text) {
  controls.renewSeed();
  const asked = [...attached.map((image) => ({ image })), ...(text ? [text] : [])];
  const isRestored = restored?.shown === shownPrompt(text);
  const prompt = $("whole-thread").checked ? joined([...thread(), "\n", ...asked]) : isRestored ? restored.parts : asked;
  const body = { prompt: prompt.length === 1 && typeof prompt[0] === "string" ? prompt[0] : prompt, ...controls.values() };
  if (mode() === "image") body.draws = true;
  if (mode() === "text") body.max_images = 0;
  run(body, text || "An image");
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
  attached = parts.filter((part) => typeof part !== "string").map((part) => part.image);
  $("prompt").value = parts.filter((part) => typeof part === "string").join("");
  document.querySelector(`input[name=mode][value=${body.draws ? "image" : body.max_images === 0 ? "text" : "both"}]`).checked = true;
  $("whole-thread").checked = false;
  // Texts and images keep their order, which the composer does not show.
  restored = { parts, shown: shownPrompt($("prompt").value.trim()) };
  controls.restore(body.max_images === 0 ? { ...body, max_images: undefined } : body);
  showAttached();
  fit();
  close("history");
  $("prompt").focus();
}

// Images of the prompt

function attach(url) {
  attached.push(url);
  showAttached();
  $("prompt").focus();
}

async function addFiles(files) {
  for (const file of files) {
    try {
      attach(KINDS.includes(file.type) ? await read(file) : await converted(file));
    } catch {
      say(`${file.name} is no image that this browser can read.`);
    }
  }
  $("file").value = "";
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
    ...attached.map((url, place) => {
      const remove = () => {
        attached.splice(place, 1);
        showAttached();
        $("prompt").focus();
      };
      const name = `Image ${place + 1} of the prompt`;
      return element(
        "li", {}, element("img", { src: url, alt: name, class: "pixels" }),
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
