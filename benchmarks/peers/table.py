"""What the tools said, weighed against what is wrong with each run, as a markdown table."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

Weight = Literal["cause", "symptom", "wrong cause"]

TWIN = "two_updates"
"""The healthy run that differs from the faulty ones by the fault alone."""

AS_HEALTHY = "as in the healthy run"
"""What a tool says of the healthy twin too says nothing of the fault."""

WEIGHED: dict[tuple[str, str, str], Weight] = {
    ("nan_steps_skipped", "rlprobe", "GRAD_PATHOLOGY"): "cause",
    ("pays_for_length", "rlprobe", "REWARD_HACK_LENGTH"): "cause",
    ("pays_for_length", "rldoctor", "length_pathology"): "cause",
    ("pays_for_length", "rldoctor", "reward_hacking"): "cause",
    ("frozen_behind_dropout", "rldoctor", "reward_hacking"): "wrong cause",
}
"""Findings, by run, tool and the tool's name for it, that are more or less than a symptom."""

TOOLS = {"rlprobe": "rlprobe", "rldoctor": "rl-doctor", "rlwatch": "rlwatch"}
"""Names of the tools by their names on PyPI."""


def weigh(said: Mapping[str, Any], notes: Mapping[str, Sequence[Any]], cases: Sequence[Any]) -> list[dict[str, Any]]:
    """What each tool's findings are worth, run by run.

    Args:
        said: Findings by run and tool, as `judges.judged` returns them.
        notes: What this project's doctor noted, by run.
        cases: The `cases.Case` of each run.
    """
    usual = {(tool, f["name"]) for tool, findings in said[TWIN].items() for f in findings if f["alarm"]}
    return [
        {
            "name": case.name,
            "title": case.title,
            "healthy": case.healthy,
            "causes": case.causes,
            "tools": {
                tool: [{**finding, "worth": _worth(case, tool, finding, usual)} for finding in findings]
                for tool, findings in said[case.name].items()
            },
            "doctor": notes[case.name],
        }
        for case in cases
    ]


def _worth(case: Any, tool: str, finding: Mapping[str, Any], usual: Collection[tuple[str, str]]) -> str:
    if not finding["alarm"]:
        return "information"
    if case.healthy:
        return "alarm"
    if (tool, finding["name"]) in usual:
        return AS_HEALTHY
    return WEIGHED.get((case.name, tool, finding["name"]), "symptom")


def markdown(results: Mapping[str, Any]) -> str:
    """The table of what `weigh` returned."""
    versions = results["versions"]
    header = ["run", *(f"{name} {versions[tool]}" for tool, name in TOOLS.items()), "this project"]
    lines = [_line(header), _line(["---"] * len(header))]
    for healthy in (False, True):
        lines.append(_line([f"**{'healthy' if healthy else 'faulty'}**", *[""] * (len(header) - 1)]))
        for run in results["runs"]:
            if run["healthy"] == healthy:
                cells = [_cell(run["tools"][tool]) for tool in TOOLS]
                lines.append(_line([run["title"], *cells, _own(run)]))
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(findings: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for worth in ("cause", "symptom", "wrong cause", "alarm", AS_HEALTHY):
        names = dict.fromkeys(f"`{f['name']}`" for f in findings if f["worth"] == worth)
        if names:
            parts.append(f"{worth}: {', '.join(names)}")
    return "; ".join(parts) or "silent"


def _own(run: Mapping[str, Any]) -> str:
    if not run["doctor"]:
        return "silent"
    first = run["doctor"][0]
    worth = "alarm" if run["healthy"] else "cause" if first["cause"] in run["causes"] else "other cause"
    count = first["updates"]
    return f"{worth}: `{first['cause']}`, after {count} update{'s' * (count != 1)}, {first['reaction']}"
