// The conversation: kept here and nowhere else.
import { byId, element, say } from "./dom.js";
import { Files } from "./files.js";
import { bytes, count, seconds } from "./format.js";
import { markdown } from "./markdown.js";
import { events, ServerError } from "./server.js";

const PAINT_MS = 80; // between two paintings of an answer that grows
const NUMBERS = { temperature: parseFloat, top_p: parseFloat, max_tokens: (t) => parseInt(t, 10), seed: (t) => parseInt(t, 10) };

export class Chat {
  #server; #files; #history = []; #running = null; #onKey; #frame = null;

  constructor(server, onKey) {
    this.#server = server;
    this.#onKey = onKey;
    this.#files = new Files((text) => say(byId("status"), text));
    byId("composer").addEventListener("submit", (event) => { event.preventDefault(); this.#send(); });
    byId("prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); this.#send(); }
    });
    byId("stop").addEventListener("click", () => this.#stop());
    document.addEventListener("keydown", (event) => { if (event.key === "Escape") this.#stop(); });
    byId("new").addEventListener("click", () => this.#clear());
  }

  #settings() {
    const found = {};
    for (const [name, read] of Object.entries(NUMBERS)) {
      const value = read(byId(name).value);
      if (!Number.isNaN(value)) found[name] = value;
    }
    return found;
  }

  async #send() {
    const typed = byId("prompt").value;
    if (this.#running || !(typed.trim() || this.#files.any)) return;
    const files = this.#files.take();
    byId("prompt").value = "";
    byId("empty")?.remove();
    const content = [...files.map((file) => file.text), typed.trim()].filter(Boolean).join("\n\n");
    this.#add("user", "You", [
      ...files.map((file) => element("p", {}, `File ${file.name}, ${bytes(file.size)}`)),
      ...(typed.trim() ? [element("p", { class: "plain" }, typed.trim())] : []),
    ]);
    const system = byId("system").value.trim();
    const turn = { role: "user", content };
    const history = this.#history; // another one once a new chat is begun
    const messages = [...(system ? [{ role: "system", content: system }] : []), ...history, turn];
    const answer = new Answer(this.#add("assistant", byId("model").textContent || "Answer", []));
    this.#running = answer;
    this.#busy(true);
    try {
      await this.#stream({ model: byId("models").value, messages, ...this.#settings() }, answer);
    } catch (err) {
      if (!answer.abort.signal.aborted) {
        answer.fail(err.message || "the connection was lost");
        if (err instanceof ServerError && err.status === 401) this.#onKey();
      }
    }
    answer.end();
    if (answer.text) history.push(turn, { role: "assistant", content: answer.text });
    else if (history === this.#history && !byId("prompt").value) {
      byId("prompt").value = typed;
      this.#files.restore(files);
    }
    this.#running = null;
    this.#busy(false);
    say(byId("status"), answer.summary());
  }

  async #stream(body, answer) {
    if (!body.model) delete body.model;
    const asked = { ...body, stream: true, stream_options: { include_usage: true } };
    const reply = await this.#server.post("/v1/chat/completions", asked, answer.abort.signal);
    for await (const data of events(reply)) {
      if (data === "[DONE]") return;
      answer.take(JSON.parse(data));
      if (answer.started) byId("progress").hidden = true;
      else this.#progress(); // its id is known now, and the newest frame may have it
    }
    if (!answer.reason) throw new ServerError("the answer was cut off", 0);
  }

  onFrame(frame) {
    this.#frame = frame;
    this.#progress();
  }

  // Shows how far the prompt of the running answer is, by the live picture.
  #progress() {
    const answer = this.#running, frame = this.#frame;
    if (!answer || answer.started || !answer.id || !frame?.picture) return;
    const request = frame.picture.requests.find((r) => r.id.startsWith(answer.id));
    if (!request) return;
    const bar = byId("bar");
    if (request.phase === "waiting") {
      bar.removeAttribute("value");
      const ahead = frame.picture.requests.filter((r) => r.phase === "waiting" && r.number < request.number).length;
      say(byId("progress-text"), `Waiting in the queue, ${ahead} ahead`);
    } else {
      const done = Math.min(1, request.computed / Math.max(1, request.to_compute));
      bar.value = done;
      say(byId("progress-text"), `Reading the prompt: ${count(request.computed)} of ${count(request.to_compute)} tokens`);
    }
  }

  #busy(on) {
    byId("send").disabled = on;
    byId("stop").hidden = !on;
    byId("progress").hidden = !on;
    byId("bar").removeAttribute("value");
    say(byId("progress-text"), "Waiting for the first token");
    byId("log").setAttribute("aria-busy", on);
    if (on) say(byId("status"), "Answering");
    else if (document.activeElement === document.body) byId("prompt").focus();
  }

  #stop() { this.#running?.stop(); }

  #clear() {
    this.#stop();
    this.#history = [];
    byId("log").replaceChildren(element("p", { id: "empty", class: "dim" }, "Ask something, or drop a text file here: it becomes the prompt."));
    say(byId("status"), "New conversation");
    byId("prompt").focus();
  }

  #add(role, name, content) {
    const node = element("article", { class: `message ${role}` }, element("h3", {}, name), ...content);
    byId("log").append(node);
    node.scrollIntoView({ block: "nearest" });
    return node;
  }
}

class Answer {
  abort = new AbortController();
  text = ""; id = ""; reason = ""; usage = null; error = ""; stopped = false;
  #thought = ""; #node; #body; #timer = 0; #asked = performance.now(); #first = null; #last = 0; #pieces = 0;

  constructor(node) {
    this.#node = node;
    this.#body = element("div", { class: "body" });
    node.append(this.#body);
  }

  get started() { return this.#first !== null; }

  stop() { this.stopped = true; this.abort.abort(); }

  take(chunk) {
    if (chunk.error) throw new ServerError(chunk.error.message, chunk.error.code);
    this.id = chunk.id || this.id;
    this.usage = chunk.usage || this.usage;
    const choice = (chunk.choices || [])[0];
    if (!choice) return;
    const { content, reasoning, reasoning_content: thought = reasoning } = choice.delta || {};
    if (content || thought) {
      this.#last = performance.now();
      this.#first ??= this.#last;
      this.#pieces += 1;
      this.text += content || "";
      this.#thought += thought || "";
      this.#timer ||= setTimeout(() => this.#paint(), PAINT_MS);
    }
    this.reason = choice.finish_reason || this.reason;
  }

  fail(message) {
    this.error = message;
    this.#node.append(element("p", { class: "error", role: "alert" }, message));
  }

  end() {
    clearTimeout(this.#timer);
    this.#paint();
    if (this.stopped) this.#node.append(element("p", { class: "dim" }, "Stopped."));
    else if (this.reason === "length") this.#node.append(element("p", { class: "dim" }, "The longest answer that was asked for."));
  }

  summary() {
    if (this.error) return "No answer: an error is shown in the conversation.";
    if (!this.started) return this.stopped ? "Stopped before the first token." : "The answer is empty.";
    const tokens = this.usage?.completion_tokens ?? this.#pieces;
    const each = tokens > 1 ? `, then ${seconds((this.#last - this.#first) / 1000 / (tokens - 1))} each` : "";
    const ended = this.stopped ? "Stopped" : "Done";
    return `${ended}: ${count(tokens)} tokens, the first after ${seconds((this.#first - this.#asked) / 1000)}${each}`;
  }

  #paint() {
    this.#timer = 0;
    const log = byId("log");
    const below = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
    const thought = this.#thought
      ? [element("details", {}, element("summary", {}, "Reasoning"), element("p", { class: "plain" }, this.#thought))]
      : [];
    if (thought.length && this.#body.querySelector("details")?.open) thought[0].open = true;
    this.#body.replaceChildren(...thought, ...markdown(this.text));
    if (below) log.scrollTop = log.scrollHeight;
  }
}
