"""Two faults in one run: the root cause must come first."""

PAIRS: dict[str, tuple[str, str]] = {
    "old_is_current + kl_sign": ("old_is_current", "kl_sign"),
    "logprobs_zero_filled + off_by_one_shift": ("logprobs_zero_filled", "off_by_one_shift"),
    "adapter_partly_loaded + loss_sign": ("adapter_partly_loaded", "loss_sign"),
    "frozen_parameters + loss_sign": ("frozen_parameters", "loss_sign"),
    "sync_one_behind + kl_sign": ("sync_one_behind", "kl_sign"),
    "advantages_zeroed + frozen_policy": ("advantages_zeroed", "frozen_policy"),
    "adapter_ignored + temperature_missing_in_trainer": ("adapter_ignored", "temperature_missing_in_trainer"),
    "wrong_count_of_micro_batch + steps_skipped": ("wrong_count_of_micro_batch", "steps_skipped"),
    "positions_off_by_one + environment_in_mask": ("positions_off_by_one", "environment_in_mask"),
    "advantages_sign + old_not_detached": ("advantages_sign", "old_not_detached"),
}
"""By name: the fault that is the root, and the other."""
