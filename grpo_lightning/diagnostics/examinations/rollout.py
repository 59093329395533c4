"""What is known exactly of a rollout: who chose each token, with which policy, and what it was worth."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from grpo_lightning.diagnostics.checks.advantages import check_advantages
from grpo_lightning.diagnostics.checks.age import check_age, check_reuse, last_equal
from grpo_lightning.diagnostics.checks.diversity import Said, check_diversity, check_tasks, said
from grpo_lightning.diagnostics.checks.endings import check_endings
from grpo_lightning.diagnostics.checks.groups import (
    EqualAnswers,
    check_equal_answers,
    check_groups,
    check_rewards,
    equal_answers,
)
from grpo_lightning.diagnostics.checks.packed import check_packed, check_used
from grpo_lightning.diagnostics.checks.reference import check_reference, check_reference_apart
from grpo_lightning.diagnostics.checks.scored_again import ScoredAgain, check_scored_again
from grpo_lightning.diagnostics.checks.step import StepSize
from grpo_lightning.diagnostics.checks.template import check_template
from grpo_lightning.diagnostics.checks.tokens import (
    check_logprob_values,
    check_sampled_tokens,
    check_sources,
    name_copies,
)
from grpo_lightning.diagnostics.curve import Curve
from grpo_lightning.diagnostics.examination import Examination, Run
from grpo_lightning.diagnostics.rescoring import EPISODES, Rescoring
from grpo_lightning.diagnostics.rollout_table import RolloutTable, SampledRun, sampled_runs
from grpo_lightning.diagnostics.rounding import rounding
from grpo_lightning.diagnostics.scoring import quiet
from grpo_lightning.diagnostics.update import Update
from grpo_lightning.diagnostics.verdict import Status, Verdict
from grpo_lightning.rollout.advantages import with_advantages
from grpo_lightning.rollout.chat_template import TemplateFacts
from grpo_lightning.rollout.episode import Group
from grpo_lightning.rollout.generation_record import GenerationRecord
from grpo_lightning.rollout.ledger import Source
from grpo_lightning.rollout.rollout import Rollout

_REMEMBERED = 32
"""Rollouts whose tasks and equal answers, and publications whose step, are remembered."""


class RolloutExamination(Examination):
    """Checks each rollout before its first update, and what each update used of it.

    It compares with what the engine returned, what the ledgers hold and what the rewards say, not with a model: a
    failure here is a fact, except where the check's own text says how likely chance is.

    Args:
        rescored: Completions of each rollout that the reward functions are called on again.
    """

    name = "rollout"

    def __init__(self, rescored: int = EPISODES) -> None:
        self._rescored = rescored
        self.reset()

    def reset(self) -> None:
        """Forget an earlier run."""
        self._rollout: Rollout | None = None
        self._table: RolloutTable | None = None
        self._updates: int | None = None
        self._said: list[Said] = []
        self._tasks: list[tuple[int, ...]] = []
        self._equal: list[EqualAnswers] = []
        self._published: dict[int, int] = {}
        self._template: TemplateFacts | None = None
        self._template_seen = False
        self._rollouts, self._differing = 0, 0
        self._moved = 0.0
        self._rescoring, self._again = Rescoring(self._rescored), ScoredAgain()
        self._series = Curve()

    def state_dict(self) -> dict[str, Any]:
        """What was counted and added up over the rollouts so far, and the series of `facts`."""
        return {
            "rollouts": self._rollouts,
            "differing": self._differing,
            "series": self._series.state_dict(),
            "moved": self._moved,
            "scored_again": asdict(self._again),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self._rollouts, self._differing = state["rollouts"], state["differing"]
        self._series.load_state_dict(state["series"])
        self._moved, self._again = state["moved"], ScoredAgain(**state["scored_again"])

    def facts(self) -> dict[str, Any]:
        """Rewards, groups without variance, lengths, truncated and distinct share, of rollouts (`Curve`)."""
        return {"rollouts": self._series.points()}

    def on_sync(self, run: Run) -> Sequence[Verdict]:
        """Note when each version was published; try the chat template the first time."""
        self._published[run.module.policy_version] = run.trainer.global_step
        for version in sorted(self._published)[:-_REMEMBERED]:
            del self._published[version]
        if self._template_seen or run.data is None:
            return ()
        self._template_seen = True
        sampler = run.data.sampler
        self._template = sampler.encoder.template_facts(sampler.stop)
        verdicts = [check_template(self._template)]
        if run.data.multi_turn and run.data.episodes.max_turns > 1:
            # `probe` has refused what does not go on turn by turn.
            verdicts.append(Verdict("turns of the chat template", Status.PASS))
        return verdicts

    def on_rollout(self, run: Run, rollout: Rollout) -> Sequence[Verdict]:
        """Check all that is known before the first update."""
        assert run.data is not None
        groups, limit = rollout.groups, run.thresholds.surprise
        self._rollout, self._table, self._updates = rollout, RolloutTable.of(groups), 0
        runs, table = sampled_runs(groups), self._table
        sampled = table.source == Source.SAMPLED
        samples, before = said(groups), self._said
        self._said = samples
        self._tasks = [*self._tasks, rollout.origin.tasks][-_REMEMBERED:]
        self._equal = [*self._equal, equal_answers(groups)][-_REMEMBERED:]
        self._rollouts += 1
        self._differing += any(_differ(group) for group in groups)
        verdicts = [
            check_logprob_values(table.logprobs[sampled]),
            check_sources(runs),
            _sampled_tokens(run, rollout, runs),
            check_packed(rollout.batches, table),
            self._age(run, table.policy_version[sampled]),
            check_diversity(samples, before, limit),
            check_groups(groups, _own_prompts(groups, rollout.record)),
            check_equal_answers(self._equal, run.thresholds.z),
            check_rewards(self._rollouts, self._differing),
            check_advantages(groups, run.data.episodes.advantage, self._advantages_again(run, groups)),
            check_endings(groups, run.data.sampler.encoder.stop_token_ids, self._template),
        ]
        # Episodes whose tokens are not what they should be have no reward to compare with.
        if not any(verdict.status is Status.FAIL for verdict in verdicts):
            self._again += self._rescoring.score(run.data.scorer, groups)
            verdicts.append(check_scored_again(self._again))
        trainer: Any = run.trainer
        if not trainer.overfit_batches:
            verdicts.append(check_tasks(last_equal(self._tasks), len(run.data.tasks), limit))
        self._series.add({"number": float(rollout.origin.number)}, _numbers(rollout, samples))
        return verdicts

    def _advantages_again(self, run: Run, groups: Sequence[Group]) -> list[Group] | None:
        """Advantages by the estimator that the run declares; None where it is GRPO's.

        Not by the data module's own hand, which is what is judged.
        """
        data = run.data
        assert data is not None
        if data.advantages.plain:
            return None
        credit, weights = data.episodes.advantage, data.scorer.weights
        return with_advantages(groups, credit, data.advantages.estimate, part_weights=weights)

    def _age(self, run: Run, versions: NDArray[np.int64]) -> Verdict:
        published = self._published.get(int(versions.min(initial=run.module.policy_version)))
        steps = None if published is None else run.trainer.global_step - published
        return check_age(versions, current=run.module.policy_version, steps=steps, lag=_lag(run))

    def on_update(self, run: Run, update: Update) -> Sequence[Verdict]:
        """Check what the loss used, and how often the rollout was used."""
        rollout = run.data.rollout if run.data is not None else None
        if rollout is None:
            return ()
        if rollout is not self._rollout:
            # An epoch that goes on in its middle: its beginning was not seen.
            self._rollout, self._table, self._updates = rollout, RolloutTable.of(rollout.groups), None
        assert self._table is not None
        verdicts = [check_used(update.evidence, self._table)]
        if self._updates is not None:
            self._updates += 1
            verdicts.append(check_reuse(self._updates, rollout.layout.updates * rollout.layout.passes))
        if run.module.objective.kl_coef > 0:
            verdicts.append(self._reference(run, update))
        return verdicts

    def after_step(self, run: Run, update: Update, step: StepSize) -> Sequence[Verdict]:
        """Note how far the policy has moved."""
        weight = float((update.evidence.loss_weight * update.evidence.advantage).abs().sum())
        if weight > 0:
            self._moved += abs(step.loss_change) / weight
        return ()

    def _reference(self, run: Run, update: Update) -> Verdict:
        evidence = update.evidence
        if run.module.policy_version > 0:
            return check_reference_apart(evidence.reference, evidence.logprobs, self._moved, rounding(run))
        if any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in run.module.policy.modules()):
            return Verdict("reference", Status.NO_POWER, "Dropout makes reference and policy differ.")
        return check_reference(
            evidence.reference, evidence.logprobs, evidence.stored + evidence.log_mass, rounding(run)
        )


def _sampled_tokens(run: Run, rollout: Rollout, runs: Sequence[SampledRun]) -> Verdict:
    verdict = check_sampled_tokens(runs, rollout.record)
    if verdict.cause != "logprobs_replaced":
        return verdict
    # Only now is it worth a forward pass to know by what.
    stored, computed = [], []
    with quiet(run):
        for batch in rollout.batches:
            logprobs = run.module.policy.token_logprobs(batch.to(run.module.device)).logprobs
            real = batch.loss_weight != 0
            stored.append(rollout.stored_logprobs(batch.ledger_index[real]))
            computed.append(logprobs.double().cpu()[real])
    return name_copies(verdict, torch.cat(stored), torch.cat(computed))


def _lag(run: Run) -> int:
    """How many updates a rollout may be behind: what the sync allows, and what was sampled ahead."""
    return int(getattr(run.sync, "max_lag", 0)) + (0 if run.data is None else run.data.updates_behind)


def _own_prompts(groups: Sequence[Group], record: GenerationRecord | None) -> dict[int, bool]:
    """Whether each group's prompt is its task's, as it was shown then: a template may show the date."""
    if record is None:
        return {}
    return {i: record.began(group.task.id, group.prompt_ids) for i, group in enumerate(groups) if group.prompt_ids}


def _differ(group: Group) -> bool:
    return len({episode.reward for episode in group.episodes if episode.reward is not None}) > 1


def _numbers(rollout: Rollout, samples: Sequence[Said]) -> dict[str, float]:
    """The numbers of a rollout that the report draws."""
    episodes = [e for group in rollout.groups for e in group.episodes if e.turns]
    rewards = [e.reward for e in episodes if e.reward is not None]
    lengths = [e.count(Source.SAMPLED) for e in episodes] or [0]
    return {
        "version": float(rollout.origin.version),
        "reward_mean": float(np.mean(rewards)),
        "reward_std": float(np.std(rewards)),
        "without_variance": sum(not _differ(group) for group in rollout.groups) / len(rollout.groups),
        "length_mean": float(np.mean(lengths)),
        "length_max": float(max(lengths)),
        "truncated": sum(e.status == "truncated" for e in episodes) / max(1, len(episodes)),
        "distinct": len({s.tokens for s in samples}) / max(1, len(samples)),
    }
