from grpo_lightning.diagnostics import Status
from grpo_lightning.diagnostics.checks.scored_again import ScoredAgain, check_scored_again


def test_rewards_that_differ_again_and_again():
    found = check_scored_again(ScoredAgain(looked_at=4, differing=3))
    assert found.cause == "rewards_wrong"
    assert "3 of 4 episodes have another reward than their reward functions give" in found.message


def test_healthy_rewards():
    assert check_scored_again(ScoredAgain(8)).status is Status.PASS
    assert check_scored_again(ScoredAgain(8, 2)).status is Status.PASS
    assert check_scored_again(ScoredAgain(40, 3)).status is Status.PASS
    assert check_scored_again(ScoredAgain(2, 2)).status is Status.NO_POWER
    by_chance = check_scored_again(ScoredAgain(8, 8, 7))
    assert by_chance.status is Status.NO_POWER
    assert by_chance.message == "The rewards are not deterministic."
