// Text files that become part of the next message.
import { byId, element } from "./dom.js";
import { bytes } from "./format.js";

const MAX_BYTES = 64 * 1024 * 1024; // more would only be refused by the server

export class Files {
  #list = []; #say;

  // `say` is told in one line what was taken or why not.
  constructor(say) {
    this.#say = say;
    const input = byId("file"), area = byId("chat");
    input.addEventListener("change", async () => {
      await this.add([...input.files]);
      input.value = "";
    });
    area.addEventListener("dragover", (event) => {
      if (!event.dataTransfer.types.includes("Files")) return;
      event.preventDefault();
      area.classList.add("dropping");
    });
    area.addEventListener("dragleave", (event) => {
      if (!area.contains(event.relatedTarget)) area.classList.remove("dropping");
    });
    area.addEventListener("drop", (event) => {
      if (!event.dataTransfer.files.length) return;
      event.preventDefault();
      area.classList.remove("dropping");
      this.add([...event.dataTransfer.files]);
    });
  }

  async add(files) {
    for (const file of files) {
      const problem = await this.#take(file);
      this.#say(problem || `${file.name} (${bytes(file.size)}) is part of the next message`);
    }
    this.#show();
  }

  async #take(file) {
    const held = this.#list.reduce((sum, one) => sum + one.size, 0);
    if (held + file.size > MAX_BYTES) return `${file.name} has ${bytes(file.size)}; at most ${bytes(MAX_BYTES)} are taken`;
    let text;
    try {
      text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
    } catch {
      return `${file.name} is not text in UTF-8`;
    }
    if (text.includes("\0")) return `${file.name} is not a text file`;
    if (!text.trim()) return `${file.name} is empty`;
    this.#list.push({ name: file.name, size: file.size, text });
    return "";
  }

  // What was collected; the list is empty then.
  take() {
    const taken = this.#list;
    this.#list = [];
    this.#show();
    return taken;
  }

  restore(files) { this.#list = files; this.#show(); }

  get any() { return this.#list.length > 0; }

  #show() {
    byId("files").replaceChildren(...this.#list.map((file, i) => {
      const away = element("button", { type: "button", "aria-label": `Remove ${file.name}` }, "×");
      away.addEventListener("click", () => {
        this.#list.splice(i, 1);
        this.#show();
        byId("prompt").focus();
      });
      return element("li", {}, `${file.name}, ${bytes(file.size)}`, away);
    }));
  }
}
