"""Section ``paths``: each way that is taken for its speed against the plain one, in turns."""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from peft.tuners.lora.layer import Linear

from benchmarks.performance.batches import Shape, made_batch
from benchmarks.performance.engines import engine_kind
from benchmarks.performance.growth_parts import collected, encoder
from benchmarks.performance.paired import alternate, ratio, shown, spread
from benchmarks.performance.training_step import GIVEN_BACK, PACKED, step_point
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
_PAIRS, _STARTS, _REPEATS = {"full": 5, "smoke": 1}, {"full": 3, "smoke": 1}, {"full": 3, "smoke": 1}
_RANK = 16
_COMPILED = "layers compiled (`torch_compile`), against not"
_MEMORY = "freed memory kept, against glibc's default"


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


TRAINING: dict[str, Callable[[Any], AbstractContextManager[Any]]] = {
    "LoRA layers as one operation, against PEFT's": _pefts_lora,
    "attention in float32, against bfloat16": lambda module: patch.object(
        attention, "attention_dtype", lambda dtype, device: dtype
    ),
    "logits in blocks, against whole chunks": lambda module: patch.object(logprobs, "BLOCK_BYTES", 2**40),
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
    plain, compiled = _module(), _module(torch_compile=True)
    batch = made_batch(_STEP[size])

    def step(module: Any, context: AbstractContextManager[Any]) -> float:
        with context:
            begin = time.perf_counter()
            loss, _ = module.batch_loss(batch)
            loss.backward()
            seconds = time.perf_counter() - begin
        module.zero_grad(set_to_none=False)
        return seconds

    whole = partial(step, plain, contextlib.nullcontext())
    sides = {
        name: (whole, lambda off=off: step(plain, off(plain)))  # type: ignore[misc]
        for name, off in TRAINING.items()
    }
    sides[_COMPILED] = (partial(step, compiled, contextlib.nullcontext()), whole)
    # What a process has taken from the system and kept, it goes on using: this needs processes of its own.
    sides[_MEMORY] = (partial(_fresh, PACKED, size), partial(_fresh, GIVEN_BACK, size))
    return {
        name: alternate({"with": taken, "without": left}, _PAIRS[size], warmups=1, tell=partial(_tell, name))
        for name, (taken, left) in sides.items()
    }


def _fresh(side: str, size: str) -> float:
    return step_point(side, _STEP[size], _REPEATS[size])["seconds"]


def _module(**settings: Any) -> Any:
    module = GRPOModule(str(prepare_model()), dtype="bfloat16", lora_rank=_RANK, **settings)
    module.configure_model()
    return module


def _tell(path: str, side: str, number: int, seconds: float) -> None:
    print(f"{path}: {side} {number} {seconds:.2f} s", flush=True)


def _rollouts(size: str) -> dict[str, dict[str, list[float]]]:
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(_module().policy, Path(folder) / "adapter")
        adapter = AdapterRef("performance", 1, Path(folder) / "adapter", 0)
        seconds = alternate(
            {name: lambda given=given: _rollout(adapter, _ROLLOUT[size], **given) for name, given in ENGINE.items()},  # type: ignore[misc]
            _STARTS[size],
            tell=partial(_tell, "rollout"),
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
