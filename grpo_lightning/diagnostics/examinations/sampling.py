"""Are the tokens drawn from the trainer's distribution, and do the engine's logprobs say so?"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_lightning.diagnostics.attribution import attribute
from grpo_lightning.diagnostics.checks.distribution import check_distribution, check_filled
from grpo_lightning.diagnostics.checks.forward import check_forward
from grpo_lightning.diagnostics.checks.mismatch import check_earlier_weights, check_first_mismatch, mismatch_limit
from grpo_lightning.diagnostics.checks.numbers import check_logprobs
from grpo_lightning.diagnostics.checks.semantics import check_semantics, check_trainer_temperature, check_values
from grpo_lightning.diagnostics.checks.truncation import as_declared
from grpo_lightning.diagnostics.curve import Curve
from grpo_lightning.diagnostics.evidence import MicroBatchEvidence
from grpo_lightning.diagnostics.examination import Examination, Run
from grpo_lightning.diagnostics.hypotheses import Hypothesis, at_temperature, of_distributions, of_order
from grpo_lightning.diagnostics.log_ratios import LogRatioHistograms
from grpo_lightning.diagnostics.other_weights import of_weights
from grpo_lightning.diagnostics.rounding import rounding
from grpo_lightning.diagnostics.sample import draw_sample
from grpo_lightning.diagnostics.scoring import plain_logprobs, quiet
from grpo_lightning.diagnostics.tally import Tally, Windows, tally
from grpo_lightning.diagnostics.truncation import beside_truncation, kept_tokens
from grpo_lightning.diagnostics.update import Update
from grpo_lightning.diagnostics.verdict import Status, Verdict
from grpo_lightning.distributed import processes
from grpo_lightning.rollout.batch import PackedBatch
from grpo_lightning.rollout.rollout import Rollout

SUSPICIOUS = 4.0
"""A mismatch this many times the noise floor is looked into; noise grows by less as training goes on."""

MAX_ROUNDING = 20.0
"""Before the first rollout 20 times the usual rounding is allowed, times the factor of `mismatch_limit`: 0.02 nats in
float32, since an engine on a GPU may multiply in TF32 where the trainer does not."""

_EXAMINED_TOKENS = 1024
"""Input tokens of the forward passes that look into it."""

_COMPARED_ROWS = 2
_COMPARED_EVERY = 3
"""Of two rows of four sequences: the first and the last of one, and the third of the other."""

_SEED = 20


class SamplingExamination(Examination):
    """Holds what the engine sampled against the trainer's distributions.

    Before the first rollout it has the engine complete a few prompts and asks which hypothesis fits its logprobs. In
    training it adds up surprisal and position of fresh tokens, and where the engine's logprobs differ by more than
    noise it asks again, of other weights too.

    Args:
        max_mismatch: Largest RMS difference in nats between trainer and engine that rounding explains.

    Attributes:
        noise_floor: RMS of the difference in nats that was measured when all was well; None before.
    """

    name = "sampling"

    def __init__(self, *, max_mismatch: float) -> None:
        self._max_mismatch = max_mismatch
        self.reset()

    def reset(self) -> None:
        """Forget an earlier run."""
        self.noise_floor: float | None = None
        self._sampled = False
        self._attribution: dict[str, float] | None = None
        self._windows = Windows()
        self._total = Tally()
        self._series = Curve()
        self._histograms = LogRatioHistograms()
        self._draws = torch.Generator().manual_seed(_SEED)
        self._batch: PackedBatch | None = None
        self._weights: dict[str, Tensor] | None = None
        self._weights_version = -1
        self._previous: dict[str, Tensor] | None = None
        self._looked_into = 0.0

    def state_dict(self) -> dict[str, Any]:
        """The sums so far and what the report shows; the noise floor is measured again."""
        return {
            "windows": self._windows.state_dict(),
            "total": self._total.state_dict(),
            "series": self._series.state_dict(),
            "histograms": self._histograms.facts(),
            "draws": self._draws.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self._windows = Windows.from_state(state["windows"])
        self._total = Tally.from_state(state["total"])
        self._series.load_state_dict(state["series"])
        self._histograms.load(state["histograms"])
        self._draws.set_state(state["draws"])

    def facts(self) -> dict[str, Any]:
        """Attribution of the mismatch, surprisal of updates (`Curve`), histograms of log-ratios."""
        return {
            "attribution": self._attribution,
            "surprisal": self._series.points(),
            "log_ratio_histograms": self._histograms.facts(),
        }

    def on_sync(self, run: Run) -> Sequence[Verdict]:
        """The first time: what do the engine's logprobs mean?"""
        if self._sampled or run.data is None:
            return ()
        self._sampled = True
        sample = draw_sample(run.data)
        batch = sample.batch.to(run.module.device)
        allowed = mismatch_limit(MAX_ROUNDING * rounding(run), self._max_mismatch, 0.0)
        forward = _judge_forward(run, batch, allowed)
        if forward.status is Status.FAIL:
            return [forward]
        o, used, hypotheses, tokens = self._scored(run, batch, sample.logprobs)
        s, sequence = sample.logprobs, batch.sequence_index.cpu()
        values = check_values(s, o, run.thresholds)
        verdicts = [
            forward,
            values,
            check_trainer_temperature(used, o, sequence, hypotheses, run.thresholds, rounding(run)),
            check_filled(tokens),
            check_distribution(tokens, run.thresholds),
        ]
        if values.status is not Status.FAIL:
            verdicts.append(check_semantics(s, o, sequence, hypotheses, run.thresholds, rounding(run)))
            verdicts.append(check_first_mismatch(s, o, allowed))
        if not any(verdict.status is Status.FAIL for verdict in verdicts):
            self.noise_floor = float((s - o).square().mean().sqrt())
        self._attribution = attribute(s, o, sequence, hypotheses, self.noise_floor, run.thresholds.z)
        if run.data.truncated and not any(verdict.status is Status.FAIL for verdict in verdicts):
            verdicts += self._truncated(run, allowed)
        return verdicts

    def _truncated(self, run: Run, allowed: float) -> list[Verdict]:
        """What was judged so far is not truncated. Does the engine truncate as the run declares?"""
        assert run.data is not None
        top_p, top_k = run.data.top_p, run.data.top_k
        sample = draw_sample(run.data, truncated=True)
        s, batch = sample.logprobs, sample.batch.to(run.module.device)
        kept = kept_tokens(run, batch, top_p, top_k)
        o, _, hypotheses, _ = self._scored(run, batch, s)
        values = check_values(s, o - kept.log_mass, run.thresholds)
        if values.status is Status.FAIL:
            return [values]
        verdicts = [
            check_semantics(
                s,
                o - kept.log_mass,
                batch.sequence_index.cpu(),
                beside_truncation(hypotheses, o, kept.log_mass),
                run.thresholds,
                rounding(run),
            ),
            check_first_mismatch(s, o - (o - s).clamp(kept.low, kept.high), allowed),
            check_distribution(kept.tally(s, kept.judged, self._draws), run.thresholds),
        ]
        return [as_declared(verdict, top_p, top_k) for verdict in verdicts]

    def on_rollout(self, run: Run, rollout: Rollout) -> Sequence[Verdict]:
        """Was a rollout of an earlier policy drawn from that one, and do the engine's logprobs agree with it?"""
        if rollout.origin.version == run.module.policy_version:
            return ()
        if self._weights is None or self._weights_version != rollout.origin.version:
            reason = f"The weights of version {rollout.origin.version}, which sampled the rollout, were not kept."
            return [Verdict("earlier weights", Status.NO_POWER, reason)]
        device = run.module.device
        batch = rollout.batches[0].first_rows(_EXAMINED_TOKENS).to(device)
        with run.module.policy._holding({name: p.to(device) for name, p in self._weights.items()}):
            return self._earlier(run, rollout, batch)

    def _earlier(self, run: Run, rollout: Rollout, batch: PackedBatch) -> list[Verdict]:
        """Judge tokens while the policy holds the weights that sampled them."""
        assert run.data is not None
        s = rollout.stored_logprobs(batch.ledger_index.cpu())
        with quiet(run):
            current = run.module.policy.token_logprobs(batch)
        o, entropy, variance, above = (values.double().cpu() for values in current)
        own = (batch.loss_weight > 0).cpu() & s.isfinite()
        if run.data.truncated:
            kept = kept_tokens(run, batch, run.data.top_p, run.data.top_k)
            apart = s - (o - (o - s).clamp(kept.low, kept.high))
            part = kept.tally(s, own, self._draws)
        else:
            apart = s - o
            part = tally(o[own], entropy[own], variance[own], above[own], s[own], self._draws)
        apart = apart[own & apart.isfinite()]
        limit = mismatch_limit(run.noise_floor, self._max_mismatch, rounding(run))
        verdicts = [check_earlier_weights(apart, limit)]
        if part.tokens:
            verdicts += self._judge(run, part)
        rms = float(apart.square().mean().sqrt()) if len(apart) >= run.thresholds.tokens else 0.0
        if rms > max(SUSPICIOUS * self._noise(run), 2 * self._looked_into):
            self._looked_into = rms
            verdicts += self._look_into(run, batch)
        return verdicts

    def on_batch(self, run: Run, batch: PackedBatch) -> None:
        """Keep the first micro-batch of a rollout, and the weights that its epoch begins with.

        They sampled it, or, where rollouts are sampled ahead, the next one.
        """
        if not batch.first_of_rollout or not processes().first:
            return
        self._batch = batch
        if run.module.policy.has_adapter:
            self._previous, self._weights_version = self._weights, run.module.policy_version
            self._weights = {name: p.detach().to("cpu", copy=True) for name, p in run.trainable.items()}

    def on_update(self, run: Run, update: Update) -> Sequence[Verdict]:
        """Were this update's fresh tokens drawn from the policy, and do the engine's logprobs agree?"""
        evidence = update.evidence
        self._histograms.add(evidence.log_ratio, evidence.updates_since_sampling)
        fresh = evidence.updates_since_sampling == 0
        if not bool(fresh.any()) or not bool(evidence.logprobs.isfinite().all()):
            return ()
        verdicts = self._distribution(run, evidence, fresh)
        d = (evidence.stored - evidence.logprobs + evidence.log_mass)[fresh]
        d = d[d.isfinite()]
        if bool(fresh.all()) and len(d) >= run.thresholds.tokens and self._batch is not None and run.data is not None:
            rms = float(d.square().mean().sqrt())
            if rms > max(SUSPICIOUS * self._noise(run), 2 * self._looked_into):
                self._looked_into = rms
                verdicts += self._look_into(run, self._batch)
        self._batch = None
        return verdicts

    def _distribution(self, run: Run, evidence: MicroBatchEvidence, fresh: Tensor) -> list[Verdict]:
        """Whether the tokens that the current policy sampled are drawn from it."""
        truncated = run.data is not None and run.data.truncated
        if truncated:
            # Only where what is kept is known do the tokens say anything.
            if run.kept is None or run.data is None or run.data.rollout is None:
                return []
            s = run.data.rollout.stored_logprobs(run.kept.ledger_index)
            own = torch.isin(run.kept.ledger_index, evidence.ledger_index[fresh]) & s.isfinite()
            part = run.kept.tally(s, own, self._draws)
            if not part.tokens:
                return []
        else:
            part = tally(
                evidence.logprobs[fresh],
                evidence.entropy[fresh],
                evidence.surprisal_variance[fresh],
                evidence.mass_above[fresh],
                evidence.stored[fresh],
                self._draws,
            )
        return self._judge(run, part)

    def _judge(self, run: Run, part: Tally) -> list[Verdict]:
        """The verdicts of all windows that further tokens complete."""
        self._total = self._total + part
        self._series.add(
            {"update": run.module.policy_version},
            {
                "z": self._total.z,
                "observed": part.surprisal / part.tokens,
                "expected": part.entropy / part.tokens,
            },
        )
        judged = [check_distribution(window, run.thresholds) for window in self._windows.add(part)]
        if run.data is not None and run.data.truncated:
            judged = [as_declared(verdict, run.data.top_p, run.data.top_k) for verdict in judged]
        # The longest window knows most, unless a shorter one found something.
        failed = [verdict for verdict in judged if verdict.status is Status.FAIL]
        return [check_filled(self._total), *(failed or judged)[-1:]]

    def _look_into(self, run: Run, batch: PackedBatch) -> list[Verdict]:
        """Which hypothesis explains the mismatch of a rollout that the policy sampled with the weights it holds?"""
        assert run.data is not None
        assert run.data.rollout is not None
        batch = batch.first_rows(_EXAMINED_TOKENS)
        s = run.data.rollout.stored_logprobs(batch.ledger_index.cpu())
        o, _, hypotheses, _ = self._scored(run, batch, s)
        sequence = batch.sequence_index.cpu()
        noise = self._noise(run)
        if not run.data.truncated:
            self._attribution = attribute(s, o, sequence, hypotheses, noise, run.thresholds.z)
            return [check_semantics(s, o, sequence, hypotheses, run.thresholds, noise)]
        kept = kept_tokens(run, batch, run.data.top_p, run.data.top_k)
        hypotheses = beside_truncation(hypotheses, o, kept.log_mass)
        o = o - kept.log_mass
        self._attribution = attribute(s, o, sequence, hypotheses, noise, run.thresholds.z)
        verdict = check_semantics(s, o, sequence, hypotheses, run.thresholds, noise)
        return [as_declared(verdict, run.data.top_p, run.data.top_k)]

    def _noise(self, run: Run) -> float:
        return max(self.noise_floor or 0.0, rounding(run))

    def _scored(self, run: Run, batch: PackedBatch, s: Tensor) -> "_Scored":
        """What the trainer says of tokens, without dropout."""
        policy = run.module.policy
        with quiet(run):
            # Scaled here, so that a trainer that forgets its temperature does not judge itself.
            raw = policy.log_distributions(batch.replace(temperature=1.0))
            o, hypotheses = of_distributions(
                at_temperature(raw, batch.temperature), batch.target_ids, batch.temperature
            )
            current = policy.token_logprobs(batch)
            # Where nothing is suspicious, other weights are not worth a dozen forward passes.
            if float((s - o).nan_to_num().square().mean().sqrt()) > SUSPICIOUS * rounding(run):
                hypotheses += of_weights(policy, batch, self._previous)
        hypotheses += of_order(o, batch.sequence_index.cpu())
        used, entropy, variance, above = (values.double().cpu() for values in current)
        return _Scored(o, used, hypotheses, tally(o, entropy, variance, above, s, self._draws))


def _judge_forward(run: Run, batch: PackedBatch, allowed: float) -> Verdict:
    """Are the trainer's logprobs numbers, and those of its model? Of two rows: siblings, and a neighbour."""
    policy = run.module.policy
    # At temperature 1: whether the trainer minds the sampling's is asked elsewhere.
    batch = batch.first_rows(int((batch.row_ids < _COMPARED_ROWS).sum())).replace(temperature=1.0)
    with quiet(run):
        packed = policy.token_logprobs(batch).logprobs.double().cpu()
        finite = check_logprobs(packed, "the trainer")
        if finite.status is Status.FAIL:
            return finite
        compared = batch.sequence_index.cpu() % _COMPARED_EVERY == 0
        plain = plain_logprobs(policy, batch, _COMPARED_EVERY)
        return check_forward(packed[compared], plain[compared], allowed)


class _Scored(NamedTuple):
    """What the trainer says of tokens: logprobs at the sampling temperature, what the loss would use for them, what
    else they might be, and the sums over the tokens."""

    o: Tensor
    used: Tensor
    hypotheses: list[Hypothesis]
    tokens: Tally
