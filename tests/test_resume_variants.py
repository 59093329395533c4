"""Variants that remember something between updates are resumed bit for bit."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from runs import RecordingEngine
from test_checkpoints import assert_equal_weights, run


class Remembered(Callback):
    """Notes, after every optimizer step, what the module and the rollout remember."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            rollout = trainer.datamodule.rollout
            self.steps.append(
                {
                    "coefficients": pl_module._coefficients,
                    "tasks": rollout.origin.tasks,
                    "drawn": trainer.datamodule.state_dict()["tasks_drawn"],
                    "rewards": [e.rewards for g in rollout.groups for e in g.episodes],
                    "advantages": [g.advantages for g in rollout.groups],
                    "marked": batch.marked.tolist(),
                    "focus": batch.focus.tolist(),
                    # As text: NaN, where the trainer was not asked, equals itself there.
                    "proximal": repr(batch.proximal_logprobs.tolist()),
                }
            )


def flat_for_some(completion, task_id):
    return 1.0 if int(task_id.split("+")[0]) < 2 else float(len(set(completion)))


VARIANTS = {
    "trainer": {"module": {"old_logprobs": "trainer"}},
    "correction": {"module": {"correction": "mis_token", "correction_args": {"low": 0.9, "high": 1.1}}},
    "correction of sequences": {"module": {"correction": "tis_sequence"}},
    "entropy share": {"module": {"entropy_share": 0.3}},
    "entropy share and correction": {"module": {"entropy_share": 0.3, "correction": "tis_token"}},
    "kl in the reward": {"module": {"kl_coef": 0.5, "kl_in": "reward", "kl_estimator": "k1"}},
    "adaptive kl in the loss": {"module": {"kl_coef": 0.5, "kl_target": 1e-3, "kl_horizon": 2}},
    "adaptive kl in the reward": {
        "module": {"kl_coef": 0.5, "kl_target": 1e-3, "kl_horizon": 2, "kl_in": "reward", "kl_estimator": "k1"}
    },
    "entropy target": {"module": {"entropy_target": 100.0, "entropy_step": 1e-2}},
    "clip_cov": {"module": {"surrogate": "clip_cov", "surrogate_args": {"share": 0.2, "low": -5.0}}},
    "kl_cov": {"module": {"surrogate": "kl_cov", "surrogate_args": {"share": 0.2}}},
    "refills": {"rollout": {"rewards": flat_for_some, "max_refills": 3}},
    "masked": {"rollout": {"mask_truncated": True, "max_tokens": 40}},
    "overlong": {"rollout": {"overlong_buffer": 4}},
    "remax": {"rollout": {"advantage": "remax"}},
    "over the batch": {"rollout": {"advantage": "reinforce_pp"}},
}


class TestBitForBit:
    @pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
    def test_from_the_middle_and_the_end_of_an_epoch(self, tmp_path, tiny_model, settings):
        # Dropout makes what the trainer says before the epoch another thing than what it says in it.
        settings = {**settings, "module": {"learning_rate": 1e-2, "lora_dropout": 0.1, **settings.get("module", {})}}
        keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
        remembered = Remembered()
        whole, expected = run(tmp_path, tiny_model, checkpoint=keep, extra=[remembered], **settings)
        assert len({str(step) for step in remembered.steps}) > 1
        for step in (2, 3):
            torch.manual_seed(123)
            engine, again = RecordingEngine(), Remembered()
            path = tmp_path / f"step={step}.ckpt"
            resumed, notes = run(tmp_path, tiny_model, engine=engine, ckpt_path=path, extra=[again], **settings)
            assert notes.batches == expected.batches[2 * step :]
            assert again.steps == remembered.steps[step:]
            assert notes.epochs[-1] == expected.epochs[-1]
            assert_equal_weights(whole, resumed)

    def test_with_inner_epochs_and_several_updates(self, tmp_path, tiny_model):
        settings = {
            "module": {"correction": "tis_token", "entropy_share": 0.5, "kl_coef": 0.2, "kl_in": "reward"},
            "rollout": {"inner_epochs": 2},
        }
        keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
        whole, expected = run(tmp_path, tiny_model, checkpoint=keep, **settings)
        for step in (1, 7):
            resumed, notes = run(tmp_path, tiny_model, ckpt_path=tmp_path / f"step={step}.ckpt", **settings)
            assert notes.batches == expected.batches[2 * step :]
            assert_equal_weights(whole, resumed)


class TestWhatIsRestored:
    def test_coefficients(self, tmp_path, tiny_model):
        module = {"kl_coef": 0.5, "kl_target": 1e-3, "kl_horizon": 2, "entropy_target": 100.0, "entropy_step": 1e-2}
        keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
        whole, _ = run(tmp_path, tiny_model, checkpoint=keep, module=module)
        saved = [
            torch.load(tmp_path / f"step={s}.ckpt", weights_only=True)["grpo_lightning"]["coefficients"]
            for s in range(1, 7)
        ]
        assert len({s["kl"] for s in saved}) == 6
        assert [s["entropy"] for s in saved] == pytest.approx([0.01 * s for s in range(1, 7)])
        assert vars(whole._coefficients) == saved[-1]

    def test_the_order_of_tasks_goes_on_behind_what_was_drawn(self, tmp_path, tiny_model):
        settings = {"rollout": {"rewards": flat_for_some, "max_refills": 3}}
        keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
        remembered, again = Remembered(), Remembered()
        run(tmp_path, tiny_model, checkpoint=keep, extra=[remembered], **settings)
        drawn = [step["drawn"] for step in remembered.steps]
        assert drawn == sorted(drawn)
        assert drawn[-1] > 12, "some groups were replaced"
        run(tmp_path, tiny_model, ckpt_path=tmp_path / "step=3.ckpt", extra=[again], **settings)
        assert [step["drawn"] for step in again.steps] == drawn[3:]
        assert [step["tasks"] for step in again.steps] == [step["tasks"] for step in remembered.steps[3:]]

    def test_what_the_trainer_said_is_not_computed_again(self, tmp_path, tiny_model, monkeypatch):
        from grpo_lightning import GRPOModule

        module = {"correction": "tis_token"}
        keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
        run(tmp_path, tiny_model, checkpoint=keep, module=module)
        right, calls = GRPOModule.rescore, []
        monkeypatch.setattr(
            GRPOModule, "rescore", lambda self, rollout: calls.append(rollout.origin.epoch) or right(self, rollout)
        )
        run(tmp_path, tiny_model, ckpt_path=tmp_path / "step=3.ckpt", module=module)
        assert calls == [2]
