// What is chosen, where it stands in the address, and what keys and clicks do.

const state = { epoch: null, group: 0, episode: 0, colour: "source", query: "", status: "all", sort: "order" };
let found = [];

const epoch = () => epochData(state.epoch);
const group = () => epoch().groups[state.group];
const matching = () => found.find(([number]) => number === state.group)?.[1] ?? [];

function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  const whole = (name) => (/^\d+$/.test(given.get(name) ?? "") ? Number(given.get(name)) : null);
  const known = about.epochs.map((row) => row.epoch);
  state.epoch = known.includes(whole("e")) ? whole("e") : state.epoch ?? known.at(-1);
  state.group = whole("g") ?? state.group;
  state.episode = whole("i") ?? state.episode;
  if (Object.hasOwn(COLOURINGS, given.get("c") ?? "")) state.colour = given.get("c");
}

const address = () =>
  `#e=${state.epoch}&g=${state.group}&i=${state.episode}` + (state.colour === "source" ? "" : `&c=${state.colour}`);

function showColours() {
  const used = effectiveColouring(state.colour, epoch(), group());
  const reasons = [];
  for (const input of byId("modes").querySelectorAll("input")) {
    const reason = COLOURINGS[input.value].missing(epoch(), group());
    input.disabled = Boolean(reason);
    input.checked = input.value === used;
    input.parentElement.title = reason;
    if (reason) reasons.push(`${COLOURINGS[input.value].label}: ${reason}.`);
  }
  byId("reasons").textContent = reasons.join(" ");
  const legend = COLOURINGS[used].legend(scales(epoch()));
  if (used !== "source") legend.push(["none", "no value"]);
  byId("legend").replaceChildren(
    ...legend.map(([name, text]) => make("li", "", make("span", `token sample ${name}`, "ab"), text))
  );
  colourTokens(byId("episode"), used, scales(epoch()));
}

function showNothing(text) {
  for (const id of ["group", "strip", "episode"]) byId(id).replaceChildren();
  document.querySelector(".colouring").hidden = true;
  const clear = make("button", "", "Clear the filters");
  clear.addEventListener("click", clearFilters);
  byId("episode").append(make("p", "empty", text), epoch().groups.length ? clear : "");
}

function showEpisode() {
  hideTip();
  if (!epoch().groups.length) return showNothing("This epoch has no groups.");
  if (!found.length) return showNothing("No episode matches.");
  document.querySelector(".colouring").hidden = false;
  const passing = new Set(matching());
  const scale = scales(epoch());
  byId("group").replaceChildren(groupHead(epoch(), group(), state));
  byId("strip").replaceChildren(
    ...group().episodes.map((episode, number) =>
      episodeTab(episode, number, { current: number === state.episode, dimmed: !passing.has(number), scale })
    )
  );
  const shows = group().episodes.length;
  byId("episode").replaceChildren(
    ...(shows ? episodeView(epoch(), group(), state, state.query) : [make("p", "empty", "This group has no episodes.")])
  );
  showColours();
}

/** Scroll a list, and only it, so that its current entry is seen. */
function keepInSight(list) {
  const current = list.querySelector("[aria-current=true]");
  if (!current) return;
  const [outer, inner] = [list.getBoundingClientRect(), current.getBoundingClientRect()];
  list.scrollTop += Math.min(0, inner.top - outer.top) + Math.max(0, inner.bottom - outer.bottom);
  list.scrollLeft += Math.min(0, inner.left - outer.left) + Math.max(0, inner.right - outer.right);
}

/** Bring the page in line with the state, and the state with what there is. */
function show() {
  found = selection(epoch(), state);
  if (found.length && !matching().includes(state.episode)) {
    if (!matching().length) state.group = found[0][0];
    state.episode = matching()[0];
  }
  const focused = document.activeElement?.closest?.("#strip, #groups")?.id;
  showEpochs(state.epoch, (number) => choose({ epoch: number, group: 0, episode: 0 }));
  showGroups(epoch(), found, state.group);
  showEpisode();
  keepInSight(byId("groups"));
  keepInSight(byId("strip"));
  if (focused) byId(focused).querySelector("[aria-current=true]")?.focus();
  if (location.hash !== address()) location.replace(address());
}

function choose(change) {
  Object.assign(state, change);
  show();
  byId("live").textContent = found.length ? `Epoch ${state.epoch}, group ${state.group}, episode ${state.episode}` : "";
}

function clearFilters() {
  byId("search").value = "";
  byId("status").value = "all";
  choose({ query: "", status: "all" });
}

function step(list, current, by) {
  const at = list.indexOf(current) + by;
  return list[Math.max(0, Math.min(list.length - 1, at))];
}

function stepGroup(by) {
  const next = step(found.map(([number]) => number), state.group, by);
  if (next === undefined || next === state.group) return;
  choose({ group: next, episode: found.find(([number]) => number === next)[1][0] });
  scrollTo(0, 0);
}

function stepEpoch(by) {
  const next = step(about.epochs.map((row) => row.epoch), state.epoch, by);
  if (next !== state.epoch) choose({ epoch: next, group: 0, episode: 0 });
}

const stepEpisode = (by) => found.length && choose({ episode: step(matching(), state.episode, by) });

function nextColour() {
  const usable = Object.keys(COLOURINGS).filter((name) => !COLOURINGS[name].missing(epoch(), group()));
  const used = effectiveColouring(state.colour, epoch(), group());
  choose({ colour: usable[(usable.indexOf(used) + 1) % usable.length] });
  byId("live").textContent = `Coloured by ${COLOURINGS[state.colour].label}`;
}

const KEYS = {
  j: () => stepEpisode(1),
  k: () => stepEpisode(-1),
  ArrowRight: () => stepEpisode(1),
  ArrowLeft: () => stepEpisode(-1),
  l: () => stepGroup(1),
  h: () => stepGroup(-1),
  "]": () => stepGroup(1),
  "[": () => stepGroup(-1),
  ".": () => stepEpoch(1),
  ",": () => stepEpoch(-1),
  c: nextColour,
  t: () => byId("episode").querySelector(".token")?.focus(),
  "/": () => (showSidebar(true), byId("search").select(), byId("search").focus()),
  "?": () => byId("help").showModal(),
};

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || byId("help").open) return;
  const on = event.target;
  if (on === byId("search") && event.key === "Escape") {
    on.value = "";
    choose({ query: "" });
    byId("main").focus({ preventScroll: true });
    return;
  }
  const typing = on.matches("select, input[type=search]") || (on.matches("input") && event.key.startsWith("Arrow"));
  if (typing || !Object.hasOwn(KEYS, event.key)) return;
  event.preventDefault();
  KEYS[event.key]();
}

function showSidebar(open) {
  document.body.classList.toggle("sidebar-open", open);
  byId("sidebar-toggle").setAttribute("aria-expanded", String(open));
}

const systemTheme = matchMedia("(prefers-color-scheme: dark)");

/** Light or dark: as the system has it, or as it was chosen here. */
function showTheme(theme) {
  document.documentElement.dataset.theme = theme;
  byId("theme").textContent = theme === "dark" ? "☀ Light" : "☾ Dark";
}

function toggleTheme() {
  const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  showTheme(theme);
  try {
    localStorage.setItem("theme", theme);
  } catch {
    // Some browsers keep nothing for local files: the choice then lasts as long as the page.
  }
}

function storedTheme() {
  try {
    return localStorage.getItem("theme");
  } catch {
    return null;
  }
}

function start() {
  showTheme(storedTheme() ?? (systemTheme.matches ? "dark" : "light"));
  systemTheme.addEventListener("change", () => storedTheme() ?? showTheme(systemTheme.matches ? "dark" : "light"));
  byId("theme").addEventListener("click", toggleTheme);
  showNotices();
  if (!about.epochs.length) {
    byId("episode").append(make("p", "empty", "There are no epochs on this page."));
    return;
  }
  for (const [name, colouring] of Object.entries(COLOURINGS)) {
    const input = make("input", "");
    Object.assign(input, { type: "radio", name: "colour", value: name });
    byId("modes").append(make("label", "", input, make("span", "", colouring.label)));
  }
  byId("modes").addEventListener("change", (event) => choose({ colour: event.target.value }));
  byId("epoch").addEventListener("change", (event) => choose({ epoch: Number(event.target.value), group: 0, episode: 0 }));
  byId("epoch-previous").addEventListener("click", () => stepEpoch(-1));
  byId("epoch-next").addEventListener("click", () => stepEpoch(1));
  byId("search").addEventListener("input", (event) => choose({ query: event.target.value }));
  byId("status").addEventListener("change", (event) => choose({ status: event.target.value }));
  byId("sort").addEventListener("change", (event) => choose({ sort: event.target.value }));
  byId("groups").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    const number = Number(button.dataset.group);
    choose({ group: number, episode: found.find(([other]) => other === number)[1][0] });
    showSidebar(false);
  });
  byId("strip").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    if (!matching().includes(Number(button.dataset.episode))) clearFilters();
    choose({ episode: Number(button.dataset.episode) });
  });
  byId("skip").addEventListener("click", (event) => {
    event.preventDefault();
    byId("main").focus();
  });
  byId("sidebar-toggle").addEventListener("click", () => showSidebar(!document.body.classList.contains("sidebar-open")));
  byId("help-button").addEventListener("click", () => byId("help").showModal());
  watchTokens(byId("episode"));
  addEventListener("keydown", onKey);
  addEventListener("hashchange", () => {
    if (location.hash === address()) return;
    readAddress();
    show();
  });
  readAddress();
  show();
}

start();
