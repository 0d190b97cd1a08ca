// What an answer amounts to: the most frequent ids, and where the time went.

import { colourOf } from "./colours.js";

const NUM_SHOWN = 10;
const STEPS = {
  read: "reading the body",
  decode: "decoding and resizing",
  queue: "waiting for a batch",
  infer: "tokenizer",
  cache: "kept answer",
};

/** Return [[id, count, index of its first patch], ...], most frequent first. */
export function countIds(ids) {
  const found = new Map();
  ids.forEach((id, index) => {
    if (found.has(id)) found.get(id)[1] += 1;
    else found.set(id, [id, 1, index]);
  });
  return [...found.values()].sort((a, b) => b[1] - a[1] || a[0] - b[0]);
}

/** Return how many ids there are, and how evenly they are used. */
export function describeCounts(counts, numPatches, vocabSize) {
  const entropy = counts.reduce((sum, [, n]) => sum - (n / numPatches) * Math.log(n / numPatches), 0);
  const perplexity = Math.exp(entropy).toFixed(1);
  return `${counts.length} of ${vocabSize.toLocaleString("en")} ids, perplexity ${perplexity}`;
}

/** Show the most frequent ids as bars that choose their first patch. */
export function showFrequent(list, counts, select) {
  const top = counts[0][1];
  list.replaceChildren(...counts.slice(0, NUM_SHOWN).map(([id, count, first]) => {
    const button = element("button", "");
    button.type = "button";
    const bar = element("i", "");
    bar.style.width = `${(100 * count) / top}%`;
    bar.style.background = `rgb(${colourOf(id).join(" ")})`;
    const track = element("span", "");
    track.className = "track";
    track.append(bar);
    button.append(element("b", String(id)), track, element("span", String(count)));
    button.setAttribute("aria-label", `Id ${id}: ${count} ${count === 1 ? "patch" : "patches"}; show them`);
    button.addEventListener("click", () => select(first));
    const item = document.createElement("li");
    item.append(button);
    return item;
  }));
}

/** Show the steps of the service, and what the network and the browser took, as one bar. */
export function showTimes(bar, list, timings, totalMs) {
  const steps = timings.filter(([, ms]) => ms !== null);
  const known = steps.reduce((sum, [, ms]) => sum + ms, 0);
  const rest = Math.max(0, totalMs - known);
  const shown = [...steps.map(([name, ms]) => [STEPS[name] ?? name, ms]), ["network and the rest", rest]];
  bar.replaceChildren(...shown.map(([, ms], index) => {
    const part = element("i", "");
    part.className = `step-${index % 6}`;
    part.style.flexGrow = String(ms);
    return part;
  }));
  list.replaceChildren(...shown.map(([name, ms], index) => {
    const item = element("li", "");
    const swatch = element("i", "");
    swatch.className = `step-${index % 6}`;
    item.append(swatch, element("span", name), element("b", `${ms.toFixed(1)} ms`));
    return item;
  }));
}

function element(name, text) {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}
