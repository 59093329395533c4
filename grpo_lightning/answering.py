"""Tasks answered with an engine, greedily or sampled: what validation, prediction and rollouts share."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info

from grpo_lightning.distributed import processes
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.model_source import model_context, require_context, require_model
from grpo_lightning.rewards.scorer import Scorer
from grpo_lightning.rollout.ahead import Ahead
from grpo_lightning.rollout.engine import EngineSpec, RolloutEngine
from grpo_lightning.rollout.episode import Group
from grpo_lightning.rollout.episode_settings import EpisodeSettings
from grpo_lightning.rollout.evaluation import Scores, greedy_scores, sampled_scores
from grpo_lightning.rollout.loader import BatchLoader
from grpo_lightning.rollout.probe import probe
from grpo_lightning.rollout.prompts import PromptEncoder, PromptSettings
from grpo_lightning.rollout.resting import rest, rests
from grpo_lightning.rollout.sampler import Sampler
from grpo_lightning.rollout.sync import sync_engine
from grpo_lightning.rollout.task_batch import TaskBatch, task_loader
from grpo_lightning.rollout.types import Task
from grpo_lightning.tasks import TaskSource

if TYPE_CHECKING:
    from grpo_lightning.module import GRPOModule


class AnsweringDataModule(LightningDataModule):
    """What `RolloutDataModule` is beside its rollouts."""

    tasks: TaskSource
    val_tasks: TaskSource | None
    predict_tasks: TaskSource | None
    engine: RolloutEngine
    scorer: Scorer
    episodes: EpisodeSettings
    environments: Any
    multi_turn: bool
    prompts_per_rollout: int
    samples_per_prompt: int
    max_tokens: int
    max_prompt_tokens: int
    success_reward: float
    val_batch_size: int
    val_samples: int
    val_temperature: float
    predict_samples: int
    predict_temperature: float
    seed: int
    _bad_words: tuple[str, ...]
    _prompts: PromptSettings
    _sampler: Sampler | None
    _predict_scorer: Scorer
    _ahead: Ahead[Any] | None

    def __str__(self) -> str:
        # LightningDataModule.__str__ builds every loader, which here would start a rollout.
        return (
            f"{type(self).__name__}(tasks={len(self.tasks)}, prompts_per_rollout={self.prompts_per_rollout}, "
            f"samples_per_prompt={self.samples_per_prompt})"
        )

    __repr__ = __str__

    @property
    def max_sampled(self) -> int:
        """Most tokens that the policy may sample in one episode."""
        most = self.max_tokens * self.episodes.max_turns
        return min(most, self.episodes.max_sampled_tokens or most)

    @property
    def sampler(self) -> Sampler:
        """What answers tasks; there from `setup` on."""
        assert self._sampler is not None, "setup() runs before any generation"
        return self._sampler

    def _restart_engine(self) -> None:
        self.engine.close()
        self.engine.start(self._engine_spec(self._module()))

    def max_context(self, model: str) -> int:
        """Longest context of an episode with a model, in tokens.

        Args:
            model: Directory or hub name of the model.

        Raises:
            ConfigurationError: If the model's context is shorter.
        """
        own = model_context(require_model(model))
        return self.episodes.context(self.max_prompt_tokens, self.max_tokens, own)

    def _engine_spec(self, module: "GRPOModule") -> EngineSpec:
        return EngineSpec(
            model=module.model_name,
            lora_rank=module.adapter_rank,
            max_length=self.max_context(module.model_name),
            max_concurrency=max(
                self.prompts_per_rollout * self.samples_per_prompt,
                min(self.val_batch_size, len(self.val_tasks or ())) * max(1, self.val_samples),
                min(self.val_batch_size, len(self.predict_tasks or ())) * self.predict_samples,
            ),
            seed=self.seed,
        )

    def prompt_encoder(self, model: str, stage: str = "fit") -> PromptEncoder:
        """The encoder of the tasks' prompts for a model, tried on them.

        Args:
            model: Directory or hub name of the model; only its configuration and tokenizer are read.
            stage: For ``"predict"`` the prompts of `predict_tasks` are tried.

        Raises:
            ConfigurationError: If there is no such model, its context is too short, or a prompt does not fit.
        """
        require_context(require_model(model), self.max_prompt_tokens, self.max_tokens)
        encoder = PromptEncoder(model, self.max_prompt_tokens, self._prompts)
        encoder.banned_token_ids(self._bad_words)
        for tasks in [self.predict_tasks] if stage == "predict" else [self.tasks, self.val_tasks]:
            if tasks is None or len(tasks) == 0:
                continue
            if self.multi_turn:
                has_rewards = bool(self.scorer.names)
                processes().from_first(partial(probe, self.environments, tasks, encoder, self.episodes, has_rewards))
            else:
                encoder.check(tasks)
        return encoder

    def teardown(self, stage: str) -> None:
        """Stop the engine, and what it samples ahead."""
        self._drop_ahead()
        self.engine.close()

    def on_exception(self, exception: BaseException) -> None:
        """The same after an exception, where `teardown` may not run."""
        self._drop_ahead()
        self.engine.close()

    def _drop_ahead(self) -> None:
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.cancel()

    def ensure_synced(self) -> None:
        """Make the engine serve the module's policy (`sync_engine`). Idempotent; called before any generation.

        A rollout that is being sampled ahead is waited for: the engine must serve one policy to its end.

        Raises:
            StaleRolloutError: If the engine is still too far behind afterwards.
        """
        from grpo_lightning.callbacks import LoRAWeightSync, RunDoctor

        if self._ahead is not None:
            self._ahead.wait()
        callbacks, module = self._trainer().callbacks, self._module()
        sync = next((c for c in callbacks if isinstance(c, LoRAWeightSync)), None)
        served = self.engine.policy_version
        with module.phases("start"):
            self.engine.wait_until_ready()
        with module.phases("sync"):
            sync_engine(self.engine, module, sync)
        if self.engine.policy_version != served and module.fitting:
            with module.phases("doctor"):
                for doctor in callbacks:
                    if isinstance(doctor, RunDoctor):
                        doctor.examine_engine(self._trainer())

    def rest(self) -> None:
        """Have the engine give its memory to the trainer, if it does that. All processes must call it."""
        if rests(self.engine):
            with self._module().phases("sync"):
                processes().from_first(lambda: rest(self.engine))

    def val_dataloader(self) -> Any:
        """Batches of held-out tasks. They are generated in the validation step, when the policy is current."""
        if self.val_tasks is None:
            return []
        return task_loader(self.val_tasks, self.val_batch_size)

    def _prepare_predict(self) -> None:
        self._predict_scorer, missing = self.scorer.applicable(self._tasks_to_predict()[0])
        for name, fields in missing.items():
            rank_zero_info(f"Reward {name!r} is left out: the tasks to predict have no {', '.join(map(repr, fields))}.")

    def _tasks_to_predict(self) -> TaskSource:
        if self.predict_tasks is None or len(self.predict_tasks) == 0:
            raise ConfigurationError(
                "predict needs tasks, but there are none; set predict_tasks, for example to JsonlTasks('prompts.jsonl')"
            )
        return self.predict_tasks

    def predict_dataloader(self) -> BatchLoader[TaskBatch]:
        """Batches of the tasks to predict, which `predict` answers.

        Raises:
            ConfigurationError: If there are none.
        """
        return task_loader(self._tasks_to_predict(), self.val_batch_size)

    def predict(self, batch: TaskBatch) -> list[Group]:
        """Answer tasks with ``predict_samples`` completions each."""
        return processes().from_first(lambda: self._predict(batch))

    def _predict(self, batch: TaskBatch) -> list[Group]:
        return self._sample(
            "Prediction",
            batch.tasks,
            samples=self.predict_samples,
            temperature=self.predict_temperature,
            key="predict",
            scorer=self._predict_scorer,
        )

    def evaluate(self, batch: TaskBatch) -> Scores:
        """Answer held-out tasks greedily, and with ``val_samples`` by sampling as well.

        Returns:
            The scores of `greedy_scores` and `sampled_scores`.
        """
        return processes().from_first(lambda: self._evaluate(batch))

    def _evaluate(self, batch: TaskBatch) -> Scores:
        # The seeds know no epoch: evaluations differ by the policy alone.
        sample = partial(self._sample, tasks=batch.tasks, key="val")
        greedy = sample("Evaluation", samples=1, temperature=0.0)
        scores = greedy_scores(greedy, self.scorer.names, self.success_reward)
        if self.val_samples:
            sampled = sample("Sampled evaluation", samples=self.val_samples, temperature=self.val_temperature)
            scores |= sampled_scores(sampled, self.success_reward)
        return scores

    def _sample(
        self,
        title: str,
        tasks: Sequence[Task],
        scorer: Scorer | None = None,
        ahead: Sampler | None = None,
        **settings: Any,
    ) -> list[Group]:
        # What is sampled ahead shows no bar beside that of the training.
        bar = self._trainer().progress_bar_callback if ahead is None else None
        return (ahead or self.sampler).sample(title, tasks, scorer or self.scorer, trainer_bar=bar, **settings)

    def _trainer(self) -> Any:
        if self.trainer is None:
            raise ConfigurationError(f"{type(self).__name__} needs a Trainer: call trainer.fit(module, datamodule)")
        return self.trainer

    def _module(self) -> "GRPOModule":
        from grpo_lightning.module import GRPOModule

        module = self._trainer().lightning_module
        if not isinstance(module, GRPOModule):
            raise ConfigurationError(
                f"expected a GRPOModule beside {type(self).__name__}, but got {type(module).__name__}"
            )
        return module
