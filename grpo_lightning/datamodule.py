"""Rollouts as a LightningDataModule: each epoch's train loader holds a fresh rollout, packed."""

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from grpo_lightning.arithmetic import BatchPlan
from grpo_lightning.bounds import require_positive
from grpo_lightning.distributed import processes
from grpo_lightning.envs.environment import EnvironmentFactory
from grpo_lightning.envs.kinds import as_environments
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.loading import require_full_finetuning
from grpo_lightning.objective import kl_of
from grpo_lightning.rewards.scorer import Scorer
from grpo_lightning.rollout.advantages import Advantages
from grpo_lightning.rollout.ahead import check_ahead
from grpo_lightning.rollout.batch import PackedBatch
from grpo_lightning.rollout.engine import CheckedEngine, RolloutEngine
from grpo_lightning.rollout.episode_settings import SINGLE_TURN, EpisodeSettings
from grpo_lightning.rollout.loader import BatchLoader
from grpo_lightning.rollout.micro_batches import Layout
from grpo_lightning.rollout.prompts import PromptEncoder, PromptSettings
from grpo_lightning.rollout.rescored import Rescored
from grpo_lightning.rollout.resting import rests
from grpo_lightning.rollout.rollout import Rollout
from grpo_lightning.rollout.sampler import Sampler
from grpo_lightning.rollout.schedule import RolloutSchedule
from grpo_lightning.rollout.shaping import KL, punish_kl
from grpo_lightning.rollout.state import rollout_from_state
from grpo_lightning.rollout.vllm_engine import VLLMEngine
from grpo_lightning.sampling import SamplingDataModule
from grpo_lightning.tasks import TaskSource, hold_out, shuffled
from grpo_lightning.trainer_check import another_epoch, check_attention, check_trainer
from grpo_lightning.truncation_check import check_range, check_truncation

if TYPE_CHECKING:
    from grpo_lightning.module import GRPOModule

# Without held-out tasks there is nothing to validate, which is no reason for a warning.
warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")


class RolloutDataModule(SamplingDataModule):
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
        rollouts_ahead: Rollouts that are sampled while the one before is trained on, so that engine and trainer work
            at once: 0 or 1. With 1 a rollout is sampled by the policy of one epoch earlier, which needs a
            ``correction`` of `GRPOModule`.
        max_tokens: Longest completion, in tokens.
        max_prompt_tokens: Longest prompt, in tokens; a longer one is refused.
        system_prompt: A system message to put first where a task has none; a task's own wins.
        chat_template: File with a Jinja chat template, for models without one or in place of theirs.
        chat_template_args: Variables of the chat template, such as ``{"enable_thinking": false}``.
        plain_prompts: Take the text of a task's single message as the prompt, without a chat template.
        temperature: Sampling temperature.
        top_p: Training samples only the fewest likeliest tokens that hold this mass. Below 1 it needs a ``correction``
            of `GRPOModule` that takes this back on the tokens that are kept.
        top_k: Training samples only so many of the likeliest tokens; 0 for all. It needs the same.
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
        advantage: How rewards become advantages: a name of ``docs/algorithms.md`` (``"group_std"`` is GRPO's), or a
            function of `Judged`, in YAML its import path.
        advantage_args: Its settings.
        max_refills: Dynamic sampling: how often groups whose rewards are all equal are replaced by those of further
            tasks. 0 keeps them.
        mask_truncated: Keep answers that a limit cut off out of the loss; their rewards still count in their group.
        overlong_buffer: Tokens before the longest answer over which a penalty from 0 to -1 grows; by default none.
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
        rollouts_ahead: int = 0,
        max_tokens: int = 256,
        max_prompt_tokens: int = 1024,
        system_prompt: str | None = None,
        chat_template: str | None = None,
        chat_template_args: dict[str, Any] | None = None,
        plain_prompts: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
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
        advantage: str | Callable[..., Tensor] = "group_std",
        advantage_args: dict[str, Any] | None = None,
        max_refills: int = 0,
        mask_truncated: bool = False,
        overlong_buffer: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        require_positive(
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
        check_range(top_p, top_k)
        if rollouts_ahead not in (0, 1):
            raise ConfigurationError(
                f"expected rollouts_ahead to be 0 or 1, but got {rollouts_ahead}: a further one would be an epoch older"
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
        self.rollouts_ahead = int(rollouts_ahead)
        self.max_tokens = max_tokens
        self.max_prompt_tokens = max_prompt_tokens
        self._prompts = PromptSettings(system_prompt, chat_template, chat_template_args or {}, plain_prompts)
        self.temperature = temperature
        self.top_p, self.top_k = top_p, top_k
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
        self.advantages = Advantages.from_settings(advantage, advantage_args or {}, self.episodes.advantage)
        self.max_refills = max_refills
        self.mask_truncated = mask_truncated
        self.overlong_buffer = overlong_buffer
        if max_refills < 0:
            raise ConfigurationError(f"expected max_refills >= 0, but got {max_refills}")
        if overlong_buffer is not None and not 0 < overlong_buffer <= self.max_sampled:
            raise ConfigurationError(
                f"expected overlong_buffer from 1 to {self.max_sampled}, the most tokens of an answer, but got "
                f"{overlong_buffer}"
            )
        self.seed = seed
        self._schedule = RolloutSchedule()
        self._ahead = None
        self._sampler: Sampler | None = None
        self._predict_scorer = self.scorer

    @property
    def truncated(self) -> bool:
        """Whether training leaves out unlikely tokens when it samples."""
        return self.top_p < 1 or self.top_k > 0

    @property
    def updates_per_epoch(self) -> int:
        """Optimizer steps of one epoch."""
        return self.updates_per_rollout * self.inner_epochs

    @property
    def updates_behind(self) -> int:
        """Optimizer steps by which the policy that sampled a rollout may be behind when training on it begins.

        What `LoRAWeightSync` allows comes on top.
        """
        return self.rollouts_ahead * self.updates_per_epoch

    @property
    def rollout(self) -> Rollout | None:
        """The rollout that is trained on, as this process sees it."""
        return self._schedule.current

    def setup(self, stage: str) -> None:
        """Check the settings against the Trainer's, then begin starting the engine.

        Raises:
            ConfigurationError: If the run could not work, before anything expensive has happened.
        """
        trainer, module = self._trainer(), self._module()
        self._drop_ahead()
        self._schedule.begin_run(fresh=module.policy_version == 0)
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
            top_p=self.top_p,
            top_k=self.top_k,
        )
        spec = self._engine_spec(module)
        processes().from_first(lambda: self.engine.start(spec))
        if stage == "fit":
            rank_zero_info(self._arithmetic(trainer))

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
        if stage == "fit":
            check_attention(trainer, module.hparams["attn_implementation"])
            check_truncation(self.top_p, self.top_k, module.objective.correction)
            check_ahead(self.rollouts_ahead, module.objective.correction, rests(self.engine))
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

    def train_dataloader(self) -> BatchLoader[PackedBatch]:
        """Make the epoch's rollout, or give it again if Lightning asks twice; then begin the next one, if it may.

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
            with module.phases("rollout"):
                self._schedule.add(processes().scatter_from_first(lambda: self._make_rollouts(module, epoch)))
        self.rest()
        assert self.rollout is not None
        updates_left = self.updates_per_epoch - start // self.rollout.layout.micro_batches
        if self.rollouts_ahead and another_epoch(self._trainer(), updates_left):
            processes().from_first(self._look_ahead)
        if module.objective.rescores and self.rollout.rescored is None:
            with module.phases("rescore"):
                self._schedule.current = self._rescored(self.rollout, module)
        return BatchLoader(self.rollout.batches, start)

    def _rescored(self, rollout: Rollout, module: "GRPOModule") -> Rollout:
        """The rollout with what the trainer says of it, and with the KL in its rewards where it stands there."""
        objective, rescored = module.objective, module.rescore(rollout)
        if objective.kl_reward > 0:
            kl = kl_of(objective.kl_estimator, rescored.logprobs, rescored.reference)

            def again() -> list[Rollout]:
                groups = self.judged(punish_kl(rollout.groups, kl, objective.kl_reward))
                penalties = [value for g in groups for e in g.episodes if (value := e.rewards.get(KL)) is not None]
                mean = {f"reward/{KL}": sum(penalties) / max(1, len(penalties))}
                cut = self._cut(rollout.origin, groups, module, rollout.record)
                return [part.with_metrics(mean) for part in cut]

            rollout = processes().scatter_from_first(again)
        return rollout.with_rescored(rescored, objective.focus)

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
        sampling = self.sampler.settings(self.temperature, truncated=True)
        origin, groups, position = rollout_from_state(saved, self.layout(), sampling, self.tasks)
        rollout = self._cut(origin, groups, module)[processes().rank]
        if module.objective.rescores and saved["rescored"] is not None:
            rollout = rollout.with_rescored(Rescored.from_state(saved["rescored"]), module.objective.focus)
        self._schedule.current = rollout
        return position


def _texts(name: str, values: list[str] | str | None) -> tuple[str, ...]:
    if isinstance(values, str) or not all(values or ()):
        raise ConfigurationError(f"expected {name} to be a list of texts that are not empty, but got {values!r}")
    return tuple(values or ())
