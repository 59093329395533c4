"""The content of ``doctor.json`` for a run that the doctor did not see: what its log tells."""

from collections.abc import Mapping
from typing import Any

from grpo_lightning.diagnostics.beyond_a_log import BEYOND_A_LOG
from grpo_lightning.diagnostics.conclusion import diagnose
from grpo_lightning.diagnostics.foreign.examine import examine_log
from grpo_lightning.diagnostics.foreign.log import Log
from grpo_lightning.diagnostics.record import Record


def foreign_record(
    log: Log, source: str, *, updates_per_rollout: int | None = None, facts: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Examine a log and write down what it tells.

    Args:
        log: The log.
        source: What it is: ``"metrics"``, ``"trl"`` or ``"csv"``.
        updates_per_rollout: As for `examine_log`.
        facts: Of parts of the doctor, by their name, where more than the log is known.
    """
    elapsed = 0.0
    record = Record(lambda: elapsed)
    for step, values in log.rows:
        if values:
            record.add_update(int(step), values)
    # What a log shows holds from its start to its end.
    elapsed = log.seconds or 0.0
    verdicts, reactions = examine_log(log, updates_per_rollout)
    asked = [verdict for verdict in verdicts if not verdict.message.startswith(BEYOND_A_LOG)]
    diagnosis = diagnose(asked, reactions)
    last = max(int(step) for step, _ in log.rows)
    record.add_verdicts(last, verdicts, diagnosis, "" if diagnosis is None else str(diagnosis))
    content = record.content(
        source=source,
        run={"seconds": log.seconds, "epochs": None},
        versions={},
        settings={"updates_per_rollout": updates_per_rollout},
        parts=facts or {},
    )
    if log.seconds is None and content["diagnosis"] is not None:
        content["diagnosis"]["hours_lost"] = None
    return content
