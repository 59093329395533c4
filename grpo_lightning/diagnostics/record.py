"""What the doctor saw in a run: the content of ``doctor.json``."""

import dataclasses
import math
import numbers
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from grpo_lightning.diagnostics.conclusion import REACTIONS, Diagnosis, title
from grpo_lightning.diagnostics.curve import Curve
from grpo_lightning.diagnostics.verdict import Status, Verdict

FORMAT = 1
"""Version of the form of ``doctor.json``."""

_TIMELINE = 500
"""Most changes of verdicts that are kept: half of them the first, half the newest."""

_COUNTERS = {Status.PASS: "passed", Status.FAIL: "failed", Status.NO_POWER: "no_power"}


@dataclass
class CheckRecord:
    """One check over a run.

    Attributes:
        verdict: The last verdict, except that one without power takes no other's place.
        silence: Why the last verdict without power had none.
        passed: How often it passed.
        failed: How often it failed.
        no_power: How often it could not tell.
        first_update: Optimizer steps done when it was first asked.
        last_update: The same, the last time.
        passed_update: The same, when it last passed; None if it never did.
        passed_seconds: Seconds into the run then.
    """

    verdict: dict[str, Any] = field(default_factory=dict)
    silence: str = ""
    passed: int = 0
    failed: int = 0
    no_power: int = 0
    first_update: int = 0
    last_update: int = 0
    passed_update: int | None = None
    passed_seconds: float | None = None


class Record:
    """Collects verdicts and numbers of a run, for its report.

    Args:
        clock: Seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begin = clock()
        self._checks: dict[str, CheckRecord] = {}
        self._timeline: list[dict[str, Any]] = []
        self._dropped = 0
        self._diagnosis: dict[str, Any] | None = None
        self._curves = {"updates": Curve(), "epochs": Curve()}
        self._epochs = 0
        self._updates = 0

    @property
    def seconds(self) -> float:
        """Since the run began, time between its parts left out."""
        return self._clock() - self._begin

    def add_update(self, updates: int, values: Mapping[str, float]) -> None:
        """Note what an optimizer step saw.

        Args:
            updates: Optimizer steps done before.
            values: Its numbers, by their names in ``docs/metrics.md``.
        """
        self._curves["updates"].add({"update": updates}, values)

    def add_epoch(self, epochs: int, updates: int, values: Mapping[str, float]) -> None:
        """Note an epoch that was trained to its end.

        Args:
            epochs: Epochs done.
            updates: Optimizer steps done.
            values: Its metrics.
        """
        self._epochs, self._updates = epochs, updates
        self._curves["epochs"].add({"epoch": epochs, "update": updates}, values)

    def add_verdicts(
        self, updates: int, verdicts: Sequence[Verdict], diagnosis: Diagnosis | None, message: str = ""
    ) -> None:
        """Note the verdicts of one moment.

        Args:
            updates: Optimizer steps done.
            verdicts: All of them.
            diagnosis: What they mean together; None if none failed.
            message: What is said of it to the user.
        """
        self._updates = updates
        seconds = self.seconds
        if diagnosis is not None:
            self._note(updates, seconds, diagnosis, message)
        for verdict in verdicts:
            self._count(updates, seconds, verdict)

    def _note(self, updates: int, seconds: float, diagnosis: Diagnosis, message: str) -> None:
        """Keep the strongest diagnosis, of equal ones the first; count how often the root was found."""
        root, known = diagnosis.root, self._diagnosis
        if known is not None and known["cause"] == root.cause:
            known["times"] += 1
        if known is not None and REACTIONS.index(known["reaction"]) <= REACTIONS.index(diagnosis.reaction):
            return
        check = self._checks.get(root.check, CheckRecord())
        self._diagnosis = {
            **plain_verdict(root),
            "title": title(root),
            "reaction": diagnosis.reaction,
            "explained": [
                {"check": v.check, "cause": v.cause, "title": title(v), "message": v.message}
                for v in diagnosis.explained
            ],
            "text": message,
            "times": 1,
            "update": updates,
            "seconds": seconds,
            "passed_update": check.passed_update,
            "hours_lost": (seconds - (check.passed_seconds or 0.0)) / 3600,
        }

    def _count(self, updates: int, seconds: float, verdict: Verdict) -> None:
        check = self._checks.setdefault(verdict.check, CheckRecord(first_update=updates))
        before = check.verdict.get("status")
        counter = _COUNTERS[verdict.status]
        setattr(check, counter, getattr(check, counter) + 1)
        check.last_update = updates
        if verdict.status is Status.PASS:
            check.passed_update, check.passed_seconds = updates, seconds
        if verdict.status is Status.NO_POWER:
            check.silence = verdict.message
        # A verdict without power says nothing, so it changes nothing that is known.
        if verdict.status is not Status.NO_POWER or before in (None, Status.NO_POWER.value):
            check.verdict = plain_verdict(verdict)
            if before != verdict.status.value:
                self._changed(updates, seconds, verdict)

    def _changed(self, updates: int, seconds: float, verdict: Verdict) -> None:
        change = {
            "update": updates,
            "seconds": seconds,
            "check": verdict.check,
            "status": verdict.status.value,
            "cause": verdict.cause,
        }
        self._timeline.append(change)
        if len(self._timeline) > _TIMELINE:
            del self._timeline[_TIMELINE // 2]
            self._dropped += 1

    def content(
        self,
        *,
        source: str,
        run: Mapping[str, Any],
        versions: Mapping[str, str],
        settings: Mapping[str, Any],
        parts: Mapping[str, Any],
    ) -> dict[str, Any]:
        """What ``doctor.json`` holds, as JSON values.

        Args:
            source: What was examined: ``"run"``, ``"metrics"``, ``"trl"`` or ``"csv"``.
            run: Facts of the run beside those that are known here.
            versions: Of packages.
            settings: Of the doctor.
            parts: Facts of its parts, by name.
        """
        record = {
            "format": FORMAT,
            "source": source,
            "run": {"epochs": self._epochs, "updates": self._updates, "seconds": self.seconds, **run},
            "diagnosis": self._diagnosis,
            "checks": [{**check.verdict, **_counts(check)} for check in self._checks.values()],
            "timeline": self._timeline,
            "timeline_dropped": self._dropped,
            "curves": {name: curve.columns() for name, curve in self._curves.items()},
            "parts": parts,
            "settings": settings,
            "versions": versions,
        }
        result: dict[str, Any] = json_value(record)
        return result

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {
            "seconds": self.seconds,
            "checks": {name: asdict(check) for name, check in self._checks.items()},
            "timeline": self._timeline,
            "dropped": self._dropped,
            "diagnosis": self._diagnosis,
            "curves": {name: curve.state_dict() for name, curve in self._curves.items()},
            "epochs": self._epochs,
            "updates": self._updates,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._begin = self._clock() - state["seconds"]
        self._checks = {name: CheckRecord(**check) for name, check in state["checks"].items()}
        self._timeline, self._dropped = [dict(change) for change in state["timeline"]], state["dropped"]
        self._diagnosis = None if state["diagnosis"] is None else dict(state["diagnosis"])
        for name, curve in self._curves.items():
            curve.load_state_dict(state["curves"][name])
        self._epochs, self._updates = state["epochs"], state["updates"]


def plain_verdict(verdict: Verdict) -> dict[str, Any]:
    """A verdict as JSON values."""
    plain: dict[str, Any] = json_value({**vars(verdict), "status": verdict.status.value})
    return plain


def json_value(value: Any) -> Any:
    """The same in JSON's types: NaN and infinities become text, dataclasses mappings, anything unknown its text."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return json_value({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    if isinstance(value, Mapping):
        return {str(key): json_value(inner) for key, inner in value.items()}
    if isinstance(value, Sequence | set | frozenset):
        return [json_value(inner) for inner in value]
    return str(value)


def _counts(check: CheckRecord) -> dict[str, Any]:
    return {name: value for name, value in asdict(check).items() if name != "verdict"}
