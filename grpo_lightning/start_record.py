"""What a checkpoint says of where its policy started, and whether a resumed run starts from the same."""

import json
from collections.abc import Mapping

from grpo_lightning.adapter_config import check_same
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.policy import Policy

START_KEY = "grpo_lightning_start"
"""Key of the record in a checkpoint."""

StartRecord = Mapping[str, str | None]
"""``adapter_config``: the adapter's configuration as JSON, None if all weights are trained. ``start_digest``: digest
of the adapter that training started from, None if it was fresh."""


def start_record(policy: Policy) -> dict[str, str | None]:
    """The record of a policy."""
    config = json.dumps(policy.adapter_config(), sort_keys=True) if policy.has_adapter else None
    return {"adapter_config": config, "start_digest": policy.start_digest}


def check_start(saved: StartRecord, policy: Policy, adapter: str | None) -> None:
    """Refuse a checkpoint that belongs to another kind of policy, or to one with another reference.

    Args:
        saved: The checkpoint's record.
        policy: The policy, loaded but not yet restored.
        adapter: The folder that it was loaded from, if any.

    Raises:
        ConfigurationError: Naming the difference.
    """
    current = start_record(policy)
    if (saved["adapter_config"] is None) != (current["adapter_config"] is None):
        kinds = {True: "full_finetuning=True", False: "an adapter (full_finetuning=False)"}
        raise ConfigurationError(
            f"expected {kinds[saved['adapter_config'] is None]}, with which the checkpoint was made, but got "
            f"{kinds[current['adapter_config'] is None]}"
        )
    if saved["start_digest"] != current["start_digest"]:
        if saved["start_digest"] is None:
            problem = f"a fresh adapter, but got adapter={adapter!r}; leave it out"
        elif adapter is None:
            problem = "the adapter that training started from, but got none; give adapter=..."
        else:
            problem = f"the adapter that training started from, but the content of {adapter} is another one's by now"
        raise ConfigurationError(f"to resume from this checkpoint expected {problem}")
    if saved["adapter_config"] is not None and current["adapter_config"] is not None:
        check_same(json.loads(saved["adapter_config"]), json.loads(current["adapter_config"]))
