"""The chat templates that TRL and vLLM ship: which can be continued turn by turn, how, and which are refused."""

import re
from collections import Counter
from pathlib import Path

import pytest
from chat_models import TOOLS, chat_encoder, result, said, templates_of, text, tokens, user

from grpo_lightning.diagnostics import Status
from grpo_lightning.diagnostics.checks.template import check_template
from grpo_lightning.errors import ConfigurationError

TEMPLATES = {
    **templates_of("trl", "chat_templates"),
    **{
        name: path
        for name, path in templates_of("vllm", "transformers_utils/chat_templates").items()
        if "chatml" in name
    },
}
ROLES = {"user": user("NEW WORD"), "tool": result("NEW WORD")}
CASES = [(name, role) for name in TEMPLATES for role in ROLES]

STOPS = {
    "cohere": ["<|END_OF_TURN_TOKEN|>"],
    "deepseek": ["<｜end▁of▁sentence｜>"],
    "diffusion_gemma": ["<turn|>", "<|tool_response>"],
    "gemma4": ["<turn|>", "<|tool_response>"],
    "gemma": ["<end_of_turn>"],
    "glm": ["<|user|>", "<|observation|>"],
    "gptoss": ["<|return|>", "<|call|>"],
    "idefics3": ["<end_of_utterance>"],
    "lfm2": ["<|im_end|>"],
    "llama3": ["<|eot_id|>", "<|eom_id|>"],
    "muse": ["<|eot|>"],
    "nemotron": ["<|im_end|>"],
    "phi3": ["<|end|>"],
    "qwen": ["<|im_end|>", "<|endoftext|>"],
    "smolvlm": ["<end_of_utterance>"],
    "template_chatml": ["<|im_end|>"],
}
"""Stop tokens of the models, by the beginning of the templates' names."""

REFUSED = {
    "user": re.compile(r"idefics3|llava_next|smolvlm"),
    "tool": re.compile(r"idefics3|llava_next|smolvlm|cohere|gemma(?!4)|phi3|deepseek"),
}
"""Templates that show no plain text, no results of tools, or (DeepSeek) a second result otherwise than the first."""


@pytest.fixture(scope="module")
def encoders(tiny_model, tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            stops = next((stops for family, stops in STOPS.items() if name.startswith(family)), [])
            made[name] = chat_encoder(tiny_model, tmp_path_factory.mktemp("chat") / name, TEMPLATES[name], stops)
        return made[name]

    return get


def accepted(role):
    return [name for name in TEMPLATES if not REFUSED[role].match(name)]


@pytest.mark.parametrize(("name", "role"), [case for case in CASES if case[0] in accepted(case[1])])
def test_conversation_goes_on_as_the_template_shows_it(encoders, name, role):
    encoder = encoders(name)
    tools = TOOLS if role == "tool" else ()
    encoder.check_turns(tools, [role])
    cut_off = encoder.continuation(tokens(encoder, "x"), [ROLES[role]], tools)
    assert "NEW WORD" in text(encoder, cut_off.observation)
    prompt = encoder.first([user("first question")], tools)
    again = text(encoder, [*cut_off.close, *cut_off.observation])
    assert "first question" in text(encoder, prompt)
    assert "first question" not in again
    assert "7f3a" not in again
    assert "<bos>" not in again


@pytest.mark.parametrize(("name", "role"), [case for case in CASES if case[0] not in accepted(case[1])])
def test_template_that_cannot_is_refused_by_name(encoders, name, role):
    with pytest.raises(ConfigurationError, match=f"role '{role}'.*{name}.jinja.*chat_template=FILE"):
        encoders(name).check_turns(TOOLS, [role])


@pytest.mark.parametrize("name", accepted("user"))
def test_end_of_an_answer_is_not_said_twice(encoders, name):
    encoder = encoders(name)
    question = [user("NEW WORD")]
    cut_off = encoder.continuation(tokens(encoder, "x"), question)
    for stop in encoder.stop_token_ids:
        over = encoder.continuation([*tokens(encoder, "x"), stop], question)
        assert over.close == ()
        if not name.startswith("glm"):
            assert over.observation == cut_off.observation
    said = [*tokens(encoder, "x"), *cut_off.close]
    assert encoder.continuation(said, question).close == ()


def test_coverage(encoders):
    """How many templates each technique serves."""
    techniques = Counter(
        (role, encoders(name)._turns.technique(role, TOOLS if role == "tool" else ()).kind)
        for role in ROLES
        for name in accepted(role)
    )
    print(f"{len(TEMPLATES)} templates; {dict(techniques)}")
    for role in ROLES:
        assert techniques[role, "sentinel"] == len(accepted(role))
        print(f"refused for {role}:", sorted(set(TEMPLATES) - set(accepted(role))))
    assert techniques["user", "sentinel"] >= 67
    assert techniques["tool", "sentinel"] >= 50


STRIP = {"qwen3", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "deepseek_r1_distill", "nemotron_3_nano", "glm4moe"}
KEEP = {"smolvlm", "qwen2_5", "qwen3_training", "qwen3_instruct_2507", "llama3", "gemma3", "gptoss", "template_chatml"}


@pytest.mark.parametrize(("name", "strips"), [(n, n in STRIP) for n in sorted(STRIP | KEEP)])
def test_what_becomes_of_earlier_thinking(encoders, name, strips):
    assert encoders(name).strips_thinking is strips


@pytest.mark.parametrize(
    ("name", "shows"),
    [("qwen3", True), ("llama3_1", True), ("gptoss", True), ("template_chatml", False), ("llama3", False)],
)
def test_whether_tools_are_shown(encoders, name, shows):
    assert encoders(name).shows_tools(TOOLS) is shows


@pytest.mark.parametrize(
    ("name", "forced"),
    [
        ("template_chatml", "go left<|im_end|>"),
        ("qwen3", "<think>\n\n</think>\n\ngo left<|im_end|>"),
        ("qwen3_5_think", "\n</think>\n\ngo left<|im_end|>"),
        ("deepseek_r1_distill", "\n</think>\n\ngo left<｜end▁of▁sentence｜>"),
        ("gptoss", "<|channel|>final<|message|>go left<|end|>"),
        ("gemma3", "go left<end_of_turn>"),
        ("glm4moe", "\n<think></think>\ngo left"),
    ],
)
def test_forced_answer_is_shown_as_an_answer(encoders, name, forced):
    assert encoders(name).forced("go left") == tokens(encoders(name), forced)


@pytest.mark.parametrize(
    ("name", "role", "close", "observation"),
    [
        ("template_chatml", "user", "<|im_end|>", "\n<|im_start|>user\nNEW WORD<|im_end|>\n<|im_start|>assistant\n"),
        ("gemma3", "user", "<end_of_turn>", "\n<start_of_turn>user\nNEW WORD<end_of_turn>\n<start_of_turn>model\n"),
        ("glm4moe", "user", "", "<|user|>\nNEW WORD<|assistant|>"),
        ("glm4moe", "tool", "", "<|observation|>\n<tool_response>\nNEW WORD\n</tool_response><|assistant|>"),
        ("gptoss", "user", "<|end|>", "<|start|>user<|message|>NEW WORD<|end|><|start|>assistant"),
        (
            "gptoss",
            "tool",
            "<|call|>",
            '<|start|>functions.look_up to=assistant<|channel|>commentary<|message|>"NEW WORD"<|end|>'
            "<|start|>assistant",
        ),
        (
            "qwen3",
            "tool",
            "<|im_end|>",
            "\n<|im_start|>user\n<tool_response>\nNEW WORD\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
        ),
    ],
)
def test_tokens_of_well_known_templates(encoders, name, role, close, observation):
    encoder = encoders(name)
    found = encoder.continuation((), [ROLES[role]], TOOLS if role == "tool" else ())
    assert found.close == tuple(tokens(encoder, close))
    assert found.observation == tuple(tokens(encoder, observation))


@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "gemma3", "gptoss", "phi3", "cohere"])
def test_real_vocabulary_gives_the_same_sequence(demo_model, tmp_path, name):
    """With a byte-pair vocabulary, in which neighbouring characters merge."""
    encoder = chat_encoder(demo_model, tmp_path, TEMPLATES[name], STOPS.get(name[:6], []))
    encoder.check_turns()
    answer = tokens(encoder, "It is 4.")
    found = encoder.continuation(answer, [user("NEW WORD")])
    whole = encoder.first([user("2 + 2?"), said("It is 4."), user("NEW WORD")])
    ids = [*answer, *found.close, *found.observation]
    assert whole[-len(ids) :] == ids


def test_packages_are_read_and_not_imported():
    import sys

    assert all(isinstance(path, Path) for path in TEMPLATES.values())
    assert "trl" not in sys.modules


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_doctor_accepts_it(encoders, name):
    assert check_template(encoders(name).template_facts()).status is Status.PASS
