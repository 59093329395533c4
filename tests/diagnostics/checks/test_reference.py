import torch

from grpo_lightning.diagnostics import Status
from grpo_lightning.diagnostics.checks.reference import check_reference, check_reference_apart

POLICY = -torch.linspace(0.1, 3, 50, dtype=torch.float64)
NAN = torch.full_like(POLICY, torch.nan)


def test_reference():
    assert check_reference(POLICY.clone(), POLICY, NAN, 5e-5).status is Status.PASS
    assert check_reference(POLICY + 1e-2, POLICY, NAN, 5e-5).cause == "reference_wrong"
    # In bfloat16 the engine is no nearer than that.
    assert check_reference(POLICY + 1e-2, POLICY, POLICY + 5e-2, 5e-5).status is Status.PASS
    # Or it agrees bit for bit, or is unknown, and the dtype alone explains it.
    assert check_reference(POLICY + 1e-2, POLICY, POLICY, 5e-2).status is Status.PASS
    assert check_reference(POLICY + 1e-2, POLICY, NAN, 5e-2).status is Status.PASS
    assert check_reference(NAN, POLICY, POLICY, 5e-5).status is Status.NO_POWER


def test_the_policy_itself_is_no_reference_once_it_has_moved():
    found = check_reference_apart(POLICY.clone(), POLICY, 0.1, 5e-5)
    assert found.cause == "reference_wrong"
    assert "equals the current policy bit for bit on all 50 tokens" in found.message
    # It hardly moved; bfloat16 hides such a step; one token tells them apart; and too few tokens.
    assert check_reference_apart(POLICY, POLICY, 5e-4, 5e-5).status is Status.NO_POWER
    assert check_reference_apart(POLICY, POLICY, 0.1, 5e-2).status is Status.NO_POWER
    assert check_reference_apart(torch.cat([POLICY[:49], POLICY[:1]]), POLICY, 0.1, 5e-5).status is Status.PASS
    assert check_reference_apart(POLICY[:31], POLICY[:31], 0.1, 5e-5).status is Status.NO_POWER
