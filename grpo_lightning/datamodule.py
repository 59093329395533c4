"""Rollouts as a LightningDataModule: each epoch's train loader holds a fresh rollout, packed."""

import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_info

from grpo_lightning.arithmetic import BatchPlan
from grpo_lightning.distributed import processes
from grpo_lightning.envs.environment import EnvironmentFactory
from grpo_lightning.envs.kinds import as_environments
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.loading import require_full_finetuning
from grpo_lightning.model_source import model_context, require_context, require_model
from grpo_lightning.rewards.scorer import Scorer
from grpo_lightning.rollout.advantages import with_advantages
from grpo_lightning.rollout.batch import PackedBatch
from grpo_lightning.rollout.engine import CheckedEngine, EngineSpec, RolloutEngine
from grpo_lightning.rollout.episode import Group
from grpo_lightning.rollout.episode_settings import SINGLE_TURN, EpisodeSettings
from grpo_lightning.rollout.evaluation import Scores, greedy_scores, sampled_scores
from grpo_lightning.rollout.generation_record import GenerationRecord
from grpo_lightning.rollout.loader import BatchLoader
from grpo_lightning.rollout.metrics import rollout_metrics
from grpo_lightning.rollout.micro_batches import Layout
from grpo_lightning.rollout.probe import probe
from grpo_lightning.rollout.prompts import PromptEncoder, PromptSettings
from grpo_lightning.rollout.rollout import Origin, Rollout, make_rollouts
from grpo_lightning.rollout.sampler import Sampler
from grpo_lightning.rollout.schedule import RolloutSchedule
from grpo_lightning.rollout.state import rollout_from_state
from grpo_lightning.rollout.sync import sync_engine
from grpo_lightning.rollout.task_batch import TaskBatch, task_loader
from grpo_lightning.rollout.types import Task
from grpo_lightning.rollout.validation import validate_rollout
from grpo_lightning.rollout.vllm_engine import VLLMEngine
from grpo_lightning.tasks import TaskSource, hold_out, shuffled
from grpo_lightning.tasks.order import draw
from grpo_lightning.trainer_check import check_trainer

if TYPE_CHECKING:
    from grpo_lightning.module import GRPOModule

# Without held-out tasks there is nothing to validate, which is no reason for a warning.
warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")


class RolloutDataModule(LightningDataModule):
    """Samples ``prompts_per_rollout x samples_per_prompt`` completions an epoch and packs them for `GRPOModule`.

    Before anything is generated (training, validation, first epoch, resume) the engine must serve the module's
    current policy; otherwise it is synced, and if it is still behind, the rollout is refused.

    Args:
        tasks: Where prompts come from.
        rewards: One reward function or several: ``f(completion, **fields) -> float | None``, plain or async, given
            fields of the task by parameter name. On the command line, import paths. None if an environment gives all
            rewards.
        environment: What makes the environment of each episode: a class of `Environment`, a ``functools.partial`` of
            one, or a dictionary of such by `Task.env`. Without it each task is answered once.
        episodes: Limits and choices of multi-turn episodes.
        engine: What generates: `VLLMEngine` (default) or `TransformersEngine`.
        engine_restarts: How often in one rollout an engine that died is started again; finished episodes are kept.
        val_tasks: Held-out tasks. Give these or ``val_size``.
        val_size: Held-out tasks to take from ``tasks``, drawn by ``seed``.
        prompts_per_rollout: Tasks of one epoch.
        samples_per_prompt: Completions of each task: the group that advantages compare within.
        updates_per_rollout: Optimizer steps that share one rollout; must divide ``prompts_per_rollout``.
        inner_epochs: Passes over each rollout.
        max_tokens: Longest completion, in tokens.
        max_prompt_tokens: Longest prompt, in tokens; a longer one is refused.
        system_prompt: A system message to put first where a task has none; a task's own wins.
        chat_template: File with a Jinja chat template, for models without one or in place of theirs.
        chat_template_args: Variables of the chat template, such as ``{"enable_thinking": false}``.
        plain_prompts: Take the text of a task's single message as the prompt, without a chat template.
        temperature: Sampling temperature.
        stop: Texts that end a completion; the one that did is part of it.
        bad_words: Words of one token each, written as the tokenizer reads them (with a leading space or without), that
            cannot be sampled. The trainer leaves them out of its softmax too, so the ratios stay right.
        reward_weights: Weight of each reward in the sum; 1 each by default.
        reward_timeout: Seconds that one reward call may take.
        reward_errors: ``"raise"`` stops when a reward raises or times out; ``"skip"`` drops the completion, counted.
        success_reward: Reward from which on a greedy completion counts as correct in ``val/accuracy``.
        val_batch_size: Held-out tasks, or tasks to predict, generated at once.
        predict_tasks: Tasks that ``predict`` answers. Rewards that ask for fields they lack are left out.
        predict_samples: Completions of each of them.
        predict_temperature: Temperature of these completions; 0 is greedy.
        val_samples: Sampled answers of each held-out task, beside the greedy one, for ``val/avg_at_<n>`` and
            ``val/pass_at_<k>``: 0, or 2 and more. Every evaluation uses the same seeds.
        val_temperature: Sampling temperature of these answers.
        order: Which task comes next, a pure function ``(position, size, seed) -> index``: `shuffled`, `sequential`,
            `Widening` of ``grpo_lightning.tasks``, or your own. On the command line, an import path.
        seed: Seed of the task order, the hold-out and the sampling.
    """

    def __init__(
        self,
        tasks: TaskSource,
        rewards: list[Callable[..., Any]] | Callable[..., Any] | None = None,
        *,
        environment: EnvironmentFactory | dict[str, EnvironmentFactory] | None = None,
        episodes: EpisodeSettings | None = None,
        engine: RolloutEngine | None = None,
        engine_restarts: int = 1,
        val_tasks: TaskSource | None = None,
        val_size: int = 0,
        prompts_per_rollout: int = 16,
        samples_per_prompt: int = 8,
        updates_per_rollout: int = 1,
        inner_epochs: int = 1,
        max_tokens: int = 256,
        max_prompt_tokens: int = 1024,
        system_prompt: str | None = None,
        chat_template: str | None = None,
        chat_template_args: dict[str, Any] | None = None,
        plain_prompts: bool = False,
        temperature: float = 1.0,
        stop: list[str] | None = None,
        bad_words: list[str] | None = None,
        reward_weights: list[float] | None = None,
        reward_timeout: float = 30.0,
        reward_errors: Literal["raise", "skip"] = "raise",
        success_reward: float = 1.0,
        val_batch_size: int = 128,
        predict_tasks: TaskSource | None = None,
        predict_samples: int = 1,
        predict_temperature: float = 0.0,
        val_samples: int = 0,
        val_temperature: float = 1.0,
        order: Callable[[int, int, int], int] = shuffled,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _require_positive(
            prompts_per_rollout=prompts_per_rollout,
            updates_per_rollout=updates_per_rollout,
            inner_epochs=inner_epochs,
            max_tokens=max_tokens,
            max_prompt_tokens=max_prompt_tokens,
            temperature=temperature,
            val_batch_size=val_batch_size,
            predict_samples=predict_samples,
            val_temperature=val_temperature,
        )
        if predict_temperature < 0:
            raise ConfigurationError(f"expected predict_temperature >= 0, but got {predict_temperature}")
        if engine_restarts < 0:
            raise ConfigurationError(f"expected engine_restarts >= 0, but got {engine_restarts}")
        if val_samples != 0 and val_samples < 2:
            raise ConfigurationError(
                f"expected val_samples to be 0 (greedy answers only) or at least 2, but got {val_samples}"
            )
        if samples_per_prompt < 2:
            raise ConfigurationError(
                f"expected samples_per_prompt >= 2, but got {samples_per_prompt}: "
                "advantages compare the samples of a group"
            )
        BatchPlan(prompts_per_rollout, samples_per_prompt, updates_per_rollout).check()
        if val_tasks is not None and val_size:
            raise ConfigurationError("expected val_tasks or val_size, but got both")
        if len(tasks) == 0:
            raise ConfigurationError("expected at least one task, but the source is empty")
        if val_size:
            tasks, val_tasks = hold_out(tasks, val_size, seed)
        self.tasks = tasks
        self.val_tasks = val_tasks
        self.engine: RolloutEngine = VLLMEngine() if engine is None else engine
        functions = rewards if isinstance(rewards, list) else [] if rewards is None else [rewards]
        if not functions and environment is None:
            raise ConfigurationError(
                "expected at least one reward function, or an environment that gives rewards, but got neither"
            )
        self.environments = as_environments(environment)
        self.multi_turn = environment is not None
        if environment is None and episodes is not None:
            raise ConfigurationError(
                "expected episodes beside an environment only: without one, tasks are answered once"
            )
        self.episodes = SINGLE_TURN if environment is None else episodes or EpisodeSettings()
        self.engine_restarts = engine_restarts
        self.scorer = Scorer(
            functions,
            weights=reward_weights,
            timeout=reward_timeout,
            on_error=reward_errors,
        )
        self.prompts_per_rollout = prompts_per_rollout
        self.samples_per_prompt = samples_per_prompt
        self.updates_per_rollout = updates_per_rollout
        self.inner_epochs = inner_epochs
        self.max_tokens = max_tokens
        self.max_prompt_tokens = max_prompt_tokens
        self._prompts = PromptSettings(system_prompt, chat_template, chat_template_args or {}, plain_prompts)
        self.temperature = temperature
        self._stop = _texts("stop", stop)
        self._bad_words = _texts("bad_words", bad_words)
        self.success_reward = success_reward
        self.val_batch_size = val_batch_size
        self.predict_tasks = predict_tasks
        self.predict_samples = predict_samples
        self.predict_temperature = predict_temperature
        self.val_samples = val_samples
        self.val_temperature = val_temperature
        self.order = order
        self.seed = seed
        self._schedule = RolloutSchedule()
        self._sampler: Sampler | None = None
        self._predict_scorer = self.scorer
        self._sync_seconds = self._doctor_seconds = 0.0

    def __str__(self) -> str:
        # LightningDataModule.__str__ builds every loader, which here would start a rollout.
        return (
            f"{type(self).__name__}(tasks={len(self.tasks)}, prompts_per_rollout={self.prompts_per_rollout}, "
            f"samples_per_prompt={self.samples_per_prompt})"
        )

    __repr__ = __str__

    @property
    def updates_per_epoch(self) -> int:
        """Optimizer steps of one epoch."""
        return self.updates_per_rollout * self.inner_epochs

    @property
    def rollout(self) -> Rollout | None:
        """The rollout that is trained on, as this process sees it."""
        return self._schedule.current

    @property
    def sampler(self) -> Sampler:
        """What answers tasks; there from `setup` on."""
        assert self._sampler is not None, "setup() runs before any generation"
        return self._sampler

    def setup(self, stage: str) -> None:
        """Check the settings against the Trainer's, then begin starting the engine.

        Raises:
            ConfigurationError: If the run could not work, before anything expensive has happened.
        """
        trainer, module = self._trainer(), self._module()
        self._schedule.begin_run(fresh=module.policy_version == 0)
        self._sync_seconds = self._doctor_seconds = 0.0
        encoder = self.check(module, trainer, stage)
        self._sampler = Sampler(
            engine=self.engine,
            encoder=encoder,
            environments=self.environments,
            episodes=self.episodes,
            max_context=self.max_context(module.model_name),
            max_tokens=self.max_tokens,
            stop=self._stop,
            banned_token_ids=encoder.banned_token_ids(self._bad_words),
            seed=self.seed,
            restarts=self.engine_restarts,
            sync=self.ensure_synced,
            restart=self._restart_engine,
        )
        spec = self._engine_spec(module)
        processes().from_first(lambda: self.engine.start(spec))
        if stage == "fit":
            rank_zero_info(self._arithmetic(trainer))

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

    def check(self, module: "GRPOModule", trainer: Any, stage: str = "fit") -> PromptEncoder:
        """Refuse what could not work, as far as that is known without weights and engine.

        Args:
            module: The module that is trained.
            trainer: Its Trainer.
            stage: ``"fit"``, ``"validate"`` or ``"predict"``.

        Returns:
            The encoder of the tasks' prompts.

        Raises:
            ConfigurationError: If the run could not work.
        """
        check_trainer(trainer, stage, self.updates_per_epoch)
        if module.hparams["full_finetuning"]:
            require_full_finetuning(self.engine, trainer.precision)
        if stage == "predict":
            self._prepare_predict()
        else:
            self.scorer.check(self.tasks[0])
        encoder = self.prompt_encoder(module.model_name, stage)
        self._draw_tasks(0)
        if isinstance(self.engine, CheckedEngine):
            self.engine.check(self._engine_spec(module))
        return encoder

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

    def plan(self, trainer: Any) -> BatchPlan:
        """The batches that a Trainer will make of this module's rollouts."""
        limited = trainer.max_epochs is not None and trainer.max_epochs > 0 and trainer.max_steps < 0
        return BatchPlan(
            self.prompts_per_rollout,
            self.samples_per_prompt,
            self.updates_per_rollout,
            trainer.accumulate_grad_batches,
            self.inner_epochs,
            trainer.world_size,
            trainer.max_epochs if limited else None,
        )

    def _arithmetic(self, trainer: Any) -> str:
        held_out = f", {len(self.val_tasks)} held out" if self.val_tasks is not None else ""
        turns = (
            f", episodes of at most {self.episodes.max_turns} turns and "
            f"{self.max_context(self._module().model_name)} tokens in all"
            if self.multi_turn
            else ""
        )
        return (
            f"Each epoch: {self.plan(trainer)}. Completions of at most {self.max_tokens} tokens{turns}; "
            f"{len(self.tasks)} tasks{held_out}."
        )

    def state_dict(self) -> dict[str, Any]:
        """Position in the order of tasks, random generators, and the rollout if it is still being trained on.

        All processes must call it.
        """
        return self._schedule.state_dict(self._trainer().fit_loop)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there, when the train loader is next asked for."""
        self._schedule.load_state_dict(state_dict)

    def layout(self) -> Layout:
        """How the coming epoch's rollout is cut."""
        trainer = self._trainer()
        scheduler = next((c for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler)), None)
        micro_batches: int = (
            trainer.accumulate_grad_batches
            if scheduler is None
            else scheduler.get_accumulate_grad_batches(trainer.fit_loop.epoch_progress.current.processed)
        )
        return Layout(self.updates_per_rollout, micro_batches, processes().count, self.inner_epochs)

    def teardown(self, stage: str) -> None:
        """Stop the engine."""
        self.engine.close()

    def on_exception(self, exception: BaseException) -> None:
        """Stop the engine: `teardown` may not run after an exception."""
        self.engine.close()

    def ensure_synced(self) -> None:
        """Make the engine serve the module's policy (`sync_engine`). Idempotent; called before any generation.

        Raises:
            StaleRolloutError: If the engine is still too far behind afterwards.
        """
        from grpo_lightning.callbacks import LoRAWeightSync, RunDoctor

        callbacks = self._trainer().callbacks
        sync = next((c for c in callbacks if isinstance(c, LoRAWeightSync)), None)
        served = self.engine.policy_version
        self._sync_seconds += sync_engine(self.engine, self._module(), sync)
        begin = time.perf_counter()
        if self.engine.policy_version != served and self._module().fitting:
            for doctor in callbacks:
                if isinstance(doctor, RunDoctor):
                    doctor.examine_engine(self._trainer())
        self._doctor_seconds += time.perf_counter() - begin

    def train_dataloader(self) -> BatchLoader[PackedBatch]:
        """Make the epoch's rollout, or give it again if Lightning asks twice.

        Raises:
            ConfigurationError: If it is called before the fit has started.
            CheckpointError: If an unfinished epoch cannot be resumed.
        """
        module = self._module()
        if not module.fitting:
            raise ConfigurationError(
                "the train loader was asked for before training started, where a rollout would be made with an "
                "unfinished policy. Trainer.estimated_stepping_batches does this: use max_epochs * updates_per_epoch"
            )
        epoch = self._trainer().fit_loop.epoch_progress.current.processed
        start = self._restore(module, epoch)
        if self.rollout is None or self.rollout.origin.epoch != epoch:
            self._schedule.add(processes().scatter_from_first(lambda: self._make_rollouts(module, epoch)))
        assert self.rollout is not None
        return BatchLoader(self.rollout.batches, start)

    def _restore(self, module: "GRPOModule", epoch: int) -> int:
        """After a checkpoint was loaded: generators as they were, and the rollout of an unfinished epoch.

        Returns:
            How many of its micro-batches were trained on.
        """
        if self._schedule.restoring:
            # Loading the engine's model may draw from the generators.
            processes().from_first(self.engine.wait_until_ready)
        saved = self._schedule.take_restored(epoch)
        if saved is None:
            return 0
        sampling = self.sampler.settings(self.temperature)
        origin, groups, position = rollout_from_state(saved, self.layout(), sampling, self.tasks)
        self._schedule.current = self._cut(origin, groups, module)[processes().rank]
        return position

    def _make_rollouts(self, module: "GRPOModule", epoch: int) -> list[Rollout]:
        """Sample one rollout and cut it for every process."""
        begin, aside = time.perf_counter(), self._sync_seconds + self._doctor_seconds
        # To overfit means the same tasks again and again.
        indices = self._draw_tasks(0 if self._trainer().overfit_batches else self._schedule.tasks_drawn)
        record = GenerationRecord()
        groups = self._sample(
            f"Rollout {self._schedule.rollouts}",
            [self.tasks[index] for index in indices],
            samples=self.samples_per_prompt,
            temperature=self.temperature,
            key=self._schedule.rollouts,
            record=record,
        )
        validate_rollout(groups)
        groups = with_advantages(groups, self.episodes.advantage)
        seconds = time.perf_counter() - begin - (self._sync_seconds + self._doctor_seconds - aside)
        metrics = rollout_metrics(groups, self.multi_turn) | {
            "time/rollout_seconds": seconds,
            "time/sync_seconds": self._sync_seconds,
            "time/doctor_seconds": self._doctor_seconds,
            "sync/version": float(self.engine.policy_version),
            "sync/lag": float(module.policy_version - self.engine.policy_version),
        }
        metrics["throughput/rollout_tokens_per_second"] = metrics["tokens/sampled"] / seconds
        self._sync_seconds = self._doctor_seconds = 0.0
        origin = Origin(module.policy_version, self._schedule.rollouts, epoch, tuple(indices), metrics)
        return self._cut(origin, groups, module, record)

    def _cut(
        self, origin: Origin, groups: Sequence[Group], module: "GRPOModule", record: GenerationRecord | None = None
    ) -> list[Rollout]:
        sampling = self.sampler.settings(self.temperature)
        return make_rollouts(origin, groups, self.layout(), module.token_weights, sampling, record)

    def _draw_tasks(self, first: int) -> list[int]:
        """Indices of a rollout's tasks, after ``first`` tasks were drawn."""
        positions = range(first, first + self.prompts_per_rollout)
        return [draw(self.order, position, len(self.tasks), self.seed) for position in positions]

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

    def _sample(self, title: str, tasks: Sequence[Task], scorer: Scorer | None = None, **settings: Any) -> list[Group]:
        bar = self._trainer().progress_bar_callback
        return self.sampler.sample(title, tasks, scorer or self.scorer, trainer_bar=bar, **settings)

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


def _texts(name: str, values: list[str] | str | None) -> tuple[str, ...]:
    if isinstance(values, str) or not all(values or ()):
        raise ConfigurationError(f"expected {name} to be a list of texts that are not empty, but got {values!r}")
    return tuple(values or ())


def _require_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ConfigurationError(f"expected {name} > 0, but got {value}")
