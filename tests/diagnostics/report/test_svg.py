import pytest

from grpo_lightning.diagnostics.report.line_chart import Line, line_chart
from grpo_lightning.diagnostics.report.svg import Scale, element, finite, number, scale_over


@pytest.mark.parametrize(
    ("value", "drawn"),
    [
        (1, 1.0),
        (0.5, 0.5),
        (True, None),
        (None, None),
        ("1", None),
        (1e300, None),
        (10**400, None),
        (float("nan"), None),
    ],
)
def test_what_can_be_drawn(value, drawn):
    assert finite(value) == drawn


@pytest.mark.parametrize(
    ("value", "shown"), [(0.012345, "0.0123"), (1e-7, "1e-7"), (1234567.0, "1.23e6"), (-2.0, "-2")]
)
def test_numbers_are_short(value, shown):
    assert number(value) == shown


def test_attributes_are_escaped():
    assert element("a", class_='"><b', x=1.50) == '<a class="&quot;&gt;&lt;b" x="1.5"></a>'


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (-3, 3, [-2, 0, 2]),
        (7, 7.9, [7, 7.2, 7.4, 7.6, 7.8]),
    ],
)
def test_ticks_are_round(low, high, ticks):
    assert Scale(low, high, 0, 1).ticks() == pytest.approx(ticks)


def test_ticks_of_counts_are_whole():
    assert Scale(0, 2, 0, 1).ticks(whole=True) == [0, 1, 2]


def test_a_logarithmic_scale():
    scale = scale_over([2e-5, 0.3], 100, 0, log=True)
    assert scale.ticks() == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1])
    assert scale(1e-5) == 100
    assert scale(1) == 0
    assert scale(10**-2.5) == pytest.approx(50)
    assert not scale_over([0.2, 0.3], 0, 1, log=True).log


def test_values_beyond_a_scale_are_at_its_ends():
    assert [Scale(0, 2, 0, 10)(value) for value in (-1, 1, 5)] == [0, 5, 10]


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-9, 1e99])
def test_values_that_are_alike_have_a_scale(value):
    scale = scale_over([value, value * (1 + 1e-8)], 0, 1)
    assert scale.low < value < scale.high
    assert scale(value) == pytest.approx(0.5, abs=1e-3)
    assert len({number(tick) for tick in scale.ticks()}) == len(scale.ticks())


def test_a_chart_of_nothing_is_empty():
    assert line_chart([Line("a", [1, 2], [None, float("nan")])], x="update", y="") == ""
    assert line_chart([], x="update", y="") == ""


def test_it_goes_over_gaps():
    assert "from 1 at update 1 to 3 at update 3" in line_chart([Line("a", [1, 2, 3], [1, None, 3])], x="update", y="u")
