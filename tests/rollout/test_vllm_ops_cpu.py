"""What replaces passes of vLLM's CPU backend: the same results, or the same distribution."""

import itertools
import math

import pytest
import torch

pytest.importorskip("vllm")

from vllm import ir
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler
from vllm.v1.sample.sampler import Sampler

from grpo_lightning.rollout import vllm_ops_cpu
from grpo_lightning.rollout.vllm_ops_cpu import by_inversion, rms_norm, sampled_by_inversion, without_ranks


def by_loop(probs, uniform):
    """Token by token, in float64."""
    found = []
    for line, u in zip(probs.double().tolist(), uniform.tolist(), strict=True):
        wanted = u * math.fsum(line)
        found.append(next(token for token, total in enumerate(itertools.accumulate(line)) if total > wanted))
    return found


def test_inversion_worked_by_hand():
    probs = torch.tensor([[0.25, 0.0, 0.5, 0.25]]).expand(5, -1)
    uniform = torch.tensor([0.0, 0.2499, 0.25, 0.74, 0.75], dtype=torch.float64)
    assert by_inversion(probs, uniform).tolist() == [0, 0, 2, 2, 3]


@pytest.mark.parametrize("vocabulary", [3, 255, 256, 257, 1000])
def test_inversion_is_the_loop(vocabulary):
    random = torch.Generator().manual_seed(0)
    probs = torch.rand(64, vocabulary, generator=random).pow(8)
    uniform = torch.rand(64, generator=random, dtype=torch.float64)
    assert by_inversion(probs, uniform).tolist() == by_loop(probs, uniform)


def test_a_token_without_probability_is_never_drawn():
    probs = torch.zeros(4, 700)
    probs[:, [300, 600]] = torch.tensor([1.0, 1e-30])
    ends = torch.tensor([0.0, 0.5, 1 - 2.0**-53, 1 - 2.0**-40], dtype=torch.float64)
    assert set(by_inversion(probs, ends).tolist()) <= {300, 600}
    probs = torch.zeros(2, 512)
    probs[:, 5] = 1.0
    assert by_inversion(probs, ends[[0, 2]]).tolist() == [5, 5]


def test_frequencies_are_the_probabilities():
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    uniform = torch.rand(40_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    counts = torch.bincount(by_inversion(probs.expand(40_000, -1), uniform), minlength=4)
    chi_squared = float(((counts - 40_000 * probs).square() / (40_000 * probs)).sum())
    assert chi_squared < 16.3  # 3 degrees of freedom, 1 in 1000


def sampler(mode="processed_logprobs"):
    made = TopKTopPSampler.__new__(TopKTopPSampler)
    torch.nn.Module.__init__(made)
    made.logprobs_mode, made.use_fp64_gumbel = mode, False
    return made


def drawn(logits, seeds, mode="processed_logprobs", k=None):
    def original(self, *args):
        return "vLLM's own"

    generators = {row: torch.Generator().manual_seed(seed) for row, seed in seeds.items()}
    return sampled_by_inversion(original)(sampler(mode), logits, generators, k, None)


def test_a_request_draws_from_its_own_generator_whatever_is_beside_it():
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(2))
    tokens, logprobs = drawn(logits, {0: 7, 3: 9})
    torch.testing.assert_close(logprobs, logits.log_softmax(-1))
    alone, _ = drawn(logits[3:4], {0: 9})
    assert tokens[3] == alone[0]
    others = [int(drawn(logits, {0: 7, 3: 9})[0][1]) for _ in range(20)]
    assert len(set(others)) > 1


@pytest.mark.parametrize("settings", [{"mode": "raw_logprobs"}, {"k": torch.tensor([2])}])
def test_other_settings_are_left_to_vllm(settings):
    assert drawn(torch.zeros(1, 4), {}, **settings) == "vLLM's own"


def test_logprobs_are_gathered_without_ranks():
    logprobs = torch.randn(3, 9).log_softmax(-1)
    tokens = torch.tensor([1, 8, 0])
    theirs = Sampler.gather_logprobs(logprobs, 0, tokens)
    ours = without_ranks(Sampler.gather_logprobs)(logprobs, 0, tokens)
    assert torch.equal(ours.logprob_token_ids, theirs.logprob_token_ids)
    assert torch.equal(ours.logprobs, theirs.logprobs)
    assert ours.logprob_token_ids.dtype == theirs.logprob_token_ids.dtype
    assert ours.selected_token_ranks.tolist() == [0, 0, 0]
    assert ours.selected_token_ranks.shape == theirs.selected_token_ranks.shape


def test_more_logprobs_come_with_ranks():
    logprobs, tokens = torch.randn(3, 9).log_softmax(-1), torch.tensor([1, 8, 0])
    assert without_ranks(lambda *args: args)(logprobs, 2, tokens) == (logprobs, 2, tokens)


class Norm:
    """The fields of vLLM's layer that matter here."""

    def __init__(self, width, dtype):
        self.weight = torch.nn.Parameter(torch.randn(width).to(dtype))
        self.variance_epsilon, self.variance_size_override = 1e-6, None
        self.pass_weight = self.pass_weight_add = True

    def forward_native(self, x, residual=None):
        return "vLLM's own"


needs_kernels = pytest.mark.skipif(
    not hasattr(torch.ops._C, "fused_add_rms_norm"), reason="vLLM's CPU kernels are in its CPU build alone"
)


@needs_kernels
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_norms_are_vllms_native_ones(dtype, tolerance):
    norm, x, residual = Norm(64, dtype), torch.randn(7, 64).to(dtype), torch.randn(7, 64).to(dtype)
    with torch.no_grad():
        expected = ir.ops.rms_norm(x, norm.weight.data, 1e-6, None)
        torch.testing.assert_close(rms_norm(norm, x.clone()), expected, rtol=tolerance, atol=tolerance)
        expected, summed = ir.ops.fused_add_rms_norm(x.clone(), residual.clone(), norm.weight.data, 1e-6, None)
        found, kept = rms_norm(norm, x.clone(), residual.clone())
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(kept, summed, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("change", [{"variance_size_override": 32}, {"pass_weight": False}, {"weight": None}])
def test_other_norms_are_left_to_vllm(change):
    norm = Norm(64, torch.float32)
    for name, value in change.items():
        setattr(norm, name, torch.nn.Parameter(torch.ones(64, dtype=torch.float64)) if value is None else value)
    assert rms_norm(norm, torch.randn(2, 64)) == "vLLM's own"


def test_everything_is_put_in_its_place(monkeypatch):
    monkeypatch.setattr(vllm_ops_cpu, "RMSNorm", type("RMSNorm", (), {}))
    monkeypatch.setattr(vllm_ops_cpu, "TopKTopPSampler", type("Sampler", (), {"forward_cpu": lambda *a: None}))
    monkeypatch.setattr(vllm_ops_cpu, "Sampler", type("Gather", (), {"gather_logprobs": lambda *a: None}))
    before = vllm_ops_cpu.TopKTopPSampler.forward_cpu
    vllm_ops_cpu.install()
    assert vllm_ops_cpu.TopKTopPSampler.forward_cpu is not before
    assert vllm_ops_cpu.Sampler.gather_logprobs.__name__ == "gather_logprobs"
