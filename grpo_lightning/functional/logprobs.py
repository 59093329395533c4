"""Log-probabilities of chosen tokens from hidden states, without ever holding ``[tokens, vocabulary]`` whole.

Shapes: ``N`` target tokens, ``H`` hidden size, ``V`` vocabulary, ``C`` chunk size, ``K`` banned tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

DEFAULT_CHUNK_BYTES = 64 * 2**20
"""Size of one chunk of float32 logits. Large enough for efficient matrix products, small beside a model."""


def token_logprobs(
    hidden_NH: Tensor,
    head_VH: Tensor,
    targets_N: Tensor,
    *,
    temperature: float = 1.0,
    banned_token_ids: Sequence[int] = (),
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target token and the entropy of its distribution.

        z[n] = W h[n] / T
        log p(y[n]) = z[n, y[n]] - log sum_v exp(z[n, v])
        H[n] = -sum_v p(v) log p(v)

    The sums leave out banned tokens: they have probability 0, as they had when the targets were sampled.

    Logits are computed in the dtype of ``hidden_NH`` for ``C`` tokens at a time and normalised in float32
    (float64 stays float64). With a frozen head the gradient
    ``d log p(y) / d h = (W[y] - p W) / T`` is computed in the forward pass while the logits
    are at hand, so the backward pass multiplies by the incoming gradient and never rebuilds logits. A
    trainable head recomputes each chunk in the backward pass instead.

    Args:
        hidden_NH: Final hidden states that predict the targets, shape ``[N, H]``.
        head_VH: Output embedding, shape ``[V, H]``, same dtype.
        targets_N: Token ids, int64, shape ``[N]``.
        temperature: Sampling temperature ``T > 0``.
        banned_token_ids: Tokens that the sampler could not choose; none of the targets.
        chunk_bytes: Upper bound for one chunk of logits, in bytes.

    Returns:
        Log-probabilities and entropies in nats, each ``[N]``, float32 (float64 for float64 input). The
        entropies carry no gradient.

    Raises:
        ValueError: If shapes disagree or the temperature is not positive.
    """
    if hidden_NH.ndim != 2 or targets_N.shape != hidden_NH.shape[:1] or head_VH.shape[1:] != hidden_NH.shape[1:]:
        raise ValueError(
            "expected hidden [N, H], head [V, H] and targets [N], but got "
            f"{tuple(hidden_NH.shape)}, {tuple(head_VH.shape)} and {tuple(targets_N.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"expected a temperature > 0, but got {temperature}")
    element = 8 if hidden_NH.dtype == torch.float64 else 4
    chunk = max(1, chunk_bytes // (head_VH.shape[0] * element))
    banned_K = torch.tensor(banned_token_ids, dtype=torch.int64, device=head_VH.device)
    if head_VH.requires_grad and torch.is_grad_enabled():
        return _trainable_head(hidden_NH, head_VH, targets_N, temperature, banned_K, chunk)
    logprobs, entropy = _FrozenHead.apply(hidden_NH, head_VH, targets_N, temperature, banned_K, chunk)  # type: ignore[no-untyped-call]
    return logprobs, entropy


def _chunk_logprobs(
    hidden_CH: Tensor, head_VH: Tensor, targets_C: Tensor, temperature: float, banned_K: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-softmax over the vocabulary ``[C, V]`` and its value at the targets ``[C]``."""
    logits_CV = torch.nn.functional.linear(hidden_CH, head_VH)
    logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32)) / temperature
    # Not -inf, whose product with probability 0 would make the entropy NaN; exp() of this is exactly 0 too.
    logits_CV.index_fill_(1, banned_K, torch.finfo(logits_CV.dtype).min)
    logp_CV = torch.log_softmax(logits_CV, dim=-1)
    return logp_CV, logp_CV.gather(1, targets_C[:, None]).squeeze(1)


def _trainable_head(
    hidden_NH: Tensor, head_VH: Tensor, targets_N: Tensor, temperature: float, banned_K: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    def one(hidden_CH: Tensor, head: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
        logp_CV, picked_C = _chunk_logprobs(hidden_CH, head, targets_C, temperature, banned_K)
        return picked_C, -(logp_CV.detach().exp() * logp_CV.detach()).sum(-1)

    parts = [
        checkpoint(one, h, head_VH, t, use_reentrant=False)
        for h, t in zip(torch.split(hidden_NH, chunk), torch.split(targets_N, chunk), strict=True)
    ]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        head_VH: Tensor,
        targets_N: Tensor,
        temperature: float,
        banned_K: Tensor,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(hidden_NH.dtype, torch.float32)
        logprobs_N = hidden_NH.new_empty(hidden_NH.shape[0], dtype=dtype)
        entropy_N = torch.empty_like(logprobs_N)
        needs_grad = ctx.needs_input_grad[0]
        jacobian_NH = torch.empty_like(hidden_NH) if needs_grad else None
        for start in range(0, hidden_NH.shape[0], chunk):
            part = slice(start, start + chunk)
            logp_CV, logprobs_N[part] = _chunk_logprobs(
                hidden_NH[part], head_VH, targets_N[part], temperature, banned_K
            )
            probs_CV = logp_CV.exp()
            entropy_N[part] = -torch.linalg.vecdot(probs_CV, logp_CV)
            if jacobian_NH is not None:
                mean_CH = probs_CV.to(head_VH.dtype) @ head_VH
                jacobian_NH[part] = (head_VH[targets_N[part]] - mean_CH) / temperature
        if jacobian_NH is not None:
            ctx.save_for_backward(jacobian_NH)
        ctx.mark_non_differentiable(entropy_N)
        return logprobs_N, entropy_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logprobs_N: Tensor, grad_entropy_N: Tensor) -> tuple[Tensor | None, ...]:
        (jacobian_NH,) = ctx.saved_tensors
        return grad_logprobs_N[:, None].to(jacobian_NH.dtype) * jacobian_NH, None, None, None, None, None
