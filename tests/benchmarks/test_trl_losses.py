"""The comparison with TRL's losses: what TRL computed is stored, and this project must still agree with it."""

import json
import re
import sys
from dataclasses import replace

import pytest
import torch
from doc_blocks import DOCS

from benchmarks.marked import marks
from benchmarks.trl_losses import __main__ as command
from benchmarks.trl_losses.__main__ import RESULTS, asked, main
from benchmarks.trl_losses.batch import LENGTHS, Batch
from benchmarks.trl_losses.cases import CASES, SECTIONS, TOLERANCE, Case
from benchmarks.trl_losses.compare import compared, relative
from benchmarks.trl_losses.ours import computed, objective_of
from benchmarks.trl_losses.table import markdown
from grpo_lightning import objective
from grpo_lightning.functional import TokenLoss, token_weights
from grpo_lightning.functional.advantages import ESTIMATORS

LOSS_TYPES = {"grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"}
"""All of TRL 1.16."""

BY_NAME = {case.name: case for case in CASES}
EQUAL = [case for case in CASES if not case.difference]
LOSSES = [case for case in EQUAL if case.compares == "loss"]

WITHOUT_EFFECT = {
    # With rewards of this size it is less than what counts as different.
    ("GDPO, converted", "advantage_args"),
}


@pytest.fixture(scope="module")
def results():
    return json.loads(RESULTS.read_text("utf-8"))


@pytest.fixture(scope="module")
def stored(results):
    return {case["name"]: case for case in results["cases"]}


@pytest.fixture(scope="module")
def batch():
    return Batch.stored()


def again(case: Case, stored, batch):
    return compared(case, batch, stored[case.name]["computed_by_trl"])


def named(cases):
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


def test_the_results_are_of_all_cases_in_the_code(results):
    assert [case["name"] for case in results["cases"]] == [case.name for case in CASES]
    assert len(BY_NAME) == len(CASES)


def test_every_loss_level_and_mode_of_trl_is_compared():
    assert {case.trl["loss_type"] for case in CASES if "loss_type" in case.trl} == LOSS_TYPES
    modes = {case.trl.get("vllm_importance_sampling_mode") for case in EQUAL}
    assert modes >= {"token_truncate", "token_mask", "sequence_truncate", "sequence_mask"}
    assert {case.trl.get("scale_rewards") for case in EQUAL} >= {"none", "group", "batch"}
    settings = {name for case in CASES for name in case.trl}
    assert settings >= {"importance_sampling_level", "delta", "top_entropy_quantile", "off_policy_mask_threshold"}


@named(CASES)
def test_what_trl_computed_still_compares_as_written_down(case, stored, batch):
    now, then = again(case, stored, batch), stored[case.name]
    assert now["here_loss"] == pytest.approx(then["here_loss"], rel=1e-9, abs=1e-12)
    for name in ("trainer", "trl", "here", "difference", "follows", "note", "equal"):
        assert now[name] == then[name], name
    for name, apart in then["relative_difference"].items():
        assert now["relative_difference"][name] == pytest.approx(apart, rel=1e-6, abs=1e-8)


@named(CASES)
def test_results_are_equal_or_the_difference_has_a_name(case, stored):
    apart = max(stored[case.name]["relative_difference"].values())
    assert (apart <= TOLERANCE) == (not case.difference) == stored[case.name]["equal"]
    # What is not equal is so by much more than rounding, and it is said whose result is that of the paper.
    assert (apart > 1e-3) == bool(case.difference) == bool(case.follows)


@named(EQUAL)
def test_every_setting_has_an_effect_on_what_is_equal(case, stored, batch):
    """Without any one of them the results would not be equal, so the tensors would show if it did something else."""
    for name, value in case.here.items():
        if (case.name, name) in WITHOUT_EFFECT or value == "group_mean":
            continue
        without = replace(case, here={key: other for key, other in case.here.items() if key != name})
        assert refused_or_unequal(without, stored, batch), name


def refused_or_unequal(case, stored, batch):
    try:
        return not again(case, stored, batch)["equal"]
    except (TypeError, ValueError):
        return True


@named(LOSSES)
def test_a_changed_formula_is_noticed(case, stored, batch, monkeypatch):
    """A thousandth is enough."""

    def changed(settings):
        right = objective_of(settings)

        def surrogate(terms):
            token = right.surrogate(terms)
            factor = 1 + 1e-3 * terms.advantages.abs()
            return TokenLoss(factor * token.loss, token.clipped_low, token.clipped_high)

        return replace(right, surrogate=surrogate)

    monkeypatch.setattr("benchmarks.trl_losses.ours.objective_of", changed)
    assert not again(case, stored, batch)["equal"]


def test_a_changed_kl_is_noticed(stored, batch, monkeypatch):
    right = objective.kl_of
    monkeypatch.setattr(objective, "kl_of", lambda *a: right(*a) + 1e-3 * a[1].square())
    noticed = {case.name for case in LOSSES if not again(case, stored, batch)["equal"]}
    assert noticed == {case.name for case in LOSSES if "kl_coef" in case.here}
    assert len(noticed) >= 5


def test_a_changed_weight_is_noticed(stored, batch, monkeypatch):
    def changed(lengths, *a, **k):
        weights = token_weights(lengths, *a, **k)
        return [w * (1 + 1e-3 * n) for w, n in zip(weights, lengths, strict=True)]

    monkeypatch.setattr("benchmarks.trl_losses.ours.token_weights", changed)
    assert not any(again(case, stored, batch)["equal"] for case in LOSSES)


@named([case for case in EQUAL if case.compares == "advantages"])
def test_a_changed_advantage_is_noticed(case, stored, batch, monkeypatch):
    name = case.here["advantage"]
    right = ESTIMATORS[name]
    monkeypatch.setitem(ESTIMATORS, name, lambda judged, **settings: right(judged, **settings) + 1e-3)
    assert not again(case, stored, batch)["equal"]


@pytest.mark.parametrize("part", ["loss", "gradient", "entropy_gradient"])
def test_a_difference_in_any_part_of_the_result_counts(part, stored, batch):
    case = BY_NAME["entropy bonus"]
    theirs = dict(stored[case.name]["computed_by_trl"])
    theirs[part] = [1.001 * v for v in theirs[part]] if isinstance(theirs[part], list) else 1.001 * theirs[part]
    assert compared(case, batch, stored[case.name]["computed_by_trl"])["equal"]
    assert not compared(case, batch, theirs)["equal"]


def test_the_relative_difference_is_in_units_of_theirs():
    assert relative(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.2)


def test_bounds_bind_for_some_tokens_and_not_for_others(batch):
    ratio = (torch.tensor(batch.logprobs) - torch.tensor(batch.old)).exp()
    of_engine = (torch.tensor(batch.old) - torch.tensor(batch.sampling)).exp()
    for values, low, high in ((ratio, 0.8, 1.28), (of_engine, 0.8, 1.3)):
        assert 0 < (values < low).float().mean() < 0.5
        assert 0 < (values > high).float().mean() < 0.5
    assert len(batch.logprobs) == sum(LENGTHS) == batch.spans()[-1][1]


def test_an_optimizer_step_on_some_answers_leaves_the_others_alone(batch):
    gradient = computed(BY_NAME["GRPO"], batch, [0, 2]).gradient
    (begin, end), (other, last) = batch.spans()[0], batch.spans()[2]
    assert gradient[begin:end].any()
    assert not gradient[end:other].any()
    assert gradient[other:last].any()
    assert not gradient[last:].any()


def test_the_process_with_trl_is_told_all_that_a_case_says_of_it():
    told = json.loads(json.dumps(BY_NAME["an answer without reward, DAPO"].request()))
    assert told["unscorable"] == [3]
    assert told["trl"] == {"beta": 0.0, "num_iterations": 2, "scale_rewards": "none", "loss_type": "dapo"}
    assert BY_NAME["DAPO, before the first update"].request()["trl"]["num_iterations"] == 1
    assert "scale_rewards" not in BY_NAME["RLOO"].request()["trl"]


def test_the_table_has_a_row_for_every_case(results, stored):
    table = markdown(results)
    assert f"TRL {results['versions']['trl']}" in table
    for title, cases in SECTIONS.items():
        assert f"| **{title}** |" in table
        for case in cases:
            row = next(line for line in table.split("\n") if line.startswith(f"| {case.name} |"))
            assert ("| equal |" in row) == (not case.difference)
            assert case.difference in row


def test_the_table_shows_how_large_a_difference_is(results):
    table = markdown(results)
    assert "| gradient 50 % | TRL divides by the rollout's tokens" in table
    assert "| 15 % | TRL's standard deviation divides by one less" in table
    assert re.search(r"\| gradient equal, loss 0\.\d+ % \| the value is that of `k3`", table)


def test_the_page_shows_the_table(results):
    page = DOCS / "algorithms.md"
    if not page.exists() or marks("trl")[0] not in page.read_text("utf-8"):
        pytest.skip("no page has the marks")
    assert markdown(results) in page.read_text("utf-8")


def test_show_prints_the_table(results, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["trl_losses", "show"])
    main()
    assert capsys.readouterr().out == markdown(results)


def test_without_the_environment_it_is_said_how_to_make_it(tmp_path):
    with pytest.raises(SystemExit, match="run python -m benchmarks.trl_losses setup"):
        asked(tmp_path)


def test_comparing_fails_where_a_result_is_not_as_expected(results, stored, tmp_path, monkeypatch):
    found = {name: dict(case["computed_by_trl"]) for name, case in stored.items()}
    for name in found:
        found[name].setdefault("answers", list(range(len(LENGTHS))))
    monkeypatch.setattr(command, "asked", lambda _: {"versions": results["versions"], "found": found})
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(command, "PAGE", tmp_path / "page.md")
    command.compare(tmp_path)
    assert json.loads((tmp_path / "results.json").read_text("utf-8")) == results
    found["GSPO"]["loss"] *= 1.01
    with pytest.raises(SystemExit, match="not as expected: GSPO$"):
        command.compare(tmp_path)
