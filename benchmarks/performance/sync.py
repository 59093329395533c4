"""Section ``sync``: from changed weights to an engine that serves them."""

import math
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.performance.engines import engine_kind, make_engine
from benchmarks.performance.paired import shown, spread
from grpo_lightning import GRPOModule
from grpo_lightning.adapter_config import fresh_config
from grpo_lightning.adapters import write_adapter
from grpo_lightning.callbacks import LoRAWeightSync
from grpo_lightning.rollout.engine import EngineSpec, RolloutEngine
from grpo_lightning.rollout.types import AdapterRef, SamplingSettings

RANK = 16
"""The rank of the headline."""

_RANKS = (8, 16, 32, 64)
_REPEATS = 12
_PROMPT = tuple(range(3, 23))


@contextmanager
def served(model: str, rank: int) -> Iterator[tuple[GRPOModule, RolloutEngine, LoRAWeightSync]]:
    """A module with a fresh adapter and a running engine for it.

    Args:
        model: Folder of the model.
        rank: Of the adapter.
    """
    engine, sync = make_engine("bfloat16"), LoRAWeightSync()
    module = GRPOModule(model, dtype="bfloat16", lora_rank=rank, lora_alpha=2.0 * rank)
    try:
        engine.start(EngineSpec(model, rank, max_length=256, max_concurrency=64))
        module.configure_model()
        engine.wait_until_ready()
        yield module, engine, sync
    finally:
        engine.close()
        sync._clean()


def publications(model: str, rank: int, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of publications after changes of the weights; the first is not counted.

    Args:
        model: Folder of the model.
        rank: Of the adapter.
        repeats: Counted publications.

    Returns:
        ``total``, of which ``load`` is the engine's part and ``write`` the rest, and ``answer``: a single token by the
        weights just published, which is not part of the total.
    """
    found: dict[str, list[float]] = {"total": [], "write": [], "load": [], "answer": []}
    settings = SamplingSettings(max_tokens=1, temperature=1.0, stop_token_ids=())
    with served(model, rank) as (module, engine, sync):
        loads: list[float] = []
        load = engine.load_adapter

        def timed(ref: AdapterRef) -> None:
            begin = time.perf_counter()
            load(ref)
            loads.append(time.perf_counter() - begin)

        engine.load_adapter = timed  # type: ignore[method-assign]
        for number in range(-1, repeats):
            with torch.no_grad():
                for parameter in module.policy.trainable_parameters().values():
                    parameter.add_(torch.randn_like(parameter), alpha=1e-3)
            module.weights_changed()
            begin = time.perf_counter()
            sync.publish(module, engine)
            total = time.perf_counter() - begin
            begin = time.perf_counter()
            generation = engine.run(engine.generate(_PROMPT, settings, seed=0))
            answer = time.perf_counter() - begin
            assert generation.policy_version == module.policy_version, "the answer is of the weights just published"
            if number >= 0:
                parts = {"total": total, "write": total - loads[-1], "load": loads[-1], "answer": answer}
                for name, seconds in parts.items():
                    found[name].append(round(1000 * seconds, 2))
    return found


def shapes(model: Any) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the seven projections of a Llama layer.

    Args:
        model: Its configuration.
    """
    hidden, inner = model.hidden_size, model.intermediate_size
    heads = hidden // model.num_attention_heads
    keys = heads * model.num_key_value_heads
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, keys),
        "self_attn.v_proj": (hidden, keys),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }


MODELS = {
    "1B": {"layers": 16, "hidden": 2048, "inner": 8192, "heads": 32, "key_heads": 8},
    "3B": {"layers": 28, "hidden": 3072, "inner": 8192, "heads": 24, "key_heads": 8},
    "8B": {"layers": 32, "hidden": 4096, "inner": 14336, "heads": 32, "key_heads": 8},
    "70B": {"layers": 80, "hidden": 8192, "inner": 28672, "heads": 64, "key_heads": 8},
}
"""Sizes of Llama 3's models, of which the adapter alone is made."""


def writing(name: str, rank: int, repeats: int) -> dict[str, Any]:
    """Writing the adapter of a larger model, in memory where there is tmpfs.

    Args:
        name: One of `MODELS`.
        rank: Of the adapter.
        repeats: How often it is written.
    """
    from transformers import LlamaConfig

    sizes = MODELS[name]
    config = LlamaConfig(
        hidden_size=sizes["hidden"],
        intermediate_size=sizes["inner"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["key_heads"],
    )
    weights = {}
    for layer in range(sizes["layers"]):
        for projection, (inputs, outputs) in shapes(config).items():
            stem = f"base_model.model.model.layers.{layer}.{projection}"
            weights[f"{stem}.lora_A.weight"] = torch.zeros(rank, inputs)
            weights[f"{stem}.lora_B.weight"] = torch.zeros(outputs, rank)
    adapter = fresh_config(rank=rank, alpha=2.0 * rank, dropout=0.0, targets="all-linear")
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    milliseconds = []
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        for number in range(-1, repeats):
            begin = time.perf_counter()
            write_adapter(weights, adapter, Path(folder) / "adapter")
            if number >= 0:
                milliseconds.append(round(1000 * (time.perf_counter() - begin), 2))
            shutil.rmtree(Path(folder) / "adapter")
    return {"bytes": sum(tensor.nbytes for tensor in weights.values()), "write": milliseconds}


def measure(size: str) -> dict[str, Any]:
    """Every rank with an engine of its own, then writing alone for larger models.

    Args:
        size: ``"full"`` or ``"smoke"``.
    """
    from grpo_lightning.demo import prepare_model

    model = str(prepare_model())
    ranks, repeats, names = (_RANKS, _REPEATS, MODELS) if size == "full" else ((RANK,), 2, {"1B": MODELS["1B"]})
    found = {}
    for rank in ranks:
        found[str(rank)] = publications(model, rank, repeats)
        print(f"rank {rank}: {found[str(rank)]['total']} ms", flush=True)
    return {
        "engine": engine_kind(),
        "ranks": found,
        "models": {name: writing(name, RANK, max(3, repeats // 2)) for name in names},
    }


def headline(result: Mapping[str, Any]) -> dict[str, float]:
    """Median of the demo's model at rank 16."""
    return {"sync_milliseconds": spread(result["ranks"][str(RANK)]["total"])["median"]}


def table(result: Mapping[str, Any]) -> str:
    """Markdown: by rank, then by size of the model."""
    lines = [
        "| Rank, demo's model | Update to ready, ms | written, ms | loaded, ms | first token after it, ms |",
        "|---|---|---|---|---|",
    ]
    for rank, found in result["ranks"].items():
        cells = [shown(spread(found[name]), ".0f") for name in ("total", "write", "load", "answer")]
        lines.append(f"| {rank} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Medians of {len(next(iter(result['ranks'].values()))['total'])} publications, least and largest in brackets.",
        "",
        f"| Adapter of rank {RANK} for a Llama of | Size | written, ms |",
        "|---|---|---|",
    ]
    for name, found in result["models"].items():
        lines.append(f"| {name} | {_size(found['bytes'])} | {shown(spread(found['write']), '.0f')} |")
    return "\n".join(lines)


def _size(count: int) -> str:
    """Bytes with three digits.

    >>> _size(19_500_000)
    '18.6 MiB'
    """
    mib = count / 2**20
    return f"{mib:.{max(0, 2 - math.floor(math.log10(mib)))}f} MiB"
