// The server's routes: the key, its errors as one line, its events.
const MAX_EVENT = 32 * 1024 * 1024; // characters of one event

export class ServerError extends Error {
  constructor(message, status) { super(message); this.status = status; }
}

export class Server {
  #key = "";

  useKey(key) { this.#key = key; }

  get hasKey() { return this.#key !== ""; }

  async ask(path, options = {}) {
    const headers = { ...(options.headers || {}) };
    if (this.#key) headers.Authorization = `Bearer ${this.#key}`;
    const reply = await fetch(path, { ...options, headers, credentials: "omit", cache: "no-store" });
    if (!reply.ok) throw new ServerError(await reason(reply), reply.status);
    return reply;
  }

  async json(path) { return (await this.ask(path)).json(); }

  async post(path, body, signal) {
    return this.ask(path, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
      signal,
    });
  }
}

async function reason(reply) {
  const text = await reply.text().catch(() => "");
  try {
    return JSON.parse(text).error.message;
  } catch {
    return `the server answered ${reply.status}`;
  }
}

// The data of each event of a stream, as text.
export async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      text = (text + value).replaceAll("\r\n", "\n");
      if (text.length > MAX_EVENT) throw new ServerError("an event of the server has no end", 0);
      let end;
      while ((end = text.indexOf("\n\n")) >= 0) {
        const lines = text.slice(0, end).split("\n").filter((line) => line.startsWith("data:"));
        text = text.slice(end + 2);
        if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
