"""What is compared: settings of `GRPOModule` and `RolloutDataModule` by algorithm, and those that all share."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from benchmarks.learning.sums import MAX_TOKENS
from grpo_lightning import GRPOModule, RolloutDataModule

PRESETS = Path(__file__).parents[2] / "configs" / "algorithms"
"""Where the project keeps its presets, ``NAME.yaml``."""

Settings = dict[str, dict[str, Any]]
"""``model`` and ``data``."""

SHARED: Settings = {
    "model": {"full_finetuning": True, "dtype": "float32", "learning_rate": 3e-4, "weight_decay": 0.0},
    "data": {
        "prompts_per_rollout": 16,
        "samples_per_prompt": 8,
        "updates_per_rollout": 2,
        "inner_epochs": 2,
        "max_tokens": MAX_TOKENS,
        "max_prompt_tokens": 16,
        "temperature": 1.0,
        "plain_prompts": True,
    },
}
"""The same for all; they win over a preset's, its updates for each rollout too. The rate was tuned for GRPO."""

ALGORITHMS: dict[str, Settings] = {
    "grpo": {},
    "dr_grpo": {"model": {"aggregation": "constant"}, "data": {"advantage": "group_mean"}},
    "dapo": {"model": {"aggregation": "token", "clip_high": 0.28}, "data": {"max_refills": 2}},
    "gspo": {"model": {"ratio_level": "sequence", "clip_low": 3e-4, "clip_high": 4e-4}},
    "cispo": {"model": {"surrogate": "cispo", "aggregation": "token"}},
    "rloo": {
        "model": {"surrogate": "reinforce", "aggregation": "sequence_sum"},
        "data": {"advantage": "leave_one_out"},
    },
    "reinforce_pp": {"model": {"aggregation": "token"}, "data": {"advantage": "reinforce_pp"}},
    "sapo": {"model": {"surrogate": "sapo"}},
    "opo": {"model": {"surrogate": "reinforce", "aggregation": "token"}, "data": {"advantage": "opo"}},
    "gpg": {"model": {"surrogate": "reinforce", "aggregation": "token"}, "data": {"advantage": "group_mean"}},
    "maxrl": {"data": {"advantage": "maxrl"}},
    "kl_cov": {"model": {"surrogate": "kl_cov", "aggregation": "token"}},
    "tis": {"model": {"correction": "tis_token"}},
}
"""What each changes, where the project has no preset of that name."""


def own(name: str, presets: Path = PRESETS) -> tuple[Settings, str]:
    """What an algorithm changes, and where that comes from.

    Args:
        name: Name in `ALGORITHMS`.
        presets: Folder of presets.

    Returns:
        Its settings, see `changes`, and the preset's file name or ``"benchmark"``.

    Raises:
        ValueError: If the name is unknown.
    """
    if name not in ALGORITHMS:
        raise ValueError(f"expected an algorithm of {', '.join(ALGORITHMS)}, but got {name!r}")
    path = presets / f"{name}.yaml"
    if path.is_file():
        return changes(yaml.safe_load(path.read_text(encoding="utf-8")) or {}), path.name
    return changes(ALGORITHMS[name]), "benchmark"


def changes(settings: Mapping[str, Mapping[str, Any] | None]) -> Settings:
    """Settings of module and data module that differ from the default, or are shared here.

    Args:
        settings: ``model`` and ``data``, as in a configuration; the rest of one is left out.
    """
    owners = {"model": GRPOModule, "data": RolloutDataModule}
    defaults = {
        part: {name: parameter.default for name, parameter in inspect.signature(owner).parameters.items()}
        for part, owner in owners.items()
    }
    return {
        part: {
            name: value
            for name, value in (settings.get(part) or {}).items()
            if value != defaults[part].get(name) or name in SHARED[part]
        }
        for part in owners
    }


def combined(mine: Mapping[str, Mapping[str, Any]], shared: Mapping[str, Mapping[str, Any]] = SHARED) -> Settings:
    """All settings of a run.

    Args:
        mine: The algorithm's.
        shared: Those of all, which win.
    """
    return {part: {**mine.get(part, {}), **values} for part, values in shared.items()}


def overruled(mine: Mapping[str, Mapping[str, Any]], shared: Mapping[str, Mapping[str, Any]] = SHARED) -> list[str]:
    """Names of an algorithm's settings that the shared ones replace.

    Args:
        mine: The algorithm's.
        shared: Those of all.
    """
    return [
        name
        for part, values in mine.items()
        for name, value in values.items()
        if shared[part].get(name, value) != value
    ]
