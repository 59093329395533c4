"""What the growth benchmark makes of its points, and the rollouts that it makes up."""

import json
from dataclasses import asdict

import pytest

from benchmarks.performance.batches import InstantEngine, Shape, made_batch, made_groups
from benchmarks.performance.growth import (
    AXES,
    FULL,
    PARTS,
    SMOKE,
    Plan,
    draw,
    exponent,
    headline,
    judged,
    python_costs,
    table,
    within,
)
from benchmarks.performance.growth_parts import packing_point
from benchmarks.performance.growth_picture import PICTURE
from grpo_lightning.rollout.ledger import Source

SHAPE = Shape(prompts=2, samples=3, prompt_tokens=5, completion_tokens=4, turns=2)


def test_made_rollouts_have_the_shape_that_was_asked_for():
    groups, batch = made_groups(SHAPE), made_batch(SHAPE)
    assert [len(group.episodes) for group in groups] == [3, 3]
    assert {len(group.prompt_ids) for group in groups} == {5}
    for source, count in ((Source.SAMPLED, 8), (Source.ENVIRONMENT, 16)):
        assert {episode.count(source) for group in groups for episode in group.episodes} == {count}
    assert batch.num_tokens == SHAPE.input_tokens == 2 * (5 + 3 * 23)
    assert batch.num_targets == SHAPE.sampled_tokens == 48
    assert float(batch.loss_weight.sum()) == pytest.approx(1)
    assert batch.advantages.unique().numel() > 2


def test_an_engine_that_answers_at_once_keeps_to_the_length():
    engine = InstantEngine.of(SHAPE)
    assert {len(answer.token_ids) for answer in engine.answers} == {4}


def test_an_exponent_is_that_of_the_larger_half():
    assert exponent([1, 2, 4, 8], [9, 9, 48, 192]) == pytest.approx(2)
    # Of five points the last three: 4, 16 and 64 grow with the power 1.5.
    assert exponent([1, 2, 4, 16, 64], [7, 1, 8, 64, 512]) == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("seconds", "size", "work", "fine"),
    [
        ([1, 2, 4], [1, 2, 4], None, True),
        ([1, 2, 5], [1, 2, 4], None, False),
        ([1, 2, 4], [1, 2, 5], None, False),
        ([1, 2, 6], [1, 2, 4], [1, 2, 6], True),
        ([1, 2, 2], None, [1, 2, 2], True),
    ],
)
def test_a_curve_is_held_to_its_work_and_its_memory_to_a_straight_line(seconds, size, work, fine):
    given = {"seconds": seconds, "bytes": size, "work": work}
    curve = {"sizes": [1, 2, 4]} | {name: values for name, values in given.items() if values is not None}
    assert within(judged(curve)) is fine
    assert judged(curve)["bound"] >= 1


def made_result():
    """Curves of collector and packing with known costs: 1 ms an episode, 0.5 ms a turn, 2 us and 0.25 us a token."""
    plans = {part: Plan(Shape(2, 4, 8, 16), dict.fromkeys(AXES, (1, 2, 4)), 1) for part in PARTS}

    def collector(shape):
        turns = (shape.turns - 1) * 0.5e-3
        return shape.prompts * shape.samples * (1e-3 + turns + 2e-6 * shape.turns * shape.completion_tokens)

    def packing(shape):
        return 0.25e-6 * shape.prompts * shape.samples * (shape.prompt_tokens + shape.completion_tokens)

    parts = {}
    for part, seconds in (("collector", collector), ("packing", packing)):
        parts[part] = {
            axis: {
                "sizes": [1, 2, 4],
                "seconds": [seconds(shape) for shape in plans[part].shapes(axis)],
                "bytes": [1024, 2048, 4096],
            }
            for axis in AXES
        }
    bases = {part: asdict(plans[part].base) for part in parts}
    return {"engine": "made up", "bases": bases, "parts": parts, "python": python_costs(parts, plans)}


def test_costs_of_the_first_process_are_the_slopes_of_the_curves():
    expected = {
        "collector_us_per_sampled_token": 2.0,
        "collector_us_per_episode": 1000.0,
        "collector_us_per_further_turn": 500.0,
        "packing_us_per_token": 0.25,
    }
    assert made_result()["python"] == pytest.approx(expected)


def test_a_row_and_a_panel_a_curve(tmp_path):
    result = json.loads(json.dumps(made_result()))
    shown = table(result)
    assert shown.count("| yes |") + shown.count("| no |") == headline(result)["growth_curves"] == 10
    assert headline(result)["growth_curves_beyond_bound"] == 0
    assert "1000 us of a processor for an episode" in shown
    draw(result, tmp_path)
    assert (tmp_path / PICTURE).stat().st_size > 10_000


def test_packing_is_measured():
    found = packing_point(SHAPE, 1)
    assert found["seconds"] > 0
    assert found["bytes"] > 48 * 8


@pytest.mark.parametrize("plans", [FULL, SMOKE], ids=["full", "smoke"])
def test_every_part_grows_along_every_axis(plans):
    assert list(plans) == list(PARTS)
    for plan in plans.values():
        assert list(plan.sizes) == list(AXES)
        assert all(len(sizes) >= 3 and list(sizes) == sorted(sizes) for sizes in plan.sizes.values())
