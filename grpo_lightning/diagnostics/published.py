"""Reading back what was written for the engine."""

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from grpo_lightning.adapters import CONFIG_FILE, read_adapter_weights
from grpo_lightning.diagnostics.base_weights import sum_of_bits
from grpo_lightning.diagnostics.checks.engine import check_published, check_resolution
from grpo_lightning.diagnostics.examination import Run
from grpo_lightning.diagnostics.verdict import Status, Verdict
from grpo_lightning.policy import Policy


class PublishedAdapters:
    """The adapters of a run as they were published, one after the other.

    Args:
        dtype: Precision in which the engine was told to keep them; None or float32 leaves nothing to judge.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        self._dtype = None if dtype in (torch.float32, torch.float64) else dtype
        self._digests: dict[tuple[int, ...], int] = {}
        self._before: list[Tensor] = []

    def written(self, run: Run) -> Verdict:
        """Compare what was published last with the adapter that the policy holds now."""
        assert run.sync is not None
        policy, version, latest = run.module.policy, run.module.policy_version, run.sync.latest
        if latest is None or latest.version != version or not (latest.path / CONFIG_FILE).is_file():
            reason = "Nothing is known of what was published: LoRAWeightSync.publish is another, and leaves no files."
            return Verdict("published adapter", Status.NO_POWER, reason)
        published = read_adapter_weights(latest.path)
        config = json.loads((latest.path / CONFIG_FILE).read_text(encoding="utf-8"))
        earlier = self._digests.setdefault(_digest(published), version)
        return check_published(published, config, _adapter(policy), policy.adapter_config(), earlier != version)

    def resolution(self, run: Run) -> Verdict | None:
        """Compare the adapter's change with the engine's precision; None if that is fine, or nothing changed yet."""
        if self._dtype is None:
            return None
        now = [w.detach().to("cpu", torch.float32, copy=True) for w in _adapter(run.module.policy).values()]
        verdict = check_resolution(self._before, now, self._dtype, run.thresholds) if self._before else None
        # Updates that were lost one by one may arrive together.
        if verdict is None or verdict.cause != "adapter_resolution":
            self._before = now
        return verdict


def _adapter(policy: Policy) -> dict[str, Tensor]:
    """The adapter that a policy holds, under the names that files have."""
    from peft import get_peft_model_state_dict

    weights: dict[str, Tensor] = get_peft_model_state_dict(policy.model)
    return weights


def _digest(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    return tuple(sum_of_bits(tensors[name]) for name in sorted(tensors))
