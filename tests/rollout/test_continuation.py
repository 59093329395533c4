"""What is put between two answers, on templates with one peculiarity each."""

import json

import pytest
from chat_models import BOS, TOOLS, chat_encoder, result, said, text, tokens, user
from fakes import EOS_ID, encode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grpo_lightning.errors import ConfigurationError
from grpo_lightning.rollout.continuation import Continuation
from grpo_lightning.rollout.prompts import PromptEncoder, PromptSettings

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_CLOSE = CHATML.replace("<|im_end|>", "")
BOS_FIRST = "{{ bos_token }}" + CHATML
TRIMMED = CHATML.replace("m.content", "m.content | trim")
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + CHATML
)
LOUD = CHATML.replace("m.content", "m.content | upper if m.role == 'assistant' else m.content")
LOUD_WITHOUT_CLOSE = LOUD.replace("<|im_end|>", "")
HEADERS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
HINT_IN_LAST = CHATML.replace(
    "{{ m.content }}", "{{ m.content }}{% if loop.last and m.role == 'user' %} (be brief){% endif %}"
)
NUMBERED = CHATML.replace(
    "{{ m.content }}", "{% if m.role == 'user' %}Round {{ loop.index }}: {% endif %}{{ m.content }}"
)
FIRST_ONLY = CHATML.replace("{{ m.content }}", "{% if loop.index < 3 %}{{ m.content }}{% endif %}")
HIDDEN = CHATML.replace("m.content", "'...' if m.role == 'assistant' else m.content")
COUNTED_AND_LOUD = LOUD.replace("{% for", "{{ messages | length }}{% for", 1)
TWO_TOKENS = CHATML.replace("<|im_end|>", "<|end_text|><|im_end|>")
STRIPS = CHATML.replace(
    "{{ m.content }}",
    "{% if loop.last %}{{ m.content }}{% else %}{{ m.content.split('</think>')[-1] | trim }}{% endif %}",
)
TOOLS_IN_CALLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.id }} {{ c.function.name }}({{ c.function.arguments + '' }})]{% endfor %}"
    "{% if m.role == 'tool' %} for {{ m.tool_call_id }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

IM_END, END_OF_TEXT = "<|im_end|>", "<|endoftext|>"
NEWS = [user("go on")]
NEXT = "<|im_start|>user\ngo on<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def make(tiny_model, tmp_path):
    def encoder(template, stops=(IM_END, END_OF_TEXT), **settings):
        return chat_encoder(tiny_model, tmp_path / "chat", template, stops, **settings)

    return encoder


@pytest.fixture(scope="module")
def chatml(tiny_model, tmp_path_factory):
    return chat_encoder(tiny_model, tmp_path_factory.mktemp("chatml"), CHATML, (IM_END, END_OF_TEXT))


def shown(encoder, continuation):
    return text(encoder, continuation.close), text(encoder, continuation.observation)


class TestEndOfAnAnswer:
    @pytest.mark.parametrize(
        ("completion", "close"),
        [
            ("4<|im_end|>", ""),
            ("<|im_end|>", ""),
            ("4<|endoftext|>", ""),
            ("4", IM_END),
            ("", IM_END),
            ("4<|im_end|> and", IM_END),
        ],
    )
    def test_is_added_unless_a_stop_token_is_there(self, chatml, completion, close):
        assert shown(chatml, chatml.continuation(tokens(chatml, completion), NEWS)) == (close, "\n" + NEXT)

    def test_that_is_no_stop_token(self, make):
        encoder = make(CHATML, (END_OF_TEXT,))
        assert shown(encoder, encoder.continuation(encode("4"), NEWS)) == (IM_END, "\n" + NEXT)
        for end in (END_OF_TEXT, IM_END):
            found = encoder.continuation([*encode("4"), *tokens(encoder, end)], NEWS)
            assert shown(encoder, found) == ("", "\n" + NEXT)

    @pytest.mark.parametrize(
        ("completion", "close"),
        [
            ("4", "<|end_text|><|im_end|>"),
            ("4<|end_text|>", IM_END),
            ("4<|end_text|><|im_end|>", ""),
            ("4<|im_end|>", ""),
        ],
    )
    def test_of_two_tokens_is_completed(self, make, completion, close):
        encoder = make(TWO_TOKENS)
        assert shown(encoder, encoder.continuation(tokens(encoder, completion), NEWS))[0] == close

    @pytest.mark.parametrize("completion", ["4", "4<eos>", ""])
    def test_is_nothing_where_the_template_has_none(self, make, completion):
        encoder = make(NO_CLOSE)
        encoder.check_turns()
        found = encoder.continuation(tokens(encoder, completion), NEWS)
        assert shown(encoder, found) == ("", "\n" + NEXT.replace(IM_END, ""))

    @pytest.mark.parametrize(
        ("completion", "observation"),
        [
            ("4<|user|>", "go on<|assistant|>"),
            ("4<|tool|>", "<|user|>go on<|assistant|>"),
            ("4", "<|user|>go on<|assistant|>"),
        ],
    )
    def test_that_begins_the_next_message(self, make, completion, observation):
        encoder = make(
            HEADERS,
            ("<|user|>", "<|tool|>"),
        )
        encoder.check_turns()
        assert shown(encoder, encoder.continuation(tokens(encoder, completion), NEWS)) == ("", observation)
        assert encoder.forced("left") == encode("left")


class TestObservation:
    def test_repeats_no_beginning_of_the_sequence(self, make):
        encoder = make(BOS_FIRST)
        encoder.check_turns(roles=["user", "system"])
        assert text(encoder, encoder.first(NEWS)) == BOS + NEXT
        assert shown(encoder, encoder.continuation((), NEWS)) == (IM_END, "\n" + NEXT)

    def test_repeats_no_system_prompt(self, make):
        encoder = make(CHATML, system_prompt="Be brief.")
        encoder.check_turns()
        assert "Be brief." in text(encoder, encoder.first(NEWS))
        assert shown(encoder, encoder.continuation((), NEWS)) == (IM_END, "\n" + NEXT)

    def test_is_trimmed_where_the_template_trims(self, make):
        encoder = make(TRIMMED)
        encoder.check_turns()
        assert shown(encoder, encoder.continuation((), [user("  go on \n")])) == (IM_END, "\n" + NEXT)

    def test_may_be_several_messages(self, chatml):
        found = chatml.continuation((), [{"role": "system", "content": "s"}, *NEWS])
        assert shown(chatml, found) == (IM_END, "\n<|im_start|>system\ns<|im_end|>\n" + NEXT)

    def test_may_be_none(self, chatml):
        assert shown(chatml, chatml.continuation((), [])) == (IM_END, "\n<|im_start|>assistant\n")

    @pytest.mark.parametrize(
        "content", ["Said7f3a", "Said7f3ab Argument7f3a", "News7f3a", "<|im_end|>\n<|im_start|>", ""]
    )
    def test_may_say_anything(self, chatml, content):
        found = chatml.continuation((), [user(content)])
        assert shown(chatml, found) == (IM_END, "\n" + NEXT.replace("go on", content))

    def test_of_a_refused_sequence_of_roles(self, make):
        encoder = make(ALTERNATING)
        encoder.check_turns()
        with pytest.raises(
            ConfigurationError, match=r"chat.jinja refuses.*user, assistant, user, user.*must alternate"
        ):
            encoder.continuation((), NEWS * 2)

    @pytest.mark.parametrize(("template", "close"), [(LOUD, IM_END), (LOUD_WITHOUT_CLOSE, "")])
    def test_is_a_difference_where_the_template_changes_answers(self, make, template, close):
        encoder = make(template)
        assert encoder._turns.technique("user").kind == "prefix"
        encoder.check_turns()
        observation = NEXT if close else NEXT.replace(IM_END, "")
        assert shown(encoder, encoder.continuation((), NEWS)) == (close, "\n" + observation)


class TestToolResults:
    def test_answer_calls_with_their_names_and_ids(self, make):
        encoder = make(TOOLS_IN_CALLS)
        encoder.check_turns(TOOLS, ["tool", "user"])
        found = encoder.continuation((), [{**result("42"), "tool_call_id": "id[" + IM_END[:5]}, *NEWS], TOOLS)
        close, observation = shown(encoder, found)
        assert close == IM_END
        assert observation == "\n<|im_start|>tool\n42 for id[<|im_<|im_end|>\n" + NEXT

    def test_may_be_several(self, make):
        encoder = make(TOOLS_IN_CALLS)
        results = [{**result(str(i)), "tool_call_id": f"id{i}"} for i in range(2)]
        _, observation = shown(encoder, encoder.continuation((), results, TOOLS))
        middle = "".join(f"<|im_start|>tool\n{i} for id{i}<|im_end|>\n" for i in range(2))
        assert observation == f"\n{middle}<|im_start|>assistant\n"


class TestCheckTurns:
    @pytest.mark.parametrize(
        ("template", "reason"),
        [
            (FIRST_ONLY, "shows messages of the role 'user' behind an answer.*chat.jinja does not"),
            (HIDDEN, "shows messages of the role 'user' behind an answer.*chat.jinja does not"),
            (COUNTED_AND_LOUD, "shows messages of the role 'user' behind an answer.*chat.jinja does not"),
            (HINT_IN_LAST, "role 'user'.*chat.jinja the beginning of a conversation .* is shown differently"),
            (NUMBERED, "role 'user'.*chat.jinja what is appended .*Round 3.* is not how .* ends .*Round 5"),
            (
                CHATML.replace(
                    "{% if add_generation_prompt %}", "{% if add_generation_prompt and messages | length < 3 %}"
                ),
                "no generation prompt",
            ),
        ],
    )
    def test_refuses_by_name(self, make, template, reason):
        with pytest.raises(ConfigurationError, match=f"(?s){reason}.*Give another with chat_template=FILE"):
            make(template).check_turns()

    def test_names_the_role(self, make):
        encoder = make(ALTERNATING)
        with pytest.raises(ConfigurationError, match="role 'tool'.*chat.jinja.*roles must alternate"):
            encoder.check_turns(TOOLS, ["user", "tool"])

    def test_takes_plain_prompts(self, tiny_model):
        PromptEncoder(tiny_model, 10, PromptSettings(plain_prompts=True)).check_turns(TOOLS, ["user", "tool"])

    def test_takes_the_tiny_and_the_demo_model(self, tiny_model, demo_model):
        for model in (tiny_model, demo_model):
            PromptEncoder(model, 10).check_turns(roles=["user", "system", "tool"])
            assert not PromptEncoder(model, 10).shows_tools(TOOLS)


class TestPlainPrompts:
    @pytest.fixture
    def plain(self, tiny_model):
        return PromptEncoder(tiny_model, 10, PromptSettings(plain_prompts=True))

    @pytest.mark.parametrize("completion", [(), (EOS_ID,), tuple(encode("4"))])
    def test_continue_with_the_text_of_the_messages(self, plain, completion):
        assert plain.continuation(completion, [user(" a"), user("b")]) == Continuation((), tuple(encode(" ab")))

    def test_begin_and_force_with_text(self, plain):
        assert plain.first([user("a"), said(" b")]) == encode("a b")
        assert plain.forced(" left") == encode(" left")

    def test_know_nothing_of_tools_and_thinking(self, plain):
        assert not plain.shows_tools(TOOLS)
        assert not plain.strips_thinking
        assert plain.is_extension(encode("abgo on"), [user("a"), said("b"), *NEWS])


class TestIsExtension:
    @pytest.mark.parametrize("answer", ["4", " 4\n", "<think>2+2</think>4"])
    @pytest.mark.parametrize("end", [IM_END, END_OF_TEXT, ""])
    def test_where_all_is_kept(self, make, answer, end):
        encoder = make(TRIMMED)
        assert not encoder.strips_thinking
        assert self.extends(encoder, answer, end)

    @pytest.mark.parametrize(("answer", "extends"), [("4", True), ("<think>2+2</think>4", False)])
    def test_is_not_where_thinking_is_stripped(self, make, answer, extends):
        encoder = make(STRIPS)
        assert encoder.strips_thinking
        encoder.check_turns()
        assert self.extends(encoder, answer, IM_END) is extends

    def extends(self, encoder, answer, end):
        completion = tokens(encoder, answer + end)
        found = encoder.continuation(completion, NEWS)
        ledger = [*encoder.first([user("2+2")]), *completion, *found.close, *found.observation]
        whole = [user("2+2"), said(encoder.decode(completion)), *NEWS]
        return encoder.is_extension(ledger, whole)


def test_thinking_that_the_prompt_begins_and_history_drops_is_stripped(make):
    template = CHATML.replace("<|im_start|>assistant\n{% endif", "<|im_start|>assistant\n<think>\n{% endif")
    encoder = make(template)
    assert encoder.strips_thinking
    encoder.check_turns()
    assert text(encoder, encoder.forced("left")) == "\n</think>\n\nleft<|im_end|>"


def test_tools_are_shown_where_their_names_appear(make):
    assert make("{% for t in tools or [] %}{{ t | tojson }}{% endfor %}" + CHATML).shows_tools(TOOLS)
    assert not make("{% if tools %}You have tools.{% endif %}" + CHATML).shows_tools(TOOLS)


def test_first_begins_with_tools_and_a_whole_conversation(make):
    encoder = make("{% for t in tools or [] %}{{ t.function.name }}\n{% endfor %}" + CHATML)
    ids = encoder.first([user("a"), said("b"), user("c")], TOOLS)
    turns = "".join(
        f"<|im_start|>{role}\n{c}<|im_end|>\n" for role, c in [("user", "a"), ("assistant", "b"), ("user", "c")]
    )
    assert text(encoder, ids) == f"look_up\n{turns}<|im_start|>assistant\n"


@given(st.lists(st.integers(3, 98), max_size=40), st.text(st.characters(min_codepoint=32, max_codepoint=126)))
@settings(max_examples=200, deadline=None)
def test_sequence_is_what_the_template_shows(chatml, answer, news):
    """On a tokenizer of single characters tokens and text say the same, so the whole can be compared."""
    ledger = chatml.first([user("2+2")])
    found = chatml.continuation(answer, [user(news)])
    whole = [user("2+2"), said(chatml.decode(answer)), user(news)]
    assert [*ledger, *answer, *found.close, *found.observation] == chatml.first(whole)


@given(st.lists(st.integers(0, 49151), max_size=30))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_tokens_change_nothing_of_what_follows(smol, answer):
    """Most such sequences do not survive decoding and encoding; they are never encoded anew."""
    found = smol.continuation(answer, NEWS)
    over = bool(answer) and answer[-1] in smol.stop_token_ids
    assert text(smol, found.close) == ("" if over else IM_END)
    assert text(smol, found.observation) == "\n" + NEXT
    assert found == smol.continuation(answer[-1:], NEWS)


@pytest.fixture(scope="module")
def smol(demo_model):
    return PromptEncoder(demo_model, 100)


def test_demo_model_is_continued_as_its_template_shows_it(smol):
    answer = tokens(smol, "It is 4.<|im_end|>")
    found = smol.continuation(answer, NEWS)
    whole = smol.first([user("2+2"), said("It is 4."), *NEWS])
    assert [*smol.first([user("2+2")]), *answer, *found.observation] == whole
    assert smol.forced("It is 4.") == answer


def test_special_token_may_swallow_the_whitespace_behind_it(make, tmp_path):
    """Phi-3's tokens do."""
    encoder = make(CHATML)
    path = tmp_path / "chat" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    for token in tokenizer["added_tokens"]:
        token["rstrip"] = token["content"] == IM_END
    path.write_text(json.dumps(tokenizer))
    encoder = PromptEncoder(
        str(tmp_path / "chat"), 100, PromptSettings(chat_template=str(tmp_path / "chat/chat.jinja"))
    )
    encoder.check_turns()
    answer = tokens(encoder, "4<|im_end|>")
    found = encoder.continuation(answer, NEWS)
    whole = encoder.first([user("2+2"), said("4"), *NEWS])
    assert "\n<|im_start|>user" not in text(encoder, whole)
    assert [*encoder.first([user("2+2")]), *answer, *found.observation] == whole
