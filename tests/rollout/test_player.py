"""Playing one episode: what every ending, limit and fault makes of it."""

import asyncio
import logging
import math
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from fakes import EOS_ID, FakeChat, decode, encode, make_task, random_generation
from games import Delayed, Echo, Picky, play, user
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grpo_lightning.envs import Environment, InvalidAction, Observation
from grpo_lightning.errors import ConfigurationError, RewardError, RolloutError
from grpo_lightning.rewards import Scorer
from grpo_lightning.rollout.episode_settings import EpisodeSettings
from grpo_lightning.rollout.ledger import Ledger, Source
from grpo_lightning.rollout.player import request_seed
from grpo_lightning.rollout.types import Generation


def says(*texts, stop=True):
    """An engine that gives these answers in turn, each ended by EOS, then the last one for ever."""

    def generation(prompt, params, seed, version):
        turn = decode(prompt).count("<a ") - 1
        ids = [*encode(texts[min(turn, len(texts) - 1)]), *([EOS_ID] if stop else [])][: params.max_tokens]
        ended = stop and ids[-1] == EOS_ID
        return Generation(tuple(ids), tuple(-0.1 * (i + 1) for i in range(len(ids))), "stop" if ended else "length", 7)

    return generation


def test_samples_that_begin_alike_have_their_prompt_encoded_once(monkeypatch):
    encoded = []
    first = FakeChat.first

    def prompt(self, name, messages, tools=()):
        encoded.append(name)
        return first(self, messages)

    monkeypatch.setattr(FakeChat, "prompt", prompt)
    groups, _ = play([make_task("a"), make_task("b")], Echo, samples=4)
    assert sorted(encoded) == ["a", "b"]
    assert {group.prompt_ids for group in groups} == {tuple(encode(f"<u {name}?><a ")) for name in "ab"}


def test_samples_that_begin_otherwise_have_prompts_of_their_own():
    begun = iter("abc")

    class Differs(Echo):
        async def reset(self, task):
            return Observation(user(next(begun)))

    with pytest.raises(RolloutError, match="there are 3 different ones"):
        play([make_task("a")], Differs, samples=3)


def one(environment, *, generation=None, task=None, **settings):
    groups, engine = play([task or make_task("t")], environment, generation=generation, samples=1, **settings)
    return groups[0].episodes[0], engine


def text_of(ledger, source):
    return decode(ledger.token_ids[ledger.source == source].tolist())


class TestTokens:
    def test_a_ledger_by_hand(self):
        episode, engine = one(lambda: Echo(2), generation=says("hi", "yo"))
        [ledger] = episode.ledgers
        assert decode(ledger.token_ids.tolist()) == "<u t?><a hi><u 1:hi><a yo"
        assert text_of(ledger, Source.PROMPT) == "<u t?><a "
        assert text_of(ledger, Source.SAMPLED) == "hiyo"
        assert text_of(ledger, Source.ENVIRONMENT) == "><u 1:hi><a "
        assert ledger.count(Source.FORCED) == 0
        assert ledger.turn.tolist() == [0] * 9 + [0] * 3 + [1] * 12 + [1] * 3
        assert ledger.logprobs[ledger.sampled].tolist() == pytest.approx([-0.1, -0.2, -0.3] * 2)
        assert set(ledger.policy_version[ledger.sampled]) == {7}
        assert [t.action.text for t in episode.turns] == ["hi", "yo"]
        assert episode.closing == user("2:yo")
        assert (episode.reward, dict(episode.rewards), episode.status) == (3.0, {"environment": 3.0}, "terminated")
        # Each request is the ledger so far, bit for bit.
        ids = ledger.token_ids.tolist()
        assert [list(p) for p, *_ in engine.requests] == [ids[:9], ids[:24]]

    def test_an_answer_that_was_cut_off_is_closed_in_the_policys_place(self):
        episode, _ = one(lambda: Echo(2), generation=says("abcdef", stop=False), truncated_action="step")
        [ledger] = episode.ledgers
        forced = (ledger.source == Source.FORCED).nonzero()[0].tolist()
        assert [ledger.token_ids[i] for i in forced] == [EOS_ID]
        assert ledger.token_ids[forced[0] - 1] == encode("f")[0]
        assert ledger.turn[forced[0]] == 0
        assert episode.count(Source.SAMPLED) == 12

    def test_by_default_an_answer_that_was_cut_off_ends_the_episode(self):
        episode, engine = one(lambda: Echo(3), generation=says("abcdefgh", stop=False))
        assert episode.status == "truncated"
        assert len(episode.turns) == len(engine.calls) == 1
        assert episode.reward == 0.0

    def test_an_empty_answer_is_an_answer(self):
        episode, _ = one(lambda: Echo(2), generation=says("", "x"))
        assert [t.action.text for t in episode.turns] == ["", "x"]
        assert episode.turns[0].action.token_ids == (EOS_ID,)

    def test_seeds_differ_by_turn_and_sample(self):
        _, engine = play([make_task("t")], lambda: Echo(3), samples=4)
        found = [seed for _, _, seed, _, _ in engine.requests]
        assert len(set(found)) == len(found)
        assert set(found) <= {request_seed("0/0", "t", number, turn) for number in range(4) for turn in range(3)}


class TestLimits:
    def test_turns(self):
        episode, _ = one(lambda: Echo(9), generation=says("a"), max_turns=3)
        assert (len(episode.turns), episode.status) == (3, "truncated")
        assert episode.reward == 1 + 2 + 3

    def test_sampled_tokens(self):
        episode, engine = one(lambda: Echo(9), generation=says("abc"), max_sampled_tokens=10)
        assert [params.max_tokens for _, params, *_ in engine.requests] == [6, 6, 2]
        assert (episode.count(Source.SAMPLED), episode.status) == (10, "truncated")

    def test_context(self):
        episode, engine = one(lambda: Echo(9), generation=says("abc"), max_context=30)
        assert episode.status == "truncated"
        assert all(len(p) + params.max_tokens <= 30 for p, params, *_ in engine.requests)
        assert len(episode.ledgers[0]) <= 30

    def test_a_full_context_can_go_on_in_a_new_sequence(self):
        episode, engine = one(
            lambda: Echo(4), generation=says("abc"), max_context=40, context_limit="split", task=make_task("t")
        )
        assert (len(episode.turns), episode.status) == (4, "terminated")
        assert len(episode.ledgers) > 1
        second = episode.ledgers[1]
        # First and latest observation, and the answer between them.
        assert text_of(second, Source.PROMPT).startswith("<u t?><a abc><u ")
        assert second.turn[0] == [turn.segment for turn in episode.turns].index(1)
        assert all(len(p) < 40 for p, *_ in engine.requests)

    def test_wall_time_keeps_the_turns_so_far(self):
        async def generation(prompt, params, seed, version):
            if decode(prompt).count("<a ") == 3:
                await asyncio.sleep(30)
            return says("a")(prompt, params, seed, version)

        begin = time.perf_counter()
        episode, _ = one(lambda: Echo(5), generation=generation, timeout=0.3)
        assert time.perf_counter() - begin < 5
        assert (len(episode.turns), episode.status, episode.reward) == (2, "truncated", 3.0)
        # What stands in the context was not said behind it.
        assert episode.closing == ()

    def test_wall_time_waits_for_a_step_before_scoring(self):
        order = []

        class Slow(Environment):
            def reset(self, task):
                return Observation(user("go"))

            def step(self, action):
                time.sleep(0.5)
                order.append("step")
                return Observation(user("more"), reward=1.0)

            def score(self, episode):
                order.append("score")
                return {}

        episode, _ = one(Slow, generation=says("a"), timeout=0.2)
        assert (order, episode.reward, episode.status) == (["step", "score"], 1.0, "truncated")

    def test_an_environment_that_was_made_too_late_is_closed(self):
        closed = threading.Event()

        class Late(Echo):
            def __init__(self):
                time.sleep(0.4)
                super().__init__(1)

            async def close(self):
                closed.set()

        episode, _ = one(Late, retries=0, step_timeout=0.1)
        assert "making it took longer than 0.1 s" in episode.failure
        assert closed.wait(5)

    def test_open_environments(self):
        class Counted(Delayed):
            now = most = 0

            def __init__(self):
                super().__init__(2)
                Counted.now += 1
                Counted.most = max(Counted.most, Counted.now)

            async def close(self):
                Counted.now -= 1

        play([make_task(f"t{i}") for i in range(4)], Counted, samples=8, generation=says("a"), concurrency=5)
        assert (Counted.now, Counted.most) == (0, 5)

    @pytest.mark.parametrize(
        ("name", "value"), [("max_turns", 0), ("timeout", -1.0), ("step_timeout", 0.0), ("concurrency", 0)]
    )
    def test_nonsense_is_refused(self, name, value):
        with pytest.raises(ConfigurationError, match=f"episodes.{name} > 0, but got {value}"):
            EpisodeSettings(**{name: value})

    @pytest.mark.parametrize("name", ["invalid_action", "truncated_action", "thinking", "context_limit", "advantage"])
    def test_a_choice_that_there_is_not_is_refused(self, name):
        with pytest.raises(ConfigurationError, match=f"expected episodes.{name} to be one of '.*', but got 'stop'"):
            EpisodeSettings(**{name: "stop"})


class TestOpening:
    def test_examples_in_the_prompt_stay_when_a_full_context_is_split(self):
        examples = (*user("a"), {"role": "assistant", "content": "b"}, *user("c"))

        class Taught(Echo):
            async def reset(self, task):
                return replace(await super().reset(task), messages=examples)

        episode, _ = one(lambda: Taught(4), generation=says("abc"), max_context=44, context_limit="split")
        assert len(episode.ledgers) > 1
        for ledger in episode.ledgers:
            assert text_of(ledger, Source.PROMPT).startswith("<u a><a b><u c><a ")

    def test_an_episode_that_is_over_at_once_is_nobodys_fault(self):
        class Over(Echo):
            async def reset(self, task):
                return Observation(user("bye"), terminated=True)

        episode, engine = one(Over)
        assert (episode.reward, episode.status, engine.calls) == (None, "truncated", [])
        assert "before the policy could act" in episode.failure


class TestForced:
    def test_the_message_goes_back(self):
        episode, _ = one(lambda: Picky(1), generation=says("z", "b"))
        assert [t.error for t in episode.turns] == ["Say a letter up to m.", None]
        assert "<u Say a letter up to m.>" in decode(episode.ledgers[0].token_ids.tolist())
        assert (episode.reward, episode.status) == (0.0, "terminated")
        assert [t.reward for t in episode.turns] == [-1.0, 1.0]

    def test_the_end(self):
        episode, _ = one(lambda: Picky(1), generation=says("z", "b"), invalid_action="end")
        assert [t.error for t in episode.turns] == ["Say a letter up to m."]
        assert (episode.reward, episode.status) == (-1.0, "terminated")

    def test_the_default_move_is_in_the_context_and_not_in_the_loss(self):
        episode, engine = one(lambda: Picky(2), generation=says("z", "?", "b"), invalid_action="default")
        assert [t.action.was_forced for t in episode.turns] == [False, True, False]
        forced = episode.turns[1].action
        assert (forced.text, forced.token_logprobs, forced.policy_version) == ("a default", (), -1)
        [ledger] = episode.ledgers
        assert text_of(ledger, Source.FORCED) == "a default"
        assert text_of(ledger, Source.SAMPLED) == "zb"
        # The policy saw it.
        assert "<a a default><u 1:a default><a " in decode(engine.requests[-1][0])
        assert math.isnan(ledger.logprobs[ledger.source == Source.FORCED][0])
        assert episode.count(Source.FORCED) == len("a default") + 1

    def test_a_scripted_opening(self):
        class Opening(Echo):
            async def reset(self, task):
                return Observation((await super().reset(task)).messages, forced_action="begin")

        episode, engine = one(lambda: Opening(2), generation=says("?", "go"))
        assert [t.action.was_forced for t in episode.turns] == [True, False]
        assert len(engine.calls) == 1
        assert text_of(episode.ledgers[0], Source.FORCED) == "begin"

    def test_an_episode_of_forced_actions_alone_teaches_nothing(self):
        class Script(Echo):
            async def reset(self, task):
                return Observation((await super().reset(task)).messages, forced_action="begin")

        episode, _ = one(lambda: Script(1))
        assert (episode.reward, episode.status) == (None, "terminated")
        assert "before the policy could act" in episode.failure


class TestThinking:
    chat = staticmethod(lambda: FakeChat())

    def test_kept_by_default(self):
        episode, _ = one(lambda: Echo(2), generation=says("<think>"), sampling=_sampling(12))
        assert len(episode.ledgers) == 1

    def test_split(self):
        episode, _ = one(lambda: Echo(3), generation=says("<think>", "plain"), sampling=_sampling(12), thinking="split")
        assert [turn.segment for turn in episode.turns] == [0, 1, 2]
        assert [text_of(ledger, Source.SAMPLED) for ledger in episode.ledgers] == ["<think>", "plain", "plain"]
        assert [ledger.turn[0] for ledger in episode.ledgers] == [0, 1, 2]
        assert text_of(episode.ledgers[1], Source.PROMPT) == "<u t?><a <think>><u 1:<think>><a "


def _sampling(max_tokens):
    from dataclasses import replace

    from games import SAMPLING

    return replace(SAMPLING, max_tokens=max_tokens)


class Broken(Echo):
    """Fails in one place, the first few times it is made.

    Args:
        place: ``"make"``, ``"reset"``, ``"step"``, ``"score"`` or ``"close"``.
        times: How often; for ever by default.
    """

    def __init__(self, place, times=10**9, counter=None):
        self.place, self.counter = place, counter if counter is not None else []
        super().__init__(2)
        self.counter.append(self)
        self.broken = len(self.counter) <= times
        self._break("make")

    def _break(self, place):
        if self.broken and self.place == place:
            raise OSError("the disk is gone")

    async def reset(self, task):
        self._break("reset")
        return await super().reset(task)

    async def step(self, action):
        if self.taken == 1:
            self._break("step")
        return await super().step(action)

    async def score(self, episode):
        self._break("score")
        return {}

    async def close(self):
        await super().close()
        self._break("close")


class Unprintable:
    def __repr__(self):
        raise ValueError("no name")


class Panic(BaseException):
    """Not an Exception, as panics of Rust extensions are not."""


class TestFaults:
    @pytest.mark.parametrize("place", ["make", "reset", "step", "score"])
    def test_a_broken_environment_is_begun_again_and_then_left_out(self, place, caplog):
        made = []
        episode, _engine = one(lambda: Broken(place, counter=made), generation=says("a"), retries=2)
        assert (episode.status, episode.reward, episode.attempts, episode.turns) == ("error", None, 3, ())
        turn = {"step": 1, "score": 1}.get(place, 0)
        assert f"environment {'(new)' if place == 'make' else 'Broken'}, task 't', turn {turn}: " in episode.failure
        assert "raised OSError: the disk is gone" in episode.failure
        assert len(made) == 3
        assert all(env.closed == 1 for env in made if place != "make")

    @pytest.mark.parametrize("place", ["make", "reset", "step", "score"])
    def test_a_second_attempt_gives_the_same_episode(self, place):
        whole, _ = one(lambda: Broken("nowhere"))
        episode, _engine = one(lambda made=[]: Broken(place, 1, made), retries=1)
        assert (episode.attempts, whole.attempts) == (2, 1)
        assert (episode.turns, episode.ledgers, episode.reward) == (whole.turns, whole.ledgers, whole.reward)

    def test_a_failing_close_is_only_reported(self, caplog):
        episode, _ = one(lambda: Broken("close"))
        assert episode.status == "terminated"
        assert "close() raised OSError: the disk is gone" in caplog.text

    def test_closed_when_cancelled(self):
        made = []

        def environment():
            made.append(Echo(3))
            return made[-1]

        def generation(prompt, params, seed, version):
            if len(made) == 3:
                raise ZeroDivisionError
            return random_generation(prompt, params, seed, version)

        with pytest.raises(ZeroDivisionError):
            play([make_task("t")], environment, generation=generation)
        assert [env.closed for env in made] == [1, 1, 1]

    def test_a_hanging_step_of_a_plain_environment_is_named_and_left_behind(self, caplog):
        release = threading.Event()

        class Hanging(Environment):
            def reset(self, task):
                return Observation(user("go"))

            def step(self, action):
                release.wait(60)
                return Observation(terminated=True)

        try:
            with caplog.at_level(logging.WARNING):
                episode, _ = one(Hanging, generation=says("a"), retries=0, step_timeout=0.4, stall_warning=0.1)
        finally:
            release.set()
        assert "environment Hanging, task 't', turn 0: step() took longer than 0.4 s" in episode.failure
        assert "environment Hanging, task 't', turn 0: step() has been running for 0.1 s" in caplog.text

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ("hello", "step() should return an Observation, but returned 'hello'"),
            (None, "step() should return an Observation, but returned None"),
            (Observation(user("x"), reward=math.nan), "step() gave a reward of nan"),
            (Observation(user("x"), info={"x": Unprintable()}), "cannot be read: ValueError: no name"),
            (Observation(user("half a pair \ud83d")), "cannot be read: UnicodeEncodeError: 'utf-8' codec can't encode"),
        ],
    )
    def test_what_an_environment_must_not_say(self, wrong, message):
        class Wrong(Echo):
            async def step(self, action):
                return wrong

        episode, _ = one(Wrong, retries=0)
        assert message in episode.failure

    def test_a_prompt_may_hold_earlier_conversation(self):
        class Reminded(Echo):
            async def reset(self, task):
                return replace(
                    await super().reset(task),
                    messages=(*user("a"), {"role": "assistant", "content": "b"}, *user("c")),
                )

        [ledger] = one(lambda: Reminded(1), generation=says("d"))[0].ledgers
        assert text_of(ledger, Source.PROMPT) == "<u a><a b><u c><a "

    def test_one_environment_for_all_episodes_is_refused(self):
        shared = Echo(2)
        with pytest.raises(ConfigurationError, match="played at once were given the same Echo: have the function"):
            play([make_task("t")], lambda: shared)

    @pytest.mark.parametrize("made", [None, Echo, object()])
    def test_a_factory_returns_an_environment(self, made):
        failure = one(lambda: made, retries=0)[0].failure
        assert "expected a factory that returns an Environment, but <function" in failure
        assert f"returned {made!r}" in failure

    @pytest.mark.parametrize("move", [None, 3])
    def test_a_default_move_is_a_text(self, move):
        class Moves(Picky):
            def default_action(self):
                return move

        episode, _ = one(Moves, generation=says("z"), retries=0, invalid_action="default")
        assert f"default_action() should return a text, but returned {move!r}" in episode.failure

    @pytest.mark.parametrize("place", ["reset", "score", "default_action"])
    def test_actions_are_invalid_in_step_alone(self, place):
        class Confused(Picky):
            pass

        def refuse(*_):
            raise InvalidAction("not now")

        setattr(Confused, place, refuse)
        said = "z" if place == "default_action" else "a"
        episode, _ = one(lambda: Confused(1), generation=says(said), retries=0, invalid_action="default")
        assert f"{place}() raised InvalidAction: not now" in episode.failure

    @pytest.mark.parametrize("reward", [math.nan, "1"])
    def test_the_reward_of_an_invalid_action_is_a_number(self, reward):
        class Never(Echo):
            def step(self, action):
                raise InvalidAction("no", reward=reward)

        failure = one(Never, generation=says("a"), retries=0)[0].failure
        assert f"step() raised InvalidAction with a reward of {reward!r}, which is no finite number" in failure

    @pytest.mark.parametrize("error", [Panic("lost"), asyncio.CancelledError("lost"), KeyboardInterrupt("lost")])
    @pytest.mark.parametrize("place", ["reset", "step", "score"])
    def test_an_environment_cannot_cancel_the_rollout(self, place, error):
        class Cancels(Echo):
            pass

        async def fail(*_):
            raise error

        setattr(Cancels, place, fail)
        episode, _ = one(lambda: Cancels(1), generation=says("a"), retries=0)
        assert f"{place}() raised {type(error).__name__}: lost" in episode.failure

    @pytest.mark.parametrize("scores", [{"a": math.inf}, {"a": "b"}, {"a": None}, [1.0], 3.0, None])
    def test_scores_are_finite_numbers_by_name(self, scores):
        class Scoring(Echo):
            def score(self, episode):
                return scores

        assert "score() should return finite numbers by name" in one(Scoring, retries=0)[0].failure

    def test_an_environment_that_exits_does_not_end_the_run(self):
        class Exits(Echo):
            def reset(self, task):
                raise SystemExit(3)

        assert "reset() raised SystemExit: 3" in one(Exits, retries=0)[0].failure


class TestRewards:
    def test_environment_scores_and_functions_add_up(self):
        class Scoring(Echo):
            def score(self, episode):
                return {"bonus": float(len(episode.turns))}

        scorer = Scorer([lambda completion: 2.0], weights=[0.5])
        episode, _ = one(lambda: Scoring(2), generation=says("a"), scorer=scorer)
        assert dict(episode.rewards) == {"environment": 3.0, "bonus": 2.0, "lambda": 2.0}
        assert episode.reward == 3.0 + 2.0 + 1.0

    def test_a_function_may_ask_for_the_episode(self):
        def turns(completion, episode, task_id):
            assert completion == episode.turns[-1].action.text
            return float(len(episode.turns))

        episode, _ = one(lambda: Echo(3), generation=says("a"), scorer=Scorer([turns]))
        assert episode.rewards["turns"] == 3.0

    def test_scores_may_be_numbers_of_any_kind(self):
        class Scoring(Echo):
            def score(self, episode):
                return {"bonus": np.float32(2)}

        rewards = one(lambda: Scoring(1), generation=says("a"))[0].rewards
        assert (type(rewards["bonus"]), rewards["bonus"]) == (float, 2.0)

    @pytest.mark.parametrize("name", ["environment", "mean"])
    def test_two_rewards_of_one_name_are_refused(self, name):
        class Scoring(Echo):
            def score(self, episode):
                return {name: 1.0}

        with pytest.raises(RewardError, match=f"otherwise than '{name}'"):
            one(lambda: Scoring(1), generation=says("a"))

    def test_a_penalty_of_an_invalid_action_counts(self):
        class Never(Environment):
            def reset(self, task):
                return Observation(user("go"))

            def step(self, action):
                raise InvalidAction("no", reward=-0.25)

        assert one(Never, generation=says("a"), max_turns=4)[0].reward == -1.0


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_whatever_happens_the_ledger_holds_what_was_sampled_and_nothing_else(data):
    """Random environments, turn counts, failures, truncations, splits and forced moves."""
    seed = data.draw(st.integers(0, 10**6))
    choices = {
        "max_turns": data.draw(st.integers(1, 6)),
        "max_sampled_tokens": data.draw(st.none() | st.integers(1, 20)),
        "invalid_action": data.draw(st.sampled_from(["message", "default", "end"])),
        "truncated_action": data.draw(st.sampled_from(["end", "step"])),
        "context_limit": data.draw(st.sampled_from(["end", "split"])),
        "thinking": data.draw(st.sampled_from(["keep", "split"])),
        "retries": data.draw(st.integers(0, 1)),
        "max_context": data.draw(st.integers(20, 120)),
    }
    said = {}

    def generation(prompt, params, seed, version):
        generation = random_generation(prompt, params, seed, 3)
        said.setdefault(tuple(prompt), []).append(generation)
        return generation

    class Chat(FakeChat):
        def is_extension(self, token_ids, messages, tools=()):
            return sum(token_ids) % 3 > 0

    class Faulty(Picky):
        def __init__(self):
            super().__init__()
            self.fails = hash((seed, len(said))) % 7 == 0

        async def step(self, action):
            if self.fails and self.taken == 1:
                raise OSError("gone")
            return await super().step(action)

    tasks = [make_task(f"t{i}", n=i) for i in range(3)]
    groups, _ = play(tasks, Faulty, generation=generation, samples=3, chat=Chat(), **choices)
    for group in groups:
        assert len({e.ledgers[0].prompt_ids for e in group.episodes if e.ledgers}) <= 1
        for episode in group.episodes:
            assert (episode.status == "error") == (episode.reward is None)
            for number, turn in enumerate(episode.turns):
                ledger = episode.ledgers[turn.segment]
                mine = ledger.turn == number
                if turn.action.was_forced:
                    assert not ledger.sampled[mine].any()
                    continue
                sampled = mine & ledger.sampled
                first = int(sampled.nonzero()[0][0])
                # One unbroken run behind exactly the ids that the engine was asked with.
                assert ledger.token_ids[sampled].tolist() == list(turn.action.token_ids)
                assert ledger.token_ids[first : first + sampled.sum()].tolist() == list(turn.action.token_ids)
                asked = tuple(ledger.token_ids[:first].tolist())
                assert any(
                    g.token_ids == turn.action.token_ids and g.logprobs == tuple(ledger.logprobs[sampled].tolist())
                    for g in said[asked]
                )
                assert set(ledger.policy_version[sampled]) == {3}
            assert sum(len(t.action.token_ids) for t in episode.turns if not t.action.was_forced) == episode.count(
                Source.SAMPLED
            )
            assert all(
                isinstance(ledger, Ledger) and len(ledger) <= choices["max_context"] for ledger in episode.ledgers
            )
