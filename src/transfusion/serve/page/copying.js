// One request as others send it: on the command line, by curl, from Python. Only what is not usual there is written.

import { suffix } from "./media.js";

const FLAGS = {
  steps: "--steps", guidance: "--cfg", sampler: "--sampler", guidance_rescale: "--guidance-rescale",
  negative_prompt: "--negative-prompt", seed: "--seed", max_tokens: "--max-tokens", max_images: "--max-images",
  temperature: "--temperature", top_p: "--top-p",
};
// What the command line and `Pipeline` take unless told. A server may take another, where its model or its limits do.
const USUAL = {
  steps: 25, guidance: 3, sampler: "auto", guidance_rescale: 0, guidance_interval: [0, 1], negative_prompt: "", size: "auto",
  max_tokens: 256, max_images: 4, temperature: 0, top_p: 1, modalities: ["image"],
};
const OF_ANSWERS = ["max_tokens", "max_images", "temperature", "top_p", "modalities"];

const quote = (text) => `'${`${text}`.replaceAll("'", `'\\''`)}'`;
const parts = (body) => (Array.isArray(body.prompt) ? body.prompt : [body.prompt]);
const isFile = (part) => typeof part !== "string";

// What the file of each part may be called, null for a text. An array's name says whose it is.
function names(given) {
  let [images, sounds, arrays] = [0, 0, 0];
  return given.map((part) => {
    if (!isFile(part)) return null;
    if (part.image) return `image${(images += 1)}.png`;
    if (suffix(part) === "npy") return `array${(arrays += 1)}.${part.modality}.npy`;
    return `sound${(sounds += 1)}.${suffix(part)}`;
  });
}

// The modality of an answer that is one of it, but for an image.
const drawnOf = (body) => (body.draws ? body.modalities?.find((name) => name !== "image") : undefined);

// WIDTHxHEIGHT, as the endpoints have it, with the height first.
const heightFirst = (size) => size.split("x").reverse().join("x");

// Settings that must be written out. fields: of the server's schema.
function settings(body, fields) {
  const found = { seed: body.seed };
  for (const [name, usual] of Object.entries(USUAL)) {
    const value = body[name] ?? fields[name]?.default ?? usual;
    const isUsed = !(body.draws && OF_ANSWERS.includes(name));
    if (isUsed && JSON.stringify(value) !== JSON.stringify(usual)) found[name] = value;
  }
  return found;
}

// sizes: of the model. The server draws an image of the first where none is named, and `edit` one like its image.
export function asCommand(body, { fields, sizes }) {
  const given = parts(body);
  const drawn = drawnOf(body);
  const isEdit = body.draws && !drawn && given.length === 2 && given[0].image && !isFile(given[1]);
  if (body.draws && !isEdit && given.some(isFile)) return "# The command line has no command for this. Copy it as Python.";
  const set = settings(body, fields);
  if (isEdit) set.size ??= sizes[0];
  const flags = Object.entries(set).map(([name, value]) => {
    if (name === "size") return `--size ${heightFirst(value)}`;
    if (name === "modalities") return value.map((each) => `--modality ${each}`).join(" ");
    if (name === "guidance_interval") return `--guidance-interval ${value.join(" ")}`;
    return `${FLAGS[name]} ${typeof value === "string" ? quote(value) : value}`;
  });
  if (isEdit) return ["transfusion edit MODEL", ...flags, "--", "image1.png", quote(given[1])].join(" ");
  if (body.draws) {
    const what = drawn ? `--modality ${drawn} --out ${drawn}` : "--out images";
    return [`transfusion sample MODEL ${what}`, ...flags, "--prompt", quote(given.join(""))].join(" ");
  }
  const files = names(given);
  const words = given.map((part, place) => (isFile(part) ? `@${files[place]}` : quote(escaped(part))));
  return ["transfusion generate MODEL", ...flags, "--", ...words].join(" ");
}

// A text that begins with @ would be read as the name of a file, and - alone as standard input.
const escaped = (text) => (text.startsWith("@") ? `@${text}` : text === "-" ? "- " : text);

export function asCurl(body, origin) {
  const { preview_every, ...sent } = body;
  const files = names(parts(body));
  const marks = [];
  const prompt = Array.isArray(body.prompt)
    ? body.prompt.map((part, place) => {
        if (!isFile(part)) return part;
        const type = part.image ? "image/png" : part.media.slice(5, part.media.indexOf(";"));
        marks.push(`data:${type};base64,$(base64 -w0 ${files[place]})`);
        const mark = `\u0000${marks.length - 1}\u0000`;
        return part.image ? { image: mark } : { ...part, media: mark };
      })
    : body.prompt;
  // In a here-document these three mean something to the shell.
  const text = JSON.stringify({ ...sent, prompt }, null, 1).replace(/[\\$`]/g, "\\$&");
  const filled = text.replace(/\\\\u0000(\d+)\\\\u0000/g, (_, place) => marks[place]);
  const token = sessionStorage.getItem("transfusion-token") ? ' -H "Authorization: Bearer $TOKEN"' : "";
  return `curl -N ${origin}/v1/generate -H 'Content-Type: application/json'${token} -d @- <<END\n${filled}\nEND`;
}

function literal(value) {
  if (Array.isArray(value)) return `(${value.map(literal).join(", ")})`;
  return JSON.stringify(value);
}

export function asPython(body, { fields }) {
  const files = names(parts(body));
  const drawn = drawnOf(body);
  const prompt = parts(body).map((part, place) => {
    if (!isFile(part)) return JSON.stringify(part);
    const file = JSON.stringify(files[place]);
    return part.image ? `Image.open(${file})` : `read_media(Path(${file}).read_bytes(), pipeline.config, ${file})`;
  });
  const given = prompt.length === 1 && !files[0] ? prompt[0] : `[${prompt.join(", ")}]`;
  const named = Object.entries(settings(body, fields)).map(([name, value]) => {
    if (name === "size") return `size=(${heightFirst(value).replace("x", ", ")})`;
    return `${name}=${name === "modalities" ? JSON.stringify(value) : literal(value)}`;
  });
  const used = [...(drawn ? ["as_file"] : []), ...(parts(body).some((part) => part.media) ? ["read_media"] : [])];
  const lines = [
    ...(used.length ? ["from pathlib import Path", ""] : []),
    ...(parts(body).some((part) => part.image) ? ["from PIL import Image", ""] : []),
    "from transfusion.generate import Pipeline",
    ...(used.length ? [`from transfusion.generate.media_files import ${used.join(", ")}`] : []),
    "",
    'pipeline = Pipeline.from_export("MODEL")',
  ];
  if (drawn) {
    lines.push(
      `(drawn,) = pipeline.sample_media("${drawn}", [${given}], ${named.join(", ")})`,
      "made = as_file(drawn, pipeline.config)",
      'Path(f"drawn.{made.suffix}").write_bytes(made.data)',
    );
  } else if (body.draws) {
    lines.push(`(drawn,) = pipeline.sample([${given}], ${named.join(", ")})`, 'drawn.image.save("drawn.png")');
  } else {
    lines.push(`for event in pipeline.stream(${given}, ${named.join(", ")}):`, "    print(event)");
  }
  return lines.join("\n");
}
