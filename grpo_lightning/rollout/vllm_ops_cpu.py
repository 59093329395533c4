"""What vLLM's CPU backend computes in many passes, in fewer. Imported only inside vLLM's processes.

vLLM has kernels for norms on CPUs, but calls them on other platforms alone; its sampler draws noise for the whole
vocabulary of every request, and ranks every sampled token among it.

Shapes: ``N`` requests, ``V`` vocabulary, ``M`` blocks of it, ``W`` tokens of a block.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler
from vllm.v1.sample.sampler import Sampler

_BLOCK = 256
"""Tokens that are summed before the sums are: a token is found in its block alone."""


def install() -> None:
    """Put these functions in the place of vLLM's."""
    kernels = torch.ops._C
    if hasattr(kernels, "rms_norm") and hasattr(kernels, "fused_add_rms_norm"):
        RMSNorm.forward_cpu = rms_norm
    TopKTopPSampler.forward_cpu = sampled_by_inversion(TopKTopPSampler.forward_cpu)
    Sampler.gather_logprobs = staticmethod(without_ranks(Sampler.gather_logprobs))


def rms_norm(self: Any, x: Tensor, residual: Tensor | None = None) -> Any:
    """`RMSNorm.forward_native`, or vLLM's kernel where it does the same."""
    weight = self.weight.data
    plain = self.pass_weight and self.pass_weight_add and self.variance_size_override is None
    if not plain or weight.dtype != x.dtype or not x.is_contiguous():
        return self.forward_native(x, residual)
    if residual is None:
        output = torch.empty_like(x)
        torch.ops._C.rms_norm(output, x, weight, self.variance_epsilon)
        return output
    torch.ops._C.fused_add_rms_norm(x, residual, weight, self.variance_epsilon)
    return x, residual


def sampled_by_inversion(original: Any) -> Any:
    """`TopKTopPSampler.forward_cpu` for processed logprobs with one random number a request, from its generator."""

    def forward_cpu(
        self: Any, logits: Tensor, generators: Mapping[int, torch.Generator], k: Tensor | None, p: Tensor | None
    ) -> Any:
        if k is not None or p is not None or self.use_fp64_gumbel or self.logprobs_mode != "processed_logprobs":
            return original(self, logits, generators, k, p)
        logprobs_NV = logits.log_softmax(dim=-1, dtype=torch.float32)
        uniform_N = torch.rand(len(logits), dtype=torch.float64)
        for row, generator in generators.items():
            uniform_N[row] = torch.rand((), generator=generator, dtype=torch.float64)
        return by_inversion(logprobs_NV.exp(), uniform_N), logprobs_NV

    return forward_cpu


def by_inversion(probs_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """Draw one token a line: the first at which the sum of the probabilities so far exceeds ``u`` times their sum.

    See Devroye, 1986, Non-Uniform Random Variate Generation, III.2 (http://luc.devroye.org/rnbookindex.html). A token
    of probability 0 is never drawn.

    Args:
        probs_NV: Probabilities, float32 ``[N, V]``, each line with a positive sum.
        uniform_N: ``u``, uniform in [0, 1), float64 ``[N]``.

    Returns:
        Tokens, int64 ``[N]``.
    """
    missing = -probs_NV.shape[1] % _BLOCK
    if missing:
        probs_NV = torch.nn.functional.pad(probs_NV, (0, missing))
    probs_NMW = probs_NV.view(len(probs_NV), -1, _BLOCK)
    until_NM = probs_NMW.sum(-1, dtype=torch.float32).double().cumsum(-1)
    wanted_N = uniform_N * until_NM[:, -1]
    block_N = _first_beyond(until_NM, wanted_N)
    lines_N = torch.arange(len(probs_NV))
    before_N = torch.where(block_N > 0, until_NM[lines_N, block_N - 1], 0.0)
    within_NW = probs_NMW[lines_N, block_N].double().cumsum(-1)
    return block_N * _BLOCK + _first_beyond(within_NW, wanted_N - before_N)


def _first_beyond(until_NJ: Tensor, wanted_N: Tensor) -> Tensor:
    """First column whose sum so far exceeds what is wanted; the last that adds anything if rounding leaves none."""
    beyond_NJ = (until_NJ > wanted_N[:, None]) | (until_NJ >= until_NJ[:, -1:])
    return beyond_NJ.int().argmax(-1)


def without_ranks(original: Any) -> Any:
    """`Sampler.gather_logprobs` that leaves ranks at 0 where the sampled token's logprob alone is asked for."""

    def gather_logprobs(logprobs: Tensor, num_logprobs: int, token_ids: Tensor) -> Any:
        if num_logprobs > 0:
            return original(logprobs, num_logprobs, token_ids)
        chosen = token_ids.unsqueeze(-1)
        return LogprobsTensors(
            chosen.to(torch.int32), logprobs.gather(-1, chosen), torch.zeros(len(token_ids), dtype=torch.int64)
        )

    return gather_logprobs
