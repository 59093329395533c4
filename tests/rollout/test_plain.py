import enum
import io
import json
from collections import OrderedDict
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo_lightning.rollout.plain import plain

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


class Colour(enum.StrEnum):
    RED = "red"


class Level(enum.IntEnum):
    HARD = 2


@given(values)
def test_plain_values_stay_what_they_are(value):
    assert plain(value) == value
    assert json.loads(json.dumps(plain(value))) == value


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ((1, (2.5, "x")), [1, [2.5, "x"]]),
        ({1: {None: True}}, {"1": {"None": True}}),
        (MappingProxyType({"a": OrderedDict(b=(1,))}), {"a": {"b": [1]}}),
        (np.float32(0.5), 0.5),
        (np.float64(0.5), 0.5),
        (np.str_("x"), "x"),
        (np.bool_(True), True),
        (Colour.RED, "red"),
        (Level.HARD, 2),
        (np.int64(3), 3),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (torch.tensor([0.5, 1.0]), [0.5, 1.0]),
        (torch.tensor(True), True),
        ({"board": np.array(["x", "o"])}, {"board": ["x", "o"]}),
        (Path("a/b"), repr(Path("a/b"))),
        ({1}, "{1}"),
        (b"raw", "b'raw'"),
        ([ValueError("no")], ["ValueError('no')"]),
    ],
)
def test_everything_else_becomes_plain(value, expected):
    result = plain(value)
    assert result == expected
    assert type(result) is type(expected)
    assert json.loads(json.dumps(result)) == expected
    file = io.BytesIO()
    torch.save(result, file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == expected
