"""The faults, by the place where somebody would make them."""

from benchmarks.faults.zoo import forward, loss, optimizer, publication, rollout, sampler

__all__ = ["forward", "loss", "optimizer", "publication", "rollout", "sampler"]
