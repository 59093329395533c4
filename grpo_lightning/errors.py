"""Errors that a user meets: each derives from `GRPOError` and from the built-in that fits it."""


class GRPOError(Exception):
    """Base of all errors of grpo-lightning."""


class ConfigurationError(GRPOError, ValueError):
    """Settings that cannot work together, found before expensive work starts."""


class CheckpointError(ConfigurationError):
    """A checkpoint is broken or does not fit this run."""


class WriteError(GRPOError, OSError):
    """A file could not be written whole; nothing of it was left, and what was there before is untouched."""


class RewardError(GRPOError, RuntimeError):
    """A reward function raised, ran out of time, or returned something that is not a reward."""


class RolloutError(GRPOError, RuntimeError):
    """A rollout could not be made, or nothing in it can be trained on."""


class LogprobValidationError(RolloutError):
    """The engine's sample-time logprobs are missing, not finite, or not one per sampled token."""


class LedgerError(RolloutError):
    """The tokens of a trajectory contradict what is said of them: lengths, sources, logprobs or turns."""


class StaleRolloutError(RolloutError):
    """The engine does not serve the policy version that the trainer holds."""


class EngineDiedError(RolloutError):
    """The engine's process ended while it was needed."""


class DegeneracyError(GRPOError, RuntimeError):
    """A detector found that training cannot work as it is; the message shows the evidence."""


class RatioDegeneracyError(DegeneracyError):
    """The PPO ratios carry no information about the update."""
