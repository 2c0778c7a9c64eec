// One question and its answer, as it comes.

import { generate } from "./api.js";
import { asCommand, asCurl, asPython } from "./copying.js";
import { copyText, element, pngUrl, quietButton, readableName, say } from "./dom.js";
import { extent, shown, suffix } from "./media.js";

const REASONS = { tokens: "at the maximum of tokens", length: "where the model\u2019s sequence is full", cancelled: "when the server stopped" };
// Smaller images are enlarged, pixel by pixel.
const SMALL = 160;

export class Turn {
  // actions: inspect(document), use(part), replay(turn), finished(turn), and the schema: fields and sizes.
  constructor(body, title, actions) {
    Object.assign(this, { body, title, actions, parts: [], figures: [], recipes: [] });
    this.abort = new AbortController();
    this.answer = element("div", { class: "answer" });
    this.under = element("div", { class: "under" });
    const showsSteps = body.draws && !body.modalities;
    this.article = element("article", { class: showsSteps ? "turn draws" : "turn", "aria-busy": "true", "aria-label": title }, this.asked(), this.answer, this.under);
  }

  asked() {
    const given = Array.isArray(this.body.prompt) ? this.body.prompt : [this.body.prompt];
    const parts = given.filter((part) => part !== "").map((part, place) => {
      if (typeof part === "string") return element("span", {}, part);
      if (part.media) return shown(part, `${readableName(part.modality)} ${place + 1} of the prompt`);
      return element("img", { src: part.image, alt: `Image ${place + 1} of the prompt`, class: "pixels" });
    });
    return element("div", { class: "asked" }, ...parts);
  }

  async run(expected = null) {
    const stop = element("button", { type: "button", class: "stop", onclick: () => this.stop() }, "Stop");
    this.under.replaceChildren(stop);
    const begun = performance.now();
    try {
      await generate(this.body, this.abort.signal, (name, data) => this.take(name, data));
      this.finish((performance.now() - begun) / 1000, expected);
    } catch (error) {
      if (error.name === "AbortError") this.finish((performance.now() - begun) / 1000, null);
      else this.fail(error);
    } finally {
      this.article.setAttribute("aria-busy", "false");
      this.actions.finished(this);
    }
  }

  stop() {
    this.wasStopped = true;
    this.abort.abort();
  }

  take(name, data) {
    if (name === "text") this.addText(data.text);
    if (name === "image_start") this.beginImage(data);
    if (name === "image_preview") this.showPreview(data);
    if (name === "image") this.endImage(data);
    if (name === "media") this.addMedia(data);
    if (name === "done") this.done = data;
  }

  addText(text) {
    if (typeof this.parts.at(-1) === "string") {
      this.parts[this.parts.length - 1] += text;
      this.answer.lastElementChild.textContent = this.parts.at(-1);
    } else {
      this.parts.push(text);
      this.answer.append(element("span", { class: "text" }, text));
    }
  }

  beginImage({ index, size, steps }) {
    const [width, height] = size.split("x").map(Number);
    const image = element("img", { alt: `Image ${index + 1}, being made` });
    image.classList.toggle("pixels", Math.min(width, height) < SMALL);
    const progress = element("progress", { max: steps, value: 0, "aria-label": `Steps of image ${index + 1}` });
    const frame = element("div", { class: "frame" }, image, progress);
    frame.style.setProperty("--shape", `${width} / ${height}`);
    frame.style.setProperty("--shown-width", `${Math.max(width, Math.round((256 * width) / Math.max(width, height)))}px`);
    const caption = element("figcaption", {}, element("span", {}, `step 0 of ${steps}`));
    const figure = element("figure", {}, frame, caption);
    image.hidden = true;
    this.figures[index] = { image, progress, caption, size, steps };
    this.parts.push(null);
    this.answer.append(figure);
  }

  showPreview({ index, step, png }) {
    const { image, progress, caption, steps } = this.figures[index];
    image.src = pngUrl(png);
    image.hidden = false;
    progress.value = step;
    caption.firstElementChild.textContent = `step ${step} of ${steps}`;
  }

  endImage({ index, png, seed, recipe }) {
    const { image, progress, caption, size, steps } = this.figures[index];
    const url = pngUrl(png);
    image.src = url;
    image.hidden = false;
    image.alt = `Image ${index + 1} of the answer to: ${this.title}`;
    progress.remove();
    this.parts[this.parts.lastIndexOf(null)] = { image: url };
    this.recipes[index] = recipe;
    caption.replaceChildren(
      element("span", {}, `${size.replace("x", " \u00d7 ")}, ${steps} steps`),
      element("a", { class: "quiet button", href: url, download: `transfusion-${seed}.png` }, "Download"),
      quietButton("Use in a prompt", () => this.actions.use({ image: url })),
    );
  }

  addMedia({ index, modality, seed, media_type, data }) {
    const part = { media: `data:${media_type};base64,${data}`, modality };
    const name = `${readableName(modality)} ${index + 1} of the answer to: ${this.title}`;
    const file = `transfusion-${seed}.${modality}.${suffix(part)}`;
    const caption = element(
      "figcaption", {}, element("span", {}, `${modality}, ${extent(part)}`),
      element("a", { class: "quiet button", href: part.media, download: file }, "Download"),
      quietButton("Use in a prompt", () => this.actions.use(part)),
    );
    this.parts.push(part);
    this.answer.append(element("figure", {}, shown(part, name), caption));
  }

  finish(seconds, expected) {
    const { reason, usage } = this.done ?? { reason: "", usage: null };
    const told = [`seed ${this.body.seed}`];
    if (usage?.tokens) told.push(`${usage.tokens} tokens`);
    told.push(`${seconds.toFixed(1)} s`);
    if (!this.done) told.push("stopped");
    else if (REASONS[reason]) told.push(`ended ${REASONS[reason]}`);
    if (expected) told.push(this.equals(expected) ? "made again, the same" : "made again, and it differs");
    this.endFigures();
    this.under.replaceChildren(
      element("span", {}, told.join(" \u00b7 ")),
      quietButton("Replay", () => this.actions.replay(this)),
      this.copyMenu(),
      quietButton("As the model sees it", () => this.actions.inspect(this.document())),
    );
    const images = this.parts.filter((part) => part?.image).length;
    const media = this.parts.filter((part) => part?.media).map((part) => part.modality);
    const kinds = [...new Set(media)].map((kind) => `, ${media.filter((each) => each === kind).length} of ${kind}`);
    say(this.done ? `The answer is complete: ${images} images${kinds.join("")}, ${usage.tokens} tokens.` : "Stopped.");
  }

  // Images that are not finished are no longer being made.
  endFigures() {
    for (const { image, progress } of this.figures.filter((figure) => figure.progress.isConnected)) {
      progress.remove();
      image.alt = image.alt.replace("being made", "not finished");
    }
  }

  fail(error) {
    this.endFigures();
    this.under.replaceChildren(
      element("p", { class: "error", role: "alert" }, error.message),
      quietButton("Try again", () => this.actions.replay(this)),
    );
  }

  // Whether this answer is another, image for image, sound for sound and letter for letter.
  equals(other) {
    const seen = (turn) => JSON.stringify([turn.parts.filter((part) => !part?.image), turn.recipes.map((recipe) => recipe?.pixels)]);
    return seen(this) === seen(other);
  }

  // Prompt and answer as one document, without what is not finished.
  document() {
    const given = Array.isArray(this.body.prompt) ? this.body.prompt : [this.body.prompt];
    return [...given, ...this.parts.filter((part) => part !== null)];
  }

  copyMenu() {
    const copies = {
      "Command line": () => asCommand(this.body, this.actions.schema),
      curl: () => asCurl(this.body, location.origin),
      Python: () => asPython(this.body, this.actions.schema),
    };
    const list = element("ul", { hidden: true });
    const opener = quietButton("Copy as \u2026", () => toggle(list.hidden), { "aria-expanded": "false" });
    const toggle = (opens) => {
      list.hidden = !opens;
      opener.setAttribute("aria-expanded", `${opens}`);
      if (opens) list.querySelector("button").focus();
    };
    const menu = element("div", { class: "menu" }, opener, list);
    for (const [name, make] of Object.entries(copies)) {
      const copy = async () => {
        await copyText(make());
        toggle(false);
        opener.textContent = `Copied as ${name}`;
        setTimeout(() => (opener.textContent = "Copy as \u2026"), 2000);
        say(`Copied as ${name}.`);
      };
      list.append(element("li", {}, quietButton(name, copy)));
    }
    menu.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || list.hidden) return;
      event.stopPropagation();
      toggle(false);
      opener.focus();
    });
    menu.addEventListener("focusout", (event) => menu.contains(event.relatedTarget) || toggle(false));
    return menu;
  }
}
