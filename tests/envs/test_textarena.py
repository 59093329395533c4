import random
import sys
import threading
from functools import partial

import pytest
from fakes import EOS_ID, encode
from games import play as roll_out

from grpo_lightning.envs import InvalidAction
from grpo_lightning.envs.textarena import TextArena
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.rollout.types import Action, Generation, Task
from grpo_lightning.tasks import SeedTasks

pytest.importorskip("textarena")

GUESS = "GuessTheNumber-v0-raw"
# Its number is 5.
SEED = Task("seed-1", seed=1)


def said(text):
    return Action(text, (), (), 0.0, was_forced=True, finish_reason="stop", policy_version=-1)


def play(game, seed, moves):
    """All that a game says, invalid moves and rewards included."""
    environment = TextArena(game)
    story = [environment.reset(Task("t", seed=seed))]
    for move in moves:
        try:
            story.append(environment.step(said(move)))
        except InvalidAction as invalid:
            story.append(invalid.message)
        else:
            if story[-1].terminated:
                break
    environment.close()
    return story


def test_the_tasks_messages_come_before_the_rules():
    system = {"role": "system", "content": "Be brief."}
    observation = TextArena(GUESS).reset(Task("seed-1", (system,), seed=1))
    first, rules = observation.messages
    assert first == system
    assert rules["role"] == "user"
    assert "guess the number between 1 and 20" in rules["content"]
    assert (observation.reward, observation.terminated) == (0.0, False)


def test_a_move_is_answered_without_its_echo():
    environment = TextArena(GUESS)
    environment.reset(SEED)
    observation = environment.step(said("I say [3]"))
    assert observation.messages == ({"role": "user", "content": "The target number is higher."},)
    assert (observation.reward, observation.terminated) == (0.0, False)


@pytest.mark.parametrize("game", ["Countdown-v0-raw", "Cryptarithm-v0-raw", "Slitherlink-v0-raw"])
def test_echoes_of_games_that_mix_up_their_arguments_are_dropped(game):
    environment = TextArena(game)
    environment.reset(SEED)
    with pytest.raises(InvalidAction) as raised:
        environment.step(said("abracadabra"))
    assert "abracadabra" not in raised.value.message


def test_the_game_pays_when_it_is_over():
    low, high = (play(GUESS, 1, [f"[{number}]" for number in numbers]) for numbers in (range(1, 12), range(10, 21)))
    for story, reward, reason in ((low, 1.0, "Congratulations!"), (high, 4 / 19, "The turn limit has been reached.")):
        *turns, end = story
        assert [turn.reward for turn in turns] == [0.0] * len(turns)
        assert (end.reward, end.terminated) == (pytest.approx(reward), True)
        assert end.info["reason"].startswith(reason)


def test_an_invalid_move_changes_nothing_and_pays_nothing():
    environment = TextArena(GUESS, invalid_reward=-0.25)
    environment.reset(SEED)
    environment.step(said("[3]"))
    # The game itself would end at the second one, and pay 0.89 for the guess before.
    for _ in range(5):
        with pytest.raises(InvalidAction, match="You attempted an invalid move. Reason: Invalid move format") as raised:
            environment.step(said("higher"))
        assert raised.value.reward == -0.25
    assert environment.step(said("[4]")).messages[0]["content"] == "The target number is higher."


def test_an_invalid_move_draws_no_chance():
    moves = ["[hit]"] * 12
    clean = play("Blackjack-v0-raw", 5, moves)
    mixed = play("Blackjack-v0-raw", 5, [word for move in moves for word in ("what?", move)])
    assert [told for told in mixed if not isinstance(told, str)] == clean


def test_the_move_is_what_the_pattern_finds():
    environment = TextArena(GUESS, answer_pattern="<move>(.*?)</move>", default_move="<move>[3]</move>")
    environment.reset(SEED)
    with pytest.raises(InvalidAction, match="Your answer has no move in it"):
        environment.step(said("[3]"))
    assert environment.step(said(environment.default_action())).messages[0]["content"].endswith("higher.")


GAMES = ["Bandit-v0-raw", "Blackjack-v0-raw", "2048-v0-raw", "Secretary-v0-raw", "FrozenLake-v0-random-raw"]
MOVES = ["[hit]", "[red]", "[up]", "[left]", "[continue]", "[down]", "[right]", "[blue]"] * 3


@pytest.mark.parametrize("game", GAMES)
def test_the_seed_decides(game):
    story = play(game, 7, MOVES)
    random.random()
    assert play(game, 7, MOVES) == story
    assert any(play(game, seed, MOVES) != story for seed in (8, 9))


def test_a_game_leaves_the_global_generator_alone(monkeypatch):
    monkeypatch.setattr("grpo_lightning.envs.textarena._playable", set())
    random.seed(3)
    before = random.getstate()
    for game in GAMES:
        play(game, 7, MOVES)
    assert random.getstate() == before


def test_many_episodes_at_once_are_each_what_they_are_alone():
    alone = {(game, seed): play(game, seed, MOVES) for game in GAMES for seed in range(13)}
    together, stop = {}, threading.Event()
    begin = threading.Barrier(len(alone) + 1)

    def disturb():
        while not stop.is_set():
            random.seed(random.random())

    def one(game, seed):
        begin.wait()
        together[game, seed] = play(game, seed, MOVES)

    noise = threading.Thread(target=disturb)
    players = [threading.Thread(target=one, args=key) for key in alone]
    state = random.getstate()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in [noise, *players]:
            thread.start()
        begin.wait()
        for thread in players:
            thread.join()
    finally:
        stop.set()
        noise.join()
        sys.setswitchinterval(interval)
        random.setstate(state)
    assert len(together) == 65
    assert together == alone


def guesses(prompt, params, seed, version):
    text = f"[{random.Random(seed).randint(1, 20)}]" if seed % 4 else "?"
    ids = (*encode(text), EOS_ID)
    return Generation(ids, (-0.5,) * len(ids), "stop", version)


def test_a_rollout_of_many_episodes_can_be_repeated():
    tasks = [SeedTasks(16)[index] for index in range(16)]

    def told():
        groups, _ = roll_out(
            tasks, partial(TextArena, GUESS, invalid_reward=-0.5), generation=guesses, samples=4, max_turns=14
        )
        return [episode for group in groups for episode in group.episodes]

    first, second = told(), told()
    assert len(first) == 64
    assert [(e.reward, e.turns, e.closing) for e in first] == [(e.reward, e.turns, e.closing) for e in second]
    assert {episode.status for episode in first} == {"terminated", "truncated"}
    for episode in first:
        invalid = [turn for turn in episode.turns if turn.error]
        assert {turn.reward for turn in invalid} <= {-0.5}
        assert all(turn.error for turn in episode.turns if turn.action.text == "?")
        if any(turn.info.get("reason", "").startswith("Congratulations") for turn in episode.turns):
            assert episode.reward == 1.0 - 0.5 * len(invalid)
    assert any(episode.turns[-1].reward == 1.0 for episode in first)


def test_settings_reach_the_game():
    environment = TextArena(GUESS, settings={"max_number": 3})
    assert "between 1 and 3" in environment.reset(SEED).messages[0]["content"]


def test_closing_is_always_safe():
    environment = TextArena(GUESS)
    environment.close()
    environment.reset(SEED)
    environment.close()


def test_games_that_repeat_the_history_are_refused():
    with pytest.raises(
        ConfigurationError, match="ends in -raw, but got 'FrozenLake-v0'; did you mean FrozenLake-v0-raw"
    ):
        TextArena("FrozenLake-v0")


def test_a_name_that_is_close_is_suggested():
    with pytest.raises(ConfigurationError, match="but got 'GuessNumber-v0-raw'; did you mean GuessTheNumber-v0-raw"):
        TextArena("GuessNumber-v0-raw")


@pytest.mark.parametrize("game", ["TicTacToe-v0-raw", "PublicGoodsGame-v0-raw"])
def test_games_for_several_are_refused(game):
    with pytest.raises(ConfigurationError, match="expected .*a game for one player"):
        TextArena(game)


def test_games_that_need_more_are_refused(monkeypatch):
    monkeypatch.delenv("OPENROUTER_API_KEY", raising=False)
    with pytest.raises(ConfigurationError, match="cannot begin: ValueError: OpenRouter API key not found"):
        TextArena("TwentyQuestions-v0-raw")


def test_settings_that_a_game_does_not_know_are_refused():
    with pytest.raises(ConfigurationError, match="cannot begin: TypeError: .*colour"):
        TextArena(GUESS, settings={"colour": "red"})


def test_invalid_moves_never_pay():
    with pytest.raises(ConfigurationError, match="expected invalid_reward <= 0, but got 0.5"):
        TextArena(GUESS, invalid_reward=0.5)


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "textarena", None)
    with pytest.raises(ConfigurationError, match=r"TextArena needs textarena: install grpo-lightning\[textarena\]"):
        TextArena(GUESS)
