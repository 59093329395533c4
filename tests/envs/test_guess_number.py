import random
import re
from collections.abc import Callable

import pytest

from grpo_lightning.envs import GuessNumber, InvalidAction
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.rollout.episode import Episode
from grpo_lightning.rollout.types import Action, Task

EPISODE = Episode((), (), {}, None)

INNER = 1
"""Seed of a game whose secret is neither the lowest nor the highest number, so that both hints can be heard."""


def said(text):
    return Action(text, (), (), 0.0, False, "stop", 0)


def begin(seed=0, **settings):
    environment = GuessNumber(**settings)
    return environment, environment.reset(Task("game", seed=seed))


def numbers_left(observation):
    return [int(number) for number in observation.messages[-1]["content"].split("left: ")[1].split()]


def find_secret(seed):
    """By asking for every number: the right one ends the game."""
    environment, start = begin(seed)
    return next(n for n in numbers_left(start) if environment.step(said(str(n))).terminated)


def test_the_beginning_depends_on_the_seed_alone():
    _, start = begin(3)
    assert begin(3)[1] == start
    [message] = start.messages
    assert message["role"] == "user"
    assert re.fullmatch(
        r"Guess my number\. Answer with one number only\. Numbers left: (\d\d ){6}\d\d", message["content"]
    )
    assert not start.terminated
    assert len({begin(seed)[1].messages[0]["content"] for seed in range(50)}) > 30
    assert len({find_secret(seed) - numbers_left(begin(seed)[1])[0] for seed in range(100)}) == 7


def test_messages_of_the_task_come_first():
    system = {"role": "system", "content": "You play games."}
    first, second = GuessNumber().reset(Task("game", (system,))).messages
    assert first == system
    assert second["content"].startswith("Guess my number.")


def test_a_game_that_is_won():
    environment, start = begin(INNER)
    low, high, secret = numbers_left(start)[0], numbers_left(start)[-1], find_secret(INNER)
    answer = environment.step(said(f"My guess is {low}."))
    assert answer.messages[0]["content"].startswith(f"{low} is too low. Numbers left: {low + 1} ")
    assert numbers_left(answer) == list(range(low + 1, high + 1))
    assert (answer.reward, answer.terminated, answer.error) == (None, False, None)
    answer = environment.step(said(str(high)))
    assert answer.messages[0]["content"].startswith(f"{high} is too high. ")
    assert numbers_left(answer) == list(range(low + 1, high))
    assert environment.score(EPISODE) == {"won": 0.0, "consolation": 0.2}
    answer = environment.step(said(str(secret)))
    assert (answer.messages[0]["content"], answer.terminated) == ("Right!", True)
    assert environment.score(EPISODE) == {"won": 1.0, "consolation": 0.0}


@pytest.mark.parametrize("outside", ["0", "9", "100", "123456789"])
def test_a_guess_that_was_ruled_out_earns_and_tells_nothing(outside):
    environment, start = begin(INNER)
    answer = environment.step(said(outside))
    assert not answer.terminated
    assert numbers_left(answer) == numbers_left(start)
    assert environment.score(EPISODE) == {"won": 0.0, "consolation": 0.0}
    low = str(numbers_left(start)[0])
    environment.step(said(low))
    environment.step(said(low))
    assert environment.score(EPISODE) == {"won": 0.0, "consolation": 0.1}


@pytest.mark.parametrize("text", ["", "I do not know", "61 62", "between 10 and 90", "7.5", "1" * 10, "1" * 5000])
def test_what_is_not_one_number_is_refused_and_changes_nothing(text):
    environment, start = begin(INNER)
    with pytest.raises(InvalidAction) as caught:
        environment.step(said(text))
    left = start.messages[0]["content"].split("Numbers left: ")[1]
    assert caught.value.message == f"Answer with one number only. Numbers left: {left}"
    assert caught.value.reward == 0
    assert environment.score(EPISODE) == {"won": 0.0, "consolation": 0.0}
    assert environment.step(said(str(find_secret(INNER)))).terminated


def test_the_consolation_is_a_setting():
    environment, start = begin(INNER, consolation=0.25)
    environment.step(said(str(numbers_left(start)[0])))
    assert environment.score(EPISODE)["consolation"] == 0.25


@pytest.mark.parametrize("settings", [{"numbers": 2}, {"numbers": 11, "highest": 20}])
def test_extreme_ranges(settings):
    for seed in range(20):
        left = numbers_left(begin(seed, **settings)[1])
        assert len(left) == settings["numbers"]
        assert left[0] >= 10
        assert left[-1] <= settings.get("highest", 99)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"numbers": 1}, r"expected numbers from 2 to 90, as many as there are from 10 to highest \(99\), but got 1"),
        ({"numbers": 12, "highest": 20}, r"expected numbers from 2 to 11, .* \(20\), but got 12"),
        ({"consolation": -0.1}, r"expected consolation from 0 to less than 1, but got -0\.1"),
        ({"consolation": 1.0}, r"expected consolation from 0 to less than 1, but got 1\.0"),
    ],
)
def test_settings_that_make_no_game(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        GuessNumber(**settings)


def wins(policy: Callable[[list[int]], int], listens: bool, games: int = 1000, turns: int = 3) -> float:
    """Share of games that a policy wins which picks from the numbers left, or from those of the beginning."""
    won = 0
    for seed in range(games):
        environment, answer = begin(seed)
        first = numbers_left(answer)
        for _ in range(turns):
            answer = environment.step(said(str(policy(numbers_left(answer) if listens else first))))
            if answer.terminated:
                won += 1
                break
    return won / games


def test_hints_decide_the_game():
    choose = random.Random(0).choice
    assert wins(lambda left: left[len(left) // 2], listens=True) == 1.0
    assert 0.62 < wins(choose, listens=True) < 0.72
    assert 0.32 < wins(choose, listens=False) < 0.42
    assert wins(max, listens=False) < 0.2
