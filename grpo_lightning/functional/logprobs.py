"""Log-probabilities of chosen tokens from hidden states, without ever holding ``[tokens, vocabulary]`` whole.

Shapes: ``N`` target tokens, ``H`` hidden size, ``V`` vocabulary, ``C`` chunk size, ``B`` lines of a chunk, ``K`` banned
tokens.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

DEFAULT_CHUNK_BYTES = 64 * 2**20
"""Size of one chunk of float32 logits. Large enough for efficient matrix products, small beside a model."""

BLOCK_BYTES = 2**20
"""On CPUs what is done with float32 logits goes through a few lines at a time, which stay in the processor's cache
meanwhile. Elsewhere so little work a kernel would only cost launches."""


class TokenLogprobs(NamedTuple):
    """What is known of each target token, all ``[N]``, float32 (float64 for float64 input); only the first has a
    gradient, and the second if asked for.

    Attributes:
        logprobs: Log-probability, in nats.
        entropy: Entropy of its distribution: the mean of ``-log p`` under it, in nats.
        surprisal_variance: Variance of ``-log p`` under it, in nats squared.
        mass_above: Probability of all tokens that are likelier than it, in [0, 1).
    """

    logprobs: Tensor
    entropy: Tensor
    surprisal_variance: Tensor
    mass_above: Tensor


def token_logprobs(
    hidden_NH: Tensor,
    head_VH: Tensor,
    targets_N: Tensor,
    *,
    temperature: float = 1.0,
    banned_token_ids: Sequence[int] = (),
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    entropy_gradient: bool = False,
) -> TokenLogprobs:
    """Log-probability of each target token, and of its distribution the entropy and what tests of sampling need.

        z[n] = W h[n] / T
        log p(y[n]) = z[n, y[n]] - log sum_v exp(z[n, v])
        H[n] = -sum_v p(v) log p(v)
        V[n] = sum_v p(v) log^2 p(v) - H[n]^2
        m[n] = sum_v p(v) [p(v) > p(y[n])]

    The sums leave out banned tokens: they have probability 0, as they had when the targets were sampled.

    Logits are computed in the dtype of ``hidden_NH`` for ``C`` tokens at a time and normalised in float32
    (float64 stays float64). With a frozen head the gradient
    ``d log p(y) / d h = (W[y] - p W) / T`` is computed in the forward pass while the logits
    are at hand, so the backward pass multiplies by the incoming gradient and never rebuilds logits. A
    trainable head recomputes each chunk in the backward pass instead. The entropy's gradient,
    ``d H / d h = -sum_v p(v) (log p(v) + H) W[v] / T``, goes the same ways.

    Args:
        hidden_NH: Final hidden states that predict the targets, shape ``[N, H]``.
        head_VH: Output embedding, shape ``[V, H]``, same dtype.
        targets_N: Token ids, int64, shape ``[N]``.
        temperature: Sampling temperature ``T > 0``.
        banned_token_ids: Tokens that the sampler could not choose; none of the targets.
        chunk_bytes: Upper bound for one chunk of logits, in bytes.
        entropy_gradient: Whether the entropy carries a gradient too, as a bonus in the loss needs. With a frozen head
            it costs one more product of a chunk with the head, and one more ``[N, H]`` until the backward pass.

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
    chunk = _chunk_tokens(hidden_NH, head_VH, chunk_bytes)
    banned_K = torch.tensor(banned_token_ids, dtype=torch.int64, device=head_VH.device)
    if head_VH.requires_grad and torch.is_grad_enabled():
        return _trainable_head(hidden_NH, head_VH, targets_N, temperature, banned_K, chunk, entropy_gradient)
    values = _FrozenHead.apply(hidden_NH, head_VH, targets_N, temperature, banned_K, chunk, entropy_gradient)  # type: ignore[no-untyped-call]
    return TokenLogprobs(*values)


def log_distributions(
    hidden_NH: Tensor,
    head_VH: Tensor,
    *,
    temperature: float = 1.0,
    banned_token_ids: Sequence[int] = (),
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> Iterator[Tensor]:
    """The whole distributions that `token_logprobs` takes its values from, ``C`` tokens at a time, ``[C, V]``.

    Args:
        hidden_NH: Final hidden states, shape ``[N, H]``.
        head_VH: Output embedding, shape ``[V, H]``, same dtype.
        temperature: Sampling temperature ``T > 0``.
        banned_token_ids: Tokens that the sampler could not choose.
        chunk_bytes: Upper bound for one chunk, in bytes.
    """
    banned_K = torch.tensor(banned_token_ids, dtype=torch.int64, device=head_VH.device)
    for hidden_CH in torch.split(hidden_NH, _chunk_tokens(hidden_NH, head_VH, chunk_bytes)):
        yield _log_softmax(torch.nn.functional.linear(hidden_CH, head_VH), temperature, banned_K)


def _chunk_tokens(hidden_NH: Tensor, head_VH: Tensor, chunk_bytes: int) -> int:
    element = 8 if hidden_NH.dtype == torch.float64 else 4
    return max(1, chunk_bytes // (head_VH.shape[0] * element))


def _log_softmax(logits_CV: Tensor, temperature: float, banned_K: Tensor) -> Tensor:
    """Log-softmax over the vocabulary ``[C, V]`` of logits before temperature."""
    logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32)) / temperature
    # Not -inf, whose product with probability 0 would make the entropy NaN; exp() of this is exactly 0 too.
    logits_CV.index_fill_(1, banned_K, torch.finfo(logits_CV.dtype).min)
    return torch.log_softmax(logits_CV, dim=-1)


def _blocks(logits_CV: Tensor) -> Iterator[slice]:
    """The lines of a chunk that are gone through together."""
    count, vocabulary = logits_CV.shape
    step = max(1, BLOCK_BYTES // (vocabulary * 4)) if logits_CV.device.type == "cpu" else max(1, count)
    # One block without lines where there are no tokens.
    for begin in range(0, max(1, count), step):
        yield slice(begin, min(begin + step, count))


def _trainable_head(
    hidden_NH: Tensor,
    head_VH: Tensor,
    targets_N: Tensor,
    temperature: float,
    banned_K: Tensor,
    chunk: int,
    entropy_gradient: bool,
) -> TokenLogprobs:
    def one(hidden_CH: Tensor, head: Tensor, targets_C: Tensor) -> tuple[Tensor, ...]:
        logp_CV = _log_softmax(torch.nn.functional.linear(hidden_CH, head), temperature, banned_K)
        picked_C = logp_CV.gather(1, targets_C[:, None]).squeeze(1)
        known_CV = logp_CV.detach()
        probs_CV = known_CV.exp()
        blocks = [_distribution(known_CV[b], probs_CV[b], picked_C.detach()[b]) for b in _blocks(known_CV)]
        entropy_C, *others = map(torch.cat, zip(*blocks, strict=True))
        if entropy_gradient:
            entropy_C = _Entropy.apply(logp_CV, probs_CV, entropy_C)  # type: ignore[no-untyped-call]
        return picked_C, entropy_C, *others

    parts = [
        checkpoint(one, h, head_VH, t, use_reentrant=False)
        for h, t in zip(torch.split(hidden_NH, chunk), torch.split(targets_N, chunk), strict=True)
    ]
    return TokenLogprobs(*map(torch.cat, zip(*parts, strict=True)))


def _distribution(logp_BV: Tensor, probs_BV: Tensor, picked_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Entropy, variance of the surprisal, and mass above the targets of a block, each ``[B]``, with one buffer."""
    buffer_BV = probs_BV * logp_BV
    mean_B = buffer_BV.sum(-1)
    variance_B = (buffer_BV.mul_(logp_BV).sum(-1) - mean_B.square()).clamp_min(0)
    # 1 where the logprob is larger, else 0; comparisons are several times slower.
    torch.sub(logp_BV, picked_B[:, None], out=buffer_BV).sign_().clamp_min_(0)
    return -mean_B, variance_B, buffer_BV.mul_(probs_BV).sum(-1)


def _entropy_slope(logp_CV: Tensor, probs_CV: Tensor, entropy_C: Tensor) -> Tensor:
    """Gradient of the entropy with respect to the logits ``z``, ``-p (log p + H)``, ``[C, V]``."""
    return (logp_CV + entropy_C[:, None]).mul_(probs_CV).neg_()


class _Entropy(torch.autograd.Function):
    """Gives entropies that are known the gradient that they have, without the intermediates of computing them."""

    @staticmethod
    def forward(ctx: Any, logp_CV: Tensor, probs_CV: Tensor, entropy_C: Tensor) -> Tensor:
        ctx.save_for_backward(logp_CV, probs_CV, entropy_C)
        return entropy_C.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_C: Tensor) -> tuple[Tensor, None, None]:
        # The slope sums to 0 over the vocabulary, so a log-softmax passes it on as it is.
        return _entropy_slope(*ctx.saved_tensors).mul_(grad_C[:, None]), None, None


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
        entropy_gradient: bool,
    ) -> tuple[Tensor, ...]:
        dtype = torch.promote_types(hidden_NH.dtype, torch.float32)
        logprobs_N = hidden_NH.new_empty(hidden_NH.shape[0], dtype=dtype)
        distribution = tuple(torch.empty_like(logprobs_N) for _ in range(3))
        # Of the logprobs, and of the entropy if it is asked for.
        jacobians = [torch.empty_like(hidden_NH) for _ in range(1 + entropy_gradient) if ctx.needs_input_grad[0]]
        for start in range(0, hidden_NH.shape[0], chunk):
            part = slice(start, start + chunk)
            # What the head is multiplied by in the gradients takes the place of the logits, line by line.
            weights = [torch.nn.functional.linear(hidden_NH[part], head_VH)]
            weights += [torch.empty_like(weights[0]) for _ in jacobians[1:]]
            for lines in _blocks(weights[0]):
                block = slice(start + lines.start, start + lines.stop)
                logp_BV = _log_softmax(weights[0][lines], temperature, banned_K)
                logprobs_N[block] = logp_BV.gather(1, targets_N[block, None]).squeeze(1)
                probs_BV = logp_BV.exp()
                values = _distribution(logp_BV, probs_BV, logprobs_N[block])
                for whole_N, part_B in zip(distribution, values, strict=True):
                    whole_N[block] = part_B
                if len(jacobians) > 1:
                    weights[1][lines] = _entropy_slope(logp_BV, probs_BV, distribution[0][block])
                if jacobians:
                    weights[0][lines] = probs_BV
            if jacobians:
                jacobians[0][part] = (head_VH[targets_N[part]] - weights[0] @ head_VH) / temperature
            if len(jacobians) > 1:
                jacobians[1][part] = weights[1] @ head_VH / temperature
        ctx.save_for_backward(*jacobians)
        ctx.mark_non_differentiable(*distribution[entropy_gradient:])
        return logprobs_N, *distribution

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        jacobian_NH, *of_entropy = ctx.saved_tensors
        grad_NH = grads[0][:, None].to(jacobian_NH.dtype) * jacobian_NH
        for of_entropy_NH in of_entropy:
            grad_NH += grads[1][:, None].to(jacobian_NH.dtype) * of_entropy_NH
        return grad_NH, *[None] * 6
