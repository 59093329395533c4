"""Resuming from every place where a checkpoint can be saved."""

import json
import random

import numpy as np
import pytest
import torch
from fakes import FakeEngine
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from runs import MODEL, RecordingEngine, data, length, trainer

from grpo_lightning import GRPOModule, RolloutDataModule
from grpo_lightning.callbacks import RatioDegeneracyDetector, RunSummary
from grpo_lightning.errors import CheckpointError
from grpo_lightning.tasks import SumTasks


class Losses(Callback):
    """Notes every micro-batch's loss and tokens, and every epoch's logged numbers."""

    def __init__(self):
        self.batches = []
        self.epochs = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches.append((trainer.current_epoch, batch_idx, float(outputs["loss"]), batch.target_ids.tolist()))

    def on_train_epoch_end(self, trainer, pl_module):
        timed = ("time/", "throughput/", "memory/")
        self.epochs.append({n: v for n, v in pl_module.epoch_metrics().items() if not n.startswith(timed)})


def run(
    folder, model, *, engine=None, checkpoint=None, ckpt_path=None, module=None, rollout=None, extra=(), **settings
):
    """Three epochs of two updates in two micro-batches; returns the module and what was noted."""
    torch.manual_seed(0)
    notes = Losses()
    # Dropout and the fake engine make trainer and engine disagree.
    detector = RatioDegeneracyDetector(max_mismatch=100, action="warn")
    callbacks = [notes, detector, *extra, *([checkpoint] if checkpoint else [])]
    fit = trainer(
        folder,
        **{"max_epochs": 3, "accumulate_grad_batches": 2, "enable_checkpointing": checkpoint is not None, **settings},
        callbacks=callbacks,
    )
    policy = GRPOModule(model, **{**MODEL, **(module or {})})
    fit.fit(
        policy,
        data(engine or RecordingEngine(), **{"updates_per_rollout": 2, **(rollout or {})}),
        ckpt_path=ckpt_path,
    )
    return policy, notes


def assert_equal_weights(a, b):
    for name, parameter in a.policy.trainable_parameters().items():
        assert torch.equal(parameter, b.policy.trainable_parameters()[name]), name


def checkpoints(folder):
    return {path.stem: path for path in folder.glob("*.ckpt")}


class TestResumeBitForBit:
    """With the transformers engine in float32 a resumed run is the uninterrupted one."""

    @pytest.mark.parametrize("dropout", [0.0, 0.1])
    def test_from_an_epochs_end(self, tmp_path, tiny_model, dropout):
        keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        module = {"lora_dropout": dropout, "lr_schedule": "linear", "warmup_updates": 1}
        whole, expected = run(tmp_path, tiny_model, checkpoint=keep, module=module)
        torch.manual_seed(123)
        resumed, notes = run(tmp_path, tiny_model, ckpt_path=tmp_path / "epoch=0.ckpt", module=module)
        assert notes.batches == expected.batches[4:]
        assert notes.epochs == expected.epochs[1:]
        assert_equal_weights(whole, resumed)

    @pytest.mark.parametrize("dropout", [0.0, 0.1])
    @pytest.mark.parametrize("step", [1, 3, 5])
    def test_from_the_middle_of_an_epoch(self, tmp_path, tiny_model, step, dropout):
        keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
        module = {"lora_dropout": dropout, "kl_coef": 0.1}
        whole, expected = run(tmp_path, tiny_model, checkpoint=keep, module=module)
        engine = RecordingEngine()
        resumed, notes = run(
            tmp_path, tiny_model, engine=engine, ckpt_path=tmp_path / f"step={step}.ckpt", module=module
        )
        assert notes.batches == expected.batches[2 * step :]
        assert notes.epochs == expected.epochs[(step - 1) // 2 :]
        assert_equal_weights(whole, resumed)
        # The unfinished epoch's rollout is not made again.
        assert len(engine.seeds) == 12 * (2 - step // 2)

    def test_from_the_last_step_of_an_epoch(self, tmp_path, tiny_model):
        keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
        whole, expected = run(tmp_path, tiny_model, checkpoint=keep)
        engine = RecordingEngine()
        resumed, notes = run(tmp_path, tiny_model, engine=engine, ckpt_path=tmp_path / "step=2.ckpt")
        assert notes.batches == expected.batches[4:]
        assert len(engine.seeds) == 24
        assert_equal_weights(whole, resumed)

    def test_from_a_validation_at_the_epochs_end(self, tmp_path, tiny_model):
        """Lightning saves there by default where there is validation; the epoch is not over for its loops."""
        keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=False)
        rollout = {"val_size": 2}
        whole, expected = run(tmp_path, tiny_model, checkpoint=keep, rollout=rollout)
        engine = RecordingEngine()
        resumed, notes = run(tmp_path, tiny_model, engine=engine, ckpt_path=tmp_path / "epoch=0.ckpt", rollout=rollout)
        assert notes.batches == expected.batches[4:]
        assert notes.epochs == expected.epochs
        assert len(engine.seeds) == 24
        assert_equal_weights(whole, resumed)

    def test_from_a_validation_within_an_epoch(self, tmp_path, tiny_model):
        keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, save_on_train_epoch_end=False)
        settings = {"rollout": {"val_size": 2}, "val_check_interval": 0.5}
        whole, expected = run(tmp_path, tiny_model, checkpoint=keep, **settings)
        resumed, notes = run(tmp_path, tiny_model, ckpt_path=tmp_path / "step=3.ckpt", **settings)
        assert notes.batches == expected.batches[6:]
        assert notes.epochs == expected.epochs[1:]
        assert_equal_weights(whole, resumed)

    @pytest.mark.parametrize("step", [1, 2, 3])
    def test_with_a_limit_on_steps(self, tmp_path, tiny_model, step):
        """Lightning's loops restart in another way when max_steps is set."""
        settings = {"max_steps": 6, "max_epochs": -1}
        keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
        whole, expected = run(tmp_path, tiny_model, checkpoint=keep, **settings)
        resumed, notes = run(tmp_path, tiny_model, ckpt_path=tmp_path / f"step={step}.ckpt", **settings)
        assert [b[2:] for b in notes.batches] == [b[2:] for b in expected.batches[2 * step :]]
        assert_equal_weights(whole, resumed)

    def test_inner_epochs(self, tmp_path, tiny_model):
        rollout = {"updates_per_rollout": 1, "inner_epochs": 3}
        keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
        whole, expected = run(tmp_path, tiny_model, checkpoint=keep, rollout=rollout)
        resumed, notes = run(tmp_path, tiny_model, ckpt_path=tmp_path / "step=4.ckpt", rollout=rollout)
        assert notes.batches == expected.batches[8:]
        assert_equal_weights(whole, resumed)

    @pytest.mark.parametrize("batches", [1, 3])
    def test_from_the_middle_of_an_optimizer_step(self, tmp_path, tiny_model, batches):
        """Its gradients are lost, so the resumed run computes the step's micro-batches again."""

        class Save(Callback):
            def on_train_batch_end(self, trainer, *args):
                if trainer.fit_loop.total_batch_idx + 1 == 4 + batches:
                    trainer.save_checkpoint(tmp_path / "half.ckpt")

        whole, expected = run(tmp_path, tiny_model, extra=[Save()])
        resumed, notes = run(tmp_path, tiny_model, ckpt_path=tmp_path / "half.ckpt")
        assert notes.batches == expected.batches[4 + batches - 1 :]
        assert notes.epochs == expected.epochs[1:]
        assert_equal_weights(whole, resumed)

    def test_a_resumed_run_writes_checkpoints_that_resume(self, tmp_path, tiny_model):
        def keep():
            return ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1, save_last=True)

        whole, expected = run(tmp_path, tiny_model, checkpoint=keep())
        for step in (1, 2, 3):
            run(tmp_path, tiny_model, checkpoint=keep(), ckpt_path=tmp_path / f"step={step}.ckpt", max_epochs=2)
            resumed, notes = run(tmp_path, tiny_model, ckpt_path=tmp_path / "step=4.ckpt")
            assert notes.batches == expected.batches[8:]
            assert_equal_weights(whole, resumed)

    def test_an_accumulation_schedule_in_the_middle_of_an_epoch(self, tmp_path, tiny_model):
        def scheduled(**settings):
            keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
            schedule = GradientAccumulationScheduler({0: 1, 1: 2})
            return run(tmp_path, tiny_model, checkpoint=keep, extra=[schedule], accumulate_grad_batches=1, **settings)

        whole, expected = scheduled()
        resumed, notes = scheduled(ckpt_path=tmp_path / "step=3.ckpt")
        assert notes.batches == expected.batches[4:]
        assert resumed.policy_version == whole.policy_version == 6
        assert_equal_weights(whole, resumed)


class TestContent:
    def test_weights_only_loading_and_what_is_in_it(self, tmp_path, tiny_model):
        keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
        run(tmp_path, tiny_model, checkpoint=keep)
        state = torch.load(tmp_path / "step=3.ckpt", weights_only=True)
        assert state["grpo_lightning"]["policy_version"] == 3
        assert state["optimizer_states"][0]["state"]
        assert state["lr_schedulers"]
        assert "grpo_lightning.run_doctor" in state["callbacks"]
        rollouts = state["RolloutDataModule"]
        assert (rollouts["rollouts"], rollouts["tasks_drawn"]) == (2, 8)
        assert rollouts["rollout"]["position"] == 2
        assert len(rollouts["rollout"]["groups"]) == 4

    def test_a_finished_epoch_needs_no_rollout(self, tmp_path, tiny_model):
        keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        run(tmp_path, tiny_model, checkpoint=keep)
        assert torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["RolloutDataModule"]["rollout"] is None

    def test_global_random_generators_go_on(self, tmp_path, tiny_model):
        draws = []

        def noisy(completion):
            draws.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
            return float(len(completion))

        keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        run(tmp_path, tiny_model, checkpoint=keep, rollout={"rewards": noisy})
        # Rewards run in threads: which of them draws first is open.
        expected, draws = [sorted(d) for d in zip(*draws[12:], strict=True)], []
        for generator in (random.seed, np.random.seed, torch.manual_seed):
            generator(99)
        run(tmp_path, tiny_model, ckpt_path=tmp_path / "epoch=0.ckpt", rollout={"rewards": noisy})
        assert [sorted(d) for d in zip(*draws, strict=True)] == expected

    @pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
    def test_loading_for_inference(self, tmp_path, tiny_model, precision):
        keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        trained, _ = run(tmp_path, tiny_model, checkpoint=keep, precision=precision)
        loaded = GRPOModule.load_from_checkpoint(tmp_path / "epoch=2.ckpt")
        assert_equal_weights(trained, loaded)
        assert loaded.policy_version == trained.policy_version == 6


class TestRefusals:
    @pytest.fixture
    def middle(self, tmp_path, tiny_model):
        keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
        run(tmp_path, tiny_model, checkpoint=keep, max_epochs=1)
        return tmp_path / "step=1.ckpt"

    @pytest.mark.parametrize(
        ("rollout", "settings"),
        [
            ({"updates_per_rollout": 4}, {}),
            ({"inner_epochs": 2}, {}),
            ({}, {"accumulate_grad_batches": 1}),
        ],
    )
    def test_another_cut_of_an_unfinished_epoch(self, tmp_path, tiny_model, middle, rollout, settings):
        engine = FakeEngine()
        with pytest.raises(CheckpointError, match="in the middle of an epoch that was cut into.*Resume with the same"):
            run(tmp_path, tiny_model, engine=engine, ckpt_path=middle, rollout=rollout, **settings)
        assert not engine.calls

    def test_other_tasks_in_an_unfinished_epoch(self, tmp_path, tiny_model, middle):
        policy = GRPOModule(tiny_model, **MODEL)
        other = RolloutDataModule(
            SumTasks(7), length, engine=FakeEngine(), prompts_per_rollout=4, updates_per_rollout=2, max_tokens=6,
            max_prompt_tokens=64,
        )  # fmt: skip
        with pytest.raises(CheckpointError, match="samples of task .* in its place"):
            trainer(tmp_path, accumulate_grad_batches=2).fit(policy, other, ckpt_path=middle)

    @pytest.mark.parametrize("change", [{"temperature": 1.5}, {"bad_words": ["a"]}])
    def test_other_sampling_in_an_unfinished_epoch(self, tmp_path, tiny_model, middle, change):
        with pytest.raises(CheckpointError, match="was sampled at temperature 1 with 0 banned.*Resume with the same"):
            run(tmp_path, tiny_model, engine=FakeEngine(), ckpt_path=middle, rollout=change)

    def test_before_the_epoch_began(self, tmp_path, tiny_model):
        """Lightning would skip the epoch."""

        class Save(Callback):
            def on_train_epoch_start(self, trainer, pl_module):
                if trainer.current_epoch == 1:
                    trainer.save_checkpoint(tmp_path / "start.ckpt")

        trainer(tmp_path, callbacks=[Save()]).fit(GRPOModule(tiny_model, **MODEL), data(FakeEngine()))
        with pytest.raises(CheckpointError, match="before its epoch began"):
            trainer(tmp_path).fit(
                GRPOModule(tiny_model, **MODEL), data(FakeEngine()), ckpt_path=tmp_path / "start.ckpt"
            )

    def test_another_rank(self, tmp_path, tiny_model, middle):
        with pytest.raises(CheckpointError, match="adapter setting r=4, but got 8"):
            run(tmp_path, tiny_model, engine=FakeEngine(), ckpt_path=middle, module={"lora_rank": 8})

    def test_another_base_model_of_the_same_architecture(self, tmp_path, tiny_model, middle):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        other = AutoModelForCausalLM.from_pretrained(tiny_model)
        with torch.no_grad():
            other.model.layers[1].mlp.up_proj.weight.mul_(1.1)
        other.save_pretrained(tmp_path / "other")
        AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "other")
        with pytest.raises(CheckpointError, match="another base model than .*other: its weights differ"):
            run(tmp_path, str(tmp_path / "other"), engine=FakeEngine(), ckpt_path=middle)

    def test_another_shape(self, tmp_path, tiny_model, middle):
        state = torch.load(middle, weights_only=True)
        name = next(iter(state["state_dict"]))
        state["state_dict"][name] = torch.zeros(3, 5)
        torch.save(state, middle)
        with pytest.raises(CheckpointError, match=r"has shape \(3, 5\) there, but \(4, 32\) here \(1 in all\)"):
            run(tmp_path, tiny_model, engine=FakeEngine(), ckpt_path=middle)

    @pytest.mark.parametrize("change", ["missing", "extra"])
    def test_keys(self, tmp_path, tiny_model, middle, change):
        state = torch.load(middle, weights_only=True)
        if change == "missing":
            state["state_dict"].popitem()
        else:
            state["state_dict"]["policy.model.surprise"] = torch.zeros(1)
        torch.save(state, middle)
        message = "1 parameters are missing" if change == "missing" else r"1 are unknown \['policy.model.surprise'\]"
        with pytest.raises(CheckpointError, match=message):
            run(tmp_path, tiny_model, engine=FakeEngine(), ckpt_path=middle)

    def test_a_checkpoint_of_something_else(self, tmp_path, tiny_model, middle):
        state = torch.load(middle, weights_only=True)
        del state["grpo_lightning"]
        torch.save(state, middle)
        with pytest.raises(CheckpointError, match="expected a checkpoint of a GRPOModule"):
            run(tmp_path, tiny_model, engine=FakeEngine(), ckpt_path=middle)

    def test_a_checkpoint_without_the_state_of_this_data_module(self, tmp_path, tiny_model, middle):
        class Renamed(RolloutDataModule):
            pass

        renamed = Renamed(SumTasks(5), length, engine=FakeEngine(), prompts_per_rollout=4, max_prompt_tokens=64)
        with pytest.raises(CheckpointError, match="no state of Renamed"):
            trainer(tmp_path).fit(GRPOModule(tiny_model, **MODEL), renamed, ckpt_path=middle)

    def test_no_file_and_a_broken_file(self, tmp_path, tiny_model, middle):
        with pytest.raises(CheckpointError, match="no such file"):
            run(tmp_path, tiny_model, engine=FakeEngine(), ckpt_path=tmp_path / "none.ckpt")
        middle.write_bytes(middle.read_bytes()[:-1000])
        with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
            run(tmp_path, tiny_model, engine=FakeEngine(), ckpt_path=middle)


def test_other_settings_go_on_in_the_order_of_tasks(tmp_path, tiny_model):
    """Between epochs the size of the rollouts may change; no task is skipped or repeated."""
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    run(tmp_path, tiny_model, engine=FakeEngine(), checkpoint=keep, max_epochs=1)
    engine = FakeEngine()
    run(
        tmp_path, tiny_model, engine=engine, ckpt_path=tmp_path / "epoch=0.ckpt", max_epochs=2,
        rollout={"prompts_per_rollout": 32},
    )  # fmt: skip
    first = FakeEngine()
    run(tmp_path, tiny_model, engine=first, max_epochs=1, rollout={"prompts_per_rollout": 4})
    assert len({prompt for _, prompt in [*first.calls, *engine.calls]}) == 36


def test_lightnings_own_trainer_is_not_given_another_checkpoint_io(tmp_path, tiny_model):
    from lightning.fabric.plugins import TorchCheckpointIO

    class Own(TorchCheckpointIO):
        pass

    own = Own()
    fit = Trainer(
        accelerator="cpu", max_epochs=1, plugins=[own], logger=False, default_root_dir=tmp_path,
        enable_progress_bar=False,
    )  # fmt: skip
    fit.fit(GRPOModule(tiny_model, **MODEL), data(RecordingEngine()))
    assert fit.strategy.checkpoint_io is own


def test_the_summary_of_a_resumed_run_is_of_the_whole_run(tmp_path, tiny_model):
    def summary(folder, **settings):
        fit = trainer(
            folder, enable_checkpointing=True, logger=CSVLogger(folder, name="", version=""),
            callbacks=[
                ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True),
                RunSummary(plot=False),
            ],
            max_epochs=3,
        )  # fmt: skip
        torch.manual_seed(0)
        fit.fit(GRPOModule(tiny_model, **MODEL), data(RecordingEngine(), val_size=2), **settings)
        return json.loads((folder / "summary.json").read_text())

    whole = summary(tmp_path / "whole")
    resumed = summary(tmp_path / "resumed", ckpt_path=tmp_path / "epoch=1.ckpt")
    assert resumed["epochs"] == 3
    for name in ("reward_by_epoch", "accuracy_by_epoch", "ratio_last_epoch", "reward_first"):
        assert resumed[name] == whole[name]
