// A little Markdown as elements. Text never becomes markup; links stay text.
import { element } from "./dom.js";

const INLINE = /(`[^`\n]+`|\*\*[^*\n]+\*\*|\*[^*\s][^*\n]*\*)/;
const ITEM = /^\s{0,6}([-*+]|\d{1,9}[.)])\s+(.*)$/;
const HEADING = /^#{1,6}\s+(.*)$/;
const FENCE = /^\s{0,3}```/;

function inline(text) {
  return text.split(INLINE).filter(Boolean).map((part, i) => {
    if (part.length > 2 && part.startsWith("`") && part.endsWith("`")) {
      return element("code", {}, part.slice(1, -1));
    }
    if (part.length > 4 && part.startsWith("**") && part.endsWith("**")) {
      return element("strong", {}, part.slice(2, -2));
    }
    if (part.length > 2 && part.startsWith("*") && part.endsWith("*") && INLINE.test(part)) {
      return element("em", {}, part.slice(1, -1));
    }
    return document.createTextNode(part);
  });
}

function paragraph(lines) {
  const node = element("p");
  lines.forEach((line, i) => node.append(...(i ? [element("br")] : []), ...inline(line)));
  return node;
}

export function markdown(text) {
  const found = [];
  let lines = [];
  let list = null;
  const close = () => {
    if (lines.length) found.push(paragraph(lines));
    lines = [];
    list = null;
  };
  const all = text.split("\n");
  for (let i = 0; i < all.length; i += 1) {
    const line = all[i];
    if (FENCE.test(line)) {
      close();
      const code = [];
      while (i + 1 < all.length && !FENCE.test(all[i + 1])) code.push(all[(i += 1)]);
      i += 1;
      found.push(element("pre", { tabindex: "0" }, element("code", {}, code.join("\n"))));
      continue;
    }
    const item = ITEM.exec(line);
    const heading = HEADING.exec(line);
    if (item) {
      const tag = /\d/.test(item[1]) ? "ol" : "ul";
      if (!list || list.localName !== tag) {
        close();
        list = element(tag, tag === "ol" ? { start: parseInt(item[1], 10) } : {});
        found.push(list);
      }
      list.append(element("li", {}, ...inline(item[2])));
    } else if (heading) {
      close();
      found.push(element("p", {}, element("strong", {}, ...inline(heading[1]))));
    } else if (!line.trim()) {
      close();
    } else {
      list = null;
      lines.push(line);
    }
  }
  close();
  return found;
}
