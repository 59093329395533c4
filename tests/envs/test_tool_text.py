import json

import pytest

from grpo_lightning.envs import calculator, tool_schema
from grpo_lightning.envs.tool_calls import FORMATS, parse_tool_calls
from grpo_lightning.envs.tool_text import tools_as_text, with_tools_in_system, without_tool_role

TOOLS = (tool_schema(calculator),)


def tool(content):
    return {"role": "tool", "name": "calculator", "tool_call_id": "call_0", "content": content}


def test_the_text_names_the_tools_and_how_to_call_them():
    text = tools_as_text(TOOLS)
    assert json.dumps(TOOLS[0]["function"]) in text.splitlines()
    assert '<tool_call>\n{"name": "NAME", "arguments": {"ARGUMENT": VALUE}}\n</tool_call>' in text
    assert "<tool_response>\nRESULT\n</tool_response>" in text


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_a_call_in_the_form_that_is_shown_is_read(format):
    form = FORMATS[format].form
    assert form in tools_as_text(TOOLS, format)
    (call,) = parse_tool_calls(form.replace("NAME", "add").replace("ARGUMENT", "a").replace("VALUE", "1"))
    assert (call.name, call.error) == ("add", None)
    assert str(call.arguments["a"]) == "1"


def test_the_text_goes_into_the_system_message():
    user = {"role": "user", "content": "Hello"}
    text = tools_as_text(TOOLS)
    assert with_tools_in_system([user], TOOLS) == ({"role": "system", "content": text}, user)
    system = {"role": "system", "content": "Be brief."}
    assert with_tools_in_system([system, user], TOOLS) == ({"role": "system", "content": f"Be brief.\n\n{text}"}, user)
    assert system["content"] == "Be brief."
    parts = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    (joined, _) = with_tools_in_system([parts, user], TOOLS)
    assert joined["content"] == [{"type": "text", "text": "Be brief."}, {"type": "text", "text": text}]
    assert with_tools_in_system([user], ()) == (user,)
    assert FORMATS["pythonic"].form in with_tools_in_system([user], TOOLS, "pythonic")[0]["content"]


def test_results_become_one_message_of_the_user():
    user = {"role": "user", "content": "Go on."}
    assert without_tool_role([tool("7"), tool("12"), user, tool("1")]) == (
        {
            "role": "user",
            "content": "<tool_response>\n7\n</tool_response>\n<tool_response>\n12\n</tool_response>",
        },
        user,
        {"role": "user", "content": "<tool_response>\n1\n</tool_response>"},
    )
    assert without_tool_role([user]) == (user,)
