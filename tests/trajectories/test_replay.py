"""A replay of a real run against what the run itself logged."""

import csv
from dataclasses import replace

import numpy as np
import pytest
import yaml
from fakes import FakeEngine
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from runs import MODEL, RecordingEngine, data, trainer

from grpo_lightning import GRPOModule
from grpo_lightning.callbacks import TrajectoryStore
from grpo_lightning.cli.run_policy import run_policy
from grpo_lightning.rollout.episode import Episode, Group
from grpo_lightning.rollout.ledger import Ledger
from grpo_lightning.trajectories.replay import replay_update, sampling_versions, update_batches
from grpo_lightning.trajectories.store import load_epoch, stored_epochs

TOLERANCE = 1e-6
"""Relative. Training computes the same numbers with gradients, which may take other kernels; on CPU they are equal."""

RATIO = [f"ppo/ratio_{name}" for name in ("mean", "std", "min", "max", "count")]


class Losses(Callback):
    """The loss of every optimizer step."""

    def __init__(self):
        self.sums = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.sums.append(0.0)
        # Lightning has divided by the number of micro-batches.
        self.sums[-1] += float(outputs["loss"])


def length_and_letters(completion):
    return len(completion) + len(set(completion)) / 10


class Run:
    """Two epochs of two updates, each of two micro-batches, with a checkpoint after each."""

    def __init__(self, folder, tiny_model, engine, precision="32-true", **settings):
        # Other weights may sample a group of equal rewards, whose advantages of 0 leave no trace in a loss.
        seed_everything(1)
        losses, logger = Losses(), CSVLogger(folder, name="", version="run")
        checkpoints = ModelCheckpoint(filename="{epoch}", every_n_epochs=1, save_top_k=-1)
        run = trainer(
            folder,
            logger=logger,
            callbacks=[checkpoints, losses, TrajectoryStore()],
            enable_checkpointing=True,
            accumulate_grad_batches=2,
            precision=precision,
            log_every_n_steps=1,
        )
        run.fit(
            GRPOModule(tiny_model, **MODEL, **settings),
            data(engine, length_and_letters, updates_per_rollout=2, inner_epochs=2, temperature=0.8, bad_words=["!"]),
        )
        self.folder, self.losses = folder / "run", losses.sums
        self.checkpoints = {epoch: self.folder / "checkpoints" / f"epoch={epoch}.ckpt" for epoch in (0, 1)}
        model = {"class_path": "grpo_lightning.GRPOModule", "init_args": {"model": tiny_model, **MODEL, **settings}}
        content = {"trainer": {"accelerator": "cpu", "precision": precision}, "model": model}
        (self.folder / "config.yaml").write_text(yaml.safe_dump(content))
        with (self.folder / "metrics.csv").open() as file:
            self.logged = [row for row in csv.DictReader(file) if row["policy/grad_norm"]]
        self.stored = load_epoch(stored_epochs(self.folder)[1])

    def replay(self, checkpoint, stored=None):
        with run_policy(self.folder / "config.yaml", self.checkpoints[checkpoint]) as module:
            batches = update_batches(stored or self.stored, module.token_weights)
            return [replay_update(module, update) for update in batches]


@pytest.fixture(scope="module", params=["32-true", "bf16-mixed", "bf16-true"])
def far(tmp_path_factory, tiny_model, request):
    """A run whose engine returns random logprobs, so that losses and ratios are far from those of a fresh rollout."""
    return Run(tmp_path_factory.mktemp("far"), tiny_model, FakeEngine(), request.param, kl_coef=0.1)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model):
    return Run(tmp_path_factory.mktemp("run"), tiny_model, RecordingEngine())


def test_the_first_update_is_what_the_run_saw(far):
    updates = far.replay(0)
    # Two updates of one pass; the run took four steps an epoch.
    assert len(updates) == 2
    first = far.logged[4]
    assert updates[0].loss == pytest.approx(far.losses[4], rel=TOLERANCE)
    for name in RATIO:
        assert updates[0].metrics[name] == pytest.approx(float(first[name]), rel=TOLERANCE)
    # The run had taken a step before its second update, a replay takes none.
    assert updates[1].metrics["ppo/ratio_std"] != pytest.approx(float(far.logged[5]["ppo/ratio_std"]), rel=TOLERANCE)


def test_other_weights_give_other_ratios(run):
    same, other = run.replay(0)[0].metrics, run.replay(1)[0].metrics
    assert other["ppo/ratio_mean"] != pytest.approx(same["ppo/ratio_mean"], rel=TOLERANCE)
    assert "mismatch/logprob_abs_mean" in same
    assert "mismatch/logprob_abs_mean" not in other


def with_another_logprob(stored, change):
    """The epoch with the logprob of its first episode's first sampled token changed."""
    group = stored.groups[0]
    episode = group.episodes[0]
    turn, ledger = episode.turns[0], episode.ledgers[0]
    logprobs = ledger.logprobs.copy()
    logprobs[np.flatnonzero(ledger.sampled)[0]] += change
    ledger = Ledger(**{**vars(ledger), "logprobs": logprobs})
    first, *others = turn.action.token_logprobs
    turn = replace(turn, action=replace(turn.action, token_logprobs=(first + change, *others)))
    episode = Episode(**{**vars(episode), "turns": (turn,), "ledgers": (ledger,)})
    group = Group(group.task, (episode, *group.episodes[1:]), group.advantages)
    return replace(stored, groups=(group, *stored.groups[1:]))


def test_one_changed_logprob_is_seen(run):
    changed = run.replay(0, with_another_logprob(run.stored, -0.01))
    before = run.replay(0)
    assert changed[0].loss != pytest.approx(before[0].loss, rel=TOLERANCE)
    assert changed[0].metrics["ppo/ratio_std"] != pytest.approx(before[0].metrics["ppo/ratio_std"], rel=TOLERANCE)
    assert changed[1] == before[1]


def test_the_weights_that_sampled_give_ratios_of_one(run):
    assert sampling_versions(run.stored) == [4]
    for update in run.replay(0):
        assert update.metrics["ppo/ratio_std"] < 1e-5
        assert update.metrics["mismatch/logprob_abs_max"] < 1e-5
    assert run.replay(1)[0].metrics["ppo/ratio_std"] > 1e-3


def test_an_epoch_of_two_processes_is_computed_by_one(run):
    alone = run.replay(0)
    together = run.replay(0, replace(run.stored, layout=replace(run.stored.layout, micro_batches=1, processes=2)))
    for mine, expected in zip(together, alone, strict=True):
        assert mine.loss == pytest.approx(expected.loss, rel=TOLERANCE, abs=1e-9)
        assert mine.metrics == pytest.approx(expected.metrics, rel=TOLERANCE)
