// Tokens as elements: their text, their colour, and what is said of the one that is pointed at or focused.

/** An element; its text goes in as text, whatever it holds. */
function make(tag, className, ...content) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...content.filter((part) => part !== null && part !== undefined));
  return element;
}

const byId = (id) => document.getElementById(id);
const tokenOf = new WeakMap();
const tip = byId("tip");

function fillPiece(element, entry) {
  const text = pieceText(entry);
  if (pieces.bytes[entry]) element.dataset.bytes = pieces.bytes[entry];
  if (/^<[^\s<>]+>$/.test(text)) element.classList.add("special");
  text.split("\n").forEach((line, place) => {
    if (place) element.append(make("span", "newline"), "\n");
    element.append(line);
  });
}

/** The tokens of one block, reached with one press of tab; arrow keys walk over all of the episode's. */
function tokenBlock(tokens, label, hits) {
  const block = make("div", "tokens");
  block.setAttribute("role", "group");
  block.setAttribute("aria-label", label);
  tokens.forEach((token, place) => {
    const element = make("span", "token");
    fillPiece(element, token.entry);
    if (hits.has(token)) element.classList.add("hit");
    element.tabIndex = place ? -1 : 0;
    tokenOf.set(element, token);
    block.append(element);
  });
  return block;
}

function colourTokens(container, colouring, scale) {
  for (const element of container.querySelectorAll(".token")) {
    if (element.dataset.colour) element.classList.remove(element.dataset.colour);
    element.dataset.colour = COLOURINGS[colouring].of(tokenOf.get(element), scale);
    element.classList.add(element.dataset.colour);
  }
}

/** The tokens that an occurrence of the query touches. */
function searchHits(tokens, query) {
  const hits = new Set();
  const wanted = query.trim().toLowerCase();
  if (!wanted) return hits;
  const ends = [];
  let text = "";
  for (const token of tokens) ends.push((text += pieceText(token.entry).toLowerCase()).length);
  let first = 0;
  for (let at = text.indexOf(wanted); at >= 0; at = text.indexOf(wanted, at + wanted.length)) {
    while (ends[first] <= at) first++;
    for (let i = first; i < tokens.length && (i === 0 ? 0 : ends[i - 1]) < at + wanted.length; i++) hits.add(tokens[i]);
  }
  return hits;
}

function tokenFacts(token) {
  const facts = [
    ["token id", pieces.ids[token.entry]],
    ["source", SOURCES[token.source]],
    ["turn", token.turn],
  ];
  if (pieces.bytes[token.entry]) facts.push(["part of a character", pieces.bytes[token.entry]]);
  if (token.source !== SAMPLED) return facts;
  facts.push(["policy version", token.version]);
  facts.push(["logprob", `${shown(token.logprob)} (probability ${shown(Math.exp(token.logprob))})`]);
  if (token.logRatio !== null) facts.push(["ratio", `${shown(Math.exp(token.logRatio))} (log ${signed(token.logRatio)})`]);
  if (token.advantage !== null) facts.push(["advantage", signed(token.advantage)]);
  return facts;
}

function showTip(element) {
  const token = tokenOf.get(element);
  const list = make("dl", "");
  for (const [name, value] of tokenFacts(token)) {
    list.append(make("div", "", make("dt", "", name), make("dd", "", String(value))));
  }
  tip.replaceChildren(make("code", "piece", JSON.stringify(pieceText(token.entry))), list);
  tip.hidden = false;
  element.setAttribute("aria-describedby", "tip");
  placeTip(element);
}

function placeTip(element) {
  const place = element.getClientRects()[0] ?? element.getBoundingClientRect();
  const below = place.bottom + tip.offsetHeight + 12 < innerHeight;
  tip.style.top = `${below ? place.bottom + 6 : Math.max(6, place.top - tip.offsetHeight - 6)}px`;
  tip.style.left = `${Math.max(6, Math.min(place.left, document.documentElement.clientWidth - tip.offsetWidth - 6))}px`;
}

const described = () => document.querySelector("[aria-describedby=tip]");

function hideTip() {
  tip.hidden = true;
  described()?.removeAttribute("aria-describedby");
}

/** Where an arrow key leads from a token; null for other keys. */
function neighbour(element, key) {
  const all = [...byId("episode").querySelectorAll(".token")];
  const at = all.indexOf(element);
  return { ArrowRight: all[at + 1], ArrowLeft: all[at - 1], Home: all[0], End: all[all.length - 1] }[key] ?? null;
}

function watchTokens(container) {
  const token = (event) => event.target.closest?.(".token");
  const show = (event) => {
    hideTip();
    if (token(event)) showTip(token(event));
  };
  container.addEventListener("mouseover", show);
  container.addEventListener("focusin", show);
  container.addEventListener("click", (event) => token(event)?.focus());
  container.addEventListener("mouseleave", hideTip);
  container.addEventListener("focusout", hideTip);
  // Focusing a token may scroll the page or the box that it is in: what is said of it goes along.
  addEventListener("scroll", () => described() && placeTip(described()), { passive: true, capture: true });
  container.addEventListener("keydown", (event) => {
    if (!token(event) || event.ctrlKey || event.metaKey || event.altKey) return;
    const next = neighbour(token(event), event.key);
    if (["ArrowRight", "ArrowLeft", "Home", "End"].includes(event.key)) {
      event.preventDefault();
      event.stopPropagation();
      next?.focus();
    } else if (event.key === "Escape") {
      event.stopPropagation();
      byId("main").focus({ preventScroll: true });
    }
  });
}
