"""vLLM's sleep mode."""

import asyncio
from typing import Any

import torch


class Nap:
    """Puts vLLM's engine to sleep and wakes it before its next use; all on the engine's event loop.

    At level 1 vLLM moves what it allocated while it loaded the model to host memory, the slots of the adapters among
    it, and discards the key-value cache. Adapters that were loaded are in host memory at any time. So nothing has to be
    loaded again.
    """

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self.asleep = False

    async def begin(self, client: Any) -> None:
        """Fall asleep, if it is awake. No request may be in flight: vLLM would abort it.

        Args:
            client: vLLM's ``AsyncLLM``.
        """
        async with self._lock:
            if not self.asleep:
                # What asks from here on waits for the lock to wake it again.
                self.asleep = True
                await client.sleep(level=1)

    async def end(self, client: Any) -> None:
        """Wake up, if it is asleep.

        Args:
            client: vLLM's ``AsyncLLM``.
        """
        if not self.asleep:
            return
        async with self._lock:
            if self.asleep:
                # The trainer's allocator keeps what it no longer uses.
                torch.cuda.empty_cache()
                for part in ("weights", "kv_cache"):
                    await client.wake_up(tags=[part])
                self.asleep = False
