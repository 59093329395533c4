import pytest

from grpo_lightning.envs import InvalidAction
from grpo_lightning.envs.adapter import TextAdapter, optional_package, plain, refuse_both_or_neither
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.rollout.types import Action


def said(text):
    return Action(text, (), (), 0.0, was_forced=True, finish_reason="stop", policy_version=-1)


def test_the_whole_answer_is_the_move():
    assert TextAdapter().move(said(" go north\n")) == " go north\n"


def test_the_last_match_is_the_move():
    adapter = TextAdapter(r"<move>(.*?)</move>")
    assert adapter.move(said("<move>a</move> or rather <move>b\nc</move>.")) == "b\nc"


def test_an_answer_without_a_move_is_an_invalid_action():
    with pytest.raises(InvalidAction, match=r"Your answer has no move in it: it must match <move>\(\.\*\?\)</move>"):
        TextAdapter(r"<move>(.*?)</move>").move(said("north"))


@pytest.mark.parametrize(("pattern", "groups"), [("move", 0), ("(a)(b)", 2)])
def test_a_pattern_has_one_group(pattern, groups):
    with pytest.raises(ConfigurationError, match=f"to have one group, .* has {groups}; write the others as"):
        TextAdapter(pattern)


def test_a_pattern_that_cannot_be_read_is_refused():
    with pytest.raises(ConfigurationError, match=r"to be a regular expression, but got '\(': missing \)"):
        TextAdapter("(")


def test_the_default_move_is_a_whole_answer():
    adapter = TextAdapter("<(.*)>", default_move="<stay>")
    assert adapter.move(said(adapter.default_action())) == "stay"
    with pytest.raises(ConfigurationError, match="expected default_move to be an answer that .* but got 'stay'"):
        TextAdapter("<(.*)>", default_move="stay")


def test_no_default_move_is_said():
    with pytest.raises(ConfigurationError, match="expected TextAdapter to have a default move, .* with default_move"):
        TextAdapter().default_action()


def test_only_plain_values_of_info_are_kept():
    assert plain({"a": 1, "b": "x", "c": True, "d": 0.5, "e": [1], "f": None}) == {"a": 1, "b": "x", "c": True, "d": 0.5}


def test_a_missing_package_says_what_to_install():
    with pytest.raises(ConfigurationError, match=r"^Game needs no_such_package: install grpo-lightning\[game\] \(imp"):
        optional_package("no_such_package", adapter="Game", extra="game")


@pytest.mark.parametrize(("env_id", "factory", "got"), [(None, None, "neither"), ("a", dict, "both")])
def test_name_or_factory(env_id, factory, got):
    with pytest.raises(ConfigurationError, match=f"expected Game to have either env_id or factory, but got {got}"):
        refuse_both_or_neither("Game", env_id, factory)
