import pytest
import torch

from grpo_lightning.diagnostics.checks.engine import (
    CachePair,
    check_base,
    check_base_weights,
    check_cache,
    check_published,
    check_resolution,
)
from grpo_lightning.diagnostics.thresholds import Thresholds
from grpo_lightning.diagnostics.verdict import Status
from grpo_lightning.rollout.types import Generation

LIMITS = Thresholds()
CONFIG = {"r": 4, "lora_alpha": 8, "rank_pattern": {}}


def weights(seed=0):
    random = torch.Generator().manual_seed(seed)
    return {f"{n}.lora_{x}.weight": torch.randn(4, 6, generator=random) for n in ("q_proj", "k_proj") for x in "AB"}


class TestPublished:
    def cause(self, published, config=CONFIG, is_earlier=False):
        return check_published(published, config, weights(), CONFIG, is_earlier).cause

    def test_the_same(self):
        assert (
            check_published(weights(), {**CONFIG, "rank_pattern": None}, weights(), CONFIG, False).status is Status.PASS
        )

    @pytest.mark.parametrize(
        ("change", "cause"),
        [
            (lambda w: w.bfloat16().float(), "adapter_rounded"),
            (lambda w: w.half().float(), "adapter_rounded"),
            (lambda w: w + 1e-6, "adapter_changed"),
            (lambda w: w[:2], "adapter_changed"),
        ],
    )
    def test_other_values(self, change, cause):
        assert self.cause({k: change(w) for k, w in weights().items()}) == cause

    def test_the_first_that_differs_is_shown(self):
        published = {k: w + ("q_proj" in k) for k, w in weights().items()}
        verdict = check_published(published, CONFIG, weights(), CONFIG, False)
        assert verdict.message == "2 published tensors are not the trainer's, such as q_proj.lora_A.weight."

    def test_missing(self):
        verdict = check_published({k: w for k, w in weights().items() if "q_" in k}, CONFIG, weights(), CONFIG, False)
        assert verdict.cause == "adapter_partial"
        assert "2 tensors were not published, such as k_proj.lora_A.weight" in verdict.message

    def test_another_scale(self):
        verdict = check_published(weights(), {**CONFIG, "lora_alpha": 16}, weights(), CONFIG, False)
        assert verdict.cause == "adapter_scale"
        assert verdict.evidence["lora_alpha"] == "16, expected 8"

    def test_an_earlier_one(self):
        verdict = check_published(weights(1), CONFIG, weights(), CONFIG, is_earlier=True)
        assert verdict.cause == "adapter_changed"
        assert verdict.message == "What was published is an earlier version of the adapter."


@pytest.mark.parametrize(("size", "cause"), [(1e-2, ""), (1e-4, "adapter_resolution")])
def test_resolution(size, cause):
    before = list(weights().values())
    now = [w + size * torch.randn(w.shape, generator=torch.Generator().manual_seed(2)) for w in before]
    assert check_resolution(before, now, torch.bfloat16, LIMITS).cause == cause
    assert check_resolution(before, before, torch.bfloat16, LIMITS).status is Status.NO_POWER


def answer(*logprobs, tokens=None):
    return Generation(tuple(tokens or range(len(logprobs))), logprobs, "length", 0)


class TestCache:
    SAME = (CachePair(answer(-1.0, -2.0), answer(-1.00001, -2.0)),)
    ACROSS = (CachePair(answer(-3.0, -1.0), answer(-1.0, -2.0)),)

    def test_differences_end_with_the_first_other_token(self):
        pair = CachePair(answer(-1.0, -2.0, -3.0, tokens=(5, 6, 7)), answer(-1.5, -2.0, -9.0, tokens=(5, 8, 7)))
        assert pair.differences().tolist() == [0.5, 0.0]

    def test_verdicts(self):
        fresh = (CachePair(answer(-1.0, -2.0), answer(-1.0, -2.00001)),)
        assert check_cache(fresh, self.SAME, self.ACROSS, 1e-5, LIMITS).status is Status.PASS
        assert check_cache(fresh, self.SAME, self.SAME, 1e-5, LIMITS).status is Status.NO_POWER
        assert check_cache(self.ACROSS, self.SAME, self.ACROSS, 1e-5, LIMITS).cause == "prefix_cache_stale"

    def test_what_caching_itself_changes(self):
        noisy = (CachePair(answer(-1.0, -2.0), answer(-1.05, -2.05)),)
        assert check_cache(noisy, noisy, self.ACROSS, 1e-5, LIMITS).status is Status.PASS
        assert check_cache(noisy, self.SAME, self.ACROSS, 1e-5, LIMITS).status is Status.FAIL
        # In half precision the shape of a batch alone changes as much, even if it happened not to under one adapter.
        assert check_cache(noisy, self.SAME, self.ACROSS, 0.05, LIMITS).status is not Status.FAIL


def test_base():
    assert check_base(0.04, 0.05, 96).status is Status.PASS
    assert check_base(0.06, 0.05, 96).cause == "base_differs"
    assert check_base(float("nan"), 0.05, 96).cause == "base_differs"


def test_base_weights():
    assert check_base_weights([], 3).status is Status.PASS
    verdict = check_base_weights(["layers.0"], 3)
    assert verdict.cause == "base_changed"
    assert "such as layers.0" in verdict.message
