"""What a run achieved: ``summary.json`` and ``summary.png`` in the run's folder."""

import json
import shlex
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from grpo_lightning.callbacks.adapter_export import AdapterExport
from grpo_lightning.callbacks.run_directory import FOLDER_LOGGERS, run_directory
from grpo_lightning.callbacks.run_doctor import RunDoctor
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.module import GRPOModule
from grpo_lightning.runs import find_run
from grpo_lightning.versions import package_versions

PHASES = {
    "rollout": "time/rollout_wait_seconds",
    "train": "time/train_seconds",
    "sync": "time/sync_seconds",
    "doctor": "time/doctor_seconds",
}
"""The metric of each phase's seconds; what they leave of a run is called other. Of a rollout that is sampled while the
one before is trained on, only the waiting counts: the phases lie one after the other."""


class RunSummary(Callback):
    """Collects every epoch and writes the summary when training ends, also when it ends early.

    ``accuracy_before`` needs a validation before training: ``Trainer(num_sanity_val_steps=-1)``; ``accuracy_after``
    is the last validation's.

    Args:
        plot: Also draw ``summary.png`` (needs matplotlib).
    """

    def __init__(self, plot: bool = True) -> None:
        self._plot = plot
        self._begin = time.monotonic()
        self._epochs: list[dict[str, float]] = []
        self._accuracies: list[tuple[int, float]] = []

    @property
    def state_key(self) -> str:
        """Key of the state in checkpoints, independent of the class's name."""
        return "grpo_lightning.run_summary"

    def state_dict(self) -> dict[str, Any]:
        """What was collected, so that the summary of a resumed run is that of the whole run."""
        return {
            "epochs": self._epochs,
            "accuracies": [list(pair) for pair in self._accuracies],
            "seconds": time.monotonic() - self._begin,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._epochs = list(state_dict["epochs"])
        self._accuracies = [(epoch, accuracy) for epoch, accuracy in state_dict["accuracies"]]
        self._begin -= state_dict["seconds"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start the clock before the engine and the model load. Have all ranks agree on the run's folder."""
        if stage == "fit":
            run_directory(trainer)
            self._begin = time.monotonic()
            self._epochs, self._accuracies = [], []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the held-out accuracy; the one before training counts as epoch 0."""
        if "val/accuracy" in trainer.callback_metrics:
            epoch = 0 if trainer.sanity_checking else trainer.current_epoch + 1
            self._accuracies.append((epoch, float(trainer.callback_metrics["val/accuracy"])))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the epoch."""
        assert isinstance(pl_module, GRPOModule)
        self._epochs.append({name: float(value) for name, value in pl_module.epoch_metrics().items()})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the summary and say where things are."""
        self._write(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write what there is of a fit; its exception is what matters, so no other may take its place."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        try:
            self._write(trainer)
        except Exception as error:
            rank_zero_warn(f"the run's summary could not be written: {error}")

    def _write(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero or not self._epochs:
            return
        folder = run_directory(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        result = summarize(self._epochs, self._accuracies, time.monotonic() - self._begin)
        (folder / "summary.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        picture = folder / "summary.png"
        if self._plot:
            draw(self._epochs, self._accuracies, picture)
        callbacks = getattr(trainer, "callbacks", ())
        exports = [c.latest for c in callbacks if isinstance(c, AdapterExport)]
        pages = [c.page for c in callbacks if isinstance(c, RunDoctor)]
        card = _card(result, folder, next(iter(exports), None), next(iter(pages), None))
        in_folder = isinstance(trainer.logger, FOLDER_LOGGERS)
        commands = next_commands(folder, trainer.current_epoch, trainer.max_epochs, in_folder)
        print("\n".join([card, *commands]), flush=True)


def summarize(epochs: list[dict[str, float]], accuracies: list[tuple[int, float]], seconds: float) -> dict[str, Any]:
    """The content of ``summary.json``.

    Args:
        epochs: Metrics of each epoch.
        accuracies: Epoch (0 is before training) and held-out accuracy of each validation.
        seconds: Duration of the whole run.
    """

    def total(name: str) -> float:
        return sum(e.get(name, 0.0) for e in epochs)

    before = next((a for epoch, a in accuracies if epoch == 0), None)
    after = accuracies[-1][1] if accuracies and accuracies[-1][0] > 0 else None
    phases = {phase: total(name) for phase, name in PHASES.items()}
    return {
        "epochs": len(epochs),
        "accuracy_before": before,
        "accuracy_after": after,
        "reward_first": epochs[0]["reward/mean"],
        "reward_last": epochs[-1]["reward/mean"],
        "seconds": {"total": seconds, **phases, "other": seconds - sum(phases.values())},
        "tokens_per_second": {
            "rollout": total("tokens/sampled") / max(total("time/rollout_seconds"), 1e-9),
            "train_sampled": total("tokens/trained") / max(phases["train"], 1e-9),
        },
        "ratio_last_epoch": {n: epochs[-1][f"ppo/ratio_{n}"] for n in ("mean", "std", "min", "max", "count")},
        "reward_by_epoch": [e["reward/mean"] for e in epochs],
        "accuracy_by_epoch": {str(epoch): a for epoch, a in accuracies},
        "versions": package_versions(),
    }


def draw(epochs: list[dict[str, float]], accuracies: list[tuple[int, float]], path: Path) -> None:
    """Reward with held-out accuracy, ratio mean ± std with its range, and seconds by phase, over the epochs."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        rank_zero_warn("summary.png was not drawn: install matplotlib, or set RunSummary(plot=False)")
        return
    x = range(1, len(epochs) + 1)

    def series(name: str) -> list[float]:
        return [e.get(name, float("nan")) for e in epochs]

    figure = Figure(figsize=(12, 3.4), layout="constrained")
    reward, ratio, seconds = figure.subplots(1, 3)
    reward.plot(x, series("reward/mean"), marker="o", markersize=3, label="mean reward, sampled")
    if accuracies:
        reward.plot(*zip(*accuracies, strict=True), "s--", color="tab:green", label="held-out accuracy, greedy")
    reward.set(title="Reward", xlabel="epoch", ylim=(0, None))
    reward.legend(loc="lower right", fontsize=8)
    mean, std = series("ppo/ratio_mean"), series("ppo/ratio_std")
    low, high = ([m + sign * s for m, s in zip(mean, std, strict=True)] for sign in (-1, 1))
    ratio.fill_between(x, low, high, alpha=0.25, label="mean ± std")
    ratio.plot(x, mean, marker="o", markersize=3, label="mean")
    ratio.set(title="PPO ratio before clipping", xlabel="epoch")
    ratio.legend(loc="upper right", fontsize=8)
    bottom = [0.0] * len(epochs)
    for phase, name in PHASES.items():
        values = series(name)
        seconds.bar(x, values, bottom=bottom, label=phase)
        bottom = [b + v for b, v in zip(bottom, values, strict=True)]
    seconds.set(title="Seconds by phase", xlabel="epoch")
    seconds.legend(loc="upper right", fontsize=8, ncols=2)
    seconds.margins(y=0.2)
    for axes in (reward, ratio, seconds):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, dpi=110)


def next_commands(folder: Path, epochs: int, planned: int | None, in_folder: bool = True) -> list[str]:
    """Commands that go on from here, ready for the shell; none where the run was not started from the command line.

    Args:
        folder: The run's folder.
        epochs: Epochs done.
        planned: Epochs planned; None or -1 without a limit.
        in_folder: Whether the run's logger can go on in the same folder.
    """
    try:
        config, checkpoint = find_run(folder)
    except ConfigurationError:
        return []
    run = shlex.quote(str(folder))
    # A run that came to its end needs a later end to go on to.
    more = f" --trainer.max_epochs {2 * planned}" if planned is not None and 0 < planned <= epochs else ""
    settings = f"-c {shlex.quote(str(config))} --ckpt_path {shlex.quote(str(checkpoint))}"
    return [
        f"Go on:       grpo-lightning {f'resume {run}' if in_folder else f'fit {settings}'}{more}",
        f"Evaluate:    grpo-lightning validate {settings}",
        f"Export:      grpo-lightning export {run} {shlex.quote(str(folder / 'export'))}",
    ]


def _card(result: dict[str, Any], folder: Path, adapter: Path | None, doctor: Path | None = None) -> str:
    lines = [f"Reward {result['reward_first']:.3f} -> {result['reward_last']:.3f} in {result['epochs']} epochs."]
    if result["accuracy_before"] is not None and result["accuracy_after"] is not None:
        lines.append(f"Held-out accuracy {result['accuracy_before']:.3f} -> {result['accuracy_after']:.3f}.")
    s = result["seconds"]
    lines.append(
        f"{s['total']:.0f} s in all: rollouts {s['rollout']:.0f}, training {s['train']:.0f}, sync {s['sync']:.1f}, "
        f"doctor {s['doctor']:.1f}, start-up, evaluation and the rest {s['other']:.0f}."
    )
    lines.append(f"Summary:     {folder / 'summary.json'}")
    if (folder / "summary.png").exists():
        lines.append(f"Picture:     {folder / 'summary.png'}")
    if (folder / "completions.jsonl").exists():
        lines.append(f"Completions: {folder / 'completions.jsonl'}")
    if adapter is not None:
        lines.append(f"Adapter:     {adapter}")
    if doctor is not None:
        lines.append(f"Doctor:      {doctor}")
    return "\n" + "\n".join(lines)
