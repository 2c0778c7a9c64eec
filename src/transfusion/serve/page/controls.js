// The settings, made from the server's own schema: what it does not take, no control can ask for.

import { $, element, readableName } from "./dom.js";

const GROUPS = {
  "": ["seed", "modalities"],
  Images: ["steps", "guidance", "size", "negative_prompt", "sampler", "guidance_interval", "guidance_rescale"],
  Text: ["max_tokens", "max_images", "temperature", "top_p"],
};
const SEED_LIMIT = 2 ** 31;

export class Controls {
  constructor(schema) {
    this.fields = schema.bodies.GenerateBody.properties;
    this.readers = {};
    this.writers = {};
    this.show();
  }

  show() {
    const root = $("controls");
    for (const [title, names] of Object.entries(GROUPS)) {
      const known = names.filter((name) => this.fields[name]);
      if (title && known.length) root.append(element("h3", { class: "group" }, title));
      for (const name of known) root.append(this.control(name, this.fields[name]));
    }
  }

  control(name, field) {
    const id = `setting-${name}`;
    const help = element("p", { class: "help", id: `${id}-help` }, sentence(field.description));
    if (name === "seed") return element("div", { class: "control" }, ...this.seed(id, field), help);
    if (field.items?.enum) return this.choices(name, field, help);
    const label = element("label", { for: id }, readableName(name));
    const shared = { id, "aria-describedby": help.id };
    let input;
    if (field.enum) {
      input = element("select", shared, ...field.enum.map((each) => element("option", {}, each)));
      this.bind(name, () => input.value, (value) => (input.value = value));
    } else if (field.type === "array") {
      return this.interval(name, field, id, help);
    } else if (field.type === "string") {
      input = element("input", { type: "text", ...shared });
      this.bind(name, () => input.value, (value) => (input.value = value));
    } else {
      input = this.slider(name, field, shared, label);
    }
    this.writers[name](field.default);
    return element("div", { class: "control" }, label, input, help);
  }

  slider(name, field, shared, label) {
    const [least, most] = bounds(name, field);
    const step = field.type === "integer" ? 1 : most - least > 2 ? 0.5 : 0.05;
    const input = element("input", { type: "range", min: `${least}`, max: `${most}`, step: `${step}`, ...shared });
    const shown = element("output", { for: shared.id });
    label.append(shown);
    const show = () => (shown.textContent = input.value);
    input.addEventListener("input", show);
    input.disabled = least === most;
    // A value from a recipe may stand between two steps of the slider.
    let exact = null;
    input.addEventListener("input", () => (exact = null));
    this.bind(
      name,
      () => exact ?? Number(input.value),
      (value) => {
        input.value = value;
        exact = Number(input.value) === value ? null : value;
        shown.textContent = value;
      },
    );
    return input;
  }

  // Some of several, and at least one.
  choices(name, field, help) {
    const inputs = field.items.enum.map((value) => element("input", { type: "checkbox", value }));
    const keepOne = (event) => inputs.some((input) => input.checked) || (event.target.checked = true);
    inputs.forEach((input) => input.addEventListener("change", keepOne));
    this.bind(
      name,
      () => inputs.filter((input) => input.checked).map((input) => input.value),
      (values) => inputs.forEach((input) => (input.checked = values.includes(input.value))),
    );
    this.writers[name](this.usual(name));
    const labels = inputs.map((input) => element("label", { class: "check" }, input, element("span", {}, readableName(input.value))));
    return element(
      "div", { class: "control", role: "group", "aria-label": readableName(name), "aria-describedby": help.id },
      element("span", { class: "label" }, readableName(name)), ...labels, help,
    );
  }

  interval(name, field, id, help) {
    const inputs = field.default.map((value, place) =>
      element("input", {
        type: "number", min: "0", max: "1", step: "0.05", id: place ? `${id}-${place}` : id,
        "aria-describedby": help.id, "aria-label": `${readableName(name)}, ${place ? "high" : "low"}`,
      }),
    );
    this.bind(
      name,
      () => inputs.map((input) => Number(input.value)),
      (value) => inputs.forEach((input, place) => (input.value = value[place])),
    );
    this.writers[name](field.default);
    return element(
      "div", { class: "control", role: "group", "aria-label": readableName(name) },
      element("span", { class: "label" }, readableName(name)), element("div", { class: "pair" }, ...inputs), help,
    );
  }

  seed(id, field) {
    const input = element("input", {
      type: "number", id, min: `${field.minimum}`, max: `${field.maximum}`, step: "1", "aria-describedby": `${id}-help`,
    });
    this.renews = element("input", { type: "checkbox", checked: true });
    this.bind("seed", () => Number(input.value), (value) => (input.value = value));
    this.writers.seed(newSeed());
    const renews = element("label", { class: "check" }, this.renews, element("span", {}, "A new one each time"));
    return [element("label", { for: id }, "Seed"), input, renews];
  }

  bind(name, read, write) {
    this.readers[name] = read;
    this.writers[name] = write;
  }

  // What is to be sent: the seed, and what is not as the server has it anyway.
  values() {
    const found = {};
    for (const [name, read] of Object.entries(this.readers)) {
      const value = read();
      const usual = this.fields[name].default;
      if (name === "seed" || JSON.stringify(value) !== JSON.stringify(usual)) found[name] = value;
    }
    return found;
  }

  renewSeed() {
    if (this.renews.checked) this.writers.seed(newSeed());
  }

  // What people expect: an answer may hold whatever the model has.
  usual(name) {
    return name === "modalities" ? this.fields[name].items.enum : this.fields[name].default;
  }

  // Settings of a former request: what it does not name is as usual.
  restore(body) {
    for (const [name, write] of Object.entries(this.writers)) write(body[name] ?? this.usual(name));
    this.renews.checked = false;
  }

  reset() {
    for (const [name, write] of Object.entries(this.writers)) {
      write(name === "seed" ? newSeed() : this.usual(name));
    }
    this.renews.checked = true;
  }
}

// A slider to 100 would be useless for what is mostly below 10. What is beyond can be sent by other means.
function bounds(name, field) {
  const usual = { guidance: 15, temperature: 2, steps: 100, max_tokens: 1024 };
  // Of what must be above a bound, none as near as a slider steps.
  const least = field.minimum ?? field.exclusiveMinimum + 0.05;
  return [least, Math.min(field.maximum, usual[name] ?? field.maximum)];
}

function newSeed() {
  return Math.floor(Math.random() * SEED_LIMIT);
}

function sentence(text) {
  return `${text[0].toUpperCase()}${text.slice(1)}.`;
}
