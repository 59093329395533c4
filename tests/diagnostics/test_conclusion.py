import pytest

from grpo_lightning.diagnostics import Status, Verdict
from grpo_lightning.diagnostics.causes import BY_NAME, CAUSES, ORDER
from grpo_lightning.diagnostics.conclusion import diagnose, reaction_to


def failed(cause, message="it is so"):
    return Verdict(BY_NAME[cause].check, Status.FAIL, message, "mend it", {"measured": 1.5}, cause)


def test_nothing_failed():
    assert diagnose([Verdict("a", Status.PASS), Verdict("b", Status.NO_POWER, "too few")], {}) is None


@pytest.mark.parametrize("order", [1, -1])
def test_the_first_cause_explains_the_later_ones(order):
    verdicts = [failed("old_recomputed"), failed("lr_zero"), failed("policy_frozen")][::order]
    diagnosis = diagnose(verdicts, {})
    assert diagnosis.root.cause == "lr_zero"
    assert [v.cause for v in diagnosis.explained] == ["old_recomputed", "policy_frozen"]
    assert diagnosis.reaction == "halt"


def test_a_check_that_passed_and_failed_has_not_passed():
    verdicts = [Verdict("gradient", Status.PASS), Verdict("finite", Status.PASS), failed("wrong_sign")]
    assert diagnose(verdicts, {}).passed == ("finite",)


def test_what_halts_goes_before_what_only_warns():
    assert ORDER["groups_shuffled"] < ORDER["lr_zero"]
    diagnosis = diagnose([failed("groups_shuffled"), failed("lr_zero")], {})
    assert diagnosis.root.cause == "lr_zero"
    assert diagnosis.reaction == "halt"
    assert diagnose([failed("groups_shuffled")], {}).reaction == "warn"


def test_a_chosen_reaction_counts_by_cause_then_check_then_all():
    verdict = failed("wrong_sign")
    assert reaction_to(verdict, {}) == "halt"
    assert reaction_to(verdict, {"all": "log"}) == "log"
    assert reaction_to(verdict, {"all": "log", "gradient": "warn"}) == "warn"
    assert reaction_to(verdict, {"all": "log", "gradient": "warn", "wrong_sign": "halt"}) == "halt"


def test_the_text_holds_all_that_a_person_needs():
    diagnosis = diagnose(
        [
            Verdict("finite", Status.PASS),
            Verdict(
                "gradient",
                Status.FAIL,
                "The loss has the wrong sign.",
                "Negate it.",
                {"correlation": -1.0, "allowed": 0.999},
                "wrong_sign",
                ("all advantages 0 (30 of 64 tokens have one)",),
            ),
            failed("wrong_direction"),
            Verdict("canary", Status.NO_POWER, "needs 400 tokens"),
        ],
        {},
    )
    assert str(diagnosis) == (
        "The loss has the wrong sign.\n"
        "  correlation: -1\n"
        "  allowed: 0.999\n"
        "Fix: Negate it.\n"
        "Not the cause: all advantages 0 (30 of 64 tokens have one).\n"
        "Explained by it: ascent (the policy does not move the way its advantages say).\n"
        "Checks passed: finite.\n"
        "Checks that could not tell: canary (needs 400 tokens)"
    )


def test_causes_have_names_of_their_own_and_a_statement():
    assert len(BY_NAME) == len(CAUSES)
    for cause in CAUSES:
        assert cause.name.isidentifier()
        assert cause.title[0].islower()
        assert not cause.title.endswith(".")
