// What the page holds, and what can be read from it. Nothing here touches what is shown.

const SOURCES = ["prompt", "sampled", "forced", "environment"];
const SAMPLED = 1;

const embedded = (id) => JSON.parse(document.getElementById(id).textContent);
const about = embedded("about");
const pieces = embedded("pieces");
const loadedEpochs = new Map();

/** An epoch's groups; parsed when it is first asked for. */
function epochData(number) {
  if (!loadedEpochs.has(number)) loadedEpochs.set(number, embedded(`epoch-${number}`));
  return loadedEpochs.get(number);
}

/** What an entry of the table of pieces says: its id where it has no text. */
const pieceText = (entry) => pieces.texts[entry] ?? `⟨${pieces.ids[entry]}⟩ `;

/** The tokens of an episode, one array for each of its sequences. */
function expandTokens(group, episode) {
  return episode.segments.map((segment, place) => {
    const tokens = place > 0 ? [] : (group.prompt ?? []).map((entry) => ({ entry, source: 0, turn: 0, version: -1 }));
    let at = 0;
    let sampled = 0;
    for (const [source, turn, version, count] of segment.runs) {
      for (let i = 0; i < count; i++, at++) {
        const token = { entry: segment.tokens[at], source, turn, version };
        if (source === SAMPLED) {
          token.logprob = segment.logprobs[sampled];
          token.logRatio = segment.ratios?.[sampled] ?? null;
          token.advantage = episode.advantages?.[turn] ?? null;
          sampled++;
        }
        tokens.push(token);
      }
    }
    return tokens;
  });
}

const messageText = (message) =>
  typeof message.content === "string" ? message.content : JSON.stringify(message.content ?? message, null, 1);

/** All that search looks through, in lower case; worked out once. */
function searchText(group, episode) {
  if (episode.searchable === undefined) {
    const said = episode.segments.map((segment) => segment.tokens.map(pieceText).join(""));
    group.promptText ??= (group.prompt ?? []).map(pieceText).join("");
    const errors = episode.turns?.map((turn) => turn.error ?? "") ?? [];
    const closing = episode.closing?.map(messageText) ?? [];
    const all = [group.task, group.promptText, ...said, ...closing, ...errors, episode.failure ?? ""];
    episode.searchable = all.join("\n").toLowerCase();
  }
  return episode.searchable;
}

/** How many things went wrong in an episode: its failure, refused actions, calls of tools that could not be read. */
function faults(episode) {
  const broken = episode.failure || episode.status === "error" ? 1 : 0;
  const turns = episode.turns ?? [];
  return turns.reduce((sum, t) => sum + (t.error ? 1 : 0) + (t.calls ?? []).filter((c) => c.error).length, broken);
}

const tokenCount = (episode) => episode.segments.reduce((sum, segment) => sum + segment.tokens.length, 0);

const rewardsOf = (group) => group.episodes.map((episode) => episode.reward).filter((reward) => reward !== null);

const mean = (values) => (values.length ? values.reduce((a, b) => a + b, 0) / values.length : null);

const spread = (values) => (values.length ? Math.max(...values) - Math.min(...values) : 0);

/** The advantage of an episode as one number: that of its turns if they agree, else their mean. */
const advantageOf = (episode) => mean(episode.advantages ?? []);

/** Least and largest reward of an epoch and its largest advantage, by which bars and colours are scaled. */
function scales(epoch) {
  if (!epoch.scales) {
    let [low, high, advantage] = [0, 0, 0];
    for (const group of epoch.groups) {
      for (const episode of group.episodes) {
        if (episode.reward !== null) [low, high] = [Math.min(low, episode.reward), Math.max(high, episode.reward)];
        for (const value of episode.advantages ?? []) advantage = Math.max(advantage, Math.abs(value));
      }
    }
    epoch.scales = { low, high, advantage };
  }
  return epoch.scales;
}

/** Which episodes pass the filters, as `[[group, [episode, ...]], ...]` in the order asked for. */
function selection(epoch, { query, status, sort }) {
  const wanted = query.trim().toLowerCase();
  const passes = (group, episode) =>
    (status === "all" || (status === "faults" ? faults(episode) > 0 : episode.status === status)) &&
    (!wanted || searchText(group, episode).includes(wanted));
  const found = epoch.groups
    .map((group, g) => [g, group.episodes.flatMap((episode, i) => (passes(group, episode) ? [i] : []))])
    .filter(([, episodes]) => episodes.length);
  const key = {
    best: (group) => -(mean(rewardsOf(group)) ?? -Infinity),
    worst: (group) => mean(rewardsOf(group)) ?? Infinity,
    spread: (group) => -spread(rewardsOf(group)),
    faults: (group) => -group.episodes.reduce((sum, episode) => sum + faults(episode), 0),
    length: (group) => -group.episodes.reduce((sum, episode) => sum + tokenCount(episode), 0),
  }[sort];
  if (key) {
    const keys = new Map(found.map(([g]) => [g, key(epoch.groups[g])]));
    found.sort(([a], [b]) => (keys.get(a) === keys.get(b) ? a - b : keys.get(a) - keys.get(b)));
  }
  return found;
}

/** A number as people read it. */
function shown(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  return String(Number(value.toPrecision(digits))).replace("-", "−");
}

const signed = (value) => (value > 0 ? "+" : "") + shown(value);
