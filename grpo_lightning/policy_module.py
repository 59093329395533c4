"""The policy as a LightningModule, whatever its loss: weights, optimizer, checkpoints, validation, prediction."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.parsing import AttributeDict
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from grpo_lightning.adapter_config import largest_rank
from grpo_lightning.checkpoint_check import (
    STATE_KEY,
    StartRecord,
    check_start,
    check_weights,
    drop_partial_update,
    start_record,
)
from grpo_lightning.checkpoint_io import DurableCheckpointIO
from grpo_lightning.compiled import require_compiler
from grpo_lightning.datamodule import RolloutDataModule
from grpo_lightning.errors import CheckpointError, ConfigurationError
from grpo_lightning.freed_memory import keep_freed_memory
from grpo_lightning.functional.lr_schedule import lr_factor
from grpo_lightning.loading import load_policy
from grpo_lightning.phases import PhaseClock
from grpo_lightning.policy import Policy
from grpo_lightning.redact import redact, redact_hyperparameters
from grpo_lightning.rollout.episode import Predictions
from grpo_lightning.rollout.task_batch import TaskBatch
from grpo_lightning.trainer_check import epoch_updates


class PolicyModule(LightningModule):
    """What `GRPOModule` is beside its loss.

    Attributes:
        model_name: Directory or hub name of the model.
        adapter_config: Settings of the adapter; None without one.
        policy: The policy, once it is loaded.
        policy_version: How often its weights changed.
        fitting: Whether rollouts may be made.
        phases: Where the time of the run goes.
    """

    model_name: str
    adapter_config: Any
    policy: Policy
    policy_version: int
    fitting: bool
    phases: PhaseClock
    _start_record: StartRecord

    @property
    def adapter_rank(self) -> int:
        """Largest rank of the adapter; 0 without one."""
        return 0 if self.adapter_config is None else largest_rank(self.adapter_config)

    @property
    def hparams_initial(self) -> AttributeDict:
        """What loggers get of the settings: no secrets."""
        return AttributeDict(redact(dict(super().hparams_initial)))

    def configure_model(self) -> None:
        """Load the policy (once)."""
        if not hasattr(self, "policy"):
            h = self.hparams
            self.policy = load_policy(
                h["model"],
                adapter=h["adapter"],
                full_finetuning=h["full_finetuning"],
                hold_reference=h["kl_coef"] > 0,
                dtype=h["dtype"],
                attn_implementation=h["attn_implementation"],
                lora_rank=h["lora_rank"],
                lora_alpha=h["lora_alpha"],
                lora_dropout=h["lora_dropout"],
                lora_targets=h["lora_targets"],
                gradient_checkpointing=h["gradient_checkpointing"],
                torch_compile=h["torch_compile"],
            )
            self.policy.check_head()
            self._start_record = start_record(self.policy)

    def configure_callbacks(self) -> list[Callback]:
        """The callbacks without which a run would be unsafe or mute, where the Trainer has none of their kind."""
        from grpo_lightning.callbacks import EpochLine, LoRAWeightSync, PredictionWriter, RunDoctor

        # No hook of a run comes before this one.
        self.phases.begin_run(self.trainer.profiler)  # type: ignore[attr-defined]
        present = self.trainer.callbacks  # type: ignore[attr-defined]
        kinds: tuple[type[Callback], ...] = (LoRAWeightSync, RunDoctor, EpochLine)
        if self.trainer.predicting:
            kinds += (PredictionWriter,)
        return [kind() for kind in kinds if not any(isinstance(c, kind) for c in present)]

    def configure_optimizers(self) -> Any:
        """AdamW over what is trained, with the learning rate's schedule counted in optimizer steps."""
        optimizer = AdamW(
            list(self.policy.trainable_parameters().values()),
            lr=self.hparams["learning_rate"],
            weight_decay=self.hparams["weight_decay"],
        )
        scheduler = LambdaLR(optimizer, self._lr_factor())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _lr_factor(self) -> Callable[[int], float]:
        schedule = self.hparams["lr_schedule"]
        planned = self._planned_updates() if schedule != "constant" else 0
        return partial(lr_factor, warmup=self.hparams["warmup_updates"], planned=planned, schedule=schedule)

    def _planned_updates(self) -> int:
        """Optimizer steps of the whole run, by arithmetic: Lightning's estimate would build the train loader."""
        trainer, data = self.trainer, self._data()
        ends = [trainer.max_steps] if trainer.max_steps > 0 else []
        if trainer.max_epochs is not None and trainer.max_epochs > 0 and data is not None:
            ends.append(trainer.max_epochs * epoch_updates(trainer, data.updates_per_epoch))
        if not ends:
            raise ConfigurationError(
                f"lr_schedule={self.hparams['lr_schedule']!r} needs a planned end: set Trainer(max_epochs=...)"
            )
        return min(ends)

    def setup(self, stage: str) -> None:
        """Forget a fit that ended in an exception, write whole checkpoints or none, and on a CPU keep freed memory."""
        self.fitting = False
        strategy = self.trainer.strategy
        if strategy.root_device.type == "cpu":
            keep_freed_memory()
            if stage == "fit" and self.hparams["torch_compile"]:
                require_compiler()
        if type(strategy.checkpoint_io) is TorchCheckpointIO:
            strategy.checkpoint_io = DurableCheckpointIO(partial(self.phases, "checkpoint"))
        elif isinstance(strategy.checkpoint_io, _WrappingCheckpointIO):
            name = type(strategy.checkpoint_io).__name__
            rank_zero_warn(f"{name} writes through Lightning: a checkpoint may be left incomplete by a power cut.")

    def on_fit_start(self) -> None:
        """From here on rollouts may be made."""
        self.fitting = True

    def on_fit_end(self) -> None:
        """Training is over."""
        self.fitting = False

    def weights_changed(self) -> None:
        """Count a change of the weights. Whoever writes to them outside the optimizer must call this."""
        self.policy_version += 1

    def _data(self) -> RolloutDataModule | None:
        data = getattr(self.trainer, "datamodule", None)
        return data if isinstance(data, RolloutDataModule) else None

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute the gradients, timed."""
        with self.phases("train_backward"):
            super().backward(loss, *args, **kwargs)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take the step, timed; Lightning runs forward and backward within it, which are timed apart."""
        with self.phases("train_optimizer"):
            super().optimizer_step(*args, **kwargs)

    def on_validation_start(self) -> None:
        """From here on the time is the validation's."""
        self.phases.begin("validation")

    def on_validation_end(self) -> None:
        """Until here it was. Within an epoch training goes on; at its end the engine makes the next rollout."""
        data = self._data()
        if data is not None and self.fitting and not (self.trainer.sanity_checking or self.trainer.is_last_batch):
            data.rest()
        self.phases.end("validation")

    def validation_step(self, batch: TaskBatch, batch_idx: int) -> None:
        """Generate and score one batch of held-out tasks."""
        scores = self.trainer.datamodule.evaluate(batch)  # type: ignore[attr-defined]
        for name, values in scores.items():
            if values:
                self.log(
                    f"val/{name}",
                    sum(values) / len(values),
                    batch_size=len(values),
                    on_step=False,
                    on_epoch=True,
                    prog_bar=name == "accuracy",
                    sync_dist=True,
                )

    def predict_step(self, batch: TaskBatch, batch_idx: int) -> Predictions:
        """Answer one batch of the tasks to predict."""
        return Predictions(self.trainer.datamodule.predict(batch))  # type: ignore[attr-defined]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is trained, drop the frozen base and any secret; note the start, the version, the epoch so far."""
        redact_hyperparameters(checkpoint)
        trainable = self._trainable_keys()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trainable}
        checkpoint[STATE_KEY] = {
            "prompts": None if (data := self._data()) is None else data.sampler.encoder.record(),
            "policy_version": self.policy_version,
            "start": self._start_record,
            **self.training_state(),
        }
        drop_partial_update(checkpoint, self.trainer.accumulate_grad_batches)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the version, after checking that the checkpoint holds exactly the weights that are trained here.

        Raises:
            CheckpointError: If keys are missing or unknown, or the policy started from something else.
        """
        state = checkpoint.get(STATE_KEY)
        if state is None:
            raise CheckpointError("expected a checkpoint of a GRPOModule, but this one was saved by something else")
        check_start(state["start"], self._start_record, self.model_name, self.hparams["adapter"])
        trainable = self._trainable_keys()
        expected = {name: tensor for name, tensor in self.state_dict().items() if name in trainable}
        check_weights(checkpoint["state_dict"], expected)
        data = self._data() if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING else None
        if data is not None and type(data).__qualname__ not in checkpoint:
            raise CheckpointError(
                f"the checkpoint holds no state of {type(data).__name__}, so the order of tasks cannot go on. Resume "
                "with the data module class that the run was started with"
            )
        self.policy_version = state["policy_version"]
        self.load_training_state(state)

    def _trainable_keys(self) -> set[str]:
        return {f"policy.model.{name}" for name in self.policy.trainable_parameters()}

    def training_state(self) -> dict[str, Any]:
        """What else a checkpoint holds."""
        return {}

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
