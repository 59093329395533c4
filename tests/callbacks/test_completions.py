from dataclasses import replace

import pytest
from fakes import make_episode, make_group, make_task
from lightning.pytorch.loggers import TensorBoardLogger
from short_run import short_run

from grpo_lightning.callbacks import CompletionLog
from grpo_lightning.callbacks.completions import completion_table
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.rollout.episode import Episode, Group
from grpo_lightning.rollout.ledger import Source
from grpo_lightning.rollout.types import Action


def group(name, *rewards):
    episodes = [make_episode([5 + i], reward, rewards={"len": reward}) for i, reward in enumerate(rewards)]
    return make_group(episodes, [0.5] * len(rewards), name)


def test_the_best_and_the_worst_groups_come_first():
    groups = [group("b", 2.0, 2.0), group("a", 3.0, 3.0), group("d", 0.0, 0.0), group("c", 1.0, 1.0)]
    table = completion_table(groups, epoch=3, rows=100)
    assert table.name == "completions"
    assert table.columns == ("epoch", "task", "prompt", "completion", "reward", "advantage", "reward/len")
    assert [row[1] for row in table.rows] == ["a", "a", "d", "d", "b", "b", "c", "c"]
    assert table.rows[0] == (3, "a", "user: ?", "5", 3.0, 0.5, 3.0)


@pytest.mark.parametrize(("rows", "expected"), [(1, ["a"]), (3, ["a", "a", "c"]), (99, ["a", "a", "c", "c", "b", "b"])])
def test_rows_bound_the_table(rows, expected):
    groups = [group("a", 3.0, 3.0), group("b", 2.0, 2.0), group("c", 1.0, 1.0)]
    assert [row[1] for row in completion_table(groups, epoch=0, rows=rows).rows] == expected


def test_what_could_not_be_scored_comes_last_and_is_empty():
    failed = make_group([make_episode([5], None, rewards={})], [0.0], "failed")
    table = completion_table([failed, group("good", 1.0)], epoch=0, rows=9)
    assert [(row[1], row[4], row[6]) for row in table.rows] == [("good", 1.0, 1.0), ("failed", None, None)]


def test_an_advantage_a_turn_where_they_differ():
    episode = make_episode([5], 1.0)
    turn = episode.turns[0]
    forced = replace(turn, action=Action("7", (7,), (), 0.0, True, "stop", -1))
    ledger = episode.ledgers[0].extended([7], Source.FORCED, 1)
    played = replace(episode, turns=(turn, forced), ledgers=(ledger,))
    broken = Episode((), (), {}, None, "error", "no route")
    for advantages, shown in (((0.5, 0.5), 0.5), ((0.5, -0.5), [0.5, -0.5]), ((0.0, 0.0), 0.0)):
        made = Group(make_task("a"), (played, broken), (advantages, ()))
        rows = completion_table([made], epoch=0, rows=9).rows
        assert [(row[3], row[4], row[5]) for row in rows] == [("5", 1.0, shown), ("", None, 0.0)]
        # Nothing was said in a broken episode, but its task is known.
        assert rows[1][2] == "user: a?"


def test_negative_rows_are_refused():
    with pytest.raises(ConfigurationError, match="expected rows >= 0, but got -1"):
        CompletionLog(rows=-1)


def test_no_table_without_rows(tmp_path, tiny_model):
    logger = TensorBoardLogger(tmp_path)
    short_run(tiny_model, tmp_path, logger, callbacks=[CompletionLog(rows=0)])
    assert not any(b"text_summary" in path.read_bytes() for path in tmp_path.rglob("events.out.*"))


class Broken(TensorBoardLogger):
    """A logger whose tool takes no text."""

    @property
    def experiment(self):
        writer = super().experiment
        writer.add_text = self.refuse
        return writer

    def refuse(self, *args):
        raise ValueError("no text here")


def test_a_run_goes_on_when_a_logger_refuses_tables(tmp_path, tiny_model):
    with pytest.warns(UserWarning, match="Broken did not take the table 'completions'.*no text here") as caught:
        trainer = short_run(tiny_model, tmp_path, Broken(tmp_path), callbacks=[CompletionLog()], max_epochs=2)
    assert trainer.global_step == 2
    assert sum("did not take the table" in str(w.message) for w in caught) == 1
