import sys

import pytest

from grpo_lightning.envs import InvalidAction
from grpo_lightning.envs.gymnasium import GymnasiumText
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.rollout.types import Action, Task

gymnasium = pytest.importorskip("gymnasium")

SYSTEM = {"role": "system", "content": "Play."}


class Guess(gymnasium.Env):
    """Guess a digit."""

    action_space = gymnasium.spaces.Text(1, charset="0123456789")
    observation_space = gymnasium.spaces.Text(100)

    def __init__(self, low=0):
        self.low = low
        self.closed = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.target = int(self.np_random.integers(self.low, 10))
        return f"Guess a digit from {self.low}.", {"target": self.target}

    def step(self, action):
        hit = int(action) == self.target
        return ("Right." if hit else "Wrong."), float(hit), hit, False, {"guess": action}

    def close(self):
        self.closed += 1


class Numbers(Guess):
    observation_space = gymnasium.spaces.Discrete(3)


class Duck:
    """The shape without gymnasium, as in gem-llm: no spaces, no close()."""

    def reset(self, seed=None):
        return f"seed {seed}", {}

    def step(self, action):
        return f"heard {action}", 0.25, False, action == "enough", {}


class Mute(Duck):
    def reset(self, seed=None):
        return 3, {}


@pytest.fixture(autouse=True)
def registered():
    gymnasium.register("Guess-v0", Guess, max_episode_steps=3)
    gymnasium.register("Numbers-v0", Numbers)
    yield
    for name in ("Guess-v0", "Numbers-v0"):
        del gymnasium.registry[name]


def said(text):
    return Action(text, (), (), 0.0, was_forced=True, finish_reason="stop", policy_version=-1)


def user(text):
    return {"role": "user", "content": text}


def test_a_registered_environment_is_played():
    environment = GymnasiumText("Guess-v0", settings={"low": 5})
    begin = environment.reset(Task("t", (SYSTEM,), seed=3))
    assert begin.messages == (SYSTEM, user("Guess a digit from 5."))
    target = begin.info["target"]
    assert 5 <= target <= 9
    wrong = environment.step(said(str(target - 5)))
    assert (wrong.messages, wrong.reward, wrong.terminated, wrong.truncated) == ((user("Wrong."),), 0.0, False, False)
    right = environment.step(said(str(target)))
    assert (right.messages, right.reward, right.terminated, right.truncated) == ((user("Right."),), 1.0, True, False)
    assert right.info == {"guess": str(target)}


def test_the_seed_decides():
    def target(seed):
        return GymnasiumText("Guess-v0").reset(Task("t", seed=seed)).info["target"]

    assert [target(seed) for seed in range(20)] == [target(seed) for seed in range(20)]
    assert len({target(seed) for seed in range(20)}) > 3


def test_gymnasiums_own_limit_truncates():
    environment = GymnasiumText("Guess-v0")
    target = environment.reset(Task("t", seed=3)).info["target"]
    steps = [environment.step(said(str((target + 1) % 10))) for _ in range(3)]
    assert [(step.terminated, step.truncated) for step in steps] == [(False, False), (False, False), (False, True)]


def test_a_move_outside_of_the_action_space_is_invalid():
    environment = GymnasiumText("Guess-v0", invalid_reward=-0.5)
    target = environment.reset(Task("t", seed=3)).info["target"]
    for _ in range(4):
        with pytest.raises(InvalidAction, match=r"'ten' is not a possible action: expected Text\(1, 1") as raised:
            environment.step(said("ten"))
        assert raised.value.reward == -0.5
    assert environment.step(said(str(target))).reward == 1.0


def test_the_move_is_what_the_pattern_finds():
    environment = GymnasiumText("Guess-v0", answer_pattern=r"(\d)")
    target = environment.reset(Task("t", seed=3)).info["target"]
    assert environment.step(said(f"I say {target}!")).terminated
    with pytest.raises(InvalidAction, match="Your answer has no move in it"):
        environment.step(said("I pass"))


def test_anything_of_the_shape_will_do():
    environment = GymnasiumText(factory=Duck, default_move="stay")
    assert environment.reset(Task("t", seed=3)).messages == (user("seed 3"),)
    step = environment.step(said(environment.default_action()))
    assert (step.messages, step.reward, step.truncated) == ((user("heard stay"),), 0.25, False)
    assert environment.step(said("enough")).truncated
    environment.close()


def test_it_is_closed():
    made = []
    environment = GymnasiumText(factory=lambda: made.append(Guess()) or made[0])
    environment.close()
    assert made[0].closed == 1


@pytest.mark.parametrize(
    ("env_id", "space"), [("CartPole-v1", "observation_space is Box"), ("Numbers-v0", "observation_space is Discrete")]
)
def test_other_spaces_are_refused(env_id, space):
    with pytest.raises(ConfigurationError, match=f"expected {env_id} to have Text spaces, but its {space}"):
        GymnasiumText(env_id)


def test_observations_that_turn_out_to_be_no_text_are_refused():
    with pytest.raises(ConfigurationError, match="expected the observations of Mute to be text, but got int; wrap it"):
        GymnasiumText(factory=Mute).reset(Task("t"))


@pytest.mark.parametrize("env_id", ["NoSuchGame-v0", "no_such_package:Game-v0"])
def test_unknown_environments_are_refused(env_id):
    with pytest.raises(
        ConfigurationError, match=f"environment that gymnasium can make, but got '{env_id}': .*(Such|such)"
    ):
        GymnasiumText(env_id)


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ConfigurationError, match=r"GymnasiumText needs gymnasium: install grpo-lightning\[gymnasium\]"):
        GymnasiumText("Guess-v0")


def test_a_factory_needs_no_gymnasium(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    assert GymnasiumText(factory=Duck).reset(Task("t", seed=1)).messages == (user("seed 1"),)
