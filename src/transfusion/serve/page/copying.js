// One request as others send it: on the command line, by curl, from Python. Only what is not usual there is written.

const FLAGS = {
  steps: "--steps", guidance: "--cfg", sampler: "--sampler", guidance_rescale: "--guidance-rescale",
  negative_prompt: "--negative-prompt", seed: "--seed", max_tokens: "--max-tokens", max_images: "--max-images",
  temperature: "--temperature", top_p: "--top-p",
};
// What the command line and `Pipeline` take unless told. A server may take another, where its model or its limits do.
const USUAL = {
  steps: 25, guidance: 3, sampler: "auto", guidance_rescale: 0, guidance_interval: [0, 1], negative_prompt: "", size: "auto",
  max_tokens: 256, max_images: 4, temperature: 0, top_p: 1,
};
const OF_ANSWERS = ["max_tokens", "max_images", "temperature", "top_p"];

const quote = (text) => `'${`${text}`.replaceAll("'", `'\\''`)}'`;
const parts = (body) => (Array.isArray(body.prompt) ? body.prompt : [body.prompt]);
const isImage = (part) => typeof part !== "string";

// WIDTHxHEIGHT, as the endpoints have it, with the height first.
const heightFirst = (size) => size.split("x").reverse().join("x");

// Settings that must be written out. fields: of the server's schema.
function settings(body, fields) {
  const found = { seed: body.seed };
  for (const [name, usual] of Object.entries(USUAL)) {
    const value = body[name] ?? fields[name].default;
    const isUsed = !(body.draws && OF_ANSWERS.includes(name));
    if (isUsed && JSON.stringify(value) !== JSON.stringify(usual)) found[name] = value;
  }
  return found;
}

// sizes: of the model. The server draws an image of the first where none is named, and `edit` one like its image.
export function asCommand(body, { fields, sizes }) {
  const given = parts(body);
  const isEdit = body.draws && given.length === 2 && isImage(given[0]) && !isImage(given[1]);
  if (body.draws && !isEdit && given.some(isImage)) return "# The command line has no command for this. Copy it as Python.";
  const set = settings(body, fields);
  if (isEdit) set.size ??= sizes[0];
  const flags = Object.entries(set).map(([name, value]) => {
    if (name === "size") return `--size ${heightFirst(value)}`;
    if (name === "guidance_interval") return `--guidance-interval ${value.join(" ")}`;
    return `${FLAGS[name]} ${typeof value === "string" ? quote(value) : value}`;
  });
  if (isEdit) return ["transfusion edit MODEL", ...flags, "--", "image1.png", quote(given[1])].join(" ");
  if (body.draws) return ["transfusion sample MODEL --out images", ...flags, "--prompt", quote(given.join(""))].join(" ");
  let image = 0;
  const words = given.map((part) => (isImage(part) ? `@image${(image += 1)}.png` : quote(escaped(part))));
  return ["transfusion generate MODEL", ...flags, "--", ...words].join(" ");
}

// A text that begins with @ would be read as the name of an image, and - alone as standard input.
const escaped = (text) => (text.startsWith("@") ? `@${text}` : text === "-" ? "- " : text);

export function asCurl(body, origin) {
  const { preview_every, ...sent } = body;
  let image = 0;
  const marks = [];
  const prompt = Array.isArray(body.prompt)
    ? body.prompt.map((part) => {
        if (!isImage(part)) return part;
        marks.push(`data:image/png;base64,$(base64 -w0 image${(image += 1)}.png)`);
        return { image: `\u0000${marks.length - 1}\u0000` };
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
  let image = 0;
  const prompt = parts(body).map((part) => (isImage(part) ? `Image.open("image${(image += 1)}.png")` : JSON.stringify(part)));
  const given = prompt.length === 1 && !image ? prompt[0] : `[${prompt.join(", ")}]`;
  const named = Object.entries(settings(body, fields)).map(([name, value]) =>
    name === "size" ? `size=(${heightFirst(value).replace("x", ", ")})` : `${name}=${literal(value)}`,
  );
  const lines = [
    ...(image ? ["from PIL import Image", ""] : []),
    "from transfusion.generate import Pipeline",
    "",
    'pipeline = Pipeline.from_export("MODEL")',
  ];
  if (body.draws) {
    lines.push(`(drawn,) = pipeline.sample([${given}], ${named.join(", ")})`, 'drawn.image.save("drawn.png")');
  } else {
    lines.push(`for event in pipeline.stream(${given}, ${named.join(", ")}):`, "    print(event)");
  }
  return lines.join("\n");
}
