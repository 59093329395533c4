import pytest

from grpo_lightning.functional.lr_schedule import lr_factor


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0, 0.5, 1, 1, 1, 1, 1, 1]),
        ("linear", [0, 0.5, 1, 0.75, 0.5, 0.25, 0, 0]),
        ("cosine", [0, 0.5, 1, 0.853553, 0.5, 0.146447, 0, 0]),
    ],
)
def test_golden_numbers(schedule, expected):
    factors = [lr_factor(u, warmup=2, planned=6, schedule=schedule) for u in range(8)]
    assert factors == pytest.approx(expected, abs=1e-6)


def test_a_warm_up_as_long_as_the_run():
    assert [lr_factor(u, warmup=4, planned=4, schedule="linear") for u in (3, 4, 5)] == [0.75, 1, 0]
