// Puts the page together: the key, the models, the chat, the live picture.
import { Chat } from "./chat.js";
import { byId, element, say } from "./dom.js";
import { Feed, Live } from "./live.js";
import { Server } from "./server.js";

const RETRY_MS = 2000;
const FEED = { connected: "", lost: "The connection was lost; trying again.", key: "The key is missing." };

const server = new Server();
const live = new Live();
const chat = new Chat(server, askKey);
const feed = new Feed(server, onFrame, (state) => {
  say(byId("feed"), FEED[state]);
  byId("links").hidden = server.hasKey; // a link cannot bring the key
  if (state === "connected") models = []; // it may be another server by now
  if (state === "lost") badge("unreachable");
  if (state === "key") askKey();
});
let models = [];
let loading = false;

function badge(state) {
  say(byId("state"), state);
  byId("state").dataset.state = state;
}

function onFrame(frame) {
  badge(frame.state);
  if (frame.state === "ready" && !models.length && !loading) loadModels();
  live.show(frame);
  chat.onFrame(frame);
}

function askKey() {
  const form = byId("key-form");
  if (!form.hidden) return;
  if (server.hasKey) say(byId("key-text"), "The server refused this API key. It is kept in this page's memory only.");
  form.hidden = false;
  byId("key").focus();
}

async function loadModels() {
  loading = true;
  try {
    models = (await server.json("/v1/models")).data;
  } catch (err) {
    if (err.status === 401) askKey();
    setTimeout(() => { loading = false; }, RETRY_MS); // the next frame tries again
    return;
  }
  loading = false;
  byId("models").replaceChildren(...models.map((model) => element("option", { value: model.id }, model.id)));
  byId("models-row").hidden = models.length < 2;
  const length = models[0].max_model_len;
  say(byId("model"), models[0].id);
  if (length) byId("max_tokens").max = length;
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  server.useKey(byId("key").value.trim());
  byId("key").value = "";
  byId("key-form").hidden = true;
  byId("prompt").focus();
  feed.start();
});
feed.start();
