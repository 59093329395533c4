"""Rollouts with transformers, in the trainer's process: no vLLM needed, slow, always there."""

import asyncio
import threading
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from grpo_lightning.errors import ConfigurationError, RolloutError
from grpo_lightning.functional.truncation import truncated
from grpo_lightning.rollout.engine import CURRENT, Adapter, EngineSpec, require_directory, resolve
from grpo_lightning.rollout.loop import EventLoopThread
from grpo_lightning.rollout.types import AdapterRef, FinishReason, Generation, SamplingSettings
from grpo_lightning.weights import load_exactly

T = TypeVar("T")


@dataclass
class _Request:
    prompt_ids: list[int]
    params: SamplingSettings
    adapter: AdapterRef | None
    generator: torch.Generator
    result: "asyncio.Future[Generation]"
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    version: int = -1
    finish_reason: FinishReason = "length"


class TransformersEngine:
    """A copy of the model that loads the published adapters, as vLLM does, or all weights, and samples in batches.

    Requests that arrive together are sampled together, left-padded, with a key-value cache. Each request has
    its own random generator, so that its tokens depend on its seed and not on its neighbours' randomness.

    Args:
        dtype: Weights and computation: ``"auto"`` (the model's), ``"float32"`` or ``"bfloat16"``.
        max_batch_size: Most sequences sampled at once.
        device: Torch device of the copy; the GPU if there is one by default.
    """

    def __init__(
        self,
        *,
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        max_batch_size: int = 64,
        device: str | None = None,
    ) -> None:
        if max_batch_size < 1:
            raise ConfigurationError(f"expected max_batch_size >= 1, but got {max_batch_size}")
        self._dtype = dtype
        self._max_batch_size = max_batch_size
        self._device = device
        self._spec: EngineSpec | None = None
        self._loop: EventLoopThread | None = None
        self._model: Any = None
        self._tokenizer: Any = None
        self._current: AdapterRef | None = None
        self._weights_version = -1
        self._waiting: list[_Request] = []
        # Adapters are switched on the one model, which several threads use.
        self._lock = threading.Lock()
        self._flush: asyncio.Task[None] | None = None

    @property
    def dtype(self) -> str:
        """Dtype of the engine's weights; ``"auto"`` for the model's."""
        return self._dtype

    @property
    def policy_version(self) -> int:
        """Version of the adapter or the weights loaded last; -1 before the first."""
        return self._weights_version if self._current is None else self._current.version

    def start(self, spec: EngineSpec) -> None:
        """Start the event loop and begin loading the model.

        Raises:
            ConfigurationError: If the engine runs already for another policy.
        """
        if self._spec is not None:
            if self._spec != spec:
                raise ConfigurationError(
                    f"the engine was started for {self._spec}; close it before using it for {spec}"
                )
            return
        self._spec = spec
        self._loop = EventLoopThread("grpo-lightning-transformers")

    def _loaded(self) -> Any:
        if self._spec is None:
            raise RolloutError("the transformers engine was not started, or was closed already")
        if self._model is None:
            from transformers import AutoModelForCausalLM

            device = self._device or ("cuda" if torch.cuda.is_available() else "cpu")
            dtype = self._dtype if self._dtype == "auto" else getattr(torch, self._dtype)
            model: Any = AutoModelForCausalLM.from_pretrained(self._spec.model, dtype=dtype)
            self._model = model.to(device).eval()
        return self._model

    def wait_until_ready(self) -> None:
        """Load the model."""
        self._loaded()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the engine's event loop and wait for it."""
        if self._loop is None:
            coroutine.close()
            raise RolloutError("the transformers engine was not started, or was closed already")
        return self._loop.run(coroutine)

    async def generate(
        self,
        prompt_ids: Sequence[int],
        params: SamplingSettings,
        *,
        seed: int | None = None,
        adapter: Adapter = CURRENT,
        cache_salt: str | None = None,
    ) -> Generation:
        """Sample one completion, batched with the other requests that are waiting."""
        generator = torch.Generator()
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        request = _Request(
            list(prompt_ids),
            params,
            self._resolve(adapter),
            generator,
            asyncio.get_running_loop().create_future(),
        )
        self._waiting.append(request)
        if self._flush is None or self._flush.done():
            self._flush = asyncio.create_task(self._serve())
        return await request.result

    async def _serve(self) -> None:
        while self._waiting:
            self._waiting = [r for r in self._waiting if not r.result.done()]
            # Let every coroutine that is ready to ask do so first: one batch instead of many.
            await asyncio.sleep(0)
            if not self._waiting:
                return
            first = self._waiting[0]
            batch = [r for r in self._waiting if (r.params, r.adapter) == (first.params, first.adapter)]
            batch = batch[: self._max_batch_size]
            taken = set(map(id, batch))
            self._waiting = [r for r in self._waiting if id(r) not in taken]
            try:
                await asyncio.to_thread(self._sample, batch)
            except Exception as error:
                for request in batch:
                    if not request.result.done():
                        request.result.set_exception(error)
                continue
            for request in batch:
                if not request.result.done():
                    request.result.set_result(
                        Generation(
                            tuple(request.tokens),
                            tuple(request.logprobs),
                            request.finish_reason,
                            request.version,
                        )
                    )

    @torch.inference_mode()
    def _sample(self, batch: list[_Request]) -> None:
        with self._lock:
            self._sample_locked(batch)

    def _sample_locked(self, batch: list[_Request]) -> None:
        model = self._activate(batch[0].adapter)
        params = batch[0].params
        for request in batch:
            # Whole models have no name to ask for: what counts is what is loaded now.
            request.version = self._weights_version if request.adapter is None else request.adapter.version
        width = max(len(r.prompt_ids) for r in batch)
        device = next(model.parameters()).device
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros(len(batch), width, dtype=torch.long)
        for row, request in enumerate(batch):
            ids[row, width - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
            mask[row, width - len(request.prompt_ids) :] = 1
        ids, mask = ids.to(device), mask.to(device)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        cache = None
        active = list(range(len(batch)))
        for _ in range(params.max_tokens):
            output = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            tokens, logprobs = _pick(output.logits[:, -1], params, [r.generator for r in batch])
            for row in active:
                batch[row].tokens.append(int(tokens[row]))
                batch[row].logprobs.append(float(logprobs[row]))
                if self._stops(batch[row]):
                    batch[row].finish_reason = "stop"
            active = [row for row in active if batch[row].finish_reason == "length"]
            # A cancelled batch would keep the interpreter from exiting until it is finished.
            if not active or all(request.result.done() for request in batch):
                break
            ids = tokens[:, None].to(device)
            mask = torch.cat([mask, mask.new_ones(len(batch), 1)], dim=1)
            positions = positions[:, -1:] + 1

    def _stops(self, request: _Request) -> bool:
        params = request.params
        if request.tokens[-1] in params.stop_token_ids:
            return True
        if not params.stop:
            return False
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            assert self._spec is not None, "it was needed to load the model"
            self._tokenizer = AutoTokenizer.from_pretrained(self._spec.model)
        text = self._tokenizer.decode(request.tokens, skip_special_tokens=True)
        return any(stop in text for stop in params.stop)

    async def score(self, token_ids: Sequence[int], *, adapter: Adapter = CURRENT) -> list[float]:
        """Log-probability of each token but the first, at temperature 1."""

        @torch.inference_mode()
        def forward() -> list[float]:
            with self._lock:
                model = self._activate(self._resolve(adapter))
                ids = torch.tensor([list(token_ids)], device=next(model.parameters()).device)
                logp = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
            values: list[float] = logp.gather(1, ids[0, 1:, None]).squeeze(1).tolist()
            return values

        return await asyncio.to_thread(forward)

    def _resolve(self, adapter: Adapter) -> AdapterRef | None:
        if adapter is None and self._weights_version >= 0:
            raise RolloutError("the base model was asked for, but the policy's weights have replaced it")
        return resolve(adapter, self._current)

    def _activate(self, ref: AdapterRef | None) -> Any:
        model = self._loaded()
        if ref is None:
            if self._current is not None:
                model.disable_adapters()
            return model
        model.enable_adapters()
        model.set_adapter(ref.name)
        return model

    def load_adapter(self, ref: AdapterRef) -> None:
        """Load a published adapter and drop the previous one.

        Raises:
            FileNotFoundError: If the directory holds no adapter.
            RolloutError: If it does not fit, or the base model is not there any more.
        """
        path = require_directory(ref)
        if self._weights_version >= 0:
            raise RolloutError("an adapter needs the base model, but the policy's weights have replaced it")
        with self._lock:
            model = self._loaded()
            if self._current is not None:
                model.delete_adapter(self._current.name)
                self._current = None
            result = model.load_adapter(str(path), adapter_name=ref.name)
            wrong = {*result.unexpected_keys, *result.missing_keys}
            if wrong:
                model.delete_adapter(ref.name)
                raise RolloutError(f"adapter {ref.name} does not fit the engine's model: {sorted(wrong)[:4]} …")
        self._current = ref

    def load_weights(self, state: Mapping[str, Tensor], version: int) -> None:
        """Copy all weights of the policy into this engine's model, in its dtype.

        Raises:
            ConfigurationError: If they are not exactly this model's, by name and shape; nothing is changed then.
        """
        with self._lock:
            load_exactly(self._loaded(), state)
            self._weights_version = version

    def close(self) -> None:
        """Drop the model and stop the event loop. Idempotent."""
        loop, self._loop, self._model, self._spec, self._current = self._loop, None, None, None, None
        self._tokenizer = None
        self._waiting, self._weights_version = [], -1
        if loop is not None:
            loop.close()


def _pick(logits_BV: Tensor, params: SamplingSettings, generators: list[torch.Generator]) -> tuple[Tensor, Tensor]:
    """Sample one token a row, or take the likeliest at temperature 0; and its processed log-probability."""
    temperature = params.temperature
    logits_BV = logits_BV.float().cpu()
    logits_BV = logits_BV.index_fill(1, torch.tensor(params.banned_token_ids, dtype=torch.int64), -torch.inf)
    logp_BV = (logits_BV / temperature if temperature > 0 else logits_BV).log_softmax(-1)
    if temperature > 0:
        if params.top_p < 1 or params.top_k > 0:
            logp_BV = truncated(logp_BV, top_p=params.top_p, top_k=params.top_k)
        # Exponential races: argmin(E / p) with E ~ Exp(1) is a draw from p, one generator a row.
        # In logp's dtype, not in the default one, which the Trainer's precision may change in its own thread meanwhile.
        noise = torch.stack([torch.empty_like(logp_BV[0]).exponential_(generator=g) for g in generators])
        tokens_B = (logp_BV - noise.log()).argmax(-1)
    else:
        tokens_B = logp_BV.argmax(-1)
    return tokens_B, logp_BV.gather(1, tokens_B[:, None]).squeeze(1)
