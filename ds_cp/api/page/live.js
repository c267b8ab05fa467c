// The live picture: its feed, and everything of it but the map.
import { byId, element, say } from "./dom.js";
import { bytes, count, median, ranks, rate, seconds } from "./format.js";
import { KvMap, swatch, tagOf, travels } from "./kvmap.js";
import { events } from "./server.js";

const PAUSES_S = [1, 2, 5, 10];
const KINDS = [
  [-1, "free"],
  [-2, "cached: nobody's, kept for its prefix"],
  [-3, "shared by several requests"],
  [-4, "of requests that are not listed"],
];

// Reads /state for as long as the page is looked at; tells `onFrame` of each picture.
export class Feed {
  #server; #onFrame; #onState; #abort = null; #failures = 0; #timer = 0; #stopped = true;

  constructor(server, onFrame, onState) {
    this.#server = server;
    this.#onFrame = onFrame;
    this.#onState = onState;
    document.addEventListener("visibilitychange", () => this.#look());
  }

  start() { this.#stopped = false; this.#failures = 0; this.#look(); }

  #look() {
    if (this.#stopped) return;
    if (document.hidden) this.#close();
    else if (!this.#abort) this.#read();
  }

  #close() {
    clearTimeout(this.#timer);
    if (this.#abort) this.#abort.abort();
    this.#abort = null;
  }

  async #read() {
    clearTimeout(this.#timer);
    const abort = (this.#abort = new AbortController());
    try {
      const reply = await this.#server.ask("/state", { signal: abort.signal });
      this.#onState("connected");
      for await (const data of events(reply)) {
        if (data === "[DONE]") break;
        const frame = JSON.parse(data);
        if (!frame.state) continue; // the error with which the server ends a stream
        this.#failures = 0;
        this.#onFrame(frame);
      }
    } catch (err) {
      if (abort.signal.aborted) return;
      if (err.status === 401) {
        this.#abort = null;
        this.#stopped = true;
        this.#onState("key");
        return;
      }
    }
    if (this.#abort !== abort) return;
    this.#abort = null;
    const pause = PAUSES_S[Math.min(this.#failures, PAUSES_S.length - 1)];
    this.#failures += 1;
    this.#onState("lost");
    this.#timer = setTimeout(() => this.#look(), pause * 1000);
  }
}

export class Live {
  #map = new KvMap(byId("map"));
  #frame = null;
  #queued = false;

  constructor() {
    new ResizeObserver(() => this.#queue()).observe(byId("map"));
    const headings = (names) => element("thead", {}, element("tr", {}, ...names.map((name) => element("th", { scope: "col" }, name))));
    byId("requests").replaceChildren(headings(["Request", "Phase", "Mode", "Ranks", "Prompt", "Tokens", "TTFT", "TPOT", "Why"]), element("tbody"));
    byId("ranks").replaceChildren(headings(["Rank", "Host", "State", "Used", "Cached", "Free", "Host memory", "Requests"]), element("tbody"));
    byId("wire").replaceChildren(headings(["Scheme", "Sent", "Exchanges", "Now"]), element("tbody"));
    byId("recent").replaceChildren(headings(["Answer", "Ended by", "Modes", "Prompt", "Tokens", "TTFT", "TPOT", "Whole"]), element("tbody"));
  }

  show(frame) {
    this.#frame = frame;
    this.#queue();
  }

  #queue() {
    if (this.#queued) return;
    this.#queued = true;
    requestAnimationFrame(() => {
      this.#queued = false;
      if (this.#frame?.picture) this.#draw(this.#frame);
    });
  }

  #draw({ picture, rates }) {
    this.#figures(picture, rates);
    this.#map.show(picture);
    this.#legend(picture);
    rows(byId("requests"), picture.requests.map((request, i) => requestRow(request, i, picture.requests)), "No request runs or waits.");
    const left = picture.num_running + picture.num_waiting - picture.requests.length;
    say(byId("more"), left > 0 ? `and ${count(left)} more` : "");
    rows(byId("ranks"), picture.ranks.map((rank) => rankRow(rank, picture)), "");
    rows(byId("wire"), wireRows(picture.counters, rates), "Nothing yet.");
    rows(byId("recent"), picture.recent.toReversed().map(recentRow), "None yet.");
  }

  #figures(picture, rates) {
    const used = picture.ranks.reduce((sum, rank) => sum + rank.used, 0);
    const total = picture.ranks.reduce((sum, rank) => sum + rank.total, 0);
    const known = [...picture.recent, ...picture.requests];
    const middle = (name) => seconds(median(known.map((r) => r[name]).filter((v) => v !== null)));
    const wire = Object.values(rates?.comm_bytes_per_s || {}).reduce((sum, n) => sum + n, 0);
    const all = Object.values(picture.counters.comm_bytes).reduce((sum, n) => sum + n, 0);
    const figures = [
      ["Running", count(picture.num_running)],
      ["Queue", count(picture.num_waiting)],
      ["New tokens/s", rates ? rate(rates.generation_tokens_per_s) : "–"],
      ["Prompt tokens/s", rates ? rate(rates.prefill_tokens_per_s) : "–"],
      ["KV in use", total ? `${((100 * used) / total).toFixed(0)} %` : "–"],
      ["TTFT, median", middle("ttft_s")],
      ["TPOT, median", middle("tpot_s")],
      ["Sent by rank 0", bytes(all)],
      ["Sent now", `${bytes(wire)}/s`],
      ["Preemptions", count(picture.counters.num_preemptions)],
    ];
    const root = byId("figures");
    if (root.children.length !== figures.length) {
      root.replaceChildren(...figures.map(([name]) => element("div", {}, element("dt", {}, name), element("dd"))));
    }
    figures.forEach(([, value], i) => say(root.children[i].lastChild, value));
  }

  #legend(picture) {
    const big = Math.max(1, ...picture.ranks.map((rank) => rank.blocks_per_cell));
    const size = `a cell is ${big === 1 ? "one block" : `about ${count(Math.round(big))} blocks`} of ${picture.block_size} tokens`;
    const running = picture.requests.map((r, i) => [i, tagOf(r.number), r]).filter(([, , r]) => r.phase !== "waiting").slice(0, 12);
    const there = new Set(picture.ranks.flatMap((rank) => rank.cells.map(([what]) => what)));
    const kinds = KINDS.filter(([what]) => what > -3 || there.has(what));
    const shown = JSON.stringify([size, running.map(([i, tag]) => [i, tag]), kinds]);
    const root = byId("legend");
    if (root.dataset.shown === shown) return;
    root.dataset.shown = shown;
    const items = [
      ...running.map(([i, tag]) => [swatch(i, picture.requests), `request ${tag}`]),
      ...kinds.map(([what, text]) => [swatch(what, []), text]),
    ];
    root.replaceChildren(...items.map(([sample, text]) => element("li", {}, sample, text)), element("li", {}, size));
  }
}

const cell = (content, name = null) => element("td", { class: name }, content);

// Rows are replaced only where they differ, so that a selection or a screen reader's place stays.
function rows(table, wanted, none) {
  const body = table.tBodies[0];
  const width = table.tHead.rows[0].cells.length;
  const all = wanted.length || !none ? wanted : [element("tr", {}, element("td", { colspan: width }, none))];
  all.forEach((row, i) => {
    const old = body.rows[i];
    if (!old) body.append(row);
    else if (!old.isEqualNode(row)) old.replaceWith(row);
  });
  while (body.rows.length > all.length) body.deleteRow(-1);
}

function requestRow(request, place, requests) {
  const waits = request.phase === "waiting";
  const name = element("th", { scope: "row" }, ...(waits ? [] : [swatch(place, requests)]), tagOf(request.number));
  if (request.index) name.append(` (answer ${request.index + 1})`);
  const done = request.to_compute ? Math.min(1, request.computed / request.to_compute) : 0;
  const prompt = element("td", {});
  if (request.phase === "prefill") {
    prompt.append(element("progress", { max: 1, value: done.toFixed(3), "aria-label": `prompt of request ${tagOf(request.number)}` }), " ");
  }
  prompt.append(`${count(request.phase === "prefill" ? request.computed : request.prompt_tokens)}`);
  if (request.phase === "prefill") prompt.append(` of ${count(request.to_compute)}`);
  if (request.cached_tokens) prompt.append(`, ${count(request.cached_tokens)} cached`);
  return element("tr", { "data-request": request.id },
    name, cell(request.phase), cell(request.mode ? travels(request) : "–"), cell(ranks(request.ranks)), prompt,
    cell(`${count(request.new_tokens)} of ${count(request.max_tokens)}`),
    cell(seconds(request.ttft_s)), cell(seconds(request.tpot_s)),
    cell(request.why || (waits ? `waits for ${seconds(Math.round(request.age_s))}` : "–"), "why"));
}

function rankRow(rank, picture) {
  const here = picture.requests.filter((r) => r.ranks.includes(rank.rank)).map((r) => tagOf(r.number));
  return element("tr", {}, element("th", { scope: "row" }, `${rank.rank}`), cell(rank.host), cell(rank.state),
    cell(count(rank.used)), cell(count(rank.cached)), cell(count(rank.total - rank.used - rank.cached)),
    cell(rank.host_total ? `${count(rank.host_used)} of ${count(rank.host_total)}` : "–"),
    cell(here.join(", ") || "–"));
}

function wireRows(counters, rates) {
  return Object.entries(counters.comm_bytes).filter(([, sent]) => sent > 0).sort().map(([scheme, sent]) =>
    element("tr", {}, element("th", { scope: "row" }, scheme), cell(bytes(sent)),
      cell(count(counters.comm_exchanges[scheme] || 0)),
      cell(rates ? `${bytes(rates.comm_bytes_per_s[scheme] || 0)}/s` : "–")));
}

function recentRow(ended) {
  return element("tr", {}, element("th", { scope: "row" }, ended.id.slice(0, 20)), cell(ended.finish_reason),
    cell(ended.modes.join(", ") || "–"), cell(count(ended.prompt_tokens)), cell(count(ended.new_tokens)),
    cell(seconds(ended.ttft_s)), cell(seconds(ended.tpot_s)), cell(seconds(ended.e2e_s)));
}
