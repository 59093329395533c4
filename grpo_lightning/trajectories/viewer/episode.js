// One episode: what became of it, and its turns as a conversation.

const STATUS_SIGN = { terminated: "✓", truncated: "…", error: "!" };
const STATUS_TEXT = {
  terminated: "ended by the environment",
  truncated: "cut off by a limit",
  error: "broken; it says nothing about the policy",
};
const BLOCK_TEXT = { 0: "Prompt", 1: "Policy", 2: "Forced by the system", 3: "Environment" };

const fact = (name, value, className = "") =>
  make("div", `fact ${className}`, make("dt", "", name), make("dd", "", value));

/** Any plain value, as text that people can read. */
const readable = (value) => (typeof value === "string" ? value : JSON.stringify(value));

function folded(title, content) {
  const rows = Object.entries(content ?? {});
  if (!rows.length) return null;
  const list = make("dl", "facts");
  for (const [name, value] of rows) list.append(fact(name, readable(value)));
  return make("details", "folded", make("summary", "", `${title} (${rows.length})`), list);
}

function groupHead(epoch, group, at) {
  const rewards = rewardsOf(group);
  const head = make("div", "group-head");
  head.append(make("h2", "", group.task));
  const facts = make("dl", "facts");
  facts.append(fact("epoch", String(at.epoch)), fact("group", String(at.group)));
  if (group.env) facts.append(fact("environment", group.env));
  facts.append(fact("seed", String(group.seed)), fact("policy version", String(epoch.version)));
  facts.append(fact("temperature", shown(epoch.temperature)));
  facts.append(fact("mean reward", shown(mean(rewards), 3)));
  head.append(facts);
  const data = folded("Task data", group.data);
  if (data) head.append(data);
  return head;
}

function bar(className, share, label) {
  const fill = make("i", "");
  fill.style.height = `${Math.round(100 * Math.max(0, Math.min(1, share)))}%`;
  const outer = make("span", `column ${className}`, fill);
  outer.title = label;
  return outer;
}

/** Reward and advantage of an episode as two small bars; the advantage grows up or down from the middle. */
function bars(episode, scale) {
  const columns = make("span", "bars");
  columns.setAttribute("aria-hidden", "true");
  const range = scale.high - scale.low || 1;
  const reward = episode.reward === null ? 0 : Math.max(0.04, (episode.reward - scale.low) / range);
  columns.append(bar(episode.reward === null ? "reward unknown" : "reward", reward, `reward ${shown(episode.reward)}`));
  const advantage = advantageOf(episode);
  if (advantage !== null) {
    const side = advantage < 0 ? "negative" : "positive";
    columns.append(
      bar(`advantage ${side}`, Math.abs(advantage) / (scale.advantage || 1) / 2, `advantage ${signed(advantage)}`)
    );
  }
  return columns;
}

function episodeTab(episode, number, { current, dimmed, scale }) {
  const button = make("button", `tab ${dimmed ? "dimmed" : ""} ${episode.status}`);
  button.type = "button";
  button.dataset.episode = number;
  button.setAttribute("aria-current", String(current));
  const advantage = advantageOf(episode);
  const wrong = faults(episode);
  button.setAttribute(
    "aria-label",
    `Episode ${number}, ${episode.status}, reward ${shown(episode.reward)}` +
      (advantage === null ? "" : `, advantage ${signed(advantage)}`) +
      (wrong ? `, ${wrong} errors` : "") +
      (dimmed ? ", filtered out" : "")
  );
  const sign = make("span", `sign ${wrong ? "wrong" : ""}`, wrong ? "!" : STATUS_SIGN[episode.status]);
  button.append(make("span", "number", String(number)), bars(episode, scale), make("span", "value", shown(episode.reward, 3)), sign);
  return button;
}

function episodeSummary(epoch, episode, number) {
  const box = make("section", "summary");
  const title = make("h3", "", `Episode ${number}`);
  title.append(make("span", `status ${episode.status}`, `${STATUS_SIGN[episode.status]} ${episode.status}`));
  title.lastChild.title = STATUS_TEXT[episode.status];
  if (episode.attempts) title.append(make("span", "chip", `attempt ${episode.attempts}`));
  const facts = make("dl", "facts rewards");
  facts.append(fact("reward", shown(episode.reward), "total"));
  epoch.rewardNames.forEach((name, place) => {
    if (episode.rewards[place] !== null) facts.append(fact(name, shown(episode.rewards[place])));
  });
  const advantage = advantageOf(episode);
  if (advantage !== null) facts.append(fact("advantage", signed(advantage), "total"));
  facts.append(fact("turns", String(episode.turns?.length ?? 0)), fact("tokens after the prompt", String(tokenCount(episode))));
  box.append(title, facts);
  if (episode.failure) box.append(make("p", "fault", make("strong", "", "Not scored: "), episode.failure));
  return box;
}

function toolCall(call) {
  const said = Object.entries(call.arguments).map(([name, value]) => `${name}=${JSON.stringify(value)}`);
  const item = make("li", "", make("span", "speaker", "Tool call"), make("code", "", `${call.name || "unreadable"}(${said.join(", ")})`));
  if (call.id) item.append(make("span", "chip", call.id));
  if (call.error) item.append(make("p", "fault", make("strong", "", "Not read: "), call.error));
  return item;
}

function turnHead(episode, turn, number, tokens) {
  const head = make("header", "turn-head", make("h4", "", `Turn ${number}`));
  const advantage = episode.advantages?.[number];
  if (turn.reward !== undefined) head.append(make("span", "chip", `reward ${shown(turn.reward)}`));
  if (advantage !== undefined) head.append(make("span", "chip", `advantage ${signed(advantage)}`));
  const sampled = tokens.filter((token) => token.source === SAMPLED).length;
  if (sampled) head.append(make("span", "chip quiet", `${sampled} sampled`));
  if (turn.finish === "length") head.append(make("span", "chip warning", "cut at max_tokens"));
  return head;
}

/** Consecutive tokens of one source. */
function blocks(tokens) {
  const found = [];
  for (const token of tokens) {
    if (found.at(-1)?.[0].source === token.source) found.at(-1).push(token);
    else found.push([token]);
  }
  return found;
}

function turnCard(episode, turn, number, tokens, hits) {
  const card = make("section", "turn", turnHead(episode, turn, number, tokens));
  card.setAttribute("aria-label", `Turn ${number}`);
  for (const block of blocks(tokens)) {
    const text = BLOCK_TEXT[block[0].source];
    const bubble = make("div", `bubble ${SOURCES[block[0].source]}`, make("span", "speaker", text));
    bubble.append(tokenBlock(block, `${text}, turn ${number}, ${block.length} tokens`, hits));
    card.append(bubble);
  }
  const after = make("div", "after");
  if (turn.calls) after.append(make("ul", "calls", ...turn.calls.map(toolCall)));
  if (turn.error) after.append(make("p", "fault", make("strong", "", "The policy was told: "), turn.error));
  after.append(folded("Info", turn.info) ?? "");
  card.append(after);
  return card;
}

/** Everything of an episode below the strip. */
function episodeView(epoch, group, at, query) {
  const episode = group.episodes[at.episode];
  const segments = expandTokens(group, episode);
  const parts = [episodeSummary(epoch, episode, at.episode)];
  if (!segments.length) {
    parts.push(make("p", "empty", "No tokens: the episode ended before anything was sampled. Its prompt is that of the others."));
  }
  segments.forEach((tokens, place) => {
    const hits = searchHits(tokens, query);
    if (segments.length > 1) parts.push(make("h4", "segment", `Sequence ${place} of ${segments.length}`));
    const turns = new Set(tokens.map((token) => token.turn));
    (episode.turns ?? []).forEach((turn, number) => (turn.segment ?? 0) === place && turns.add(number));
    for (const number of [...turns].sort((a, b) => a - b)) {
      const mine = tokens.filter((token) => token.turn === number);
      parts.push(turnCard(episode, episode.turns?.[number] ?? {}, number, mine, hits));
    }
  });
  if (episode.closing) {
    const closing = make("section", "turn", make("header", "turn-head", make("h4", "", "After the last action")));
    closing.firstChild.append(make("span", "chip quiet", "the policy never saw it"));
    for (const message of episode.closing) {
      const text = make("div", "plain", messageText(message));
      closing.append(make("div", "bubble environment", make("span", "speaker", message.role ?? "message"), text));
    }
    parts.push(closing);
  }
  return parts;
}
