"""What is computed: a few clusters, and the one machine on which it was measured too."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.scaling.model import Epoch, epoch
from benchmarks.scaling.parts import (
    H100,
    IDEAL,
    QWEN_1_5B,
    QWEN_7B,
    SMOLLM_135M,
    Accelerator,
    Architecture,
    Assumptions,
    Cluster,
    HostCosts,
    Workload,
)

RESULTS = Path(__file__).parents[1] / "performance.json"

MEASURED = HostCosts(episode=1.03e-3, sampled_token=1.1e-6, packed_token=0.3e-6, handed_token=0.25e-6)
"""Processor time on one core of a busy 2 GHz Xeon; used where `RESULTS` holds none."""


@dataclass(frozen=True)
class Scenario:
    """One row of the table.

    Attributes:
        name: What it is called.
        arch: The model.
        cluster: The machines.
        work: The epoch.
        given: The assumptions.
    """

    name: str
    arch: Architecture
    cluster: Cluster
    work: Workload
    given: Assumptions

    def epoch(self, host: HostCosts, **cluster: int) -> Epoch:
        """Its phases, with some of the machines changed.

        Args:
            host: Costs of the first process.
            **cluster: Changes of `Cluster`.
        """
        return epoch(self.arch, replace(self.cluster, **cluster), self.work, self.given, host)


LONG = Workload(prompts=512, samples=16, prompt_tokens=512, completion_tokens=2048, longest=8192, updates=4)
"""Reasoning: 8,192 answers of 2,048 tokens."""

SHORT = Workload(prompts=1024, samples=16, prompt_tokens=256, completion_tokens=128, longest=256, updates=4)
"""Short answers: 16,384 of 128 tokens."""

APART = Cluster(trainers=8, servers=64, accelerator=H100)
TOGETHER = Cluster(trainers=8, servers=8, accelerator=H100, colocated=True)

USUAL = Assumptions()

SCENARIOS = (
    Scenario("7B, 8 trainers, 64 servers, long answers", QWEN_7B, APART, LONG, USUAL),
    Scenario("7B, 8 trainers, 64 servers, short answers", QWEN_7B, APART, SHORT, USUAL),
    Scenario("7B, 8 trainers, 8 servers, long answers", QWEN_7B, replace(APART, servers=8), LONG, USUAL),
    Scenario("7B, 8 GPUs that take turns (sleep), long answers", QWEN_7B, TOGETHER, LONG, USUAL),
    Scenario(
        "1.5B, 1 GPU for both",
        QWEN_1_5B,
        Cluster(trainers=1, servers=1, accelerator=H100, colocated=True),
        Workload(prompts=32, samples=8, prompt_tokens=256, completion_tokens=512, longest=1024, updates=2),
        # The engine keeps its share of the memory: VLLMEngine's default.
        Assumptions(memory_share=0.45, sleeps=False, checkpointing=False),
    ),
)

CORES = Accelerator("2 cores, float32", flops=0.18e12, bandwidth=20e9, memory=24e9)
"""The machine of the demo: the rate of large matrix products as measured there; the bandwidth is assumed."""

DEMO = Scenario(
    "the demo on 2 cores",
    SMOLLM_135M,
    Cluster(trainers=1, servers=1, accelerator=CORES, colocated=True),
    Workload(prompts=16, samples=8, prompt_tokens=45, completion_tokens=13.7, longest=20, updates=2),
    replace(IDEAL, block=32, batch=128, memory_share=0.1, dtype_bytes=4, sleeps=False),
)

DEMO_MEASURED = {"rollout": 9.4, "training": 9.6}
"""Seconds: medians of the epochs 2 to 8 of one run of ``make demo``, whose answers had 13.7 tokens."""


def host_costs(path: Path = RESULTS) -> tuple[HostCosts, bool]:
    """The first process's costs, and whether they are those of ``benchmarks/performance.json``.

    Args:
        path: That file.
    """
    stored: Mapping[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    names = {
        "episode": "collector_us_per_episode",
        "sampled_token": "collector_us_per_sampled_token",
        "packed_token": "packing_us_per_token",
    }
    found = {field: 1e-6 * stored[key] for field, key in names.items() if key in stored}
    return replace(MEASURED, **found), len(found) == len(names)
