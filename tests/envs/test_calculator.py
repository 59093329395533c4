import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_lightning.envs import calculator, tool_schema


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("3 * (4 + 5)", "27"),
        (" 7 ", "7"),
        ("2 ** 10 - 1", "1023"),
        ("-2 ** 2", "-4"),
        ("+-3", "-3"),
        ("6 / 2", "3"),
        ("999999999999999 / 3", "333333333333333"),
        ("0 * -1.5", "0"),
        ("1 / 3", "0.333333333333"),
        ("0.1 + 0.2", "0.3"),
        ("2 ** 0.5", "1.41421356237"),
        ("2 ** -2", "0.25"),
        ("1 ** 999999999999", "1"),
        ("2 ** 1000", str(2**1000)),
        ("123456789 * 987654321", str(123456789 * 987654321)),
    ],
)
def test_results(expression, result):
    assert calculator(expression) == result


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("9**9**9", "the result is too large"),
        ("(-9)**9**9", "the result is too large"),
        ("10**200 * 10**200", "the result is too large"),
        ("10.0**400", "the result is too large"),
        ("1e999", "the result is too large"),
        ("9" * 400, "the result is too large"),
        ("1 / 0", "division by zero"),
        ("0 ** -1", "division by zero"),
        ("(-8) ** 0.5", "the result is not a real number"),
        ("", r"expected numbers, brackets and \+ - \* / \*\*, but got ''"),
        ("2 +", r"but got '2 \+'"),
        ("x + 1", "but got 'x'"),
        ("__import__('os').system('true')", 'but got "__import__'),
        ("True", "but got 'True'"),
        ("2j", "but got '2j'"),
        ("'a' * 9", "but got \"'a'\""),
        ("7 // 2", "but got '7 // 2'"),
        ("1 << 9999", "but got '1 << 9999'"),
        ("[1]", "but got '\\[1\\]'"),
        ("1" + "+1" * 600, "expected at most 1000 characters, but got 1201"),
        ("(" * 500 + "1" + ")" * 499, "expected numbers"),
    ],
)
def test_what_it_refuses(expression, message):
    begun = time.perf_counter()
    with pytest.raises(ValueError, match=message):
        calculator(expression)
    assert time.perf_counter() - begun < 1


@given(st.text("0123456789.+-*/() e", max_size=60) | st.text(max_size=60) | st.text("-~(", max_size=1000))
def test_answers_or_raises_a_value_error(expression):
    try:
        result = calculator(expression)
    except ValueError:
        return
    float(result)


@given(st.integers(-1000, 1000), st.integers(-1000, 1000), st.sampled_from("+-*"))
def test_agrees_with_python(left, right, sign):
    expected = {"+": left + right, "-": left - right, "*": left * right}[sign]
    assert calculator(f"({left}) {sign} ({right})") == str(expected)


def test_is_a_tool():
    assert tool_schema(calculator)["function"]["parameters"]["required"] == ["expression"]
