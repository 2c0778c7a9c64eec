// One request as others send it: on the command line, by curl, from Python. Only what is not usual is written out.

const FLAGS = {
  steps: "--steps", guidance: "--cfg", sampler: "--sampler", guidance_rescale: "--guidance-rescale",
  negative_prompt: "--negative-prompt", seed: "--seed", max_tokens: "--max-tokens", max_images: "--max-images",
  temperature: "--temperature", top_p: "--top-p",
};
const OF_ANSWERS = ["max_tokens", "max_images", "temperature", "top_p"];

const quote = (text) => `'${`${text}`.replaceAll("'", `'\\''`)}'`;
const parts = (body) => (Array.isArray(body.prompt) ? body.prompt : [body.prompt]);
const isImage = (part) => typeof part !== "string";

// WIDTHxHEIGHT, as the endpoints have it, with the height first.
const heightFirst = (size) => size.split("x").reverse().join("x");

function settings(body) {
  const { prompt, draws, preview_every, ...left } = body;
  if (left.size === "auto") delete left.size;
  if (draws) OF_ANSWERS.forEach((name) => delete left[name]);
  return left;
}

export function asCommand(body) {
  const flags = Object.entries(settings(body)).map(([name, value]) => {
    if (name === "size") return `--size ${heightFirst(value)}`;
    if (name === "guidance_interval") return `--guidance-interval ${value.join(" ")}`;
    return `${FLAGS[name]} ${typeof value === "string" ? quote(value) : value}`;
  });
  let image = 0;
  const words = parts(body).map((part) => (isImage(part) ? `image${(image += 1)}.png` : part));
  const texts = parts(body).filter((part) => !isImage(part));
  const start = { 0: ["sample", "MODEL", "--prompt", quote(texts.join("")), "--out", "images"] };
  const edits = ["edit", "MODEL", words.find((_, place) => isImage(parts(body)[place])), quote(texts.join(""))];
  const goesOn = ["generate", "MODEL", ...parts(body).map((part, place) => (isImage(part) ? `@${words[place]}` : quote(escaped(part))))];
  const command = body.draws ? (image ? edits : start[0]) : goesOn;
  return ["transfusion", ...command, ...flags].join(" ");
}

// A text that begins with @ would be read as the name of an image.
const escaped = (text) => (text.startsWith("@") ? `@${text}` : text === "-" ? " -" : text);

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

export function asPython(body) {
  let image = 0;
  const prompt = parts(body).map((part) => (isImage(part) ? `Image.open("image${(image += 1)}.png")` : JSON.stringify(part)));
  const given = prompt.length === 1 && !image ? prompt[0] : `[${prompt.join(", ")}]`;
  const named = Object.entries(settings(body)).map(([name, value]) =>
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
