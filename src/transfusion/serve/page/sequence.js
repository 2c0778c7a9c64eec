// A document as the model sees it: tokens coloured by their loss, images by their patches, and the mask.

import { inspect } from "./api.js";
import { $, element, readableName } from "./dom.js";
import { picture } from "./media.js";

// Nats at which a token is coloured most.
const MOST_NATS = 6;

export async function openSequence(document) {
  const found = await inspect(document);
  const media = document.filter((part) => typeof part !== "string");
  const blocks = found.images.map((image, place) => ({ ...image, part: media[place], kind: media[place].modality ?? "image" }));
  const view = new View({ ...found, blocks });
  $("sequence").showModal();
  view.choose(0);
}

const count = (number, one, several = `${one}s`) => `${number} ${number === 1 ? one : several}`;

class View {
  // blocks: of patches, each with its part of the document.
  constructor(found) {
    Object.assign(this, found);
    this.colours = getComputedStyle($("sequence"));
    this.options = [];
    this.facts();
    this.show();
    this.drawMask();
  }

  facts() {
    const told = this.nats.filter((nat) => nat !== null);
    const mean = told.reduce((sum, nat) => sum + nat, 0) / Math.max(told.length, 1);
    const patches = this.blocks.reduce((sum, block) => sum + block.patches, 0);
    const others = [...new Set(this.blocks.map(({ kind }) => kind))].filter((kind) => kind !== "image");
    const number = (kind) => this.blocks.filter((block) => block.kind === kind).length;
    const kinds = [count(number("image"), "image"), ...others.map((kind) => `${number(kind)} of ${kind}`)];
    const loss = told.length ? `, ${mean.toFixed(2)} nats a token, perplexity ${Math.exp(mean).toFixed(1)}` : "";
    $("sequence-facts").textContent =
      `${count(this.tokens.length - patches, "token")}, ${count(patches, "patch", "patches")} of ` +
      `${kinds.join(", ")}${loss}. The more colour a token has, the less it was foreseen.`;
  }

  // One option for each token, and one for each image or other block, whose patches follow with the arrow keys.
  show() {
    const root = $("tokens");
    const starts = new Map(this.blocks.map((block) => [block.first, block]));
    root.replaceChildren();
    for (let position = 0; position < this.tokens.length; position += 1) {
      const block = starts.get(position);
      const option = block ? this.block(block) : this.token(position);
      option.tabIndex = -1;
      option.addEventListener("click", () => this.choose(position, true));
      option.addEventListener("mouseenter", () => this.choose(position));
      root.append(option);
      const covered = block ? block.patches : 1;
      for (let each = 0; each < covered; each += 1) this.options[position + each] = option;
      position += covered - 1;
    }
    root.onkeydown = (event) => this.move(event);
  }

  token(position) {
    const isControl = this.nats[position] === null || /^<[A-Z]+>$/.test(this.texts[position]);
    const text = this.texts[position].replaceAll("\n", "\u21b5\n");
    const option = element("span", { role: "option", "aria-selected": "false" }, isControl ? text.replace(/[<>]/g, "") : text);
    if (isControl) option.className = "control-token";
    else option.style.setProperty("--loss", Math.min(1, this.nats[position] / MOST_NATS).toFixed(3));
    return option;
  }

  block({ part, kind, patches, columns }) {
    const name = `${readableName(kind)} of ${count(patches, "patch", "patches")}, ${columns} in a line`;
    const seen = part.image ? element("img", { src: part.image, alt: name, class: "pixels" }) : picture(part);
    return element("span", { role: "option", "aria-selected": "false", class: "patches", "aria-label": name }, seen);
  }

  move(event) {
    const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -this.tokens.length, End: this.tokens.length };
    if (!(event.key in steps)) return;
    event.preventDefault();
    this.choose(this.chosen + steps[event.key], true);
  }

  choose(position, focuses = false) {
    const last = this.tokens.length - 1;
    this.options[this.chosen ?? 0].setAttribute("aria-selected", "false");
    this.options[this.chosen ?? 0].tabIndex = -1;
    this.chosen = Math.max(0, Math.min(last, position));
    const option = this.options[this.chosen];
    option.setAttribute("aria-selected", "true");
    option.tabIndex = 0;
    if (focuses) option.focus();
    $("position").textContent = this.describe(this.chosen);
    this.drawMask();
  }

  describe(position) {
    const nats = this.nats[position];
    const name = this.texts[position] ? `\u201c${this.texts[position]}\u201d, token ${this.tokens[position]}` : "a patch";
    const loss = nats === null ? "" : `, ${nats.toFixed(2)} nats, probability ${(100 * Math.exp(-nats)).toPrecision(3)} %`;
    const ahead = this.sees_before[position] - position - 1;
    const before = position ? "all before it" : "itself alone";
    const mine = this.blocks.find(({ first, patches }) => position >= first && position < first + patches);
    const after = ahead > 0 ? `, and ${count(ahead, "patch", "patches")} of its ${mine.kind} after it` : "";
    return `Position ${position}: ${name}${loss}. It sees ${before}${after}.`;
  }

  // A pixel for each pair, and the line of the chosen position marked.
  drawMask() {
    const canvas = $("mask");
    const length = this.tokens.length;
    canvas.width = length;
    canvas.height = length;
    const context = canvas.getContext("2d");
    for (let query = 0; query < length; query += 1) {
      context.globalAlpha = query === this.chosen ? 1 : 0.45;
      context.fillStyle = this.colours.getPropertyValue("--text-series");
      context.fillRect(0, query, query + 1, 1);
      context.fillStyle = this.colours.getPropertyValue("--image-series");
      context.fillRect(query + 1, query, this.sees_before[query] - query - 1, 1);
    }
  }
}
