import json
import shutil
from pathlib import Path

import pytest
from fakes import EOS_ID, encode, make_task

from grpo_lightning.errors import ConfigurationError
from grpo_lightning.rollout.prompts import PromptEncoder
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


def test_without_template_a_single_message_is_plain_text(copy):
    encoder = PromptEncoder(without_template(copy), 200)
    assert encoder(make_task("abc")) == encode("abc?")


def test_without_template_a_conversation_is_refused(copy):
    encoder = PromptEncoder(without_template(copy), 200)
    with pytest.raises(ConfigurationError, match="task 'chat' has 2 messages, but the tokenizer has no chat template"):
        encoder(chat(("system", "s"), ("user", "u")))


def test_empty_prompt_is_refused(copy):
    encoder = PromptEncoder(without_template(copy), 200)
    with pytest.raises(ConfigurationError, match="but it has 0"):
        encoder(chat(("user", "")))


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
