"""TRL's side: its `GRPOTrainer`, which takes its optimizer steps in turns. Runs in TRL's environment.

Run: python -m benchmarks.performance.trl.theirs SPEC.json
"""

import resource
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl.extras.profiling import ProfilingContext
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from benchmarks.performance.trl.cases import ADAPTER, REWARDS, digest
from benchmarks.performance.turns import Turns, spec


class Timed(GRPOTrainer):
    """The trainer with a clock around what it does for a micro-batch."""

    step_seconds = 0.0

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Of which `_prepare_inputs` is a part, and generation a part of that."""
        begin = time.perf_counter()
        loss = super().training_step(*args, **kwargs)  # type: ignore[no-untyped-call]
        self.step_seconds += time.perf_counter() - begin
        return loss


class Gate(TrainerCallback):
    """Waits at the beginning of each optimizer step, and reports what it took."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._own: defaultdict[str, float] = defaultdict(float)
        self.trainer: Timed

    def watch(self) -> None:
        """Take down what TRL's own profiling measures."""

        def note(context: ProfilingContext, duration: float) -> None:
            self._own[context.name.removeprefix("Timed.")] += duration

        setattr(ProfilingContext, "_log_metrics", note)  # noqa: B010

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Wait."""
        self._turns.wait()
        self.trainer.step_seconds = 0.0
        self._own.clear()

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Report; the last log of all sums up the run instead."""
        logs = kwargs["logs"]
        if "reward" not in logs:
            return
        rollout = self._own["_prepare_inputs"]
        self._turns.note(
            {
                "phases": {"rollout": rollout, "train": self.trainer.step_seconds - rollout},
                "profiled": dict(self._own),
                "reward": logs["reward"],
                "tokens": logs["completions/mean_length"],
                "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            }
        )

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """The last step has no successor that would end it."""
        self._turns.finish()


def trainer_of(asked: Mapping[str, Any], folder: str, callbacks: Sequence[TrainerCallback] = ()) -> Timed:
    """The trainer of a case with TRL's settings.

    Args:
        asked: ``model``, ``case``, ``settings``, ``tasks`` and ``updates``.
        folder: For its files.
        callbacks: Its callbacks.
    """
    case, settings = asked["case"], asked["settings"]
    torch.set_num_threads(settings["threads"])
    completions = case["prompts"] * case["samples"]
    config = GRPOConfig(
        output_dir=folder,
        report_to="none",
        use_cpu=True,
        bf16=settings["autocast"],
        model_init_kwargs={"dtype": settings["dtype"]},
        per_device_train_batch_size=settings["batch"],
        gradient_accumulation_steps=completions // settings["batch"],
        gradient_checkpointing=settings["checkpointing"],
        torch_compile=settings["compile"],
        use_transformers_continuous_batching=settings["continuous"],
        num_generations=case["samples"],
        max_completion_length=case["tokens"],
        generation_kwargs={"min_new_tokens": case["tokens"]} if case["exact"] else None,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        loss_type="grpo",
        learning_rate=case["learning_rate"],
        lr_scheduler_type="constant",
        warmup_steps=0,
        max_grad_norm=1.0,
        max_steps=asked["updates"],
        shuffle_dataset=False,
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=asked.get("seed", 0),
    )
    trainer = Timed(
        model=asked["model"],
        reward_funcs=[rewarded(case["reward"])],
        args=config,
        train_dataset=Dataset.from_list([{"prompt": t["messages"], **t["data"]} for t in asked["tasks"]]),
        peft_config=LoraConfig(**ADAPTER),
        callbacks=list(callbacks),
    )
    require_prompts(trainer, asked)
    return trainer


def rewarded(name: str) -> Any:
    """A reward as TRL calls it."""
    reward, fields = REWARDS[name], ("answer",) if name == "correct" else ()

    def judge(completions: Sequence[Any], **columns: Any) -> list[float]:
        texts = [completion[0]["content"] for completion in completions]
        given = {field: columns[field] for field in fields}
        return [reward(text, **{f: values[i] for f, values in given.items()}) for i, text in enumerate(texts)]

    judge.__name__ = name
    return judge


def require_prompts(trainer: Any, asked: Mapping[str, Any]) -> None:
    """Refuse to run with other prompts than the other side's.

    Raises:
        ValueError: If their tokens differ.
    """
    found = digest(trainer._tokenize_prompts([task["messages"] for task in asked["tasks"]])[0])
    if found != asked["digest"]:
        raise ValueError(f"expected prompts {asked['digest']}, but TRL makes {found} of the same messages")


def main() -> None:
    """Train, an optimizer step a turn."""
    asked, turns = spec(), Turns()
    # More than this would not fit beside the other side; an error is better than a killed machine.
    resource.setrlimit(resource.RLIMIT_DATA, (asked["memory_bytes"],) * 2)
    gate = Gate(turns)
    with TemporaryDirectory() as folder:
        gate.trainer = trainer_of(asked, folder, [gate])
        gate.watch()
        gate.trainer.train()


if __name__ == "__main__":
    main()
