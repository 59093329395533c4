"""The comparison as markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.trl_losses.cases import SECTIONS, TOLERANCE

HEADER = ["", "TRL", "here", "result", "", "as in the paper"]


def markdown(results: Mapping[str, Any]) -> str:
    """What `compare.compared` made of every case, as a table."""
    by_name = {case["name"]: case for case in results["cases"]}
    versions, equal = results["versions"], [c for c in results["cases"] if c["equal"]]
    largest = max(max(c["relative_difference"].values()) for c in equal)
    lines = [
        f"TRL {versions['trl']}: {len(equal)} of {len(results['cases'])} comparisons are equal within {TOLERANCE:g} in "
        f"loss and gradient (at most {largest:.0e} apart). For the others, the length of the difference is shown in "
        "units of TRL's gradient or advantages, and whose result is that of the paper: `open` where it does not say.",
        "",
        _line(HEADER),
        _line(["---"] * len(HEADER)),
    ]
    for title, cases in SECTIONS.items():
        lines.append(_line([f"**{title}**", *[""] * (len(HEADER) - 1)]))
        lines += [_row(by_name[case.name]) for case in cases]
    return "\n".join(lines) + "\n"


def _row(case: Mapping[str, Any]) -> str:
    words = "; ".join(text for text in (case["difference"], case["note"]) if text)
    trainer = "" if case["trainer"] == "GRPOTrainer" else f"{case['trainer']} "
    return _line(
        [case["name"], trainer + _settings(case["trl"]), _settings(case["here"]), _result(case), words, case["follows"]]
    )


def _result(case: Mapping[str, Any]) -> str:
    """What is apart. A loss can be near 0, so its difference in percent is shown only where the gradients are equal."""
    if case["equal"]:
        return "equal"
    apart = case["relative_difference"]
    if "advantages" in apart:
        return _percent(apart["advantages"])
    if apart["gradient"] <= TOLERANCE:
        return f"gradient equal, loss {_percent(apart['loss'])}"
    return f"gradient {_percent(apart['gradient'])}"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def _settings(settings: Mapping[str, Any]) -> str:
    return " ".join(f"`{name}={_value(value)}`" for name, value in settings.items()) or "defaults"


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_value(inner)}" for name, inner in value.items()) + "}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
