"""vLLM as `VLLMEngine` would start it, without this project: prints when it is up.

Run: python -m benchmarks.performance.bare_engine MODEL ENVIRONMENT    the second a JSON object
"""

import json
import os
import sys
import time
from typing import Any

ARGUMENTS: dict[str, Any] = {
    "max_model_len": 276,
    "max_num_seqs": 128,
    "enable_lora": True,
    "max_loras": 1,
    "max_lora_rank": 16,
    "logprobs_mode": "processed_logprobs",
    "generation_config": "vllm",
    "disable_log_stats": True,
    "use_tqdm_on_load": False,
    "seed": 0,
    "dtype": "float32",
    "gpu_memory_utilization": 0.45,
    "tensor_parallel_size": 1,
    "enforce_eager": True,
    "enable_chunked_prefill": False,
    "block_size": 32,
    "distributed_executor_backend": "vllm.v1.executor.uniproc_executor.UniProcExecutor",
}
"""What `VLLMEngine` gives ``AsyncEngineArgs`` for the demo's configuration on CPU."""


async def start(model: str) -> None:
    """Start it, print the moment, end it.

    Args:
        model: Folder of the model.
    """
    import torch
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=model, lora_dtype=torch.float32, **ARGUMENTS))
    print("\n" + json.dumps({"ready": time.monotonic()}), flush=True)
    engine.shutdown()


if __name__ == "__main__":
    import asyncio

    # As `VLLMEngine` does it: for the processes that vLLM starts, not for this one.
    os.environ.update(json.loads(sys.argv[2]))
    asyncio.run(start(sys.argv[1]))
