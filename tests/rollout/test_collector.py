"""Collecting rollouts: everything at once, nothing mixed up, nothing lost."""

import asyncio
import dataclasses
import math
import random
import time
from typing import ClassVar

import pytest
from fakes import FakeChat, decode, encode, make_task, random_generation
from games import Delayed, Echo, play
from hypothesis import given
from hypothesis import strategies as st

from grpo_lightning.envs import SingleTurn
from grpo_lightning.errors import EngineDiedError, LogprobValidationError, RewardError
from grpo_lightning.rewards import Scorer
from grpo_lightning.rollout.player import Player, request_seed, to_action
from grpo_lightning.rollout.types import Action, Generation

TASKS = [make_task(f"t{i}", answer=str(i)) for i in range(4)]


def answer(tasks=TASKS, generation=None, reward=len, **settings):
    """Single-turn groups."""
    scorer = reward if isinstance(reward, Scorer) else Scorer([reward])
    return play(tasks, SingleTurn, generation=generation, scorer=scorer, **settings)


def digits(text):
    """Tokens of a text, as a completion with a logprob that names each."""
    ids = tuple(encode(text))
    return ids, tuple(-i / 1e4 for i in ids)


def test_one_group_a_task_in_order():
    groups, engine = answer()
    assert [g.task.id for g in groups] == ["t0", "t1", "t2", "t3"]
    assert [decode(g.prompt_ids) for g in groups] == [f"<u t{i}?><a " for i in range(4)]
    assert all(len(g.episodes) == 3 and g.advantages == () for g in groups)
    assert len(engine.calls) == 12
    assert {adapter.name for _, _, _, adapter, _ in engine.requests} == {"CURRENT"}


def test_nothing_to_collect():
    assert answer([])[0] == []


class Forgetful(Player):
    """The founding defect: what was sampled is kept on the collector, where the next episode overwrites it."""

    last: ClassVar[dict[str, Action]] = {}

    async def _sampled(self, *args):
        Forgetful.last["action"] = await super()._sampled(*args)
        await asyncio.sleep(0.001)
        return Forgetful.last["action"]


def test_every_value_belongs_to_its_own_turn():
    check_that_values_belong(Player)


def test_the_founding_defect_does_not_pass():
    with pytest.raises(AssertionError):
        check_that_values_belong(Forgetful)


def check_that_values_belong(kind):
    # 64 episodes of several turns finish in a random order, and every value names its episode and turn.
    async def generation(prompt, params, seed, version):
        await asyncio.sleep(random.uniform(0, 0.02))
        ids, logprobs = digits(f"{seed % 100000}")
        return Generation((*ids, 1), (*logprobs, -0.5), "stop", version)

    async def reward(completion, answer, episode):
        await asyncio.sleep(random.uniform(0, 0.02))
        return float(completion) + 1e6 * float(answer)

    groups, _ = play(TASKS, lambda: Delayed(3), generation=generation, scorer=Scorer([reward]), samples=16, kind=kind)
    for group, task in zip(groups, TASKS, strict=True):
        assert group.task is task
        for number, episode in enumerate(group.episodes):
            said = [str(request_seed("0/0", task.id, number, turn) % 100000) for turn in range(3)]
            assert [turn.action.text for turn in episode.turns] == said
            for turn, text in zip(episode.turns, said, strict=True):
                ids, logprobs = digits(text)
                assert turn.action.token_ids == (*ids, 1)
                assert turn.action.token_logprobs == (*logprobs, -0.5)
                assert turn.action.logprob_sum == pytest.approx(sum(logprobs) - 0.5)
                assert not turn.action.was_forced
            heard = [turn.messages[0]["content"] for turn in episode.turns]
            assert heard == [f"{task.id}?", f"1:{said[0]}", f"2:{said[1]}"]
            expected = "".join(f"<u {h}><a {s}>" for h, s in zip(heard, said, strict=True)).removesuffix(">")
            assert decode(episode.ledgers[0].token_ids.tolist()) == expected
            assert episode.rewards["reward"] == float(said[-1]) + 1e6 * float(task.data["answer"])


@pytest.mark.parametrize("kind", ["episode", "turn", "action", "group"])
def test_what_was_sampled_cannot_be_changed(kind):
    group = answer()[0][0]
    episode = group.episodes[0]
    holder, name = {
        "episode": (episode, "reward"),
        "turn": (episode.turns[0], "action"),
        "action": (episode.turns[0].action, "token_logprobs"),
        "group": (group, "episodes"),
    }[kind]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(holder, name, None)
    with pytest.raises(ValueError, match="read-only"):
        episode.ledgers[0].logprobs[-1] = 0.0


def test_action_of_a_generation():
    action = to_action(Generation((70, 71), (-0.25, -0.5), "length", 7), FakeChat())
    assert dataclasses.asdict(action) == {
        "text": decode((70, 71)),
        "token_ids": (70, 71),
        "token_logprobs": (-0.25, -0.5),
        "logprob_sum": -0.75,
        "was_forced": False,
        "finish_reason": "length",
        "policy_version": 7,
        "tool_calls": (),
    }


def test_unscored_episodes_keep_their_reason():
    def picky(completion):
        if len(completion) % 2:
            raise ValueError("odd")
        return 1.0

    episodes = [e for g in answer(reward=Scorer([picky], on_error="skip"), samples=10)[0] for e in g.episodes]
    failed = [e for e in episodes if e.reward is None]
    assert failed
    assert len(failed) < len(episodes)
    assert all("raised ValueError: odd" in e.failure for e in failed)


def test_on_episode_sees_every_episode_once():
    seen = []
    groups, _ = answer(on_episode=seen.append)
    assert sorted(map(id, seen)) == sorted(id(e) for g in groups for e in g.episodes)


def test_all_episodes_are_in_flight_at_once():
    in_flight, all_there = 0, asyncio.Event()

    async def generation(prompt, params, seed, version):
        nonlocal in_flight
        in_flight += 1
        if in_flight == 4 * 16:
            all_there.set()
        await all_there.wait()
        return random_generation(prompt, params, seed, version)

    answer(generation=generation, samples=16)
    assert in_flight == 64


def test_one_stalled_episode_delays_nobody():
    finished = []

    class Stalling(Echo):
        made = 0

        def __init__(self):
            super().__init__(3)
            Stalling.made += 1
            self.stalls = Stalling.made == 7

        async def step(self, action):
            if self.stalls and self.taken == 1:
                await asyncio.sleep(1.5)
            return await super().step(action)

    begin = time.perf_counter()
    play(
        TASKS,
        Stalling,
        generation=lambda prompt, params, seed, version: Generation((70, 1), (-0.1, -0.1), "stop", version),
        samples=16,
        on_episode=lambda e: finished.append(time.perf_counter() - begin),
    )
    assert len(finished) == 64
    assert finished[-1] >= 1.5
    assert finished[-2] < 1.0


def test_turns_are_not_in_lockstep():
    # The last turn of quick episodes comes before the second of a slow one.
    async def generation(prompt, params, seed, version):
        turn = decode(prompt).count("<a ") - 1
        order.append((decode(prompt)[3:5], turn))
        await asyncio.sleep(0.2 if "t0" in decode(prompt) else 0)
        return Generation((70, 1), (-0.1, -0.1), "stop", version)

    order = []
    play(TASKS, lambda: Echo(3), generation=generation, samples=2)
    assert max(order.index((f"t{i}", 2)) for i in (1, 2, 3)) < order.index(("t0", 1))


def test_a_slow_reward_delays_only_its_own_episode():
    scored = []
    others_done = asyncio.Event()

    async def reward(completion, task_id):
        if task_id == "t2":
            await others_done.wait()
        return 0.0

    def on_episode(episode):
        scored.append(episode)
        if len(scored) == 9:
            others_done.set()

    groups, engine = answer(reward=reward, on_episode=on_episode)
    assert len(engine.calls) == 12
    assert set(map(id, scored[-3:])) == {id(e) for e in groups[2].episodes}


def test_first_failure_cancels_the_rest_and_is_raised_as_it_is():
    error = OSError("the engine is gone")
    cancelled = []

    async def generation(prompt, params, seed, version):
        if seed == request_seed("0/0", "t1", 1, 0):
            await asyncio.sleep(0.02)
            raise error
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(seed)
            raise

    with pytest.raises(OSError, match="the engine is gone") as caught:
        answer(generation=generation)
    assert caught.value is error
    assert len(cancelled) == 11


def test_what_finished_before_a_failure_is_not_played_again():
    async def dying(prompt, params, seed, version):
        if seed in doomed:
            await asyncio.sleep(0.2)
            raise EngineDiedError("gone")
        return random_generation(prompt, params, seed, version)

    whole, _ = answer()
    doomed = {request_seed("0/0", "t1", 1, 0), request_seed("0/0", "t3", 0, 0)}
    finished = {}
    with pytest.raises(EngineDiedError):
        answer(generation=dying, finished=finished)
    assert len(finished) == 10
    groups, engine = answer(finished=finished)
    assert len(engine.calls) == 2
    assert {seed for _, _, seed, _, _ in engine.requests} == doomed
    assert groups == whole


def test_a_failing_reward_stops_the_rollout_with_its_cause():
    def reward(completion, task_id):
        if task_id == "t3":
            raise KeyError("my own bug")
        return 1.0

    with pytest.raises(RewardError, match="raised KeyError: 'my own bug' on task 't3'") as caught:
        answer(reward=reward)
    # Without its cause nobody sees which line of the reward function failed.
    assert isinstance(caught.value.__cause__, KeyError)


def test_wrong_logprobs_stop_the_rollout():
    def generation(prompt, params, seed, version):
        return Generation((5, 6), (-1.0, math.nan if "t2" in decode(prompt) else -1.0), "length", version)

    with pytest.raises(LogprobValidationError, match="task 't2'"):
        answer(generation=generation)


def test_nothing_is_scored_before_it_was_validated():
    scored = []

    def reward(completion):
        scored.append(completion)
        return 0.0

    with pytest.raises(LogprobValidationError):
        answer(generation=lambda prompt, params, seed, version: Generation((5,), (), "stop", version), reward=reward)
    assert scored == []


def test_many_failures_raise_one_and_no_group():
    async def generation(prompt, params, seed, version):
        raise RuntimeError(f"seed {seed}")

    with pytest.raises(RuntimeError, match="seed") as caught:
        answer(generation=generation)
    assert not isinstance(caught.value, ExceptionGroup)


def test_a_failing_on_episode_is_a_failure():
    def on_episode(episode):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        answer(on_episode=on_episode)


def seeds(engine):
    return {prompt: sorted(s for p, _, s, _, _ in engine.requests if p == prompt) for prompt, *_ in engine.requests}


def test_same_key_same_rollout():
    (first, one), (second, two) = answer(), answer()
    assert first == second
    assert seeds(one) == seeds(two)


def test_a_task_that_comes_twice_is_sampled_anew():
    groups, engine = answer([TASKS[0], TASKS[0]])
    flat = [seed for values in seeds(engine).values() for seed in values]
    assert len(flat) == len(set(flat)) == sum(len(g.episodes) for g in groups)


def test_seeds_depend_on_task_and_number_only():
    everything = seeds(answer()[1])
    some = seeds(answer([TASKS[3], TASKS[1]])[1])
    more = seeds(answer(TASKS[::-1], samples=5)[1])
    for prompt, values in some.items():
        assert values == everything[prompt]
    for prompt, values in everything.items():
        assert set(values) < set(more[prompt])


def test_all_seeds_of_a_rollout_differ():
    engine = answer([make_task(f"t{i}") for i in range(40)], samples=16)[1]
    assert len({s for _, _, s, _, _ in engine.requests}) == 640


@given(parts=st.lists(st.text(max_size=5) | st.integers(), min_size=1, max_size=4))
def test_seeds_are_31_bit_and_repeat(parts):
    seed = request_seed(*parts)
    assert 0 <= seed < 2**31
    assert seed == request_seed(*parts)


def test_seeds_are_the_same_in_every_process():
    assert request_seed("0/0", "t0", 0) == 1494471627


def test_parts_of_a_seed_are_told_apart():
    assert len({request_seed("1", "23"), request_seed("12", "3"), request_seed("123"), request_seed("3", "12")}) == 4
