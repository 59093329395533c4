from dataclasses import replace

import pytest
from chat_models import chat_encoder

from grpo_lightning.diagnostics import Status
from grpo_lightning.diagnostics.checks.template import check_template
from grpo_lightning.rollout.chat_template import TemplateFacts
from grpo_lightning.rollout.prompts import PromptEncoder, PromptSettings

GOOD = TemplateFacts("a model", ["x", "x"], True, "<a>", "<end>", 9, ["<end>"])


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (replace(GOOD, renderings=["x", "y"]), "differently each time"),
        (replace(GOOD, generation_prompt=""), "does not begin the assistant's turn"),
    ],
)
def test_what_training_cannot_use(facts, words):
    verdict = check_template(facts)
    assert verdict.cause == "template"
    assert words in verdict.message
    assert "chat_template=FILE" in verdict.fix


def test_what_it_can():
    assert check_template(GOOD).status is Status.PASS
    # The template does not know the variable at all.
    assert check_template(replace(GOOD, asks=False, generation_prompt="")).status is Status.PASS
    unknown = check_template(replace(GOOD, stops=["<eos>"]))
    assert unknown.status is Status.PASS
    assert "'<end>', which does not end a completion" in unknown.message
    assert check_template(None).status is Status.NO_POWER


OPEN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if add_generation_prompt or not loop.last %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt and messages[-1].role != 'assistant' %}<|im_start|>assistant\n{% endif %}"
)
CLOSED = OPEN.replace("{% if add_generation_prompt or not loop.last %}<|im_end|>\n{% endif %}", "<|im_end|>\n")


@pytest.mark.parametrize("template", [OPEN, CLOSED])
def test_facts_of_a_template(tiny_model, tmp_path, template):
    encoder = chat_encoder(tiny_model, tmp_path / "chat", template, ["<|im_end|>"])
    facts = encoder.template_facts(["STOP"])
    assert facts.end == "<|im_end|>"
    assert facts.end_id in encoder.stop_token_ids
    assert facts.asks
    assert facts.generation_prompt.endswith("assistant\n")
    assert set(facts.stops) == {"<|im_end|>", "<eos>", "STOP"}
    assert facts.end_stops


def test_plain_prompts_have_none(tiny_model):
    assert PromptEncoder(tiny_model, 100, PromptSettings(plain_prompts=True)).template_facts() is None
