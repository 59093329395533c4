"""What went wrong, by name: evidence of an update, checks as pure functions, verdicts."""

from grpo_lightning.diagnostics.evidence import MicroBatchEvidence
from grpo_lightning.diagnostics.verdict import Status, Verdict

__all__ = ["MicroBatchEvidence", "Status", "Verdict"]
