import json
import keyword
import re
import time
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_lightning.envs.tool_calls import FORMATS, ToolFormat, parse_tool_calls
from grpo_lightning.rollout.types import ToolCall

ARGUMENTS = {"city": 'Zürich, "old" town', "days": 3, "exact": True, "near": [1.5, None], "more": {"a": "b"}}


def as_json(name, arguments, key="arguments"):
    return json.dumps({"name": name, key: arguments})


def hermes(calls):
    return "\n".join(f"<tool_call>\n{as_json(*call)}\n</tool_call>" for call in calls)


def qwen3_coder(calls):
    """Values are text: what is none is written as JSON."""
    blocks = []
    for name, arguments in calls:
        parameters = "".join(
            f"<parameter={key}>\n{value if isinstance(value, str) else json.dumps(value)}\n</parameter>\n"
            for key, value in arguments.items()
        )
        blocks.append(f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>")
    return "\n".join(blocks)


def llama3(calls):
    return "; ".join(as_json(*call, key="parameters") for call in calls)


def mistral(calls):
    return "[TOOL_CALLS] " + json.dumps([{"name": name, "arguments": arguments} for name, arguments in calls])


def pythonic(calls):
    written = (f"{name}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})" for name, arguments in calls)
    return f"[{', '.join(written)}]"


def fenced(calls):
    return "\n".join(f"```json\n{as_json(*call)}\n```" for call in calls)


def deepseek(calls):
    blocks = (f"<｜tool▁call▁begin｜>{n}<｜tool▁sep｜>{json.dumps(a)}<｜tool▁call▁end｜>" for n, a in calls)
    return f"<｜tool▁calls▁begin｜>{''.join(blocks)}<｜tool▁calls▁end｜>"


WRITERS = {
    function.__name__: function for function in (hermes, qwen3_coder, llama3, mistral, pythonic, fenced, deepseek)
}
ALL = sorted(WRITERS)


def read(text, format="auto"):
    calls = parse_tool_calls(text, format)
    assert [call.error for call in calls] == [None] * len(calls)
    return [(call.name, dict(call.arguments)) for call in calls]


def error(text, format="auto"):
    (call,) = parse_tool_calls(text, format)
    assert call.error
    assert not call.arguments
    return call.name, call.error


def test_every_format_has_a_name_and_a_writer_here():
    assert {*FORMATS, "auto"} == set(get_args(ToolFormat))
    assert set(ALL) == set(FORMATS)


NAMES = st.from_regex(re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,8}", re.ASCII), fullmatch=True).filter(
    lambda name: not keyword.iskeyword(name)
)
# No surrogates (no such text can be encoded), and for the formats without quoting none of their own markers.
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="<>｜"))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
CALLS = st.lists(st.tuples(NAMES, st.dictionaries(NAMES, VALUES, max_size=3)), min_size=1, max_size=3)


@pytest.mark.parametrize("format", sorted(set(ALL) - {"qwen3_coder"}))
@given(calls=CALLS)
@settings(deadline=None)
def test_what_was_written_is_read(format, calls):
    text = WRITERS[format](calls)
    expected = [(name, arguments) for name, arguments in calls]
    assert read(text, format) == expected
    assert read(text) == expected


@given(calls=st.lists(st.tuples(NAMES, st.dictionaries(NAMES, TEXTS, max_size=3)), min_size=1, max_size=3))
@settings(deadline=None)
def test_texts_in_tags_are_read(calls):
    assert read(qwen3_coder(calls), "qwen3_coder") == calls
    assert read(qwen3_coder(calls)) == calls


@pytest.mark.parametrize("format", ALL)
@pytest.mark.parametrize("words", ["", "I look it up.\n", "<think>Shall I call f(x=1)?</think>\n\n"])
def test_words_before_the_call(format, words):
    calls = [("weather", {"city": "Bern"}), ("time_in", {"city": "Bern"})]
    assert read(words + WRITERS[format](calls)) == calls


@pytest.mark.parametrize("format", ALL)
def test_every_kind_of_value(format):
    ((name, arguments),) = read(WRITERS[format]([("weather", ARGUMENTS)]))
    assert name == "weather"
    if format == "qwen3_coder":
        arguments = {key: value if key == "city" else json.loads(value) for key, value in arguments.items()}
    assert arguments == ARGUMENTS


@pytest.mark.parametrize(
    "text",
    [
        "",
        "The sum is 7.",
        "[1, 2]",
        "[f(x), g(y)]",
        "[link](https://example.org) and [see(1)]",
        "f(x=1)",
        "Let S = [n(k=1) + 2",
        '{"answer": 3}',
        '{"name": "Ada", "age": 36}',
        '[{"name": "Ada", "age": 36}]',
        '```json\n{"name": "Ada", "age": 36}\n```',
        "```python\nprint(add(a=1))\n```",
        r"\boxed{5}",
        'add{"a": 1}',
        '{"tools": [\n  {"name": "add", "parameters": {}}\n]}',
        'Write {"name": "add", "arguments": {}} to add.',
        '<think>I could say <tool_call>{"name": "add", "arguments": {}}</tool_call>',
        '<think><tool_call>{"name": "add", "arguments": {}}</tool_call></think>The sum is 7.',
        "<think>[add(a=1)]\n</think>\n7",
        'add{"a": 1}</think>7',
    ],
)
def test_no_call(text):
    assert parse_tool_calls(text) == ()


@pytest.mark.parametrize(
    ("text", "format", "expected"),
    [
        ('{"name": "add", "arguments": {"a": 1}}', "hermes", [("add", {"a": 1})]),
        ('{"name": "add", "arguments": {}}\n{"name": "f", "arguments": {}}', "auto", [("add", {}), ("f", {})]),
        ('[{"name": "add", "arguments": {"a": 1}}]', "auto", [("add", {"a": 1})]),
        ('add{"a": 1}sub{"a": 2}', "mistral", [("add", {"a": 1}), ("sub", {"a": 2})]),
        ('[TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]sub[CALL_ID]abc[ARGS]{}', "auto", [("add", {"a": 1}), ("sub", {})]),
        ('<|python_tag|>{"name": "add", "parameters": {"a": 1}}', "auto", [("add", {"a": 1})]),
        ('{"type": "function", "name": "add", "parameters": {"a": 1}}', "auto", [("add", {"a": 1})]),
        ('<tool_call>[{"name": "add"}, {"name": "sub"}]</tool_call>', "auto", [("add", {}), ("sub", {})]),
        ('```tool\n{"name": "add"}\n```', "auto", [("add", {})]),
        ("<|python_start|>[add(a=-1)]<|python_end|>", "auto", [("add", {"a": -1})]),
        ("[now()]", "auto", [("now", {})]),
        ("[clock.now(zone='UTC')]", "auto", [("clock.now", {"zone": "UTC"})]),
        ("[add(a=(1, 2))]", "auto", [("add", {"a": [1, 2]})]),
        (
            '<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{"a": 1}\n```<｜tool▁call▁end｜>',
            "auto",
            [("add", {"a": 1})],
        ),
    ],
)  # fmt: skip
def test_variants_and_missing_markers(text, format, expected):
    assert read(text, format) == expected


def test_arguments_as_json_text():
    text = json.dumps({"name": "add", "arguments": '{"a": 1}'})
    assert read(f"<tool_call>{text}</tool_call>") == [("add", {"a": 1})]
    openai = json.dumps({"id": "x1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}})
    (call,) = parse_tool_calls(f"<tool_call>{openai}</tool_call>")
    assert call == ToolCall("add", {"a": 1}, "x1")


def test_a_call_may_contain_the_closing_tag():
    arguments = {"html": "</tool_call><tool_call>\n```"}
    assert read(hermes([("show", arguments)])) == [("show", arguments)]
    assert read(fenced([("show", arguments)])) == [("show", arguments)]


def test_line_breaks_in_json_strings():
    assert read('<tool_call>{"name": "run", "arguments": {"code": "a\nb"}}</tool_call>') == [("run", {"code": "a\nb"})]


def test_ids_are_unique():
    ids = ["a", "a", None, "call_0", "call_0"]
    text = json.dumps([{"name": "f", "id": id} for id in ids])
    calls = parse_tool_calls(f"<tool_call>{text}</tool_call>")
    assert [call.id for call in calls] == ["a", "call_1", "call_2", "call_0", "call_3"]
    assert [call.id for call in parse_tool_calls(llama3([("f", {})] * 3))] == ["call_0", "call_1", "call_2"]


def test_mistral_ids_fit_its_templates():
    ids = [call.id for call in parse_tool_calls(mistral([("f", {})] * 12))]
    assert len(set(ids)) == 12
    assert all(re.fullmatch("[a-zA-Z0-9]{9}", id) for id in ids)
    (call,) = parse_tool_calls("[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{}")
    assert call.id == "abcdefghi"


@pytest.mark.parametrize(
    ("text", "format", "name", "end"),
    [
        ('<tool_call>\n{"name": "add", "arguments": {"a"', "auto", "add", "</tool_call>"),
        ('<tool_call>\n{"name": "add", "arguments": {}}', "auto", "add", "</tool_call>"),
        ("<function=add>\n<parameter=a>\n1", "auto", "add", "</function>"),
        ('```tool\n{"name": "add"}', "auto", "add", "```"),
        ("[add(a=1, b=", "auto", "", ")]"),
        ('<｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a"', "auto", "", "<｜tool▁call▁end｜>"),
    ],
)
def test_a_cut_off_call_says_so(text, format, name, end):
    assert error(text, format) == (name, f"the call was cut off: expected {end} at its end")


def test_calls_before_a_cut_off_one_are_kept():
    first, second = parse_tool_calls(hermes([("add", {"a": 1})]) + '<tool_call>{"name": "sub", "argu')
    assert first == ToolCall("add", {"a": 1}, "call_0")
    assert second.error == "the call was cut off: expected </tool_call> at its end"


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("<tool_call>add 1 and 2</tool_call>", "", "text that is not JSON (Expecting value at character 0)"),
        ('<tool_call>{"name": "add", "arguments": {a: 1}}</tool_call>', "add", "text that is not JSON"),
        ('<tool_call>{"name": "add"}}</tool_call>', "add", "expected </tool_call> after the call, but got '}'"),
        ("<tool_call>7</tool_call>", "", 'expected {"name": ..., "arguments": {...}}, but got 7'),
        ('<tool_call>{"arguments": {}}</tool_call>', "", 'but got {"arguments": {}}'),
        ('<tool_call>{"name": "add", "arguments": [1]}</tool_call>', "add", "arguments as a JSON object, but got list"),
        ('<tool_call>{"name": "add", "arguments": "1 2"}</tool_call>', "add", "more text after its end: ' 2'"),
        ('<tool_call>{"name": "add", "arguments": {"a": 1e999}}</tool_call>', "add", "Out of range float values"),
        ('<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>', "add", "NaN is not JSON"),
        (r'<tool_call>{"name": "add", "arguments": {"a": "\ud800"}}</tool_call>', "", "not valid Unicode"),
        ('<tool_call>{"name": "add", "arguments": ' + "[" * 9999 + "</tool_call>", "add", "nested too deeply"),
        ('{"name": "add", "parameters": {"a": ', "add", "text that is not JSON"),
        ("<|python_tag|>print(1)", "", "text that is not JSON"),
        ("[TOOL_CALLS]add[ARGS]{a}", "add", "expected the arguments as a JSON object"),
        ("[TOOL_CALLS] add", "", "text that is not JSON"),
        ("```tool\nadd\n```", "", "text that is not JSON"),
        ('```tool\n{"name": "add"} 7\n```', "add", "expected ``` after the call, but got '7'"),
        ("[add(a=1, 2)]", "", "positional argument follows keyword argument"),
        ("[add(a=__import__('os'))]", "add", "expected a literal value for a, but got an expression"),
        ("[add(a=1, **{'b': 2})]", "add", "expected arguments by name, but got some without"),
        ("[add(a={1})]", "add", "not JSON serializable"),
        ("[add(a=1), 2]", None, None),
        ("[add(a=1)] + [2]", "", "another expression"),
        ("<function=add>1</function>", "add", "expected <function=NAME><parameter=ARGUMENT>..., but got '1'"),
        ("<function=add><parameter=a>1</function>", "add", "expected </parameter> at the end of 'a'"),
        ("<｜tool▁call▁begin｜>add<｜tool▁call▁end｜>", "", "expected NAME<｜tool▁sep｜>ARGUMENTS, but got 'add'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(text, name, message):
    if name is None:
        good, bad = parse_tool_calls(text)
        assert good == ToolCall("add", {"a": 1}, "call_0")
        assert bad.error == "expected name(argument=value), but got another expression"
        return
    found, said = error(text)
    assert (found, message in said) == (name, True), said


def test_a_broken_call_does_not_get_the_name_of_the_next():
    first, second = parse_tool_calls('<tool_call>{"nam</tool_call>' + hermes([("add", {"a": 1})]))
    assert (first.name, second.name) == ("", "add")


def test_positional_arguments_are_refused_where_the_format_is_known():
    assert error("[add(1)]", "pythonic") == ("add", "expected arguments by name, but got some without")


PIECES = st.sampled_from(
    [
        "<tool_call>", "</tool_call>", '{"name": "f", "arguments": ', '{"a": 1}', "{", "}", "[", "]", "(", ")", '"',
        "\\", "<function=f>", "</function>", "<parameter=x>", "</parameter>", "[TOOL_CALLS]", "[ARGS]", "[f(x=", "1",
        "-", ",", "```json\n", "```tool\n", "```", "\n", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>",
        "<｜tool▁call▁end｜>",
        "f{", "\0", "<|python_tag|>", "</think>", "\\ud800", "'", "lambda:", "f'{", "not ", "=", ":", "; ", "é",
    ]
)  # fmt: skip


@given(
    text=st.text(st.characters()) | st.lists(PIECES, max_size=30).map("".join), format=st.sampled_from([*ALL, "auto"])
)
@settings(deadline=None, max_examples=1000)
def test_never_raises(text, format):
    calls = parse_tool_calls(text, format)
    assert isinstance(calls, tuple)
    assert len({call.id for call in calls}) == len(calls)
    for call in calls:
        assert call.name or call.error
        json.dumps(dict(call.arguments), allow_nan=False, ensure_ascii=False).encode()


HOSTILE = [
    "[", "{", '{"a":', "[f(x=", "[f(x=[", "[f(x=-", "[f(x=not ", "[f(x=a.", "[f(x=1+", "[f(x=(", "[f(x=lambda:",
    "<tool_call>", '<tool_call>{"name":', "<function=a>", "<function=a><parameter=x>", "```tool\n", "[TOOL_CALLS]",
    "[TOOL_CALLS][", "\n", "[\n", "[ ", " ", '{"name":"a","arguments":', '{"name":"a","arguments":{}}\n',
    "<｜tool▁call▁begin｜>", 'a{"x":', "-", "not ", "a.", "1+", "(", "lambda:", "f'{",
]  # fmt: skip


@pytest.mark.parametrize("piece", HOSTILE)
def test_hostile_text_is_read_quickly(piece):
    """100 kB each; anything quadratic would take minutes."""
    begun = time.perf_counter()
    body = piece * (100_000 // len(piece))
    for before in ("", "[f(x=", '<tool_call>{"name": "f", "arguments": '):
        for end in ("", ")]", "</tool_call>"):
            parse_tool_calls(before + body + end)
    assert time.perf_counter() - begun < 10
