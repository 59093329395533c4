"""Every preset of `configs/algorithms` for a few epochs of the demo, under the doctor.

    python -m benchmarks.presets            # with vLLM and the demo's model; goes on where it was stopped
    python -m benchmarks.presets --small    # with transformers in place of vLLM

A run of three epochs says that a preset trains and that the doctor accepts it, not which algorithm learns best.
"""

import argparse
import gc
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from benchmarks.faults.engines import TRANSFORMERS, VLLM, Engines
from benchmarks.faults.runner import code_digest, quiet
from benchmarks.faults.witness import Witness
from benchmarks.marked import inserted
from grpo_lightning import GRPOModule, RolloutDataModule
from grpo_lightning.callbacks import EpochLine
from grpo_lightning.diagnostics import Status
from grpo_lightning.rewards import last_number_correct
from grpo_lightning.rollout.engine import RolloutEngine
from grpo_lightning.tasks import SumTasks

ROOT = Path(__file__).parents[1]
BASE = ROOT / "configs" / "demo_cpu.yaml"
FOLDER = ROOT / "configs" / "algorithms"
PRESETS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
RESULT = ROOT / "benchmarks" / "presets.json"
PAGE = ROOT / "docs" / "algorithms.md"


@dataclass(frozen=True)
class Size:
    """How large a run is.

    Attributes:
        epochs: Rollouts.
        prompts: Prompts of each.
        val_size: Held-out tasks.
        engine: ``"vLLM"`` or ``"transformers"``.
        model: Name of the model's folder.
    """

    epochs: int = 3
    prompts: int = 8
    val_size: int = 60
    engine: str = "vLLM"
    model: str = ""


class Notes(Callback):
    """Notes the mean reward of each epoch and the held-out accuracy of each validation."""

    def __init__(self) -> None:
        self.rewards: list[float] = []
        self.accuracies: list[float] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the accuracy."""
        if "val/accuracy" in trainer.callback_metrics:
            self.accuracies.append(float(trainer.callback_metrics["val/accuracy"]))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the reward."""
        assert isinstance(pl_module, GRPOModule)
        self.rewards.append(float(pl_module.epoch_metrics()["reward/mean"]))


class _Quiet(EpochLine):
    """Says nothing."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing."""


def settings(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a preset sets of `GRPOModule` and of `RolloutDataModule`."""
    content = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    return content["model"], content["data"]


def base() -> tuple[dict[str, Any], dict[str, Any], int]:
    """The demo's settings of both that a preset leaves alone, without objects, and its micro-batches."""
    content = yaml.safe_load(BASE.read_text(encoding="utf-8"))
    data = {
        name: value for name, value in content["data"].items() if name not in ("tasks", "rewards", "engine", "val_size")
    }
    model = {name: value for name, value in content["model"].items() if name != "model"}
    return model, data, content["trainer"]["accumulate_grad_batches"]


def run(name: str, model: str, engine: RolloutEngine, folder: Path, size: Size) -> dict[str, Any]:
    """Train with a preset, whatever the doctor says, and return what came of it.

    Args:
        name: The preset.
        model: Folder of the model.
        engine: What generates.
        folder: For the run's files.
        size: How large the run is.
    """
    own_model, own_data = settings(name)
    base_model, base_data, micro_batches = base()
    notes, doctor = Notes(), Witness(acts=False)
    begin, problem = time.perf_counter(), ""
    seed_everything(1, verbose=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=size.epochs,
            accumulate_grad_batches=micro_batches,
            gradient_clip_val=1.0,
            num_sanity_val_steps=-1,
            check_val_every_n_epoch=size.epochs,
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[notes, doctor, _Quiet()],
        )
        try:
            data = {**base_data, **own_data, "prompts_per_rollout": size.prompts, "val_size": size.val_size}
            trainer.fit(
                GRPOModule(model, **{**base_model, **own_model}),
                RolloutDataModule(SumTasks(20), last_number_correct, engine=engine, **data),
            )
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
    return {
        "updates": trainer.global_step,
        "accuracy_before": notes.accuracies[0] if notes.accuracies else None,
        "accuracy_after": notes.accuracies[-1] if len(notes.accuracies) > 1 else None,
        "reward_by_epoch": notes.rewards,
        "verdicts": {status.value: sum(count[status.value] for count in doctor.counts.values()) for status in Status},
        "failed": sorted({finding.cause for finding in doctor.findings if finding.reaction == "halt"}),
        "warned": sorted({finding.cause for finding in doctor.findings if finding.reaction != "halt"}),
        "error": problem,
        "seconds": round(time.perf_counter() - begin, 1),
    }


def code_of(name: str) -> str:
    """Names the code and the preset that a result belongs to."""
    return code_digest(Path(__file__).resolve(), FOLDER / f"{name}.yaml", BASE)


def run_all(
    names: Sequence[str],
    results: dict[str, Any],
    size: Size,
    train: Callable[[str], dict[str, Any]],
    code: Callable[[str], str] = code_of,
    write: Callable[[dict[str, Any]], None] = lambda results: None,
) -> dict[str, Any]:
    """Run presets that have no result of this code and size yet.

    Args:
        names: Presets.
        results: Earlier results by preset.
        size: How large the runs are.
        train: Runs one.
        code: Names the code that a preset's result belongs to.
        write: Called with all results after each run.

    Returns:
        Earlier and new results, in order of their names.
    """
    results = dict(results)
    for name in names:
        belongs = {"code": code(name), "size": asdict(size)}
        if belongs.items() <= results.get(name, {}).items():
            continue
        results[name] = {**belongs, **train(name)}
        gc.collect()
        results = dict(sorted(results.items()))
        write(results)
        print(line(name, results[name]), flush=True)
    return results


_HEAD = ("Preset", "Updates", "Accuracy", "Mean reward by epoch", "Failed", "Warned", "Seconds")


def cells(name: str, result: Mapping[str, Any]) -> tuple[str, ...]:
    """A row of the table."""
    before, after = (
        "–" if result[key] is None else f"{result[key]:.2f}" for key in ("accuracy_before", "accuracy_after")
    )
    failed = [*result["failed"], *([f"stopped by {result['error'].split(':')[0]}"] if result["error"] else [])]
    return (
        f"`{name}`",
        str(result["updates"]),
        f"{before} → {after}",
        " ".join(f"{reward:.2f}" for reward in result["reward_by_epoch"]) or "–",
        ", ".join(failed) or "none",
        ", ".join(result["warned"]) or "none",
        f"{result['seconds']:.0f}",
    )


def line(name: str, result: Mapping[str, Any]) -> str:
    """A result in a line."""
    return " | ".join(cells(name, result)) + (f" | {result['error']}" if result["error"] else "")


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown, a row a preset."""
    rows = [_HEAD, ("---",) * len(_HEAD), *(cells(name, result) for name, result in results.items())]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def write_down(results: dict[str, Any], target: Path = RESULT, page: Path = PAGE) -> None:
    """Write the JSON, and the table into the documentation if that has a place for it."""
    target.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if page.is_file():
        text = page.read_text(encoding="utf-8")
        page.write_text(inserted(text, "presets", table(results)), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=PRESETS, choices=PRESETS, metavar="NAME", help="only these")
    parser.add_argument("--small", action="store_true", help="with transformers in place of vLLM")
    parser.add_argument("--model", help="folder of a model; the demo's by default")
    parser.add_argument("--epochs", type=int, default=Size.epochs)
    parser.add_argument("--prompts", type=int, default=Size.prompts, help="prompts of a rollout")
    parser.add_argument("--val-size", type=int, default=Size.val_size, help="held-out tasks")
    parser.add_argument("--json", type=Path, default=RESULT, help="where results are kept, to go on from there")
    parser.add_argument("--code", help="name of the code that results belong to; a digest of it by default")
    parser.add_argument("--write", action="store_true", help="only write the table anew")
    args = parser.parse_args(argv)
    results = json.loads(args.json.read_text(encoding="utf-8")) if args.json.is_file() else {}
    # Results of a try-out elsewhere are none of the documentation's.
    page = PAGE if args.json == RESULT else args.json.with_suffix(".md")
    if not args.write:
        if args.model is None:
            from grpo_lightning.demo import prepare_model

            args.model = str(prepare_model())
        quiet()
        kind = "transformers" if args.small else "vLLM"
        size = Size(args.epochs, args.prompts, args.val_size, kind, Path(args.model).name)
        engines = Engines(TRANSFORMERS if args.small else VLLM)
        try:
            with tempfile.TemporaryDirectory() as folder:
                results = run_all(
                    args.only,
                    results,
                    size,
                    lambda name: run(name, args.model, engines.get("float32"), Path(folder), size),
                    (lambda name: args.code) if args.code else code_of,
                    lambda results: write_down(results, args.json, page),
                )
        finally:
            engines.close()
    write_down(results, args.json, page)
    wrong = [name for name, result in results.items() if result["failed"] or result["error"]]
    if wrong:
        raise SystemExit(f"not healthy: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
