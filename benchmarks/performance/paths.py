"""Section ``paths``: each way that is taken for its speed against the plain one, in turns."""

import contextlib
import ctypes
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from peft.tuners.lora.layer import Linear

from benchmarks.performance.batches import Shape, made_batch
from benchmarks.performance.engines import engine_kind
from benchmarks.performance.growth_parts import collected, encoder
from benchmarks.performance.paired import alternate, ratio, shown, spread
from grpo_lightning import GRPOModule, VLLMEngine, attention
from grpo_lightning.adapters import save_adapter
from grpo_lightning.demo import prepare_model
from grpo_lightning.freed_memory import keep_freed_memory
from grpo_lightning.functional import logprobs
from grpo_lightning.lora_linear import FusedLoRALinear
from grpo_lightning.rollout.engine import EngineSpec
from grpo_lightning.rollout.types import AdapterRef

_STEP = {"full": Shape(8, 8, 46, 64), "smoke": Shape(1, 2, 16, 8)}
_ROLLOUT = {"full": Shape(8, 8, 45, 32), "smoke": Shape(2, 2, 45, 4)}
_PAIRS, _STARTS, _RANK = {"full": 5, "smoke": 1}, {"full": 3, "smoke": 1}, 16
_MMAP_THRESHOLD, _TRIM_THRESHOLD, _GLIBC_DEFAULT = -3, -1, 128 * 2**10


@contextlib.contextmanager
def _pefts_lora(module: Any) -> Iterator[None]:
    fused = [layer for layer in module.modules() if type(layer) is FusedLoRALinear]
    for layer in fused:
        layer.__class__ = Linear
    try:
        yield
    finally:
        for layer in fused:
            layer.__class__ = FusedLoRALinear


@contextlib.contextmanager
def _freed_memory_goes_back(module: Any) -> Iterator[None]:
    mallopt = ctypes.CDLL(None).mallopt
    for setting in (_MMAP_THRESHOLD, _TRIM_THRESHOLD):
        mallopt(setting, _GLIBC_DEFAULT)
    try:
        yield
    finally:
        keep_freed_memory()


TRAINING: dict[str, Callable[[Any], AbstractContextManager[Any]]] = {
    "LoRA layers as one operation, against PEFT's": _pefts_lora,
    "attention in float32, against bfloat16": lambda module: patch.object(
        attention, "attention_dtype", lambda dtype, device: dtype
    ),
    "logits in blocks, against whole chunks": lambda module: patch.object(logprobs, "BLOCK_BYTES", 2**40),
    "freed memory kept, against glibc's default": _freed_memory_goes_back,
}
"""What takes each fast path of the training step away from a module."""

ENGINE: dict[str, dict[str, Any]] = {
    "as shipped": {},
    "vLLM's worker in the engine core's process, against one of its own": {
        "engine_args": {"distributed_executor_backend": "mp"}
    },
    "LoRA as matrix products, norm kernels, one random number a token, against vLLM's": {"plugins": ""},
}
"""Engines without one of the fast paths: settings of `VLLMEngine`, or the plugins that vLLM may load."""


def measure(size: str) -> dict[str, Any]:
    """Steps of one module in turns, then rollouts of engines that are started in turns, in bfloat16.

    Args:
        size: ``"full"`` or ``"smoke"``.
    """
    return {
        "steps": _steps(size),
        "rollouts": _rollouts(size) if engine_kind() == "vllm" else {},
        "shapes": {"step": vars(_STEP[size]), "rollout": vars(_ROLLOUT[size])},
    }


def _steps(size: str) -> dict[str, dict[str, list[float]]]:
    keep_freed_memory()
    module: Any = GRPOModule(str(prepare_model()), dtype="bfloat16", lora_rank=_RANK)
    module.configure_model()
    batch = made_batch(_STEP[size])

    def step(context: AbstractContextManager[Any]) -> float:
        with context:
            begin = time.perf_counter()
            loss, _ = module.batch_loss(batch)
            loss.backward()
            seconds = time.perf_counter() - begin
        module.zero_grad(set_to_none=False)
        return seconds

    return {
        name: alternate(
            {"with": lambda: step(contextlib.nullcontext()), "without": lambda off=off: step(off(module))},  # type: ignore[misc]
            _PAIRS[size],
            warmups=1,
            tell=lambda side, number, seconds, name=name: print(f"{name}: {side} {number} {seconds:.2f} s", flush=True),  # type: ignore[misc]
        )
        for name, off in TRAINING.items()
    }


def _rollouts(size: str) -> dict[str, dict[str, list[float]]]:
    with tempfile.TemporaryDirectory() as folder:
        module: Any = GRPOModule(str(prepare_model()), dtype="bfloat16", lora_rank=_RANK)
        module.configure_model()
        save_adapter(module.policy, Path(folder) / "adapter")
        adapter = AdapterRef("performance", 1, Path(folder) / "adapter", 0)
        seconds = alternate(
            {name: lambda given=given: _rollout(adapter, _ROLLOUT[size], **given) for name, given in ENGINE.items()},  # type: ignore[misc]
            _STARTS[size],
            tell=lambda side, number, result: print(f"{side}: {number} {result:.2f} s", flush=True),
        )
    shipped = seconds.pop("as shipped")
    return {name: {"with": shipped, "without": without} for name, without in seconds.items()}


def _rollout(adapter: AdapterRef, shape: Shape, plugins: str | None = None, **settings: Any) -> float:
    """Seconds of the second rollout of a fresh engine."""
    model = str(prepare_model())
    chat, engine = encoder(model), VLLMEngine(dtype="bfloat16", **settings)
    with patch.dict(os.environ, {} if plugins is None else {"VLLM_PLUGINS": plugins}):
        try:
            length = shape.prompt_tokens + shape.completion_tokens + 64
            engine.start(EngineSpec(model, _RANK, length, shape.prompts * shape.samples))
            engine.wait_until_ready()
            engine.load_adapter(adapter)
            engine.run(collected(engine, chat, shape, "warm"))
            begin = time.perf_counter()
            engine.run(collected(engine, chat, shape, "timed"))
            return time.perf_counter() - begin
        finally:
            engine.close()


def headline(result: Mapping[str, Any]) -> dict[str, float]:
    """The least gain of all paths."""
    paths = [*result["steps"].values(), *result["rollouts"].values()]
    return {"paths_least_gain": min(ratio(path["without"], path["with"])["median"] for path in paths)}


def table(result: Mapping[str, Any]) -> str:
    """A row a path."""
    lines = ["| path | with it, s | without it, s | without / with |", "|---|---|---|---|"]
    for part, what in (("steps", "training step"), ("rollouts", "rollout")):
        for name, path in result[part].items():
            cells = [f"{what}: {name}", *(shown(spread(path[side])) for side in ("with", "without"))]
            lines.append(f"| {' | '.join([*cells, shown(ratio(path['without'], path['with']))])} |")
    step, rollout = result["shapes"]["step"], result["shapes"]["rollout"]
    sizes = [
        f"{s['prompts']} prompts of {s['prompt_tokens']} tokens, {s['samples']} samples of {s['completion_tokens']}"
        for s in (step, rollout)
    ]
    return "\n".join([*lines, "", f"The step has {sizes[0]}; the rollout {sizes[1]}, each in a fresh engine."])
