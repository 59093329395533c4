import torch

from grpo_lightning.diagnostics import Status
from grpo_lightning.diagnostics.checks.forward import check_forward
from grpo_lightning.diagnostics.checks.numbers import check_logprobs

PLAIN = torch.linspace(-3, -0.1, 50, dtype=torch.float64)


def test_rounding_is_no_difference():
    assert check_forward(PLAIN + 1e-5, PLAIN, 0.02).status is Status.PASS


def test_another_forward_pass_is():
    verdict = check_forward(PLAIN.roll(1), PLAIN, 0.02)
    assert (verdict.status, verdict.cause) == (Status.FAIL, "wrong_forward")
    assert "are not those of its model" in verdict.message


def test_nothing_to_compare():
    assert check_forward(PLAIN[:0], PLAIN[:0], 0.02).status is Status.NO_POWER


def test_logprobs_are_numbers():
    assert check_logprobs(PLAIN, "the trainer").status is Status.PASS
    for value in (torch.nan, -torch.inf):
        broken = PLAIN.clone()
        broken[3] = value
        verdict = check_logprobs(broken, "the trainer")
        assert verdict.cause == "not_finite"
        assert "1 of 50 logprobs of the trainer are NaN or infinite" in verdict.message
