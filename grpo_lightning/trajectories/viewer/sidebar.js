// The list of groups and what is left out of it.

function groupButton(epoch, [number, matching], current, scale) {
  const group = epoch.groups[number];
  const rewards = rewardsOf(group);
  const wrong = group.episodes.filter((episode) => faults(episode)).length;
  const button = make("button", "group");
  button.type = "button";
  button.dataset.group = number;
  button.setAttribute("aria-current", String(current));
  const few = matching.length < group.episodes.length ? `${matching.length} of ` : "";
  const notes = make("span", "notes", `${few}${group.episodes.length} episodes`);
  if (wrong) notes.append(make("span", "wrong", ` · ! ${wrong}`, make("span", "hidden-text", " with errors")));
  button.title = `${group.task}${wrong ? `: ${wrong} episodes with errors` : ""}`;
  const spark = make("span", "spark");
  spark.setAttribute("aria-hidden", "true");
  for (const episode of group.episodes) spark.append(bars({ ...episode, advantages: undefined }, scale));
  button.append(
    make("span", "number", String(number)),
    make("span", "task", group.task),
    make("span", "value", make("span", "hidden-text", "mean reward "), shown(mean(rewards), 3)),
    notes,
    spark
  );
  return make("li", "", button);
}

function showGroups(epoch, found, current) {
  const scale = scales(epoch);
  byId("groups").replaceChildren(...found.map((row) => groupButton(epoch, row, row[0] === current, scale)));
  const episodes = found.reduce((sum, [, list]) => sum + list.length, 0);
  const all = epoch.groups.reduce((sum, group) => sum + group.episodes.length, 0);
  byId("count").textContent =
    episodes === all ? `${found.length} groups, ${all} episodes` : `${found.length} groups, ${episodes} of ${all} episodes`;
}

function showEpochs(current, choose) {
  byId("epoch").replaceChildren(
    ...about.epochs.map((row) => {
      const option = make("option", "", `${row.epoch} (mean reward ${shown(row.reward, 3)})`);
      option.value = row.epoch;
      option.selected = row.epoch === current;
      return option;
    })
  );
  const rewards = about.epochs.map((row) => row.reward).filter((reward) => reward !== null);
  const [low, high] = [Math.min(0, ...rewards), Math.max(0, ...rewards)];
  byId("epoch-bars").replaceChildren(
    ...about.epochs.map((row) => {
      const share = row.reward === null ? 0 : Math.max(0.04, (row.reward - low) / (high - low || 1));
      const column = bar("reward", share, `epoch ${row.epoch}: mean reward ${shown(row.reward, 3)}`);
      column.classList.toggle("current", row.epoch === current);
      column.addEventListener("click", () => choose(row.epoch));
      return column;
    })
  );
}

function showNotices() {
  const notices = [];
  if (about.note) notices.push(about.note);
  if (about.leftOut.length) {
    const [first, last] = [about.leftOut[0], about.leftOut.at(-1)];
    const which = about.leftOut.length === 1 ? `Epoch ${first} is` : `${about.leftOut.length} epochs (${first} to ${last}) are`;
    notices.push(`${which} not on this page, which would have grown past ${shown(about.maxBytes / 1e6)} MB. ` +
      "Choose others with --epochs, or allow more with --max-mb.");
  }
  byId("notices").replaceChildren(...notices.map((text) => make("li", "", text)));
  byId("notices").hidden = !notices.length;
}
