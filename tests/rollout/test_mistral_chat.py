"""Mistral's own chat encoder as an oracle: its package ships tokenizers, and builds token ids without any template."""

import json
import shutil
from pathlib import Path

import pytest
from chat_models import result, said, user

from grpo_lightning.rollout.prompts import PromptEncoder, PromptSettings

mistral_common = pytest.importorskip("mistral_common", reason="comes with vLLM")

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}[INST]SPACE{{ m.content }}[/INST]"
    "{% elif m.role == 'tool' %}"
    '[TOOL_RESULTS]SPACE{"content": {{ m.content }}, "call_id": "{{ m.tool_call_id }}"}[/TOOL_RESULTS]'
    "{% elif m.tool_calls %}[TOOL_CALLS]SPACE{{ m.tool_calls[0].function.arguments | tojson }}{{ eos_token }}"
    "{% else %}SPACE{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)

FILES = {
    "mistral_instruct_tokenizer_240323.model.v3": ("tokenizer.model", " "),
    "tekken_240911.json": ("tekken.json", ""),
}
"""Tokenizers with special tokens around turns: under which name a model has them, and what a turn begins with."""


@pytest.fixture(scope="module", params=FILES)
def mistral(request, tmp_path_factory):
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    shipped = Path(mistral_common.__file__).parent / "data" / request.param
    name, space = FILES[request.param]
    model = tmp_path_factory.mktemp("mistral")
    shutil.copy(shipped, model / name)
    (model / "config.json").write_text('{"model_type": "mistral"}')
    (model / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    template = model / "chat.jinja"
    template.write_text(TEMPLATE.replace("SPACE", space))
    encoder = PromptEncoder(str(model), 100, PromptSettings(chat_template=str(template)))
    return encoder, MistralTokenizer.from_file(str(shipped))


def encoded(mistral, *messages):
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    return mistral.encode_chat_completion(ChatCompletionRequest(messages=list(messages))).tokens


def test_template_can_be_continued(mistral):
    encoder, _ = mistral
    encoder.check_turns(roles=["user", "tool"])


@pytest.mark.parametrize("is_cut_off", [False, True])
def test_conversation_has_the_tokens_that_mistral_gives_it(mistral, is_cut_off):
    encoder, oracle = mistral
    question, answer, news = user("What is 2+2?"), said("It is 4."), user("And 3 + 3?")
    completion = oracle.instruct_tokenizer.tokenizer.encode("It is 4.", bos=False, eos=not is_cut_off)
    found = encoder.continuation(completion, [news])
    assert len(found.close) == is_cut_off
    sequence = [*encoder.first([question]), *completion, *found.close, *found.observation]
    assert sequence == encoded(oracle, question, answer, news)
    assert encoder.forced("It is 4.")[-1:] == list(encoder.stop_token_ids)


def test_tool_result_has_the_tokens_that_mistral_gives_it(mistral):
    encoder, oracle = mistral
    call = {"id": "call12345", "type": "function", "function": {"name": "look_up", "arguments": '{"value": "x"}'}}
    whole = encoded(oracle, user("a"), {"role": "assistant", "content": "", "tool_calls": [call]}, result("42"))
    found = encoder.continuation((), [result("42")])
    ids = [*found.close, *found.observation]
    assert len(ids) > 5
    assert whole[-len(ids) :] == ids
