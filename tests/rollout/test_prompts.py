import json
import shutil
from pathlib import Path

import pytest
from fakes import EOS_ID, encode, make_task

from grpo_lightning.errors import ConfigurationError
from grpo_lightning.rollout.prompts import PromptEncoder, PromptSettings
from grpo_lightning.rollout.types import Task


@pytest.fixture
def copy(tiny_model, tmp_path):
    """A copy of the tiny model's small files, to be changed by the test."""
    target = tmp_path / "model"
    shutil.copytree(tiny_model, target, ignore=shutil.ignore_patterns("*.safetensors"))
    return target


def edit(path: Path, **changes):
    settings = json.loads(path.read_text())
    for name, value in changes.items():
        if value is None:
            settings.pop(name, None)
        else:
            settings[name] = value
    path.write_text(json.dumps(settings))


def without_template(model: Path) -> str:
    (model / "chat_template.jinja").unlink(missing_ok=True)
    edit(model / "tokenizer_config.json", chat_template=None)
    return str(model)


def chat(*turns):
    return Task("chat", tuple({"role": role, "content": content} for role, content in turns), {})


def test_prompt_ends_where_the_answer_begins(tiny_model):
    ids = PromptEncoder(tiny_model, 200)(chat(("system", "Be brief."), ("user", "2 + 2?")))
    assert ids == encode("system: Be brief.\nuser: 2 + 2?\nassistant: ")
    assert type(ids) is list
    assert all(type(i) is int for i in ids)


def test_messages_may_be_any_mapping(tiny_model):
    from types import MappingProxyType

    task = Task("t", (MappingProxyType({"role": "user", "content": "hi"}),), {})
    assert PromptEncoder(tiny_model, 200)(task) == encode("user: hi\nassistant: ")


def test_longest_prompt_is_allowed_and_one_more_is_not(tiny_model):
    task = make_task("abc")
    length = len(PromptEncoder(tiny_model, 1000)(task))
    assert len(PromptEncoder(tiny_model, length)(task)) == length
    pattern = f"task 'abc': expected a prompt of 1 to {length - 1} tokens, but it has {length}; .*max_prompt_tokens"
    with pytest.raises(ConfigurationError, match=pattern):
        PromptEncoder(tiny_model, length - 1)(task)


def test_without_template_it_says_what_to_give(copy):
    with pytest.raises(
        ConfigurationError, match=f"{copy} has no chat template: .*chat_template=FILE.*plain_prompts=True"
    ):
        PromptEncoder(without_template(copy), 200)


@pytest.mark.parametrize("has_template", [True, False])
def test_plain_prompts_are_the_text_of_the_single_message(copy, has_template):
    model = str(copy) if has_template else without_template(copy)
    assert PromptEncoder(model, 200, PromptSettings(plain_prompts=True))(make_task("abc")) == encode("abc?")


def test_plain_conversation_is_refused(copy):
    encoder = PromptEncoder(without_template(copy), 200, PromptSettings(plain_prompts=True))
    with pytest.raises(ConfigurationError, match="task 'chat': expected a single message.*plain_prompts.*it has 2"):
        encoder(chat(("system", "s"), ("user", "u")))


@pytest.mark.parametrize("other", [{"system_prompt": "s"}, {"chat_template_args": {"a": 1}}])
def test_plain_prompts_take_nothing_of_a_template(other):
    with pytest.raises(ConfigurationError, match=f"expected plain_prompts or {next(iter(other))}, but got both"):
        PromptSettings(plain_prompts=True, **other)


def test_empty_prompt_is_refused(copy):
    encoder = PromptEncoder(without_template(copy), 200, PromptSettings(plain_prompts=True))
    with pytest.raises(ConfigurationError, match="but it has 0"):
        encoder(chat(("user", "")))


class TestSystemPrompt:
    def test_is_put_first(self, tiny_model):
        encoder = PromptEncoder(tiny_model, 200, PromptSettings(system_prompt="Be brief."))
        assert encoder(chat(("user", "hi"))) == encode("system: Be brief.\nuser: hi\nassistant: ")

    def test_gives_way_to_the_tasks_own(self, tiny_model):
        encoder = PromptEncoder(tiny_model, 200, PromptSettings(system_prompt="Be brief."))
        assert encoder(chat(("system", "own"), ("user", "hi"))) == encode("system: own\nuser: hi\nassistant: ")


TEMPLATE = (
    "{% if shout is defined and shout %}!{% endif %}{% generation %}{{ style }}{% endgeneration %}{{ eos_token }}"
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


class TestChatTemplate:
    @pytest.fixture
    def template(self, tmp_path):
        path = tmp_path / "chat.jinja"
        path.write_text(TEMPLATE)
        return str(path)

    def settings(self, template, **arguments):
        return PromptSettings(chat_template=template, chat_template_args=arguments)

    def test_of_a_file_wins_over_the_tokenizers(self, tiny_model, template):
        encoder = PromptEncoder(tiny_model, 200, self.settings(template))
        assert encoder(chat(("user", "hi"))) == [EOS_ID, *encode("[hi]>")]

    def test_of_a_file_serves_a_model_without_one(self, copy, template):
        encoder = PromptEncoder(without_template(copy), 200, self.settings(template))
        assert encoder(chat(("user", "hi"))) == [EOS_ID, *encode("[hi]>")]

    def test_arguments_reach_it(self, tiny_model, template):
        encoder = PromptEncoder(tiny_model, 200, self.settings(template, shout=True, style="x"))
        assert encoder(chat(("user", "hi"))) == [*encode("!x"), EOS_ID, *encode("[hi]>")]

    @pytest.mark.parametrize("name", ["enable_thinking", "tokenize", "add_generation_prompt", "messages", "eos_token"])
    def test_argument_that_it_does_not_use_is_refused(self, tiny_model, template, name):
        with pytest.raises(ConfigurationError, match=f"{template} does not use '{name}'.*; it knows shout, style$"):
            PromptEncoder(tiny_model, 200, self.settings(template, **{name: False}))

    def test_template_without_arguments_says_so(self, tiny_model):
        with pytest.raises(ConfigurationError, match="does not use 'a', 'b' .*; it knows no arguments"):
            PromptEncoder(tiny_model, 200, PromptSettings(chat_template_args={"b": 1, "a": 1}))

    def test_refusal_of_the_template_names_the_task(self, tiny_model, template):
        encoder = PromptEncoder(tiny_model, 200, self.settings(template))
        with pytest.raises(
            ConfigurationError, match="task 'chat': the chat template of .* refuses its messages .*no system role"
        ):
            encoder(chat(("system", "s"), ("user", "u")))

    def test_missing_file_is_refused(self, tmp_path):
        with pytest.raises(ConfigurationError, match=f"chat_template to be a file.*none at {tmp_path}/no.jinja"):
            PromptSettings(chat_template=str(tmp_path / "no.jinja"))


class TestCheck:
    def test_names_the_first_prompt_that_is_too_long_and_counts_all(self, tiny_model):
        encoder = PromptEncoder(tiny_model, 30)
        tasks = [make_task("x" * length) for length in (1, 20, 5, 25, 22)]
        with pytest.raises(ConfigurationError) as error:
            encoder.check(tasks)
        length = len(PromptEncoder(tiny_model, 200)(tasks[1]))
        assert f"task '{'x' * 20}': expected a prompt of 1 to 30 tokens, but it has {length}" in str(error.value)
        assert f"of 5 checked tasks this is so for 3, the longest with {length + 5}" in str(error.value)
        encoder.check([tasks[0], tasks[2]])

    def test_looks_at_no_more_than_2000_tasks_spread_evenly(self, tiny_model):
        seen = []

        class Many:
            def __len__(self):
                return 10_000

            def __getitem__(self, index):
                seen.append(index)
                return make_task(str(index))

        PromptEncoder(tiny_model, 200).check(Many())
        assert seen == list(range(0, 10_000, 5))


def test_model_without_tokenizer_is_refused(copy):
    for path in copy.glob("token*"):
        path.unlink()
    with pytest.raises(ConfigurationError, match=f"expected a tokenizer with {copy}"):
        PromptEncoder(str(copy), 10)


class TestBannedTokens:
    def test_are_the_ids_of_single_token_words(self, tiny_model):
        assert PromptEncoder(tiny_model, 10).banned_token_ids(["b", "a", "b"]) == tuple(encode("ab"))
        assert PromptEncoder(tiny_model, 10).banned_token_ids([]) == ()

    @pytest.mark.parametrize("word", ["ab", ""])
    def test_others_are_refused_by_name(self, tiny_model, word):
        with pytest.raises(
            ConfigurationError, match=f"bad_words of one token each, but '{word}' is {len(word)} tokens"
        ):
            PromptEncoder(tiny_model, 10).banned_token_ids(["c", word])

    def test_what_ends_a_completion_is_refused(self, tiny_model):
        with pytest.raises(ConfigurationError, match="bad_words without '<eos>', which ends a completion"):
            PromptEncoder(tiny_model, 10).banned_token_ids(["<eos>"])


def test_decode_is_the_text_without_special_tokens(tiny_model):
    encoder = PromptEncoder(tiny_model, 200)
    assert encoder.decode([*encode("It's  4."), EOS_ID]) == "It's  4."
    assert encoder.decode([EOS_ID]) == ""
    assert encoder.decode(()) == ""
    assert encoder.decode(tuple(encode("a\nb"))) == "a\nb"


def test_stop_tokens_of_model_and_tokenizer(tiny_model, tiny_qwen3):
    assert PromptEncoder(tiny_model, 10).stop_token_ids == (EOS_ID,)
    assert PromptEncoder(tiny_qwen3, 10).stop_token_ids == (EOS_ID,)


@pytest.mark.parametrize(
    ("configured", "expected"),
    [
        (EOS_ID, (EOS_ID,)),
        (50, (EOS_ID, 50)),
        ([60, 50], (EOS_ID, 50, 60)),
        ([EOS_ID, 7], (EOS_ID, 7)),
        (None, (EOS_ID,)),
        ([], (EOS_ID,)),
    ],
)
def test_stop_tokens_are_united_sorted_and_unique(copy, configured, expected):
    edit(copy / "generation_config.json", eos_token_id=configured)
    assert PromptEncoder(str(copy), 10).stop_token_ids == expected


def test_stop_token_without_generation_settings(copy):
    (copy / "generation_config.json").unlink()
    assert PromptEncoder(str(copy), 10).stop_token_ids == (EOS_ID,)


def test_stop_token_of_the_model_alone(copy):
    edit(copy / "tokenizer_config.json", eos_token=None)
    edit(copy / "generation_config.json", eos_token_id=50)
    (copy / "special_tokens_map.json").unlink(missing_ok=True)
    assert PromptEncoder(str(copy), 10).stop_token_ids == (50,)


def test_model_without_stop_token_is_refused(copy):
    edit(copy / "tokenizer_config.json", eos_token=None)
    edit(copy / "generation_config.json", eos_token_id=None)
    (copy / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(ConfigurationError, match=f"{copy} names no end-of-sequence token"):
        PromptEncoder(str(copy), 10)


def test_demo_model(demo_model):
    encoder = PromptEncoder(demo_model, 200)
    ids = encoder(chat(("user", "What is 3 + 4?")))
    text = encoder.decode(ids)
    assert "What is 3 + 4?" in text
    assert text.endswith("assistant\n")
    assert "<|" not in text
    assert encoder.stop_token_ids
