"""What vLLM is asked for and what it answers, in our terms."""

import math
from typing import Any, get_args

from grpo_lightning.errors import LogprobValidationError, RolloutError
from grpo_lightning.rollout.types import AdapterRef, FinishReason, Generation, SamplingSettings


def sampling_params(params: SamplingSettings, seed: int | None) -> Any:
    """How a completion is sampled, as vLLM is asked for it.

    Args:
        params: Settings.
        seed: Of its random numbers.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        # Both are part of "processed" logprobs.
        top_p=params.top_p,
        top_k=params.top_k,
        seed=seed,
        logprobs=0,
        # One list of numbers; otherwise a dict and an object for each token.
        flat_logprobs=True,
        stop_token_ids=list(params.stop_token_ids),
        stop=list(params.stop),
        include_stop_str_in_output=True,
        detokenize=bool(params.stop),
        # Added before the softmax. vLLM's bad_words would ban other spellings of a word too.
        logit_bias=dict.fromkeys(params.banned_token_ids, -math.inf) or None,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def generation(completion: Any, version: int) -> Generation:
    """A completion of vLLM that was asked for with `sampling_params`.

    Args:
        completion: vLLM's ``CompletionOutput``.
        version: Policy version that sampled it.

    Raises:
        LogprobValidationError: If there is not one logprob for each sampled token.
        RolloutError: If neither the policy nor the limit ended it.
    """
    if completion.logprobs is None:
        raise LogprobValidationError("vLLM returned no logprobs, although logprobs=0 asks for the sampled token's")
    if list(completion.token_ids) != completion.logprobs.token_ids:
        raise LogprobValidationError(
            f"expected vLLM's logprobs of the {len(completion.token_ids)} sampled tokens, one each, but got "
            f"{len(completion.logprobs.token_ids)} of other ones"
        )
    return Generation(
        tuple(completion.token_ids), tuple(completion.logprobs.logprobs), finish_reason(completion), version
    )


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
