"""Ending the passes over a rollout when the policy has gone far enough from where it was sampled."""

from typing import Any

from torch import Tensor

from grpo_lightning.errors import ConfigurationError
from grpo_lightning.functional import kl_k3


def check_max_kl(max_kl: float | None) -> None:
    """Refuse a limit that ends every epoch at once.

    Raises:
        ConfigurationError: If it is not positive.
    """
    if max_kl is not None and not max_kl > 0:
        raise ConfigurationError(f"expected max_kl > 0 in nats a token, or none, but got {max_kl}")


def is_beyond(log_ratio: Tensor, max_kl: float) -> bool:
    """Whether an update's tokens are too far from the policy that sampled them.

        mean_t (r_t - 1 - log r_t) > max_kl

    ``r`` is the ratio of each token to the old policy, before any clip and whatever the ratio level. The mean is that
    of ``ppo/kl_k3``, an estimate of ``KL(old || new)`` from samples of the old policy. The update itself is taken; it
    becomes the last of its epoch, and the next epoch samples anew.

    Source: early stopping of PPO in Spinning Up, https://spinningup.openai.com/en/latest/algorithms/ppo.html
    Peers: none known
    Departs: Spinning Up estimates the divergence by the mean of ``-log r``, and stops at 1.5 times its target.
    Use: with several updates per rollout, as a bound that does not depend on clips or learning rate.

    Args:
        log_ratio: Of the update's tokens to the policy that sampled them, ``[N]``.
        max_kl: Limit in nats a token, above 0.
    """
    return len(log_ratio) > 0 and float(kl_k3(-log_ratio, log_ratio * 0).mean()) > max_kl


def end_epoch(trainer: Any) -> None:
    """Let Lightning treat the present batch as the last of its epoch: validation and checkpoints come as after any.

    Args:
        trainer: In whose ``optimizer_step`` this is called, in every process.
    """
    loop = trainer.fit_loop.epoch_loop
    loop.batch_progress.is_last_batch = True
    # Lightning counts to the batch at which to validate; it counts anew in the next epoch.
    if trainer.val_check_batch != float("inf") and trainer.check_val_every_n_epoch is not None:
        trainer.val_check_batch = loop.batch_idx + 1
