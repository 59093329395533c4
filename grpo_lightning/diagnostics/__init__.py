"""What went wrong, by name: evidence of an update, checks as pure functions, verdicts."""

import importlib
from typing import TYPE_CHECKING, Any

from grpo_lightning.diagnostics.causes import CAUSES, Cause
from grpo_lightning.diagnostics.thresholds import Thresholds
from grpo_lightning.diagnostics.verdict import Status, Verdict

if TYPE_CHECKING:
    from grpo_lightning.diagnostics.evidence import MicroBatchEvidence

__all__ = ["CAUSES", "Cause", "MicroBatchEvidence", "Status", "Thresholds", "Verdict"]


def __getattr__(name: str) -> Any:
    # Reading what a run has written needs no torch; evidence does.
    if name == "MicroBatchEvidence":
        return importlib.import_module("grpo_lightning.diagnostics.evidence").MicroBatchEvidence
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
