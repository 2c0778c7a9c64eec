// The server as the page uses it. A token, where one is needed, stays in this tab.

const KEY = "transfusion-token";

export class ServerError extends Error {}

function headers() {
  const token = sessionStorage.getItem(KEY);
  const kinds = { "Content-Type": "application/json" };
  return token ? { ...kinds, Authorization: `Bearer ${token}` } : kinds;
}

async function askForToken(wasWrong) {
  const dialog = document.getElementById("token-dialog");
  const input = document.getElementById("token");
  input.value = "";
  input.setCustomValidity(wasWrong ? "That was not the token." : "");
  dialog.showModal();
  if (wasWrong) input.reportValidity();
  input.oninput = () => input.setCustomValidity("");
  await new Promise((done) => dialog.addEventListener("close", done, { once: true }));
  sessionStorage.setItem(KEY, input.value.trim());
}

// A response that is fine. Asks for the token until it is right.
async function call(path, options = {}) {
  for (;;) {
    let response;
    try {
      response = await fetch(path, { ...options, headers: headers() });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServerError("The server cannot be reached. Is it still running?");
    }
    if (response.ok) return response;
    if (response.status === 401) {
      await askForToken(sessionStorage.getItem(KEY) !== null);
      continue;
    }
    const said = await response.json().catch(() => null);
    throw new ServerError(said?.error?.message ?? `The server answered ${response.status}.`);
  }
}

export async function getSchema() {
  return (await call("/v1/schema")).json();
}

export async function inspect(document) {
  const response = await call("/v1/inspect", { method: "POST", body: JSON.stringify({ document }) });
  return response.json();
}

// Calls onEvent(name, data) with each event of an answer. Ends with it, or when the signal is aborted.
export async function generate(body, signal, onEvent) {
  const response = await call("/v1/generate", { method: "POST", body: JSON.stringify(body), signal });
  let ended = false;
  for await (const [name, data] of events(response.body)) {
    if (name === "error") throw new ServerError(data.error.message);
    onEvent(name, data);
    ended ||= name === "done";
  }
  if (!ended) throw new ServerError("The connection was closed before the answer was complete.");
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const blocks = held.split("\n\n");
    held = blocks.pop();
    for (const block of blocks) {
      const event = parse(block);
      if (event) yield event;
    }
  }
}

function parse(block) {
  let name = "";
  let data = "";
  for (const line of block.split("\n")) {
    if (line.startsWith("event: ")) name = line.slice(7);
    if (line.startsWith("data: ")) data += line.slice(6);
  }
  return data ? [name, JSON.parse(data)] : null;
}
