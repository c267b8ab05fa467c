// The ranks by host, each with its KV pool as cells, and what travels between them.
import { drawn } from "./dom.js";
import { count } from "./format.js";

export const SLOTS = 8;
const FREE = -1, CACHED = -2, SHARED = -3, RESERVED = 1000;
const LIGHT = new Set([4, 7]); // slots whose labels are light
// Fill and ink of each slot, and the lines that tell it from the others without colour.
const COLOURS = [
  ["#e69f00", "#7a4d00", ""],
  ["#56b4e9", "#0b5180", "M0 8 8 0"],
  ["#009e73", "#003d2c", "M0 0 8 8"],
  ["#f0e442", "#6d6600", "M0 4H8"],
  ["#0072b2", "#9fd4f5", "M4 0V8"],
  ["#d55e00", "#4d2000", "M0 4H8M4 0V8"],
  ["#cc79a7", "#5c1f40", "M0 8 8 0M0 0 8 8"],
  ["#882255", "#f0a8c8", "M2 2h2v2h-2z"],
];
const BOX = 142, GAP = 8, EDGE = 9, TOP = 36, BOTTOM = 20, WIDE = 128;

export const slotOf = (number) => number % SLOTS;

// A, B, ... Z, AA ...: the same request has the same letters as long as it lives.
export function tagOf(number) {
  let at = (number - 1) % 702, tag = "";
  for (at += 1; at > 0; at = Math.floor((at - 1) / 26)) {
    tag = String.fromCharCode(65 + ((at - 1) % 26)) + tag;
  }
  return tag;
}

function patterns() {
  const hatch = ([fill, ink, path], i) =>
    drawn("pattern", { id: `slot${i}`, width: 8, height: 8, patternUnits: "userSpaceOnUse" },
      drawn("rect", { width: 8, height: 8, fill }),
      drawn("path", { d: path, stroke: ink, "stroke-width": 1.4, fill: "none" }));
  const dots = drawn("pattern", { id: "shared", width: 4, height: 4, patternUnits: "userSpaceOnUse" },
    drawn("rect", { width: 4, height: 4, class: "cached" }),
    drawn("circle", { cx: 2, cy: 2, r: 1.1, fill: "currentColor" }));
  return drawn("defs", {},
    ...COLOURS.map(hatch), dots,
    drawn("marker", { id: "tip", viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 6, markerHeight: 6, orient: "auto" },
      drawn("path", { d: "M0 0 8 4 0 8z", class: "tip" })));
}

// How a cell looks: its class, its fill, and the request it belongs to.
function look(what, requests) {
  if (what === FREE) return { class: "cell free" };
  if (what === CACHED) return { class: "cell cached" };
  if (what === SHARED) return { class: "cell", fill: "url(#shared)" };
  const reserved = what >= RESERVED;
  const request = requests[reserved ? what - RESERVED : what];
  if (!request) return { class: "cell other" };
  const slot = slotOf(request.number);
  return { class: reserved ? "cell reserved" : "cell", fill: `url(#slot${slot})`, request, reserved, slot };
}

// A sample of a slot for legends and tables; the patterns are those of the map.
export const swatch = (what, requests) => {
  const { class: name, fill } = look(what, requests);
  return drawn("svg", { width: 14, height: 14, "aria-hidden": "true", focusable: "false" },
    drawn("rect", { width: 13, height: 13, x: 0.5, y: 0.5, class: name, fill }));
};

export class KvMap {
  #root; #svg; #text; #shape = ""; #boxes = new Map(); #links; #width = 0;

  constructor(root) {
    this.#root = root;
    this.#text = drawn("title", { id: "map-text" });
    this.#svg = drawn("svg", { role: "img", "aria-labelledby": "map-text" });
    root.append(this.#svg);
  }

  show(picture) {
    const width = Math.max(BOX + 2 * EDGE, Math.floor(this.#root.clientWidth));
    const sizes = picture.ranks.map((rank) => [rank.host, rank.rank, cellsOf(rank)]);
    const shape = JSON.stringify([width, sizes]);
    if (shape !== this.#shape) this.#lay(picture, width);
    this.#shape = shape;
    const working = new Set(picture.requests.filter((r) => r.working).flatMap((r) => r.ranks));
    for (const rank of picture.ranks) this.#fill(rank, picture.requests, working.has(rank.rank));
    this.#link(picture);
    const said = describe(picture);
    if (this.#text.textContent !== said) this.#text.textContent = said;
  }

  #lay(picture, width) {
    const columns = Math.max(1, Math.floor((width - 2 * EDGE + GAP) / (BOX + GAP)));
    const hosts = Map.groupBy ? Map.groupBy(picture.ranks, (r) => r.host) : grouped(picture.ranks);
    this.#boxes.clear();
    this.#svg.replaceChildren(this.#text, patterns());
    let y = 0;
    for (const [host, ranks] of hosts) {
      const top = y;
      y += 20;
      for (let i = 0; i < ranks.length; i += columns) {
        const row = ranks.slice(i, i + columns);
        const height = Math.max(...row.map((rank) => TOP + BOTTOM + grid(cellsOf(rank)).height));
        row.forEach((rank, j) => this.#box(rank, EDGE + j * (BOX + GAP), y, height));
        y += height + GAP;
      }
      const wide = Math.min(columns, ranks.length) * (BOX + GAP) - GAP + 2 * EDGE - 2;
      this.#svg.append(
        drawn("rect", { class: "host", x: 1, y: top + 1, width: wide, height: y - top - 2, rx: 6 }),
        label(EDGE, top + 14, `host ${host}`.slice(0, Math.max(12, Math.floor(wide / 7))), "small"));
      y += GAP;
    }
    this.#links = drawn("g");
    this.#svg.append(this.#links);
    this.#svg.setAttribute("viewBox", `0 0 ${width} ${Math.max(y, 1)}`);
    this.#svg.setAttribute("height", Math.max(y, 1));
  }

  #box(rank, x, y, height) {
    const frame = drawn("rect", { class: "rank", x, y, width: BOX, height, rx: 5 });
    const name = label(x + 8, y + 14, "", "");
    const used = label(x + 8, y + 28, "", "small");
    const { across, size } = grid(cellsOf(rank));
    const cells = Array.from({ length: cellsOf(rank) }, (_, i) =>
      drawn("rect", { x: x + 7 + (i % across) * size, y: y + TOP + Math.floor(i / across) * size, width: size, height: size }));
    const tags = drawn("g");
    this.#svg.append(frame, name, used, ...cells, tags);
    this.#boxes.set(rank.rank, { frame, name, used, cells, tags, size, shown: "", x: x + BOX - 14, y: y + 14, left: x + 8, foot: y + height - 6 });
  }

  #fill(rank, requests, working) {
    const box = this.#boxes.get(rank.rank);
    box.frame.setAttribute("class", working ? "rank working" : "rank");
    box.name.textContent = `rank ${rank.rank}${rank.state === "open" ? "" : `, ${rank.state}`}`;
    box.used.textContent = `${count(rank.used)} of ${count(rank.total)} blocks`;
    const shown = JSON.stringify([rank.cells, requests.map((r) => r.number)]);
    if (shown === box.shown) return;
    box.shown = shown;
    const labels = [];
    let at = 0;
    for (const [what, length] of rank.cells) {
      const { class: name, fill, request, reserved, slot } = look(what, requests);
      for (let i = 0; i < length; i += 1, at += 1) {
        const cell = box.cells[at];
        cell.setAttribute("class", name);
        if (fill) cell.setAttribute("fill", fill);
        else cell.removeAttribute("fill");
        if (request && !reserved && box.size >= 16) {
          labels.push(drawn("text", {
            class: `tag ${LIGHT.has(slot) ? "light" : "dark"}`,
            x: Number(cell.getAttribute("x")) + box.size / 2,
            y: Number(cell.getAttribute("y")) + box.size / 2 + 3,
          }, tagOf(request.number)));
        }
      }
    }
    box.tags.replaceChildren(...labels);
  }

  #link(picture) {
    const shown = [];
    for (const request of picture.requests) {
      if (!request.working || request.mode === "local" || shown.length >= 4) continue;
      const places = this.#along(picture, request);
      if (places.length < 2) continue;
      const at = places[shown.length % places.length]; // so that labels are not all in one place
      const paths = request.mode === "ring" ? ring(places) : tree(places, request.owner);
      shown.push(drawn("g", { class: request.mode, "data-request": request.id },
        ...paths.map((d) => drawn("path", { class: "link", d, "marker-end": "url(#tip)" })),
        label(at.left, at.foot, `${tagOf(request.number)} ${travels(request)}`, "said")));
    }
    this.#links.replaceChildren(...shown);
  }

  #along(picture, request) {
    const mine = new Set(request.ranks);
    const order = picture.ring_order.filter((rank) => mine.has(rank) && this.#boxes.has(rank));
    const hostOf = new Map(picture.ranks.map((rank) => [rank.rank, rank.host]));
    return order.map((rank) => ({ ...this.#boxes.get(rank), rank, host: hostOf.get(rank) }));
  }
}

const cellsOf = (rank) => rank.cells.reduce((sum, [, length]) => sum + length, 0);

function grid(cells) {
  const across = cells <= 64 ? 8 : 16;
  const size = WIDE / across;
  return { across, size, height: Math.ceil(cells / across) * size };
}

function grouped(ranks) {
  const hosts = new Map();
  for (const rank of ranks) hosts.set(rank.host, [...(hosts.get(rank.host) || []), rank]);
  return hosts;
}

const label = (x, y, text, name) => drawn("text", { x, y, class: name }, text);

export const travels = (request) =>
  request.mode === "ring" ? `ring, ${request.ring_pass === "q" ? "queries" : "KV"}` : request.mode;

function ring(places) {
  return places.map((from, i) => line(from, places[(i + 1) % places.length], i));
}

// Partials go to one rank of each host, then to the rank that computes the token.
function tree(places, owner) {
  const root = places.find((place) => place.rank === owner) || places[0];
  const heads = new Map([[root.host, root]]);
  for (const place of places) if (!heads.has(place.host)) heads.set(place.host, place);
  return places.filter((place) => place !== root).map((place) => {
    const head = heads.get(place.host);
    return line(place, head === place ? root : head, 0);
  });
}

function line(from, to, bend) {
  const dx = to.x - from.x, dy = to.y - from.y;
  const far = Math.hypot(dx, dy) || 1;
  const lift = 14 + (bend % 2) * 10;
  const mx = (from.x + to.x) / 2 - (dy / far) * lift, my = (from.y + to.y) / 2 + (dx / far) * lift;
  return `M${from.x} ${from.y}Q${mx.toFixed(1)} ${my.toFixed(1)} ${to.x} ${to.y}`;
}

function describe(picture) {
  const used = picture.ranks.reduce((sum, rank) => sum + rank.used, 0);
  const total = picture.ranks.reduce((sum, rank) => sum + rank.total, 0);
  const hosts = new Set(picture.ranks.map((rank) => rank.host)).size;
  const room = picture.ranks.reduce((sum, rank) => sum + rank.host_total, 0);
  const more = picture.ranks.reduce((sum, rank) => sum + rank.host_used, 0);
  const kept = room ? `Host memory keeps ${count(more)} blocks more, of ${count(room)}. ` : "";
  return `KV blocks of ${picture.ranks.length} ranks on ${hosts} ${hosts === 1 ? "host" : "hosts"}: ` +
    `${count(used)} of ${count(total)} are used by ${picture.num_running} running requests. ` +
    `${kept}The table of ranks has the numbers.`;
}
