"""What vLLM is asked for and what it answers, in our terms."""

from typing import Any, get_args

from grpo_lightning.errors import RolloutError
from grpo_lightning.rollout.types import AdapterRef, FinishReason


def finish_reason(completion: Any) -> FinishReason:
    """Why a completion of vLLM ended.

    Raises:
        RolloutError: If neither the policy nor the limit ended it.
    """
    reason = completion.finish_reason
    if reason in get_args(FinishReason):
        ended: FinishReason = reason
        return ended
    raise RolloutError(
        "expected a completion that ends with 'stop' or 'length', but vLLM ended one after "
        f"{len(completion.token_ids)} tokens with {reason!r}: it was cut off where neither the policy nor max_tokens "
        "ended it, so it cannot be trained on. Look for the cause in engine_args"
    )


def lora_request(ref: AdapterRef | None) -> Any:
    """An adapter as vLLM is asked for it; None for the base model."""
    if ref is None:
        return None
    from vllm.lora.request import LoRARequest

    return LoRARequest(lora_name=ref.name, lora_int_id=ref.id, lora_path=str(ref.path))
