"""Seconds of each phase of an epoch: pure functions of the parts."""

import math
from dataclasses import dataclass, replace
from typing import Literal

from benchmarks.scaling.parts import Architecture, Assumptions, Cluster, HostCosts, Workload


def batch_of(arch: Architecture, cluster: Cluster, context: float, given: Assumptions) -> int:
    """Sequences that one engine decodes at once: what was allowed, or what its cache holds.

    Args:
        arch: The model.
        cluster: The machines.
        context: Tokens of a sequence, in the mean over its life.
        given: The assumptions.

    Raises:
        ValueError: If the weights leave no room for one sequence.
    """
    room = given.memory_share * cluster.accelerator.memory - arch.parameters * given.dtype_bytes
    held = int(room / (arch.cache_bytes(given.dtype_bytes) * context))
    if held < 1:
        raise ValueError(f"expected room for a sequence of {context:g} tokens beside {arch.name}, but there is none")
    return min(given.batch, held)


def decode_step_seconds(arch: Architecture, cluster: Cluster, batch: int, context: float, given: Assumptions) -> float:
    """Seconds in which one engine makes one token for each sequence of its batch.

        max((weights + batch context cache) / bandwidth, (2 (linear + head) + 4 attention context) batch / operations)

    Args:
        arch: The model.
        cluster: The machines.
        batch: Sequences.
        context: Tokens that each sees.
        given: The assumptions.
    """
    read = (arch.linear + arch.head) * given.dtype_bytes + batch * context * arch.cache_bytes(given.dtype_bytes)
    attention = arch.layers * arch.heads * arch.head_size
    operations = batch * (2 * (arch.linear + arch.head) + 4 * attention * context)
    return given.adapter_cost * max(
        read / (given.bandwidth_share * cluster.accelerator.bandwidth),
        operations / (given.decode_share * cluster.accelerator.flops),
    )


def prefill_seconds(arch: Architecture, cluster: Cluster, work: Workload, given: Assumptions) -> float:
    """Seconds in which each engine computes its prompts: whole blocks once for each group, the rest for each sample.

    operations = tokens (2 linear + 2 attention prompt),  tokens = prompts (shared + samples (prompt - shared))
    """
    prompt = work.prompt_tokens
    shared = (prompt - 1) // given.block * given.block if given.prompts_shared else 0
    tokens = work.prompts * (shared + work.samples * (prompt - shared)) / cluster.servers
    attention = arch.layers * arch.heads * arch.head_size
    operations = tokens * (2 * arch.linear + 2 * attention * prompt)
    return given.adapter_cost * operations / (given.prefill_share * cluster.accelerator.flops)


def decode_seconds(arch: Architecture, cluster: Cluster, work: Workload, given: Assumptions) -> float:
    """Seconds in which the engines decode: with full batches up to the mean length, then the longest one alone.

    That nothing else runs beside the longest makes the tail an upper bound.
    """
    each = math.ceil(work.sequences / cluster.servers)
    context = work.prompt_tokens + work.completion_tokens / 2
    batch = min(each, batch_of(arch, cluster, context, given))
    full = each * work.completion_tokens / batch * decode_step_seconds(arch, cluster, batch, context, given)
    late = work.prompt_tokens + (work.completion_tokens + work.longest) / 2
    alone = (work.longest - work.completion_tokens) * decode_step_seconds(arch, cluster, 1, late, given)
    return full + alone


def collector_seconds(work: Workload, host: HostCosts) -> float:
    """Seconds of one core for the collector, beside the engines: episodes and their tokens, however many engines."""
    return host.episode * work.sequences + host.sampled_token * work.sampled_tokens


def packing_seconds(cluster: Cluster, work: Workload, host: HostCosts) -> float:
    """Seconds of one core for packing, and for handing all but the first process their parts."""
    tokens = work.sequences * (work.prompt_tokens + work.completion_tokens)
    handed = work.input_tokens * (cluster.trainers - 1) / cluster.trainers
    return host.packed_token * tokens + host.handed_token * handed


def pass_seconds(arch: Architecture, cluster: Cluster, work: Workload, given: Assumptions, *, training: bool) -> float:
    """Seconds of a pass over the rollout, shared among the trainers.

        forward  = 2 linear T + 2 head N + 4 attention pairs
        training = 3 passes through the frozen layers with checkpointing, 2 without; attention 4 and 3; head 2

    Args:
        arch: The model.
        cluster: The machines.
        work: The rollout.
        given: The assumptions.
        training: Forward and backward pass; else the forward pass alone.
    """
    again = int(given.checkpointing)
    linear, head, attention = (2 + again, 2, 3 + again) if training else (1, 1, 1)
    operations = (
        2 * linear * arch.linear * work.input_tokens
        + 2 * head * arch.head * work.sampled_tokens
        + 4 * attention * arch.layers * arch.heads * arch.head_size * work.pairs
    )
    return operations / (cluster.trainers * given.balance * given.train_share * cluster.accelerator.flops)


def gradient_seconds(arch: Architecture, cluster: Cluster, work: Workload, given: Assumptions) -> float:
    """Seconds in which the trainers add up the adapter's float32 gradients (ring), once an optimizer step."""
    share = 2 * (cluster.trainers - 1) / cluster.trainers
    moved = share * 4 * arch.adapter_parameters(given.rank)
    return work.updates * moved / (given.link_share * cluster.gradient_link)


def sync_seconds(arch: Architecture, cluster: Cluster, given: Assumptions) -> float:
    """Seconds from the last update until all engines have the adapter: one writes it, all read it, each loads it."""
    moved = 4 * arch.adapter_parameters(given.rank) * (1 + cluster.servers)
    return moved / (given.link_share * cluster.storage) + given.load


def sleep_seconds(arch: Architecture, cluster: Cluster, given: Assumptions) -> float:
    """Seconds of an epoch in which colocated engines move their weights out of the accelerator and back."""
    if not (cluster.colocated and given.sleeps):
        return 0.0
    return 2 * arch.parameters * given.dtype_bytes / (given.link_share * cluster.host_link)


@dataclass(frozen=True)
class Epoch:
    """Seconds of the phases of an epoch.

    Attributes:
        engine: Prefill and decoding.
        collector: The first process's part of the rollout, while the engines work.
        packing: Packing and handing out.
        score: The trainer's pass over the rollout before training.
        train: Forward and backward passes.
        gradients: Adding them up.
        sync: Publishing the adapter.
        sleep: Engines going to sleep and waking up.
        colocated: Whether engines and trainers take turns on the same accelerators.
    """

    engine: float
    collector: float
    packing: float
    score: float
    train: float
    gradients: float
    sync: float
    sleep: float
    colocated: bool

    @property
    def rollout(self) -> float:
        """The slower of engines and collector, which work at the same time."""
        return max(self.engine, self.collector)

    @property
    def training(self) -> float:
        """All that follows the rollout, but the publication."""
        return self.packing + self.score + self.train + self.gradients

    @property
    def in_turn(self) -> float:
        """An epoch in which nothing of rollout and training overlaps."""
        return self.rollout + self.training + self.sync + self.sleep

    @property
    def ahead(self) -> float | None:
        """An epoch with rollouts one step ahead; None where there is nothing to overlap on."""
        return None if self.colocated else max(self.rollout, self.training) + self.sync

    @property
    def bound(self) -> Literal["engine", "collector", "packing", "score", "train", "gradients", "sync", "sleep"]:
        """The longest phase."""
        phases = {name: value for name, value in vars(self).items() if name != "colocated"}
        return max(phases, key=phases.__getitem__)  # type: ignore[return-value]


def epoch(arch: Architecture, cluster: Cluster, work: Workload, given: Assumptions, host: HostCosts) -> Epoch:
    """All phases.

    Args:
        arch: The model.
        cluster: The machines.
        work: The rollout.
        given: The assumptions.
        host: Costs of the first process.
    """
    return Epoch(
        engine=prefill_seconds(arch, cluster, work, given) + decode_seconds(arch, cluster, work, given),
        collector=collector_seconds(work, host),
        packing=packing_seconds(cluster, work, host),
        score=pass_seconds(arch, cluster, work, given, training=False) if given.scores else 0.0,
        train=pass_seconds(arch, cluster, work, given, training=True),
        gradients=gradient_seconds(arch, cluster, work, given),
        sync=sync_seconds(arch, cluster, given),
        sleep=sleep_seconds(arch, cluster, given),
        colocated=cluster.colocated,
    )


def collector_limit(host: HostCosts, completion_tokens: float) -> float:
    """Sampled tokens a second that the collector takes at most, whatever the engines do."""
    return completion_tokens / (host.episode + host.sampled_token * completion_tokens)


def saturating_servers(
    arch: Architecture, cluster: Cluster, work: Workload, given: Assumptions, host: HostCosts, most: int = 4096
) -> int | None:
    """With how many engines the collector first takes longer than they do; None if not with so many.

    Args:
        arch: The model.
        cluster: The machines; their number of engines is varied.
        work: The rollout.
        given: The assumptions.
        host: Costs of the first process.
        most: Where to stop looking.
    """
    for servers in range(1, most + 1):
        found = epoch(arch, replace(cluster, servers=servers), work, given, host)
        if found.collector >= found.engine:
            return servers
    return None
