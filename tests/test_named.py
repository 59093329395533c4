"""Settings that name functions."""

import math

import pytest

from grpo_lightning.errors import ConfigurationError
from grpo_lightning.functional.surrogates import clipped
from grpo_lightning.named import configured, name_of, named, one_of


def double(value, *, factor=2.0):
    if factor <= 0:
        raise ValueError(f"expected factor > 0, but got {factor}")
    return factor * value


def needs(value, *, limit):
    return min(value, limit)


def anything(value, **settings):
    return value, settings


KNOWN = {"double": double, "needs": needs}


class TestNamed:
    def test_a_name_of_ours(self):
        assert named("kind", "double", KNOWN) is double

    def test_the_function_itself(self):
        assert named("kind", anything, KNOWN) is anything

    def test_an_import_path(self):
        assert named("kind", "math.hypot", KNOWN) is math.hypot

    def test_our_name_wins_over_a_module(self):
        assert named("kind", "math.hypot", {"math.hypot": double}) is double

    @pytest.mark.parametrize(("value", "nearest"), [("doble", "double"), ("need", "needs")])
    def test_an_unknown_name_is_refused_with_the_nearest(self, value, nearest):
        with pytest.raises(ConfigurationError, match=f"expected kind to be one of double, needs.*{value!r}") as error:
            named("kind", value, KNOWN)
        assert f"did you mean {nearest!r}?" in str(error.value)

    def test_nothing_is_suggested_where_nothing_is_near(self):
        with pytest.raises(ConfigurationError) as error:
            named("kind", "xyz", KNOWN)
        assert "did you mean" not in str(error.value)

    @pytest.mark.parametrize("value", ["nowhere_at_all.function", "math.no_such_function"])
    def test_what_cannot_be_imported(self, value):
        with pytest.raises(ConfigurationError, match=f"kind={value!r} cannot be imported"):
            named("kind", value, KNOWN)

    def test_what_is_no_function(self):
        with pytest.raises(ConfigurationError, match="expected kind='math.pi' to be a function, but it is float"):
            named("kind", "math.pi", KNOWN)


class TestConfigured:
    def test_settings_are_bound(self):
        assert configured("kind", double, {"factor": 3.0}, 1.0)(2.0) == 6.0

    def test_defaults_stay(self):
        assert configured("kind", double, {}, 1.0)(2.0) == 4.0

    def test_an_unknown_setting_is_refused_by_name(self):
        with pytest.raises(ConfigurationError, match="kind 'double' has no setting 'facto'; it has factor"):
            configured("kind", double, {"facto": 3.0}, 1.0)

    def test_a_positional_argument_is_no_setting(self):
        with pytest.raises(ConfigurationError, match="no setting 'value'"):
            configured("kind", double, {"value": 3.0}, 1.0)

    def test_a_value_out_of_range_is_refused_early(self):
        with pytest.raises(ConfigurationError, match=r"cannot be used with \{'factor': -1\}: expected factor > 0"):
            configured("kind", double, {"factor": -1}, 1.0)

    def test_a_missing_setting_is_refused_early(self):
        with pytest.raises(ConfigurationError, match="kind 'needs' cannot be used with {}: .*'limit'"):
            configured("kind", needs, {}, 1.0)

    def test_a_function_of_any_settings(self):
        assert configured("kind", anything, {"free": 1}, 0)(5) == (5, {"free": 1})


class TestOneOf:
    def test_a_name_of_ours(self):
        assert one_of("kind", "double", KNOWN) is double

    @pytest.mark.parametrize("value", ["math.hypot", "doble", double])
    def test_nothing_else(self, value):
        with pytest.raises(ConfigurationError, match="expected kind to be one of double, needs, but got"):
            one_of("kind", value, KNOWN)


def test_functions_are_written_down_by_their_import_path():
    assert name_of(None) is None
    assert name_of("clipped") == "clipped"
    path = name_of(clipped)
    assert path == "grpo_lightning.functional.surrogates.clipped.clipped"
    assert named("surrogate", path, {}) is clipped
