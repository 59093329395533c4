"""Whether a checkpoint fits the run that is to be resumed from it."""

import json
from collections.abc import Mapping

from torch import Tensor

from grpo_lightning.adapter_config import check_same
from grpo_lightning.errors import CheckpointError
from grpo_lightning.fingerprint import base_fingerprint
from grpo_lightning.policy import Policy

STATE_KEY = "grpo_lightning"
"""Where a checkpoint holds what is not weights, beside Lightning's own entries."""

StartRecord = Mapping[str, str | None]
"""Where a policy started. ``base``: fingerprint of the model. ``adapter_config``: the adapter's configuration as JSON,
None if all weights are trained. ``start_digest``: digest of the adapter that training started from, None if it was
fresh."""


def start_record(policy: Policy) -> dict[str, str | None]:
    """The record of a policy that was loaded and not trained yet."""
    config = json.dumps(policy.adapter_config(), sort_keys=True) if policy.has_adapter else None
    return {
        "base": base_fingerprint(policy.causal_lm),
        "adapter_config": config,
        "start_digest": policy.start_digest,
    }


def check_start(saved: StartRecord, current: StartRecord, model: str, adapter: str | None) -> None:
    """Refuse a checkpoint of another kind of policy, of another base, or with another reference.

    Args:
        saved: The checkpoint's record.
        current: The record of the policy as it was loaded.
        model: The model that it was loaded from.
        adapter: The folder that its adapter was loaded from, if any.

    Raises:
        CheckpointError: Naming the difference.
    """
    if (saved["adapter_config"] is None) != (current["adapter_config"] is None):
        kinds = {True: "full_finetuning=True", False: "an adapter (full_finetuning=False)"}
        raise CheckpointError(
            f"expected {kinds[saved['adapter_config'] is None]}, with which the checkpoint was made, but got "
            f"{kinds[current['adapter_config'] is None]}"
        )
    if saved["base"] != current["base"]:
        raise CheckpointError(
            f"the checkpoint's run started from another base model than {model}: its weights differ. Give the model "
            "that the run started from (hyper_parameters in the checkpoint name it)"
        )
    if saved["start_digest"] != current["start_digest"]:
        if saved["start_digest"] is None:
            problem = f"a fresh adapter, but got adapter={adapter!r}; leave it out"
        elif adapter is None:
            problem = "the adapter that training started from, but got none; give adapter=..."
        else:
            problem = f"the adapter that training started from, but the content of {adapter} is another one's by now"
        raise CheckpointError(f"to resume from this checkpoint expected {problem}")
    if saved["adapter_config"] is not None and current["adapter_config"] is not None:
        check_same(json.loads(saved["adapter_config"]), json.loads(current["adapter_config"]))


def check_weights(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint with other weights than those that are trained.

    Lightning's own check is off, because checkpoints leave the frozen weights out.

    Args:
        found: The checkpoint's ``state_dict``.
        expected: What is trained.

    Raises:
        CheckpointError: Naming what is missing, unknown, or of another shape.
    """
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unknown:
        raise CheckpointError(
            f"the checkpoint does not fit this policy: {len(missing)} parameters are missing {missing[:3]}, "
            f"{len(unknown)} are unknown {unknown[:3]}. Are model, lora_targets and lora_rank the same?"
        )
    wrong = [name for name in expected if found[name].shape != expected[name].shape]
    if wrong:
        raise CheckpointError(
            f"the checkpoint does not fit this policy: {wrong[0]} has shape {tuple(found[wrong[0]].shape)} there, but "
            f"{tuple(expected[wrong[0]].shape)} here ({len(wrong)} in all). Are model and lora_rank the same?"
        )
