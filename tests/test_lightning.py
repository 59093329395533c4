"""What Lightning does around the rollouts: its hook order, resuming, bare Trainers, exceptions."""

import logging

import pytest
import torch
from fakes import FakeEngine, encode
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from runs import MODEL, Gradients, RecordingEngine, data, trainer
from torch.utils.data import DataLoader, IterableDataset

from grpo_lightning import GRPOModule, TransformersEngine
from grpo_lightning.callbacks import (
    EpochLine,
    LoRAWeightSync,
    ParameterPerturbation,
    RatioDegeneracyDetector,
    RunDoctor,
)
from grpo_lightning.diagnostics.sample import PROMPTS, SAMPLES
from grpo_lightning.errors import ConfigurationError, DegeneracyError, RewardError, RolloutError, StaleRolloutError
from grpo_lightning.rollout.batch import PackedBatch
from grpo_lightning.tasks import SumTasks


class TestLossNormalisation:
    @pytest.mark.parametrize("aggregation", ["sequence", "token"])
    @pytest.mark.parametrize("kl_coef", [0.0, 0.1])
    def test_the_gradient_does_not_depend_on_micro_batches(self, tmp_path, tiny_model, aggregation, kl_coef):
        gradients = {}
        for micro_batches in (1, 2, 4, 7):
            torch.manual_seed(0)
            collector = Gradients()
            trainer(tmp_path, max_epochs=1, accumulate_grad_batches=micro_batches, callbacks=[collector]).fit(
                GRPOModule(tiny_model, aggregation=aggregation, kl_coef=kl_coef, **MODEL), data(FakeEngine())
            )
            (gradients[micro_batches],) = collector.steps
        scale = gradients[1].abs().max()
        assert scale > 0
        for micro_batches in (2, 4, 7):
            torch.testing.assert_close(gradients[micro_batches], gradients[1], rtol=0, atol=float(scale) * 1e-5)


class TestSync:
    def test_everything_is_generated_by_the_current_policy(self, tmp_path, tiny_model):
        """Trap 1: Lightning builds the loader before any start hook; syncing in one would be a rollout late."""
        engine = FakeEngine()
        module = GRPOModule(tiny_model, **MODEL)
        expected = []

        class Watch(Callback):
            def on_train_epoch_start(self, trainer, pl_module):
                expected.append(("train", pl_module.policy_version))

            def on_validation_batch_end(self, trainer, pl_module, *args):
                assert engine.calls[-1][0] == pl_module.policy_version

        trainer(tmp_path, max_epochs=3, callbacks=[Watch()]).fit(
            module, data(engine, updates_per_rollout=2, val_size=3)
        )
        train_calls = [version for version, prompt in engine.calls if prompt in _train_prompts(engine)]
        assert [v for _, v in expected] == [0, 2, 4]
        assert {0, 2, 4} <= set(train_calls)
        assert max(version for version, _ in engine.calls) == 6  # the last validation sees the last update

    def test_adapter_names_ids_and_directories_are_never_reused(self, tmp_path, tiny_model):
        engine = FakeEngine()
        for _ in range(2):
            trainer(tmp_path).fit(GRPOModule(tiny_model, **MODEL), data(engine))
        for attribute in ("name", "id", "path"):
            values = [getattr(ref, attribute) for ref in engine.loads]
            assert len(values) == 4
            assert len(set(values)) == 4
        assert not any(ref.path.exists() for ref in engine.loads)

    def test_published_adapters_are_float32_and_exact(self, tmp_path, tiny_model):
        from peft import get_peft_model_state_dict
        from safetensors.torch import load_file

        class Compare(FakeEngine):
            def load_adapter(self, ref):
                super().load_adapter(ref)
                published = load_file(ref.path / "adapter_model.safetensors")
                assert {t.dtype for t in published.values()} == {torch.float32}
                for name, tensor in get_peft_model_state_dict(module.policy.model).items():
                    assert torch.equal(published[name], tensor)

        module = GRPOModule(tiny_model, **{**MODEL, "dtype": "bfloat16"})
        engine = Compare()
        trainer(tmp_path, precision="bf16-true").fit(module, data(engine))
        assert len(engine.loads) == 2

    def test_a_sync_that_does_nothing_is_refused(self, tmp_path, tiny_model):
        class Mute(LoRAWeightSync):
            def publish(self, module, engine):
                pass

        with pytest.raises(StaleRolloutError, match=r"policy version -1.*version 0.*Mute\.publish"):
            trainer(tmp_path, callbacks=[Mute()]).fit(GRPOModule(tiny_model, **MODEL), data(FakeEngine()))

    def test_weights_changed_without_the_optimizer_are_published(self, tmp_path, tiny_model):
        engine = FakeEngine()
        module = GRPOModule(tiny_model, **MODEL)
        trainer(tmp_path, callbacks=[ParameterPerturbation()]).fit(module, data(engine))
        assert module.policy_version == 4  # two perturbations, two updates
        assert [ref.version for ref in engine.loads] == [0, 2]


def _train_prompts(engine):
    """Prompts that were sampled (validation is greedy)."""
    return {prompt for prompt, params, *_ in engine.requests if params.temperature > 0}


class TestTrainer:
    def test_a_bare_trainer_works(self, tmp_path, tiny_model, monkeypatch):
        monkeypatch.chdir(tmp_path)
        engine = RecordingEngine()
        bare = Trainer(max_epochs=3, accelerator="cpu")
        bare.fit(GRPOModule(tiny_model, **MODEL), data(engine, val_size=2))
        preflight = PROMPTS * SAMPLES + 2  # the doctor's sample, and its canary
        # Every epoch is a new rollout.
        assert len(engine.seeds) == len(set(engine.seeds)) == preflight + 3 * 4 * 3
        metrics = bare.callback_metrics
        for name in (
            "ppo/ratio_mean",
            "ppo/ratio_std",
            "ppo/ratio_min",
            "ppo/ratio_max",
            "reward/mean",
            "val/accuracy",
        ):
            assert name in metrics, sorted(metrics)
        kinds = [type(c) for c in bare.callbacks]
        assert [kinds.count(k) for k in (LoRAWeightSync, RunDoctor, EpochLine)] == [1, 1, 1]

    def test_own_callbacks_are_not_doubled(self, tmp_path, tiny_model):
        mine = RatioDegeneracyDetector(action="warn")
        run = trainer(tmp_path, callbacks=[mine])
        run.fit(GRPOModule(tiny_model, **MODEL), data(FakeEngine()))
        assert [c for c in run.callbacks if isinstance(c, RatioDegeneracyDetector)] == [mine]

    def test_reusing_a_rollout_for_epochs_is_refused(self, tmp_path, tiny_model):
        engine = FakeEngine()
        with pytest.raises(ConfigurationError, match="reload_dataloaders_every_n_epochs=1.*inner_epochs"):
            trainer(tmp_path, reload_dataloaders_every_n_epochs=2).fit(GRPOModule(tiny_model, **MODEL), data(engine))
        assert not engine.calls

    def test_stepping_estimate_is_refused_before_any_rollout(self, tmp_path, tiny_model):
        """Trap 17: the estimate builds the train loader while optimizers are configured."""

        class Estimating(GRPOModule):
            def configure_optimizers(self):
                _ = self.trainer.estimated_stepping_batches
                return super().configure_optimizers()

        engine = FakeEngine()
        with pytest.raises(ConfigurationError, match="updates_per_epoch"):
            trainer(tmp_path).fit(Estimating(tiny_model, **MODEL), data(engine))
        assert not engine.calls

    @pytest.mark.parametrize(
        ("schedule", "last"), [("linear", 0.25), ("cosine", 0.5 * (1 - 2**-0.5)), ("constant", 1.0)]
    )
    def test_schedules_end_with_the_planned_updates(self, tmp_path, tiny_model, schedule, last):
        rates = []

        class Rates(Callback):
            def on_before_optimizer_step(self, trainer, pl_module, optimizer):
                rates.append(optimizer.param_groups[0]["lr"] / MODEL["learning_rate"])

        trainer(tmp_path, max_epochs=3, callbacks=[Rates()]).fit(
            GRPOModule(tiny_model, lr_schedule=schedule, warmup_updates=2, **MODEL),
            data(FakeEngine(), updates_per_rollout=2),
        )
        assert rates[:2] == [0.0, 0.5]
        assert rates[2] == 1.0
        assert rates[5] == pytest.approx(last)

    def test_gradient_clipping_is_lightnings(self, tmp_path, tiny_model):
        norms = []

        class Norms(Callback):
            def on_train_batch_end(self, trainer, pl_module, *args):
                grads = [p.grad for p in pl_module.policy.trainable_parameters().values() if p.grad is not None]
                if grads:
                    norms.append(torch.stack([g.norm() for g in grads]).norm())

        trainer(tmp_path, gradient_clip_val=1e-3, callbacks=[Norms()]).fit(
            GRPOModule(tiny_model, **MODEL), data(FakeEngine())
        )
        assert norms
        assert all(float(n) <= 1.001e-3 for n in norms)

    @pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
    def test_precision(self, tmp_path, tiny_model, precision):
        module = GRPOModule(tiny_model, **MODEL)
        run = trainer(tmp_path, precision=precision)
        run.fit(module, data(FakeEngine()))
        assert run.global_step == 2
        assert {p.dtype for p in module.policy.trainable_parameters().values()} == {torch.float32}

    def test_an_earlier_rollout_is_not_used_again(self, tmp_path, tiny_model):
        class Stop(Callback):
            def on_train_start(self, trainer, pl_module):
                raise ZeroDivisionError

        engine = FakeEngine()
        shared = data(engine)
        with pytest.raises(ZeroDivisionError):
            trainer(tmp_path, callbacks=[Stop()]).fit(GRPOModule(tiny_model, **MODEL), shared)
        first = len(engine.calls)
        assert first == 12
        trainer(tmp_path, max_epochs=1).fit(GRPOModule(tiny_model, **MODEL), shared)
        assert len(engine.calls) == 2 * first

    def test_cut_epochs_go_on_to_new_tasks(self, tmp_path, tiny_model):
        engine = FakeEngine()
        trainer(tmp_path, max_epochs=3, limit_train_batches=1).fit(
            GRPOModule(tiny_model, **MODEL), data(engine, updates_per_rollout=4)
        )
        seeds = [seed for _, _, seed, *_ in engine.requests]
        assert len(seeds) == len(set(seeds)) == 36

    def test_an_infinite_gradient_halts_before_it_destroys_the_weights(self, tmp_path, tiny_model):
        class Explode(Callback):
            def on_after_backward(self, trainer, pl_module):
                for parameter in pl_module.policy.trainable_parameters().values():
                    parameter.grad.fill_(torch.inf)

        module = GRPOModule(tiny_model, **MODEL)
        with pytest.raises(DegeneracyError, match="would destroy the weights"):
            trainer(tmp_path, callbacks=[Explode()], gradient_clip_val=1.0).fit(module, data(FakeEngine()))
        assert all(torch.isfinite(p).all() for p in module.policy.trainable_parameters().values())

    def test_another_module_is_refused(self, tmp_path):
        class Other(LightningModule):
            def configure_optimizers(self):
                return None

            def training_step(self, batch, batch_idx):
                return None

        with pytest.raises(ConfigurationError, match="expected a GRPOModule"):
            trainer(tmp_path).fit(Other(), data(FakeEngine()))

    def test_sanity_validation_and_validate(self, tmp_path, tiny_model):
        engine = FakeEngine()
        module, held_out = GRPOModule(tiny_model, **MODEL), data(engine, val_size=4)
        run = trainer(tmp_path, num_sanity_val_steps=-1)
        run.fit(module, held_out)
        assert engine.calls[0][0] == 0
        (scores,) = run.validate(module, held_out)
        assert set(scores) == {"val/reward", "val/accuracy", "val/reward_length"}
        assert engine.calls[-1][0] == module.policy_version == 2


class TestSampling:
    def test_every_request_has_the_stop_texts_and_the_banned_tokens(self, tmp_path, tiny_model):
        engine = FakeEngine()
        trainer(tmp_path, max_epochs=1).fit(
            GRPOModule(tiny_model, **MODEL), data(engine, val_size=2, stop=["\n\n"], bad_words=["b", "a"])
        )
        assert {params.temperature for _, params, *_ in engine.requests} == {0.0, 1.0}
        for _, params, *_ in engine.requests:
            assert params.stop == ("\n\n",)
            assert params.banned_token_ids == tuple(encode("ab"))

    def test_the_trainer_leaves_banned_tokens_out_as_the_engine_does(self, tmp_path, tiny_model):
        run = trainer(tmp_path, max_epochs=1, callbacks=[RatioDegeneracyDetector()])
        letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
        run.fit(
            GRPOModule(tiny_model, **MODEL),
            data(TransformersEngine(dtype="float32"), bad_words=letters, max_tokens=20, stop=["12"]),
        )
        assert float(run.callback_metrics["mismatch/logprob_abs_max"]) < 1e-4
        rollout = run.datamodule.rollout
        texts = [episode.text for group in rollout.groups for episode in group.episodes]
        assert not any(letter in text for text in texts for letter in letters)
        with torch.no_grad():
            free, *_ = run.lightning_module.policy.token_logprobs(rollout.batches[0].replace(banned_token_ids=()))
        assert float((free - rollout.batches[0].old_logprobs).abs().max()) > 0.05

    @pytest.mark.parametrize("name", ["stop", "bad_words"])
    @pytest.mark.parametrize("values", ["text", ["a", ""]])
    def test_what_is_no_list_of_texts_is_refused(self, name, values):
        with pytest.raises(
            ConfigurationError, match=f"expected {name} to be a list of texts .*{values!r}".replace("[", r"\[")
        ):
            data(FakeEngine(), **{name: values})

    def test_bad_words_of_several_tokens_are_refused_before_the_engine_starts(self, tmp_path, tiny_model):
        engine = FakeEngine()
        with pytest.raises(ConfigurationError, match="bad_words of one token each, but 'damn' is 4 tokens"):
            trainer(tmp_path).fit(GRPOModule(tiny_model, **MODEL), data(engine, bad_words=["damn"]))
        assert not engine.specs


class TestDataModule:
    def test_str_makes_no_rollout(self, tiny_model):
        """Trap 7: LightningDataModule.__str__ builds every loader."""
        engine = FakeEngine()
        assert "prompts_per_rollout=4" in str(data(engine))
        assert not engine.specs

    def test_the_loader_is_a_sequence_of_packed_batches(self, tmp_path, tiny_model):
        """Traps 4, 10 and 12: no iterable dataset, batches move between devices, counts divide evenly."""
        seen = []

        class Loader(Callback):
            def on_train_epoch_start(self, trainer, pl_module):
                seen.append(trainer.train_dataloader)

        trainer(tmp_path, accumulate_grad_batches=3, callbacks=[Loader()]).fit(
            GRPOModule(tiny_model, **MODEL), data(FakeEngine(), updates_per_rollout=2, inner_epochs=2)
        )
        assert not isinstance(seen[0], (DataLoader, IterableDataset))
        assert len(seen[0]) == 3 * 2 * 2
        batch = seen[0].batches[0]
        assert isinstance(batch, PackedBatch)
        moved = batch.to("meta")
        assert moved.input_ids.device.type == "meta"
        assert moved.temperature == batch.temperature
        assert [b.first_of_rollout for b in seen[0]] == [True] + [False] * 11

    def test_rollout_metrics_are_logged(self, tmp_path, tiny_model):
        """Trap 8: self.log raises inside train_dataloader."""
        run = trainer(tmp_path, logger=CSVLogger(tmp_path, name="", version=""), log_every_n_steps=1)
        run.fit(GRPOModule(tiny_model, **MODEL), data(FakeEngine()))
        header = (tmp_path / "metrics.csv").read_text().splitlines()[0].split(",")
        for name in (
            "ppo/ratio_std", "ppo/clip_fraction_low", "ppo/kl_k1", "ppo/kl_k3", "ppo/updates_since_sampling",
            "mismatch/logprob_abs_mean", "mismatch/logprob_abs_max", "mismatch/kl_k3", "sync/version", "sync/lag",
            "reward/mean", "reward/std", "reward/length", "group/zero_variance_fraction", "group/dropped",
            "completion/length_mean", "completion/length_max", "completion/truncated_fraction", "policy/entropy",
            "policy/grad_norm", "policy/update_norm", "tokens/sampled", "tokens/forced", "tokens/trained",
            "time/rollout_seconds", "time/train_seconds", "time/sync_seconds", "time/doctor_seconds",
            "throughput/rollout_tokens_per_second", "throughput/train_tokens_per_second",
        ):  # fmt: skip
            assert name in header, name

    def test_order_of_tasks_is_deterministic(self, tmp_path, tiny_model):
        requests = []
        for _ in range(2):
            engine = FakeEngine()
            trainer(tmp_path).fit(GRPOModule(tiny_model, **MODEL), data(engine, seed=7))
            # Of a rollout's requests none waits for another, so they come in any order.
            made = [(prompt, seed) for prompt, _, seed, *_ in engine.requests]
            requests.append([sorted(made[i : i + 12]) for i in range(0, len(made), 12)])
        assert len(requests[0]) == 2
        assert requests[0] == requests[1]

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"samples_per_prompt": 1}, "samples_per_prompt >= 2"),
            ({"updates_per_rollout": 3}, r"use --data.updates_per_rollout 2 \(or another of \[1, 2, 4\]\)"),
            ({"max_tokens": 0}, "max_tokens > 0"),
            ({"temperature": 0.0}, "temperature > 0"),
            ({"val_size": 36}, "val_size is 36"),
            ({"val_size": 1, "val_tasks": SumTasks(2)}, "got both"),
            ({"reward_weights": [1.0, 2.0]}, "one weight per reward"),
        ],
    )
    def test_bad_settings_are_refused_at_once(self, settings, message):
        with pytest.raises(ConfigurationError, match=message):
            data(FakeEngine(), **settings)

    def test_a_reward_with_unknown_fields_is_refused_before_the_engine_starts(self, tmp_path, tiny_model):
        engine = FakeEngine()
        with pytest.raises(ConfigurationError, match="asks for 'solution'.*'answer'"):
            trainer(tmp_path).fit(
                GRPOModule(tiny_model, **MODEL), data(engine, reward=lambda completion, solution: 1.0)
            )
        assert not engine.specs

    def test_too_long_prompts_are_refused_before_the_engine_starts(self, tmp_path, tiny_model):
        engine = FakeEngine()
        with pytest.raises(ConfigurationError, match="raise max_prompt_tokens"):
            trainer(tmp_path).fit(GRPOModule(tiny_model, **MODEL), data(engine, max_prompt_tokens=3))
        assert not engine.specs


class TestFailedEpisodes:
    @pytest.mark.parametrize("aggregation", ["sequence", "token"])
    def test_dropped_groups_leave_fillers(self, tmp_path, tiny_model, aggregation):
        """Trap 16: an update whose groups were all dropped still has its micro-batches, and they weigh nothing."""
        dropped = {"n": 0}

        def picky(completion, task_id):
            a = int(task_id.split("+")[0])
            dropped["n"] += a < 3
            return None if a < 3 else float(len(completion))

        steps = Gradients()
        run = trainer(tmp_path, max_epochs=3, callbacks=[steps], accumulate_grad_batches=2)
        run.fit(
            GRPOModule(tiny_model, aggregation=aggregation, **MODEL),
            data(FakeEngine(), reward=picky, updates_per_rollout=4),
        )
        assert run.global_step == 12
        assert dropped["n"]
        assert any(float(g.abs().max()) == 0 for g in steps.steps)
        assert any(float(g.abs().max()) > 0 for g in steps.steps)

    def test_a_rollout_without_any_reward_names_why(self, tmp_path, tiny_model):
        with pytest.raises(RolloutError, match="none of the 4 groups.*12 x no reward applies"):
            trainer(tmp_path).fit(GRPOModule(tiny_model, **MODEL), data(FakeEngine(), reward=lambda completion: None))

    def test_a_failing_reward_stops_the_run_and_the_engine(self, tmp_path, tiny_model):
        """Trap 13: the engine is closed by on_exception as well as by teardown."""

        def broken(completion):
            raise ZeroDivisionError("oops")

        engine = FakeEngine()
        with pytest.raises(RewardError, match="'broken' raised ZeroDivisionError: oops on task"):
            trainer(tmp_path).fit(GRPOModule(tiny_model, **MODEL), data(engine, reward=broken))
        assert engine.closed
        with pytest.raises(RolloutError, match="closed"):
            engine.run(engine.score([1, 2]))

    def test_skipped_failures_are_counted(self, tmp_path, tiny_model):
        def fragile(completion):
            if len(completion) % 2:
                raise ValueError(completion)
            return float(len(completion))

        run = trainer(tmp_path)
        run.fit(GRPOModule(tiny_model, **MODEL), data(FakeEngine(), reward=fragile, reward_errors="skip"))
        assert run.callback_metrics["reward/failed"] > 0


class TestCheckpoints:
    def fit(self, tmp_path, model, engine, epochs, ckpt_path=None, precision="32-true", **settings):
        run = trainer(
            tmp_path,
            precision=precision,
            max_epochs=epochs,
            enable_checkpointing=True,
            callbacks=[ModelCheckpoint(tmp_path / "ckpt", save_last=True, every_n_epochs=1)],
        )
        module = GRPOModule(model, **{**MODEL, **settings})
        run.fit(module, data(engine, updates_per_rollout=2), ckpt_path=ckpt_path)
        return module

    def test_resume_goes_on_where_it_stopped(self, tmp_path, tiny_model):
        """Traps 2, 3 and 11: one rollout per epoch, the right version, plain values under weights-only loading."""
        torch.manual_seed(0)
        whole_engine = FakeEngine()
        whole = self.fit(tmp_path / "whole", tiny_model, whole_engine, 3)
        torch.manual_seed(0)
        self.fit(tmp_path / "parts", tiny_model, FakeEngine(), 2)
        last = tmp_path / "parts" / "ckpt" / "last.ckpt"
        assert torch.load(last, weights_only=True)["grpo_lightning"]["policy_version"] == 4
        engine = FakeEngine()
        resumed = self.fit(tmp_path / "parts", tiny_model, engine, 3, ckpt_path=last)
        assert resumed.policy_version == whole.policy_version == 6
        assert [version for version, _ in engine.calls] == [4] * 12
        assert [r[0] for r in engine.requests] == [r[0] for r in whole_engine.requests][24:]
        assert [r[2] for r in engine.requests] == [r[2] for r in whole_engine.requests][24:]
        for name, parameter in whole.policy.trainable_parameters().items():
            assert torch.equal(parameter, resumed.policy.trainable_parameters()[name]), name

    def test_the_adapter_survives_bf16_true_when_restored(self, tmp_path, tiny_model):
        trained = self.fit(tmp_path, tiny_model, FakeEngine(), 1, precision="bf16-true")
        last = tmp_path / "ckpt" / "last.ckpt"
        restored = self.fit(tmp_path, tiny_model, FakeEngine(), 1, ckpt_path=last, precision="bf16-true")
        for name, parameter in trained.policy.trainable_parameters().items():
            assert torch.equal(parameter, restored.policy.trainable_parameters()[name])
            if "lora_B" in name:
                assert not torch.equal(parameter, parameter.bfloat16().float())

    def test_the_checkpoint_holds_the_adapter_alone(self, tmp_path, tiny_model):
        module = self.fit(tmp_path, tiny_model, FakeEngine(), 1)
        state = torch.load(tmp_path / "ckpt" / "last.ckpt", weights_only=True)["state_dict"]
        assert len(state) == len(module.policy.trainable_parameters())
        assert all("lora_" in name for name in state)

    def test_a_checkpoint_of_another_adapter_is_refused(self, tmp_path, tiny_model):
        self.fit(tmp_path, tiny_model, FakeEngine(), 1, lora_targets=["q_proj"])
        with pytest.raises(ConfigurationError, match="are missing.*lora_targets"):
            self.fit(tmp_path, tiny_model, FakeEngine(), 2, ckpt_path=tmp_path / "ckpt" / "last.ckpt")

    def test_detector_state_has_a_stable_key(self, tmp_path, tiny_model):
        """Trap 14: state keyed by class name is lost when the class is renamed."""
        self.fit(tmp_path, tiny_model, FakeEngine(), 1)
        callbacks = torch.load(tmp_path / "ckpt" / "last.ckpt", weights_only=True)["callbacks"]
        assert callbacks["grpo_lightning.run_doctor"]["ratio"]["first_mismatch"] > 0


def test_founding_log_lines(tmp_path, tiny_model, caplog):
    with caplog.at_level(logging.INFO):
        trainer(tmp_path).fit(GRPOModule(tiny_model, **MODEL), data(FakeEngine(), updates_per_rollout=2))
    messages = [r.getMessage() for r in caplog.records]
    assert messages.count("using stored sample-time logprobs as old, current policy as new") == 1
    checks = [m for m in messages if m.startswith("PPO Ratio Check - mean: ")]
    assert len(checks) == 4
    assert ", std: " in checks[0]
    assert ", count: " in checks[0]
