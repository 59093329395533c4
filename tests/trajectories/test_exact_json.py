import json
from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from made_epochs import plain, same, texts

from grpo_lightning.trajectories.exact_json import NotStored, from_json, from_text, to_json, to_text

ARRAYS = hnp.arrays(
    hnp.scalar_dtypes() | hnp.unicode_string_dtypes() | hnp.byte_string_dtypes(),
    hnp.array_shapes(min_dims=0, min_side=0),
)


def back(value):
    return from_json(to_json(value))


@given(plain)
def test_plain_values_come_back_in_every_bit(value):
    to_json(value).encode()
    assert same(back(value), value)


@given(ARRAYS)
def test_numpy_values_come_back_in_every_bit(array):
    assert same(back({"a": [array]}), {"a": [array]})
    if array.ndim == 0:
        assert same(back(array[()]), array[()])


@given(texts)
def test_any_text_becomes_valid_unicode_and_comes_back(text):
    to_text(text).encode()
    assert from_text(to_text(text)) == text


@pytest.mark.parametrize("text", ["", "\0", "\0a\\n", "\ud800\\n\u00e9\\ud83d", "\\ud800"])
def test_texts_that_look_like_escapes(text):
    to_text(text).encode()
    assert back(text) == from_text(to_text(text)) == text


def test_a_pair_of_surrogates_stays_a_pair():
    assert back("\ud83d\ude00") == "\ud83d\ude00" != "\U0001f600"


def test_readable_where_it_can_be():
    assert to_json({"ä": [1, 0.5, None, True], "b": "c"}) == '{"ä":[1,0.5,null,true],"b":"c"}'
    json.loads(to_json({"nan": float("nan")}), parse_constant=pytest.fail)


def test_other_mappings_become_dicts():
    assert back(MappingProxyType({"a": 1})) == {"a": 1}


class Stubborn:
    def __repr__(self):
        raise RuntimeError("no")


class Endless(dict):
    def items(self):
        raise RuntimeError("no")


def test_what_is_not_plain_is_kept_as_its_repr():
    lost = back({"kept": 1, "lost": {4, 5}, "array": np.array([object], dtype=object)})
    assert lost["kept"] == 1
    assert lost["lost"] == NotStored("builtins.set", "{4, 5}")
    assert lost["array"].kind == "numpy.ndarray"
    assert back(lost) == lost
    assert back([Stubborn()]) == [NotStored(f"{__name__}.Stubborn", "")]
    assert back([Endless(a=1)]) == [NotStored(f"{__name__}.Endless", "{'a': 1}")]
    assert back("x" * 10_000) == "x" * 10_000
    assert len(back(frozenset(["x" * 10_000])).shown) == 500


def test_what_has_no_end_is_cut():
    cycle: list = [1]
    cycle.append(cycle)
    assert back(cycle) == [1, NotStored("builtins.list", "[1, [...]]")]
    deep: list = []
    for _ in range(3000):
        deep = [deep]
    assert "NotStored" in repr(back(deep))
    assert isinstance(back(10**5000), NotStored)


@given(st.sampled_from(['{"$tuple2": []}', '{"$tuple": [], "a": 1}', "nonsense"]))
def test_what_this_version_did_not_write_is_refused(text):
    with pytest.raises(ValueError, match="."):
        from_json(text)
