"""What the doctor found, as one HTML page."""

from grpo_lightning.diagnostics.report.page import render

__all__ = ["render"]
