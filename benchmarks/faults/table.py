"""The documentation's table of faults, which says beforehand what is expected of the doctor, and what came of it."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.faults import zoo
from benchmarks.faults.fault import ZOO, Fault
from benchmarks.faults.power import POWER, POWER_OF_FAULT
from grpo_lightning.diagnostics.causes import ORDER

assert zoo.__all__

_HEAD = ("Fault", "What was done wrong", "Expected verdict", "Deadline", "Reaction", "Power", "False alarms")


def table() -> str:
    """Markdown, a row a fault, in causal order of what must be named."""
    rows = [
        (
            f"`{fault.name}`",
            fault.description,
            _expected(fault),
            fault.deadline.text,
            "refused by a guard" if fault.guard else fault.reaction,
            *(POWER_OF_FAULT.get(fault.name) or POWER[fault.expected[0]]),
        )
        for fault in sorted(ZOO.values(), key=lambda fault: ORDER[fault.expected[0]])
    ]
    lines = [_HEAD, ("---",) * len(_HEAD), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def results(content: Mapping[str, Any]) -> str:
    """What came of it, in a paragraph.

    Args:
        content: Content of ``fault_matrix.json``.
    """
    faults, pairs = content["faults"], content["pairs"]
    live, replayed = content["healthy_live_steps"], content["healthy_replay_steps"]
    rates = content["false_alarm_rate_upper_95_live"], content["false_alarm_rate_upper_95_replay"]
    return (
        f"{_right(faults)} of {len(faults)} faults and the root of {_right(pairs)} of {len(pairs)} pairs were named "
        f"rightly and in time. {live + replayed:,} healthy optimizer steps over {len(content['healthy_configs'])} "
        f"configurations, {live:,} of them with live vLLM, the rest replayed from its ledgers, raised "
        f"{content['false_alarms'] or 'no'} false alarms: with 95% confidence fewer than {rates[0]:.1e} a live step "
        f"and {rates[1]:.1e} a replayed one."
    )


def _right(found: Sequence[Mapping[str, Any]]) -> int:
    return sum(result["named_correctly"] for result in found)


def _expected(fault: Fault) -> str:
    names = " or ".join(f"`{cause}`" for cause in fault.expected)
    return f"{names}: {fault.why_alias}" if fault.why_alias else names
