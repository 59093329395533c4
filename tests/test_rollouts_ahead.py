"""Rollouts that are sampled while the one before is trained on."""

import asyncio
import threading
import time
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from doctored import PartDoctor
from fakes import FakeEngine, random_generation
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from runs import MODEL, data, length, trainer

from grpo_lightning import GRPOModule, TransformersEngine
from grpo_lightning.adapter_config import DEFAULT_RANK
from grpo_lightning.callbacks import LoRAWeightSync, RatioDegeneracyDetector, RunDoctor
from grpo_lightning.diagnostics import Status
from grpo_lightning.diagnostics.examinations.rollout import RolloutExamination
from grpo_lightning.errors import ConfigurationError, DegeneracyError, EngineDiedError, RewardError, StaleRolloutError

SIZE = 4 * 3
"""Completions of a rollout."""

UPDATES = 2
"""Optimizer steps of an epoch."""


class Epochs(Callback):
    """Notes each epoch's rollout and numbers, and tells when its training has begun."""

    def __init__(self):
        self.begun = [threading.Event() for _ in range(9)]
        self.rollouts = []
        self.metrics = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.begun[trainer.current_epoch].set()
        if batch_idx == 0:
            self.rollouts.append(trainer.datamodule.rollout)

    def on_train_epoch_end(self, trainer, pl_module):
        self.metrics.append(pl_module.epoch_metrics())


def fit(tmp_path, model, engine, *, ahead=1, epochs=3, rollouts=None, module=None, callbacks=(), ckpt_path=None, **run):
    policy = GRPOModule(model, **{**MODEL, "correction": "tis_token", **(module or {})})
    settings = {"updates_per_rollout": UPDATES, "rollouts_ahead": ahead, **(rollouts or {})}
    seen = Epochs()
    runner = trainer(tmp_path, max_epochs=epochs, callbacks=[*callbacks, seen], **run)
    runner.fit(policy, data(engine, **settings), ckpt_path=ckpt_path)
    return runner, seen


class Dying(FakeEngine):
    """Dies whenever it generates after some of its syncs: the first rollout's, the second's, ..."""

    def __init__(self, syncs):
        super().__init__(self._answer)
        self._syncs = syncs
        self._synced = 0

    def wait_until_ready(self):
        self._synced += 1

    def _answer(self, prompt_ids, params, seed, version):
        if self._synced in self._syncs:
            raise EngineDiedError("gone")
        return random_generation(prompt_ids, params, seed, version)


def no_thread_is_left():
    return not any(t.name == "grpo-lightning-ahead" and t.is_alive() for t in threading.enumerate())


def requests(engine):
    return sorted((prompt, seed) for prompt, params, seed, *_ in engine.requests)


class TestOverlap:
    def test_the_next_rollout_is_sampled_while_one_is_trained_on(self, tmp_path, tiny_model):
        """Training waits for the next rollout to begin, whose answers wait for the training."""
        seen, late, started = Epochs(), [], []
        sampling = [threading.Event() for _ in range(3)]

        class Waits(Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                following = trainer.current_epoch + 1
                if following < 3 and not sampling[following].wait(60):
                    late.append(f"rollout {following}")

        async def generation(prompt_ids, params, seed, version):
            number = len(started) // SIZE
            started.append(number)
            sampling[number].set()
            if number and not await asyncio.to_thread(seen.begun[number - 1].wait, 60):
                late.append(f"epoch {number - 1}")
            return random_generation(prompt_ids, params, seed, version)

        fit(tmp_path, tiny_model, FakeEngine(generation), callbacks=[seen, Waits()])
        assert len(started) == 3 * SIZE
        assert not late

    def test_versions_and_lag(self, tmp_path, tiny_model):
        engine = FakeEngine()
        _, seen = fit(tmp_path, tiny_model, engine)
        assert [version for version, _ in engine.calls] == [0] * 2 * SIZE + [UPDATES] * SIZE
        # Nothing is published for a rollout that will not come.
        assert [ref.version for ref in engine.loads] == [0, UPDATES]
        for rollout, version in zip(seen.rollouts, [0, 0, UPDATES], strict=True):
            assert rollout.origin.version == version
            sampled = [e.ledgers[0].policy_version[e.ledgers[0].sampled] for g in rollout.groups for e in g.episodes]
            assert {int(v) for values in sampled for v in values} == {version}
        column = {name: [m.get(name) for m in seen.metrics] for name in seen.metrics[0]}
        assert column["sync/version"] == [0, 0, UPDATES]
        assert column["sync/lag"] == [0, UPDATES, UPDATES]
        assert column["ppo/updates_since_sampling"] == [UPDATES - 1, 2 * UPDATES - 1, 2 * UPDATES - 1]
        assert column["time/rollout_sampling_seconds"][0] <= column["time/rollout_seconds"][0]

    def test_waiting_is_counted_apart_from_sampling(self, tmp_path, tiny_model):
        async def generation(prompt_ids, params, seed, version):
            await asyncio.sleep(0.5)
            return random_generation(prompt_ids, params, seed, version)

        class Busy(Callback):
            """Trains for as long as the rollout beside it takes."""

            def on_train_batch_end(self, trainer, *args):
                if (ahead := trainer.datamodule._ahead) is not None:
                    ahead._thread.join()

        _, seen = fit(tmp_path, tiny_model, FakeEngine(generation), epochs=2, callbacks=[Busy()])
        assert seen.metrics[1]["time/rollout_sampling_seconds"] >= 0.5
        assert seen.metrics[1]["time/rollout_seconds"] < 0.25

    @pytest.mark.parametrize(
        ("rollouts", "run"),
        [
            ({}, {}),
            ({"max_refills": 2, "max_tokens": 1}, {}),
            ({}, {"overfit_batches": 1}),
            ({}, {"max_epochs": -1, "max_steps": 3 * UPDATES}),
        ],
    )
    def test_tasks_and_seeds_are_those_of_a_run_without(self, tmp_path, tiny_model, rollouts, run):
        found = []
        for ahead in (0, 1):
            engine = FakeEngine()
            epochs = run.get("max_epochs", 3)
            others = {name: value for name, value in run.items() if name != "max_epochs"}
            _, seen = fit(tmp_path, tiny_model, engine, ahead=ahead, epochs=epochs, rollouts=rollouts, **others)
            origins = [(r.origin.number, r.origin.epoch, r.origin.tasks, r.origin.drawn) for r in seen.rollouts]
            found.append((origins, requests(engine)))
        assert len(found[0][0]) == 3
        assert found[0] == found[1]
        if "max_refills" in rollouts:
            assert any(drawn > 4 for *_, drawn in found[0][0])

    def test_only_what_is_sampled_in_its_place_has_a_bar(self, tmp_path, tiny_model, monkeypatch):
        from grpo_lightning.rollout import sampler

        shown, bar = [], sampler.rollout_bar
        monkeypatch.setattr(
            sampler, "rollout_bar", lambda title, *args: shown.append((title, args[-1])) or bar(title, *args)
        )
        fit(tmp_path, tiny_model, FakeEngine(), enable_progress_bar=True)
        assert [(title, trainer_bar is None) for title, trainer_bar in shown] == [
            ("Rollout 0", False),
            ("Rollout 1", True),
            ("Rollout 2", True),
        ]


class TestOthersThatGenerate:
    def test_validation_waits_for_the_rollout(self, tmp_path, tiny_model):
        finished = []

        async def generation(prompt_ids, params, seed, version):
            await asyncio.sleep(0.0 if params.temperature == 0 else 0.3)
            finished.append(version)
            return random_generation(prompt_ids, params, seed, version)

        engine = FakeEngine(generation)
        fit(
            tmp_path, tiny_model, engine, epochs=2, rollouts={"val_size": 2}, val_check_interval=0.5,
            num_sanity_val_steps=0,
        )  # fmt: skip
        assert finished == [0] * 2 * SIZE + [1] * 2 + [2] * 2 + [3] * 2 + [4] * 2


class TestFailures:
    def test_a_reward_that_raises_does_so_when_the_rollout_is_taken(self, tmp_path, tiny_model):
        scored = []

        def fragile(completion):
            scored.append(completion)
            if len(scored) > SIZE:
                raise ZeroDivisionError("oops")
            return length(completion)

        seen = Epochs()
        with pytest.raises(RewardError, match="'fragile' raised ZeroDivisionError: oops"):
            fit(tmp_path, tiny_model, FakeEngine(), rollouts={"reward": fragile}, callbacks=[seen])
        assert len(seen.metrics) == 1
        assert no_thread_is_left()

    @pytest.mark.parametrize("deaths", [1, 2, 3])
    def test_an_engine_that_dies_is_started_again_as_often_as_allowed(self, tmp_path, tiny_model, caplog, deaths):
        """It dies while the second rollout is sampled ahead, and then when that is sampled again."""
        engine = Dying(range(2, 2 + deaths))
        run = partial(fit, tmp_path, tiny_model, engine, rollouts={"engine_restarts": 1})
        if deaths < 3:
            runner, seen = run()
            assert runner.global_step == 3 * UPDATES
            # Sampled again with the policy of its own epoch.
            assert [r.origin.version for r in seen.rollouts] == [0, UPDATES, UPDATES]
        else:
            with pytest.raises(EngineDiedError, match="gone"):
                run()
        assert "died while a rollout was sampled ahead; it is sampled again" in caplog.text
        assert no_thread_is_left()

    @pytest.mark.parametrize("end", ["stop", "exception"])
    def test_what_is_under_way_is_cancelled_at_the_end(self, tmp_path, tiny_model, end):
        engine = FakeEngine()

        async def generation(prompt_ids, params, seed, version):
            if len(engine.calls) > SIZE:
                await asyncio.sleep(3600)
            return random_generation(prompt_ids, params, seed, version)

        class End(Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                if end == "exception":
                    raise RuntimeError("enough")
                trainer.should_stop = True

        engine._generation = generation
        run = partial(fit, tmp_path, tiny_model, engine, callbacks=[End()])
        begin = time.monotonic()
        if end == "stop":
            assert run()[0].global_step == UPDATES
        else:
            with pytest.raises(RuntimeError, match="enough"):
                run()
        assert time.monotonic() - begin < 300
        assert no_thread_is_left()
        assert engine.closed


class TestResume:
    @pytest.mark.parametrize("ended", [UPDATES, UPDATES + 1])
    def test_a_rollout_that_was_not_begun_is_not_counted(self, tmp_path, tiny_model, ended):
        """The same tasks and seeds come again; what is resumed samples its first rollout in its place."""
        whole = FakeEngine()
        keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
        fit(tmp_path, tiny_model, whole, callbacks=[keep], enable_checkpointing=True)
        engine = FakeEngine()
        runner, seen = fit(tmp_path, tiny_model, engine, ckpt_path=tmp_path / f"step={ended}.ckpt")
        assert runner.global_step == 3 * UPDATES
        if ended == UPDATES:
            assert [version for version, _ in engine.calls] == [UPDATES] * 2 * SIZE
            assert [r.origin.version for r in seen.rollouts] == [UPDATES, UPDATES]
        else:
            # The epoch goes on with its own rollout, which the next one is sampled beside.
            assert [version for version, _ in engine.calls] == [UPDATES + 1] * SIZE
            assert [r.origin.version for r in seen.rollouts[-1:]] == [UPDATES + 1]
        made = whole.requests[-len(engine.requests) :]
        assert requests(engine) == sorted((prompt, seed) for prompt, _, seed, *_ in made)


class TestRefusals:
    @pytest.mark.parametrize("count", [-1, 2])
    def test_other_numbers_are_refused(self, count):
        with pytest.raises(ConfigurationError, match=f"rollouts_ahead to be 0 or 1, but got {count}"):
            data(FakeEngine(), rollouts_ahead=count)

    def test_without_a_correction_it_is_refused_before_the_engine_starts(self, tmp_path, tiny_model):
        engine = FakeEngine()
        with pytest.raises(ConfigurationError, match="rollouts_ahead=1 .* expected a correction of GRPOModule"):
            fit(tmp_path, tiny_model, engine, module={"correction": None})
        assert not engine.specs


REAL = {"learning_rate": 1e-2}
LONGER = {"max_tokens": 12}
WHOLE = {"full_finetuning": True, "learning_rate": 1e-4, "lora_rank": DEFAULT_RANK}


class Remembering(RunDoctor):
    """The doctor, with all that it said."""

    def __init__(self, **settings):
        super().__init__(report=False, **settings)
        self.said = []

    def _conclude(self, run, verdicts):
        self.said += verdicts
        super()._conclude(run, verdicts)

    def statuses(self, check):
        return [verdict.status for verdict in self.said if verdict.check == check]


class TestDoctor:
    @pytest.mark.parametrize(
        ("module", "rollouts"),
        [
            ({}, {}),
            ({"correction": "mis_token"}, {"top_k": 20}),
            ({"kl_coef": 0.05, "kl_in": "reward"}, {}),
            ({}, {"advantage": "remax"}),
            (WHOLE, {}),
            ({"learning_rate": 2e-3}, {"inner_epochs": 2, "temperature": 0.7}),
        ],
    )
    def test_a_healthy_run_is_left_alone(self, tmp_path, tiny_model, module, rollouts):
        doctor = Remembering()
        runner, seen = fit(
            tmp_path, tiny_model, TransformersEngine(dtype="float32"), module={**REAL, **module},
            rollouts={**LONGER, **rollouts}, callbacks=[doctor],
        )  # fmt: skip
        passes = rollouts.get("inner_epochs", 1)
        assert runner.global_step == 3 * UPDATES * passes
        assert seen.metrics[-1]["sync/lag"] == UPDATES * passes
        assert not [str(v) for v in doctor.said if v.status is Status.FAIL]
        assert doctor.statuses("rollout age") == [Status.PASS] * 3
        known = Status.NO_POWER if module.get("full_finetuning") else Status.PASS
        assert doctor.statuses("earlier weights") == [known] * 2

    def test_the_weights_of_the_declared_version_sampled_it(self, tmp_path, tiny_model):
        """Also where all weights are trained, in the same process, while the engine samples."""
        _, seen = fit(
            tmp_path, tiny_model, TransformersEngine(dtype="float32"), epochs=2, rollouts=LONGER,
            module={**WHOLE, "learning_rate": 1e-3}, callbacks=[Remembering()],
        )  # fmt: skip
        fresh = GRPOModule(tiny_model, **MODEL)
        fresh.configure_model()
        for rollout in seen.rollouts:
            batch = rollout.batches[0]
            with torch.no_grad():
                logprobs = fresh.policy.token_logprobs(batch).logprobs
            assert float((logprobs - batch.old_logprobs).abs().max()) < 1e-4

    def test_an_engine_that_samples_with_an_older_adapter_than_it_says_is_named(self, tmp_path, tiny_model):
        class Late(TransformersEngine):
            """Asked what it serves it tells the truth; once trained, requests get the base model, as at first."""

            trained = False

            async def generate(self, prompt_ids, params, **settings):
                if not self.trained:
                    return await super().generate(prompt_ids, params, **settings)
                generation = await super().generate(prompt_ids, params, **{**settings, "adapter": None})
                return replace(generation, policy_version=self.policy_version)

        class Begins(Callback):
            def on_train_batch_start(self, *args):
                engine.trained = True

        engine, doctor, seen = Late(dtype="float32"), Remembering(), Epochs()
        with pytest.raises(DegeneracyError):
            fit(
                tmp_path, tiny_model, engine, module=REAL, rollouts=LONGER, epochs=4,
                callbacks=[doctor, seen, Begins()],
            )  # fmt: skip
        # Rollouts 0 and 1 are the fresh adapter's by right.
        assert len(seen.metrics) == 2
        failed = {v.check: v.cause for v in doctor.said if v.status is Status.FAIL}
        assert failed["earlier weights"] == "other_weights"
        # The base model is also what the policy was one publication earlier.
        assert failed["logprob semantics"] in ("adapter_ignored", "sync_stale")

    def test_a_rollout_that_is_older_than_declared_is_named(self, tmp_path, tiny_model):
        def generation(prompt_ids, params, seed, version):
            return random_generation(prompt_ids, params, seed, 0)

        doctor, seen = PartDoctor(RolloutExamination()), Epochs()
        with pytest.raises(DegeneracyError, match=f"the rollout is {2 * UPDATES} updates old; {UPDATES} are declared"):
            fit(tmp_path, tiny_model, FakeEngine(generation), epochs=4, callbacks=[doctor, seen])
        assert len(seen.metrics) == 2

    def test_an_adapter_that_is_not_published_is_refused(self, tmp_path, tiny_model):
        class Once(LoRAWeightSync):
            def publish(self, module, engine):
                if module.policy_version == 0:
                    super().publish(module, engine)

        with pytest.raises(
            StaleRolloutError, match=f"serves policy version 0, but the trainer is at version {UPDATES}"
        ):
            fit(tmp_path, tiny_model, FakeEngine(), callbacks=[Once()])

    def test_the_first_update_of_a_rollout_has_ratios_of_1_by_right(self, tmp_path, tiny_model):
        """They compare with what the trainer said at the epoch's beginning, however old the samples are."""
        detector = RatioDegeneracyDetector(max_mismatch=100, warn_std=1e-9)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            fit(tmp_path, tiny_model, FakeEngine(), rollouts={"updates_per_rollout": 1}, callbacks=[detector])
        assert not [str(w.message) for w in said if "warn_std" in str(w.message)]
