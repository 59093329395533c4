"""Callbacks for `Trainer`; `GRPOModule` adds the first three by itself where they are missing."""

from grpo_lightning.callbacks.adapter_export import AdapterExport
from grpo_lightning.callbacks.completions import CompletionLog
from grpo_lightning.callbacks.epoch_line import EpochLine
from grpo_lightning.callbacks.lora_sync import LoRAWeightSync
from grpo_lightning.callbacks.perturbation import ParameterPerturbation
from grpo_lightning.callbacks.prediction_writer import PredictionWriter
from grpo_lightning.callbacks.ratio_degeneracy import RatioDegeneracyDetector
from grpo_lightning.callbacks.run_doctor import RunDoctor
from grpo_lightning.callbacks.run_summary import RunSummary
from grpo_lightning.callbacks.trajectory_store import TrajectoryStore

__all__ = [
    "AdapterExport",
    "CompletionLog",
    "EpochLine",
    "LoRAWeightSync",
    "ParameterPerturbation",
    "PredictionWriter",
    "RatioDegeneracyDetector",
    "RunDoctor",
    "RunSummary",
    "TrajectoryStore",
]
