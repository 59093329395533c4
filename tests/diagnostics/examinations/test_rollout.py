"""Whole runs of a tiny model: each fault is named before the first update, and healthy runs are left alone."""

import contextlib
import itertools
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from doctored import PartDoctor, forged
from fakes import EOS_ID, FakeEngine, encode
from games import Echo, Picky
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from runs import MODEL, RecordingEngine, length

from grpo_lightning import GRPOModule, RolloutDataModule
from grpo_lightning.callbacks import ParameterPerturbation, RunDoctor
from grpo_lightning.diagnostics import Status
from grpo_lightning.diagnostics.examinations.rollout import RolloutExamination
from grpo_lightning.diagnostics.rescoring import Rescoring
from grpo_lightning.errors import ConfigurationError, DegeneracyError
from grpo_lightning.rewards import Scorer
from grpo_lightning.rollout.advantages import with_advantages
from grpo_lightning.rollout.chat_template import ChatTemplate
from grpo_lightning.rollout.episode import Group
from grpo_lightning.rollout.episode_settings import EpisodeSettings
from grpo_lightning.rollout.ledger import Ledger, Source
from grpo_lightning.rollout.loader import BatchLoader
from grpo_lightning.rollout.types import Generation
from grpo_lightning.tasks import SeedTasks, SumTasks

DATA = {"prompts_per_rollout": 4, "samples_per_prompt": 4, "max_tokens": 6, "max_prompt_tokens": 64}


def single(engine=None, kind=RolloutDataModule, reward=length, **settings):
    return kind(SumTasks(5), rewards=reward, engine=engine or FakeEngine(), **{**DATA, **settings})


def multi(engine=None, environment=Picky, kind=RolloutDataModule, episodes=None, **settings):
    chosen = {"max_context": 400, "truncated_action": "step", "invalid_action": "default", **(episodes or {})}
    return kind(
        SeedTasks(50),
        environment=environment,
        episodes=EpisodeSettings(**chosen),
        engine=engine or FakeEngine(),
        **{**DATA, **settings},
    )


def fit(tmp_path, model, data, *, module=None, callbacks=(), ckpt_path=None, policy=None, doctors=(), **settings):
    doctor = PartDoctor(RolloutExamination())
    if isinstance(doctors, list):
        doctors.append(doctor)
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[*callbacks, doctor],
        **{"max_epochs": 2, "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks), **settings},
    )
    trainer.fit((module or GRPOModule)(model, **{**MODEL, **(policy or {})}), data, ckpt_path=ckpt_path)
    return doctor


def assert_found(tmp_path, model, data, cause, *words, **settings):
    """The run is halted for this cause."""
    doctors = []
    with pytest.raises(DegeneracyError) as caught:
        fit(tmp_path, model, data, doctors=doctors, **settings)
    causes = [v.cause for v in doctors[0].said if v.status is Status.FAIL]
    assert cause in causes, causes
    for word in words:
        assert word in str(caught.value)


def with_episodes(change):
    """A data module whose sampled episodes are changed behind the engine: ``(episode, number) -> episode``."""

    class Changed(RolloutDataModule):
        def _sample(self, *args, **settings):
            numbers = itertools.count()
            return [
                forged(g, episodes=tuple(change(e, next(numbers)) for e in g.episodes))
                for g in super()._sample(*args, **settings)
            ]

    return Changed


def consistently(change):
    """Change ids, logprobs and version of every sampled turn in action and ledger: what the types allow.

    Args:
        change: ``(ids, logprobs) -> (ids, logprobs)``, plain tuples.
    """

    def episode(found, number):
        turns, ledgers = [], list(found.ledgers)
        for turn in found.turns:
            if turn.action.was_forced:
                turns.append(turn)
                continue
            old = turn.action
            ids, logprobs = change(old.token_ids, old.token_logprobs)
            turns.append(replace(turn, action=forged(old, token_ids=ids, token_logprobs=logprobs)))
            ledger = ledgers[turn.segment]
            mine = ledger.sampled & (ledger.turn == len(turns) - 1)
            columns = {"token_ids": ledger.token_ids.copy(), "logprobs": ledger.logprobs.copy()}
            columns["token_ids"][mine], columns["logprobs"][mine] = ids, logprobs
            ledgers[turn.segment] = forged(ledger, **columns)
        return forged(found, turns=tuple(turns), ledgers=tuple(ledgers))

    return episode


def relabelled(source, to=Source.SAMPLED):
    """Ledgers that call the tokens of one source sampled."""

    def change(ledger):
        wrong = ledger.source == source
        if source == Source.PROMPT:
            wrong = wrong & ~np.append(wrong[1:], False)
        logprobs = np.where(wrong, -0.5, ledger.logprobs)
        return forged(
            ledger,
            source=np.where(wrong, np.int8(to), ledger.source),
            logprobs=logprobs,
            policy_version=np.where(wrong, 0, ledger.policy_version),
        )

    return lambda episode, number: forged(episode, ledgers=tuple(map(change, episode.ledgers)))


def forced_as_sampled(episode, number):
    """The forced move goes in as the policy's own, with made-up logprobs."""
    turns, ledgers = [], list(episode.ledgers)
    for index, turn in enumerate(episode.turns):
        action = turn.action
        if action.was_forced:
            made_up = (-0.1,) * len(action.token_ids)
            action = replace(action, was_forced=False, token_logprobs=made_up, policy_version=0)
            ledger = ledgers[turn.segment]
            # What closed the turn is forced too, and stays so.
            mine = np.flatnonzero((ledger.turn == index) & (ledger.source == Source.FORCED))[: len(made_up)]
            source, logprobs, version = ledger.source.copy(), ledger.logprobs.copy(), ledger.policy_version.copy()
            source[mine], logprobs[mine], version[mine] = Source.SAMPLED, -0.1, 0
            ledgers[turn.segment] = forged(ledger, source=source, logprobs=logprobs, policy_version=version)
        turns.append(replace(turn, action=action))
    return forged(episode, turns=tuple(turns), ledgers=tuple(ledgers))


def other_ids(ids, logprobs):
    return (*ids[:-1], 50 if ids[-1] != 50 else 51), logprobs


def other_context(episode, number):
    ids = episode.ledgers[0].token_ids.copy()
    ids[0] = 77
    return forged(episode, ledgers=(forged(episode.ledgers[0], token_ids=ids), *episode.ledgers[1:]))


def copied(episode, number, first=[]):  # noqa: B006
    """Every episode is the first of its group."""
    first[:] = [episode] if number % 4 == 0 else first
    said = first[0].ledgers[0]
    prompt = episode.ledgers[0].prompt_ids
    ledger = Ledger.of_prompt(prompt).extended(
        said.token_ids[said.sampled].tolist(), Source.SAMPLED, 0, said.logprobs[said.sampled].tolist(), 0
    )
    return forged(episode, turns=first[0].turns, ledgers=(ledger,), reward=float(number))


def older(episode, number):
    ledger = episode.ledgers[0]
    return forged(episode, ledgers=(forged(ledger, policy_version=np.where(ledger.sampled, -1, -1)),))


BEHIND_THE_ENGINE = {
    "one other token": (single, consistently(other_ids), "retokenised"),
    "one other token in later turns": (multi, consistently(other_ids), "retokenised"),
    "logprobs halved": (single, consistently(lambda i, p: (i, tuple(v / 2 for v in p))), "logprobs_replaced"),
    "logprobs zero": (single, consistently(lambda i, p: (i, (0.0,) * len(p))), "logprobs_zero"),
    "logprobs NaN": (single, consistently(lambda i, p: (i, (float("nan"),) * len(p))), "logprobs_missing"),
    "logprobs constant": (single, consistently(lambda i, p: (i, (-1.0,) * len(p))), "logprobs_constant"),
    "logprobs shifted": (single, consistently(lambda i, p: (i, (*p[1:], p[0]))), "shifted_logprobs"),
    "forced tokens called sampled": (multi, relabelled(Source.FORCED), "forced_in_mask"),
    "environment called sampled": (multi, relabelled(Source.ENVIRONMENT), "environment_in_mask"),
    "end of the prompt called sampled": (single, relabelled(Source.PROMPT), "environment_in_mask"),
    "forced actions called the policy's": (multi, forced_as_sampled, "forced_in_mask"),
    "another prompt": (single, other_context, "context_changed"),
    "one episode for all of a group": (single, copied, "samples_repeated"),
    "an older version": (single, older, "stale_rollout"),
}


@pytest.mark.parametrize("fault", BEHIND_THE_ENGINE)
def test_what_changes_behind_the_engine_is_named(tmp_path, tiny_model, monkeypatch, fault):
    make, change, cause = BEHIND_THE_ENGINE[fault]
    monkeypatch.setattr("grpo_lightning.sampling.validate_rollout", lambda groups: None)
    monkeypatch.setattr("grpo_lightning.rollout.batch.PackedBatch.require_sampled", lambda batch: None)
    assert_found(tmp_path, tiny_model, make(kind=with_episodes(change)), cause)


class Copies(RolloutDataModule):
    """Stores what the trainer says of the tokens in place of what the engine said."""

    factor = 1.0

    def _cut(self, origin, groups, module, record=None):
        said = {}
        for rollout in super()._cut(origin, groups, module, record):
            for batch in rollout.batches:
                with torch.no_grad():
                    values = self.factor * module.policy.token_logprobs(batch).logprobs.double()
                said |= dict(zip(batch.ledger_index.tolist(), values.tolist(), strict=True))
        values = iter([said[row] for row in sorted(said)])
        change = consistently(lambda ids, logprobs: (ids, tuple(next(values) for _ in ids)))
        groups = [forged(g, episodes=tuple(change(e, 0) for e in g.episodes)) for g in groups]
        assert next(values, None) is None
        return super()._cut(origin, groups, module, record)


class Halves(Copies):
    """The same, of another temperature."""

    factor = 0.5


@pytest.mark.parametrize(("kind", "cause"), [(Copies, "logprobs_copied"), (Halves, "logprobs_replaced")])
def test_logprobs_that_are_the_trainers_are_told_from_others(tmp_path, tiny_model, kind, cause):
    words = ["other logprobs than the engine returned"]
    assert_found(tmp_path, tiny_model, single(kind=kind), cause, *words)


def of_groups(change):
    return lambda groups, credit, *args, **settings: [
        forged(g, advantages=a) for g, a in zip(groups, change(groups, credit), strict=True)
    ]


def scaled(factor, offset=0.0):
    return lambda groups, credit: [
        tuple(tuple(factor * a + offset for a in turns) for turns in g.advantages)
        for g in with_advantages(groups, credit)
    ]


def between_groups(groups, credit):
    rewards = [e.reward for g in groups for e in g.episodes]
    mean, std = np.mean(rewards), np.std(rewards)
    return [tuple(((e.reward - mean) / std,) * len(e.turns) for e in g.episodes) for g in groups]


def neighbours(groups, credit):
    return [(*g.advantages[1:], g.advantages[0]) for g in with_advantages(groups, credit)]


def next_group(groups, credit):
    judged = with_advantages(groups, credit)
    return [g.advantages for g in (*judged[1:], judged[0])]


ADVANTAGES = {
    "zero": (scaled(0.0), "advantages_zero", "although the rewards vary"),
    "wrong sign": (scaled(-1.0), "advantages_sign", "Better samples have lower advantages"),
    "doubled": (scaled(2.0), "advantages_wrong", "2 times as large"),
    "not centred": (scaled(1.0, 0.5), "advantages_wrong", "do not sum to 0 in each group"),
    "of the neighbour": (neighbours, "advantages_wrong", "do not follow the order of the rewards"),
    "between groups": (between_groups, "advantages_wrong", "as if compared between prompts"),
}


@pytest.mark.parametrize("fault", ADVANTAGES)
def test_advantages_that_do_not_follow_are_named(tmp_path, tiny_model, monkeypatch, fault):
    change, cause, words = ADVANTAGES[fault]
    monkeypatch.setattr("grpo_lightning.sampling.with_advantages", of_groups(change))
    assert_found(tmp_path, tiny_model, single(), cause, words)


def test_advantages_of_another_group_are_named(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr("grpo_lightning.sampling.with_advantages", of_groups(next_group))
    with pytest.raises(DegeneracyError, match="advantage"):
        fit(tmp_path, tiny_model, single())


def changed_batches(change):
    class Changed(RolloutDataModule):
        def _cut(self, *args):
            return [replace(r, batches=tuple(map(change, r.batches))) for r in super()._cut(*args)]

    return Changed


def changed_step(change):
    class Changed(GRPOModule):
        def training_step(self, batch, batch_idx):
            return super().training_step(change(batch), batch_idx)

    return Changed


def one_other(values, other):
    values = values.clone()
    values[0] = other
    return values


BATCHES = {
    "one other id": (lambda b: b.replace(target_ids=one_other(b.target_ids, 99)), "retokenised"),
    "one other input": (lambda b: b.replace(input_ids=one_other(b.input_ids, 99)), "context_changed"),
    "positions from 1": (lambda b: b.replace(position_ids=b.position_ids + 1), "context_changed"),
    "a target called forced": (lambda b: b.replace(source=one_other(b.source, 2)), "forced_in_mask"),
    "targets of the prompt": (lambda b: b.replace(ledger_index=b.ledger_index - 6), "environment_in_mask"),
    "unknown targets": (lambda b: b.replace(ledger_index=b.ledger_index + 10**6), "foreign_tokens"),
    "rounded logprobs": (lambda b: b.replace(old_logprobs=b.old_logprobs.bfloat16().float()), "old_replaced"),
    "shifted logprobs": (lambda b: b.replace(old_logprobs=b.old_logprobs.roll(1)), "shifted_logprobs"),
    "logprobs zero": (lambda b: b.replace(old_logprobs=b.old_logprobs * 0), "logprobs_zero"),
    "another version": (lambda b: b.replace(policy_version=b.policy_version - 1), "stale_rollout"),
    "advantages of other tokens": (lambda b: b.replace(advantages=b.advantages.flip(0)), "advantages_wrong"),
    "advantages zero": (lambda b: b.replace(advantages=b.advantages * 0), "advantages_zero"),
    "advantages negative": (lambda b: b.replace(advantages=-b.advantages), "advantages_sign"),
}


@pytest.mark.parametrize("fault", BATCHES)
def test_batches_that_differ_from_the_ledgers_are_named(tmp_path, tiny_model, monkeypatch, fault):
    change, cause = BATCHES[fault]
    monkeypatch.setattr("grpo_lightning.rollout.batch.PackedBatch.require_sampled", lambda batch: None)
    assert_found(tmp_path, tiny_model, single(kind=changed_batches(change)), cause)


@pytest.mark.parametrize("fault", ["advantages of other tokens", "advantages zero", "advantages negative"])
def test_what_the_loss_is_given_instead_is_named(tmp_path, tiny_model, fault):
    change, cause = BATCHES[fault]
    assert_found(tmp_path, tiny_model, single(), cause, module=changed_step(change))


def test_a_rollout_that_is_trained_on_again_is_named(tmp_path, tiny_model):
    class Again(RolloutDataModule):
        made = None

        def _make_rollouts(self, module, epoch):
            self.made = self.made or super()._make_rollouts(module, epoch)
            return [replace(r, origin=replace(r.origin, epoch=epoch)) for r in self.made]

    assert_found(
        tmp_path, tiny_model, single(kind=Again), "stale_rollout", "the rollout is 1 updates old; 0 are declared"
    )


def test_more_updates_than_planned_are_named(tmp_path, tiny_model):
    class Later(RolloutDataModule):
        """Gives the first rollout for ever, as if it were in its middle."""

        def train_dataloader(self):
            if self.rollout is None:
                return super().train_dataloader()
            return BatchLoader([b.replace(first_of_rollout=False) for b in self.rollout.batches], 0)

    assert_found(tmp_path, tiny_model, single(kind=Later), "stale_rollout", "update 2 with one rollout; 1 are planned")


def test_equal_seeds_are_named(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr("grpo_lightning.rollout.player.request_seed", lambda *parts: 7)
    engine = RecordingEngine()
    data = single(engine, max_tokens=12, reward=lambda completion, task_id: float(len(completion)))
    assert_found(tmp_path, tiny_model, data, "samples_repeated", "copies of each other")


def test_mixed_groups_are_named(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(Group, "__post_init__", lambda group: None)

    class Mixed(RolloutDataModule):
        def _sample(self, *args, **settings):
            groups = super()._sample(*args, **settings)
            episodes = [e for g in groups for e in g.episodes]
            size = len(groups)
            return [forged(g, episodes=tuple(episodes[i::size])) for i, g in enumerate(groups)]

    assert_found(tmp_path, tiny_model, single(kind=Mixed), "groups_mixed", "hold episodes of several prompts")


def test_groups_of_another_task_are_named(tmp_path, tiny_model):
    class Moved(RolloutDataModule):
        def _sample(self, *args, **settings):
            groups = super()._sample(*args, **settings)
            return [forged(g, task=other.task) for g, other in zip(groups, groups[1:] + groups[:1], strict=True)]

    assert_found(tmp_path, tiny_model, single(kind=Moved), "groups_mixed", "another prompt than their task gives")


def test_a_template_that_shows_the_date_is_no_other_prompt_after_midnight(tmp_path, tiny_model, monkeypatch):
    template = tmp_path / "date.jinja"
    template.write_text("{{ strftime_now('%d') }}{% for m in messages %}{{ m.content }}{% endfor %}: ")
    days = itertools.count(10)
    render = ChatTemplate.render

    class Midnight(RolloutDataModule):
        def _sample(self, *args, **settings):
            groups = super()._sample(*args, **settings)
            day = str(next(days))
            monkeypatch.setattr(
                ChatTemplate,
                "render",
                lambda self, *args, **settings: day + render(self, *args, **settings)[2:],
            )
            return groups

    fit(tmp_path, tiny_model, single(kind=Midnight, chat_template=str(template)))


def test_another_reference_is_named(tmp_path, tiny_model):
    class Elsewhere(GRPOModule):
        def configure_model(self):
            super().configure_model()
            reference = self.policy.reference

            @contextlib.contextmanager
            def other():
                weights = self.policy.causal_lm.get_output_embeddings().weight
                with torch.no_grad(), reference():
                    weights.mul_(1.5)
                    yield
                    weights.div_(1.5)

            self.policy.reference = other

    found = {"module": Elsewhere, "policy": {"kl_coef": 0.1}}
    assert_found(tmp_path, tiny_model, single(RecordingEngine()), "reference_wrong", **found)


def test_a_reference_that_is_the_policy_itself_is_named(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr("grpo_lightning.policy.Policy.reference", lambda policy: torch.no_grad())
    found = {"policy": {"kl_coef": 0.1, "learning_rate": 0.01}, "max_epochs": 4}
    assert_found(tmp_path, tiny_model, single(RecordingEngine()), "reference_wrong", "bit for bit", **found)


def test_a_template_with_chance_is_refused(tmp_path, tiny_model):
    template = tmp_path / "chance.jinja"
    template.write_text("{{ range(100000) | random }}{% for m in messages %}{{ m.content }}{% endfor %}: ")
    data = single(chat_template=str(template))
    assert_found(tmp_path, tiny_model, data, "template", "shows the same conversation differently each time")


def warned(tmp_path, model, data, match, **settings):
    with pytest.warns(UserWarning, match=match):
        return fit(tmp_path, model, data, **settings)


def fixed(text, reason):
    def generation(prompt_ids, params, seed, version):
        ids = (*encode(text), *([EOS_ID] if reason == "stop" else []))
        rng = np.random.default_rng(seed)
        return Generation(ids, tuple(-1e-3 * rng.uniform(0.5, 1.5, len(ids))), reason, version)

    return generation


def by_chance(completion, task_id, seen=itertools.count()):  # noqa: B008
    return float(next(seen) % 2)


def test_rewards_of_other_samples_are_a_warning(tmp_path, tiny_model):
    data = single(FakeEngine(fixed("x", "stop")), reward=by_chance, samples_per_prompt=16, prompts_per_rollout=8)
    warned(tmp_path, tiny_model, data, "Equal answers to one task have rewards about as far apart as any two samples")


def dealt_out_anew(episode, number, rewards=[]):  # noqa: B006
    """Every episode has the reward of the one before."""
    rewards.append(episode.reward)
    value = rewards[-2] if number else episode.reward
    return replace(episode, reward=value, rewards=dict.fromkeys(episode.rewards, value))


def spread(completion):
    return float(sum(map(ord, completion)))


def test_rewards_of_the_neighbour_are_a_warning(tmp_path, tiny_model):
    data = single(kind=with_episodes(dealt_out_anew), reward=spread)
    doctor = warned(tmp_path, tiny_model, data, "not those of the completions they stand beside", max_epochs=4)
    assert "rewards_wrong" in [v.cause for v in doctor.said]


async def judge(completion):
    raise AssertionError("was asked again")


def asked(calls):
    def slow(completion):
        calls.append(completion)
        time.sleep(0.6)
        return 1.0

    return slow


def test_judges_and_slow_rewards_are_not_asked_again(tmp_path, tiny_model):
    data = single(reward=length, prompts_per_rollout=2, samples_per_prompt=2)
    fit(tmp_path, tiny_model, data)
    calls = []
    rescoring = Rescoring()
    found = [rescoring.score(Scorer([judge, asked(calls)]), data.rollout.groups) for _ in range(2)]
    assert found[0].looked_at > 0
    assert found[1].looked_at == 0
    assert 1 <= len(calls) <= 4


@pytest.mark.parametrize("episodes", [0, 1, 3])
def test_as_many_completions_are_scored_again_as_were_asked_for(tmp_path, tiny_model, episodes):
    data = single(reward=length, prompts_per_rollout=2, samples_per_prompt=2)
    fit(tmp_path, tiny_model, data)
    assert Rescoring(episodes).score(data.scorer, data.rollout.groups).looked_at == episodes
    (part,) = [p for p in RunDoctor(rescored=episodes)._parts if p.name == "rollout"]
    assert part._rescoring.score(data.scorer, data.rollout.groups).looked_at == episodes


def test_a_negative_number_of_them_is_refused():
    with pytest.raises(ConfigurationError, match="expected rescored >= 0, but got -1"):
        RunDoctor(rescored=-1)


def test_tasks_that_come_again_are_a_warning(tmp_path, tiny_model):
    class Same(RolloutDataModule):
        def _draw_tasks(self, first, count=None):
            return super()._draw_tasks(0)

    data = single(kind=Same)
    warned(tmp_path, tiny_model, data, "drew the same tasks in the same order", max_epochs=4)


def test_completions_that_never_end_are_a_warning(tmp_path, tiny_model):
    data = single(FakeEngine(fixed("x", "length")), reward=lambda completion: 1.0, prompts_per_rollout=8)
    warned(tmp_path, tiny_model, data, "none holds a token that would end it")


def test_empty_answers_are_a_warning(tmp_path, tiny_model):
    data = single(FakeEngine(fixed("", "stop")), reward=lambda completion: 1.0, prompts_per_rollout=8)
    warned(tmp_path, tiny_model, data, "All 32 completions are empty")


def test_a_constant_reward_is_a_warning_after_some_rollouts(tmp_path, tiny_model):
    data = single(reward=lambda completion: 1.0)
    doctor = warned(tmp_path, tiny_model, data, "In 5 rollouts no two samples", max_epochs=5)
    found = [v.status for v in doctor.said if v.check == "rewards"]
    assert found == [Status.NO_POWER] * 4 + [Status.FAIL]


HEALTHY = {
    "single": (single, {}, {}),
    "float32 engine, kl": (lambda **s: single(RecordingEngine(), **s), {}, {"policy": {"kl_coef": 0.1}}),
    "dropout, kl": (single, {}, {"policy": {"kl_coef": 0.1, "lora_dropout": 0.1}}),
    "several updates and passes": (single, {"updates_per_rollout": 2, "inner_epochs": 2}, {}),
    "accumulation": (single, {}, {"accumulate_grad_batches": 3}),
    "tiny": (single, {"prompts_per_rollout": 1, "samples_per_prompt": 2}, {}),
    "solved": (single, {"reward": lambda completion: 1.0}, {"max_epochs": 3}),
    "perturbed": (single, {}, {"callbacks": [ParameterPerturbation()]}),
    "overfit": (single, {}, {"overfit_batches": 1, "max_epochs": 3}),
    "rate 0 at first": (lambda **s: single(RecordingEngine(), **s), {}, {"policy": {"warmup_updates": 5}}),
    "forced moves": (multi, {}, {"max_epochs": 3}),
    "split": (multi, {"episodes": {"context_limit": "split", "max_context": 70}}, {}),
    "reward to go": (multi, {"episodes": {"advantage": "reward_to_go"}}, {}),
    "echo": (multi, {"environment": Echo, "episodes": {"invalid_action": "message"}}, {}),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_runs_are_left_alone(tmp_path, tiny_model, name):
    make, data, settings = HEALTHY[name]
    data = make(**data)
    doctor = fit(tmp_path, tiny_model, data, **settings)
    assert [v for v in doctor.said if v.status is Status.FAIL] == []
    answers = {v.check: v.status for v in doctor.said}
    for check in ("token sources", "sampled tokens", "packed tokens", "used tokens", "advantages", "rollout age"):
        assert answers[check] is Status.PASS, check
    assert answers["rollout reuse"] is Status.PASS
    [facts] = [part.facts() for part in doctor._parts if part.name == "rollout"]
    assert len(facts["rollouts"]) == settings.get("max_epochs", 2)
    if name == "split":
        assert any(len(e.ledgers) > 1 for g in data.rollout.groups for e in g.episodes)


def test_an_epoch_that_goes_on_in_its_middle_is_left_alone(tmp_path, tiny_model):
    keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    fit(tmp_path, tiny_model, multi(updates_per_rollout=2), callbacks=[keep], max_epochs=2)
    doctor = fit(tmp_path, tiny_model, multi(updates_per_rollout=2), ckpt_path=tmp_path / "step=3.ckpt", max_epochs=3)
    assert [v for v in doctor.said if v.status is Status.FAIL] == []
    assert [v.status for v in doctor.said if v.check == "used tokens"] == [Status.PASS] * 3
    # The rest of the second epoch, whose beginning was not seen, and the third.
    assert [v.status for v in doctor.said if v.check == "sampled tokens"] == [Status.PASS]
    assert len(doctor.part.facts()["rollouts"]) == 3
