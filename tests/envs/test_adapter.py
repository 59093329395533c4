import subprocess
import sys
from collections import OrderedDict
from types import ModuleType

import pytest
from jsonargparse import ArgumentParser

from grpo_lightning import envs
from grpo_lightning.envs import EnvironmentFactory, InvalidAction
from grpo_lightning.envs.adapter import TextAdapter, imported, optional_package, require_one
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.rollout.types import Action


class Adapter(TextAdapter):
    """What adapters share, and nothing else."""

    def reset(self, task):
        raise NotImplementedError

    def step(self, action):
        raise NotImplementedError


def said(text):
    return Action(text, (), (), 0.0, was_forced=True, finish_reason="stop", policy_version=-1)


def test_the_whole_answer_is_the_move():
    assert Adapter().move(said(" go north\n")) == " go north\n"


def test_the_last_match_is_the_move():
    adapter = Adapter(r"<move>(.*?)</move>")
    assert adapter.move(said("<move>a</move> or rather <move>b\nc</move>.")) == "b\nc"


def test_an_answer_without_a_move_is_an_invalid_action():
    with pytest.raises(InvalidAction, match=r"Your answer has no move in it: it must match <move>\(\.\*\?\)</move>"):
        Adapter(r"<move>(.*?)</move>").move(said("north"))


@pytest.mark.parametrize(("pattern", "groups"), [("move", 0), ("(a)(b)", 2)])
def test_a_pattern_has_one_group(pattern, groups):
    with pytest.raises(ConfigurationError, match=f"to have one group, .* has {groups}; write the others as"):
        Adapter(pattern)


def test_a_pattern_that_cannot_be_read_is_refused():
    with pytest.raises(ConfigurationError, match=r"to be a regular expression, but got '\(': missing \)"):
        Adapter("(")


def test_the_default_move_is_a_whole_answer():
    adapter = Adapter("<(.*)>", default_move="<stay>")
    assert adapter.move(said(adapter.default_action())) == "stay"
    with pytest.raises(ConfigurationError, match="expected default_move to be an answer that .* but got 'stay'"):
        Adapter("<(.*)>", default_move="stay")


def test_no_default_move_is_said():
    with pytest.raises(ConfigurationError, match="expected Adapter to have a default move, .* with default_move"):
        Adapter().default_action()


def test_a_missing_package_says_what_to_install():
    with pytest.raises(ConfigurationError, match=r"^Game needs no_such_package: install grpo-lightning\[game\] \(imp"):
        optional_package("no_such_package", adapter="Game", extra="game")


@pytest.mark.parametrize(("env_id", "factory", "got"), [(None, None, "neither"), ("a", dict, "env_id and factory")])
def test_there_is_one_way_to_name_an_environment(env_id, factory, got):
    with pytest.raises(ConfigurationError, match=f"expected Game to have either env_id or factory, but got {got}"):
        require_one("Game", env_id=env_id, factory=factory)


def test_an_import_path_is_imported():
    assert imported("factory", "collections.OrderedDict") is OrderedDict
    assert imported("factory", OrderedDict) is OrderedDict


@pytest.mark.parametrize("path", ["collections.Nothing", "no_such_package.make", "make"])
def test_an_import_path_that_names_nothing_is_refused(path):
    with pytest.raises(ConfigurationError, match=f"factory to be an import path like .*, but got '{path}': "):
        imported("factory", path)


YAML = {
    "GymnasiumText": "factory: collections.OrderedDict",
    "SkyRLGym": "factory: collections.OrderedDict",
    "OpenEnv": "url: ws://localhost:8000",
    "TRLEnvironment": "factory: trl_counter.Counter",
    "TextArena": "env_id: GuessTheNumber-v0-raw",
}


@pytest.mark.parametrize("name", YAML)
def test_adapters_are_named_in_yaml(name, monkeypatch):
    if name == "TextArena":
        pytest.importorskip("textarena")
    counter = ModuleType("trl_counter")
    exec("class Counter:\n def reset(self): pass\n def look(self) -> int:\n  'Look.'\n  return 1\n", vars(counter))
    monkeypatch.setitem(sys.modules, "trl_counter", counter)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--environment", type=EnvironmentFactory)
    given = f"environment: {{class_path: grpo_lightning.envs.{name}, init_args: {{{YAML[name]}}}}}"
    for text in (given, parser.dump(parser.parse_string(given))):
        factory = parser.instantiate(parser.parse_string(text)).environment
        first, second = factory(), factory()
        assert type(first) is type(second) is getattr(envs, name)
        assert first is not second


def test_adapters_import_nothing_until_they_are_used():
    packages = {"textarena", "gymnasium", "skyrl_gym", "websockets", "torch", "transformers", "vllm"}
    code = f"import sys, grpo_lightning.envs; print({packages} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
