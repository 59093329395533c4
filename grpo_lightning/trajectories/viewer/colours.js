// What tokens are coloured by. Each colouring names a class of the style sheet for a token, and what its legend says.

const LOGPROB_STEPS = [0.9, 0.5, 0.1, 0.01];
const RATIO_STEPS = [0.01, 0.05, 0.2];
const ADVANTAGE_STEPS = [0.02, 1 / 3, 2 / 3];

/** Class of a value that has a sign, by its size. */
function diverging(value, steps) {
  const size = steps.filter((step) => Math.abs(value) >= step).length;
  return size === 0 ? "d0" : `${value < 0 ? "n" : "p"}${size}`;
}

function divergingLegend(edges, unit) {
  const [one, two, three] = edges;
  return [
    ["n3", `${unit(-three)} or less`],
    ["n2", `to ${unit(-two)}`],
    ["n1", `to ${unit(-one)}`],
    ["d0", `about ${unit(0)}`],
    ["p1", `from ${unit(one)}`],
    ["p2", `from ${unit(two)}`],
    ["p3", `${unit(three)} or more`],
  ];
}

const COLOURINGS = {
  source: {
    label: "Source",
    missing: () => "",
    of: (token) => `s-${SOURCES[token.source]}`,
    legend: () => [
      ["s-prompt", "prompt"],
      ["s-sampled", "sampled by the policy"],
      ["s-forced", "forced by the system"],
      ["s-environment", "environment"],
    ],
  },
  advantage: {
    label: "Advantage",
    missing: (epoch, group) => (group?.episodes.some((e) => e.advantages) ? "" : "these episodes have no advantages"),
    of: (token, scale) =>
      token.advantage === null || token.advantage === undefined
        ? "none"
        : diverging(token.advantage / (scale.advantage || 1), ADVANTAGE_STEPS),
    legend: (scale) =>
      divergingLegend(ADVANTAGE_STEPS.map((step) => step * (scale.advantage || 1)), (value) =>
        value ? signed(Number(value.toPrecision(2))) : "0"),
  },
  ratio: {
    label: "Ratio",
    missing: (epoch) => (epoch.hasRatios ? "" : "the epoch was not trained to its end, so none are stored"),
    of: (token) =>
      token.logRatio === null || token.logRatio === undefined ? "none" : diverging(token.logRatio, RATIO_STEPS),
    legend: () => divergingLegend(RATIO_STEPS, (value) => Math.exp(value).toFixed(2)),
  },
  logprob: {
    label: "Probability",
    missing: () => "",
    of: (token) => {
      if (token.logprob === null || token.logprob === undefined) return "none";
      return `q${LOGPROB_STEPS.filter((step) => Math.exp(token.logprob) < step).length}`;
    },
    legend: () => [
      ["q0", "0.9 or more"],
      ["q1", "0.5 to 0.9"],
      ["q2", "0.1 to 0.5"],
      ["q3", "0.01 to 0.1"],
      ["q4", "less than 0.01"],
    ],
  },
};

/** The colouring that is used: the one wished for, or by source where that cannot be. */
const effectiveColouring = (wish, epoch, group) => (COLOURINGS[wish].missing(epoch, group) ? "source" : wish);
