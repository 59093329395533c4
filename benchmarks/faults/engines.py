"""Engines that outlive the runs that use them: starting vLLM costs more than the runs do."""

import gc
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from grpo_lightning import TransformersEngine, VLLMEngine
from grpo_lightning.adapters import read_adapter_config, read_adapter_weights
from grpo_lightning.rollout.engine import EngineSpec, RolloutEngine
from grpo_lightning.rollout.types import AdapterRef

_LONGEST, _AT_ONCE = 512, 128
"""Tokens of a sequence and requests: enough for every run."""


class SharedVLLMEngine(VLLMEngine):
    """A vLLM engine that between runs only forgets the adapter.

    Args:
        model: Another model than the run's.
        unsafe_args: Engine arguments that `VLLMEngine` refuses.
        **settings: Arguments of `VLLMEngine`.
    """

    def __init__(
        self, *, model: Callable[[str], str] | None = None, unsafe_args: dict[str, Any] | None = None, **settings: Any
    ) -> None:
        super().__init__(**settings)
        self._settings |= unsafe_args or {}
        self._other_model = model
        self._copy: str | None = None

    def start(self, spec: EngineSpec) -> None:
        """Start for all runs of the model at once; again, if an earlier run killed it."""
        if self._spec is not None and self._died():
            self.really_close()
        if self._spec is None:
            if self._other_model is not None:
                self._copy = self._other_model(spec.model)
            model = self._copy or spec.model
            super().start(replace(spec, model=model, max_length=_LONGEST, max_concurrency=_AT_ONCE, lora_rank=16))

    def _died(self) -> bool:
        llm = self._llm
        if llm is None or not llm.done():
            return llm is None
        return llm.cancelled() or llm.exception() is not None or bool(llm.result().errored)

    def close(self) -> None:
        """Forget the adapter."""
        self._current = None

    def really_close(self) -> None:
        """Stop the engine."""
        super().close()
        if self._copy is not None:
            shutil.rmtree(self._copy, ignore_errors=True)


class SharedTransformersEngine(TransformersEngine):
    """The same without vLLM."""

    def really_close(self) -> None:
        """Drop the model."""
        self.close()


class MergedEngine(SharedTransformersEngine):
    """An engine that serves adapters by adding them to a bfloat16 copy of its weights."""

    def _loaded(self) -> Any:
        fresh = self._model is None
        model = super()._loaded()
        if fresh:
            self._pristine = {name: w.detach().clone() for name, w in model.state_dict().items()}
        return model

    def load_adapter(self, ref: AdapterRef) -> None:
        """Merge."""
        with self._lock:
            self._loaded()
            self._current = ref

    def _activate(self, ref: AdapterRef | None) -> Any:
        model = self._loaded()
        model.load_state_dict(self._pristine)
        if ref is not None:
            config, weights = read_adapter_config(ref.path), read_adapter_weights(ref.path)
            parameters = dict(model.named_parameters())
            for name, a in weights.items():
                if ".lora_A" in name:
                    delta = config["lora_alpha"] / config["r"] * weights[name.replace("lora_A", "lora_B")] @ a
                    target = parameters[name.removeprefix("base_model.model.").replace("lora_A.", "")]
                    target.data = (target.data.bfloat16() + delta.bfloat16()).to(target.dtype)
        return model


def disturbed_copy(model: str) -> str:
    """A copy of a model whose weights are all a little different: another checkpoint of the same training."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(tempfile.mkdtemp(prefix="other-base-"))
    other: Any = AutoModelForCausalLM.from_pretrained(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in other.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.mul_(1 + 0.02 * noise.to(parameter.dtype))
    other.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return str(folder)


VLLM: dict[str, Callable[[], Any]] = {
    "float32": lambda: SharedVLLMEngine(dtype="float32"),
    "bfloat16": lambda: SharedVLLMEngine(dtype="bfloat16"),
    "raw logprobs": lambda: SharedVLLMEngine(dtype="float32", unsafe_args={"logprobs_mode": "raw_logprobs"}),
    "other base": lambda: SharedVLLMEngine(dtype="float32", model=disturbed_copy),
    "merged": lambda: MergedEngine(dtype="float32"),
}
"""Engines of the whole matrix."""

TRANSFORMERS: dict[str, Callable[[], Any]] = {
    "float32": lambda: SharedTransformersEngine(dtype="float32"),
    "bfloat16": lambda: SharedTransformersEngine(dtype="bfloat16"),
    "merged": lambda: MergedEngine(dtype="float32"),
}
"""Engines of the small matrix."""


class Engines:
    """Gives engines by name, one alive at a time.

    Args:
        kinds: How they are made.
    """

    def __init__(self, kinds: dict[str, Callable[[], Any]]) -> None:
        self._kinds = kinds
        self._alive: tuple[str, Any] | None = None

    def __contains__(self, name: str) -> bool:
        return name in self._kinds

    def get(self, name: str) -> RolloutEngine:
        """The engine of this name; another one is stopped first."""
        if self._alive is None or self._alive[0] != name:
            self.close()
            self._alive = (name, self._kinds[name]())
        engine: RolloutEngine = self._alive[1]
        return engine

    def close(self) -> None:
        """Stop the engine that is alive."""
        if self._alive is not None:
            self._alive[1].really_close()
            self._alive = None
            gc.collect()
