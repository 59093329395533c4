import os
import re
from dataclasses import replace

import numpy as np
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from made_epochs import epochs, made_epoch, same
from pyarrow.parquet import read_table, write_table

from grpo_lightning.errors import ConfigurationError, WriteError
from grpo_lightning.rollout.episode import Episode, Group
from grpo_lightning.trajectories.exact_json import NotStored
from grpo_lightning.trajectories.store import load_epoch, stored_epochs, write_epoch, write_log_ratios
from grpo_lightning.trajectories.tables import FORMAT, METADATA

FILES = ["episodes.parquet", "groups.parquet", "tokens.parquet", "turns.parquet"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def rows(stored):
    return sum(len(ledger) for group in stored.groups for e in group.episodes for ledger in e.ledgers)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(epochs())
def test_an_epoch_comes_back_in_every_bit(tmp_path, stored):
    assert same(load_epoch(write_epoch(tmp_path, stored)), stored)


def test_episodes_that_never_began_and_groups_without_any(tmp_path):
    broken = Episode((), (), {}, None, "error", "ConnectionError: refused", attempts=3)
    task = made_epoch().groups[0].task
    stored = made_epoch(groups=0, log_ratios=np.empty(0))
    for groups in [(), (Group(task, ()),), (Group(task, (broken, broken), ((), ())), Group(task, (broken,)))]:
        path = write_epoch(tmp_path, replace(stored, groups=groups))
        assert same(load_epoch(path).groups, groups)


def test_task_data_of_any_kind(tmp_path):
    stored = made_epoch(groups=1)
    task = replace(stored.groups[0].task, data={"answer": np.float32(0.1), "grid": np.eye(2), "checker": print})
    loaded = load_epoch(write_epoch(tmp_path, replace(stored, groups=(replace(stored.groups[0], task=task),))))
    data = loaded.groups[0].task.data
    assert same(data["answer"], np.float32(0.1))
    assert same(data["grid"], np.eye(2))
    assert data["checker"] == NotStored("builtins.builtin_function_or_method", "<built-in function print>")


def test_tables_that_other_tools_can_ask(tmp_path):
    stored = made_epoch(groups=2, episodes=3, turns=2, tokens=4)
    path = write_epoch(tmp_path, stored)
    assert path == tmp_path / "trajectories" / "epoch-00000"
    assert names(path) == FILES
    tokens = read_table(path / "tokens.parquet").to_pylist()
    sampled = [row for row in tokens if row["source"] == "sampled"]
    assert len(sampled) == 2 * 3 * 2 * 4
    others = [row for row in tokens if row["source"] != "sampled"]
    assert {(row["logprob"], row["policy_version"]) for row in others} == {(None, None)}
    action = stored.groups[1].episodes[2].turns[1].action
    last = [row for row in sampled if (row["group"], row["episode"], row["turn"]) == (1, 2, 1)]
    assert tuple(row["token_id"] for row in last) == action.token_ids
    assert tuple(row["logprob"] for row in last) == action.token_logprobs
    turn = read_table(path / "turns.parquet").to_pylist()[-1]
    assert (turn["text"], turn["messages"]) == ("the answer is 4", '{"$tuple":[{"role":"user","content":"and?"}]}')


def test_log_ratios_come_later(tmp_path):
    stored = made_epoch()
    path = write_epoch(tmp_path, stored)
    assert load_epoch(path).log_ratios is None
    log_ratios = np.linspace(-1, 1, rows(stored))
    log_ratios[::3] = np.nan
    write_log_ratios(path, log_ratios)
    assert names(path) == sorted([*FILES, "log_ratios.parquet"])
    assert same(load_epoch(path), replace(stored, log_ratios=log_ratios))


def test_log_ratios_of_other_tokens_are_refused(tmp_path):
    path = write_epoch(tmp_path, made_epoch(log_ratios=np.zeros(3)))
    message = f"expected one log-ratio for each of the {rows(made_epoch())} tokens, but {path / 'log_ratios.parquet'}"
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        load_epoch(path)


def test_written_again_it_is_replaced_whole(tmp_path):
    path = write_epoch(tmp_path, made_epoch(log_ratios=np.zeros(rows(made_epoch()))))
    again = made_epoch(groups=1)
    assert write_epoch(tmp_path, again) == path
    assert same(load_epoch(path), again)
    assert names(tmp_path / "trajectories") == ["epoch-00000"]


def test_epochs_of_a_run_in_order(tmp_path):
    assert stored_epochs(tmp_path) == {}
    for epoch in (100_000, 12, 3):
        write_epoch(tmp_path, made_epoch(epoch=epoch))
    (tmp_path / "trajectories" / ".epoch-00004.abc.tmp").mkdir()
    (tmp_path / "trajectories" / "notes").mkdir()
    assert list(stored_epochs(tmp_path)) == [3, 12, 100_000]
    assert load_epoch(stored_epochs(tmp_path)[12]).origin.epoch == 12


def test_a_full_disk_leaves_what_was_there(full_disk):
    path = write_epoch(full_disk, made_epoch())
    with pytest.raises(WriteError, match=re.escape(f"could not write {path}: ")):
        write_epoch(full_disk, made_epoch(groups=40, episodes=40, tokens=200))
    with pytest.raises(WriteError, match=re.escape(f"could not write {path / 'log_ratios.parquet'}: ")):
        write_log_ratios(path, np.random.default_rng(0).normal(size=1_000_000))
    assert names(full_disk / "trajectories") == ["epoch-00000"]
    assert same(load_epoch(path), made_epoch())


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    abandoned = tmp_path / "trajectories" / ".epoch-00000.12345678.tmp"
    abandoned.mkdir(parents=True)
    (abandoned / "tokens.parquet").write_bytes(b"half")
    write_epoch(tmp_path, made_epoch())
    assert names(tmp_path / "trajectories") == ["epoch-00000"]


class TestRefused:
    @pytest.fixture
    def path(self, tmp_path):
        return write_epoch(tmp_path, made_epoch(groups=4, episodes=8, tokens=20))

    def refused(self, path, *parts):
        with pytest.raises(ConfigurationError) as raised:
            load_epoch(path)
        for part in parts:
            assert str(part) in str(raised.value)

    def rewrite(self, path, change, metadata=None):
        table = change(read_table(path))
        write_table(table if metadata is None else table.replace_schema_metadata(metadata), path)

    def test_nothing_there(self, tmp_path):
        self.refused(tmp_path / "none", f"expected a stored epoch, but there is no folder {tmp_path / 'none'}")

    @pytest.mark.parametrize("name", FILES)
    def test_a_file_is_missing(self, path, name):
        (path / name).unlink()
        self.refused(path, f"expected {path / name}, but there is no such file")

    @pytest.mark.parametrize("name", FILES)
    @pytest.mark.parametrize("content", [b"", b"PAR1", b"not a table"])
    def test_no_parquet(self, path, name, content):
        (path / name).write_bytes(content)
        self.refused(path, f"expected a file of stored trajectories, but cannot read {path / name}: ")

    def test_cut_off(self, path):
        os.truncate(path / "tokens.parquet", 500)
        self.refused(path, f"cannot read {path / 'tokens.parquet'}: ")

    def test_a_single_wrong_bit_in_the_data(self, path):
        content = bytearray((path / "tokens.parquet").read_bytes())
        content[len(content) // 3] ^= 1
        (path / "tokens.parquet").write_bytes(content)
        self.refused(path, f"cannot read {path / 'tokens.parquet'}: ")

    def test_a_table_of_something_else(self, path):
        write_table(pyarrow.table({"prompt": ["a"]}), path / "turns.parquet")
        self.refused(path, f"expected a file of stored trajectories, but {path / 'turns.parquet'} is of something else")

    def test_a_later_format(self, path):
        metadata = read_table(path / "groups.parquet").schema.metadata
        later = metadata[METADATA].replace(f'"format":{FORMAT}'.encode(), f'"format":{FORMAT + 1}'.encode())
        assert later != metadata[METADATA]
        self.rewrite(path / "groups.parquet", lambda table: table, {METADATA: later})
        expected = (
            f"expected trajectories stored in format {FORMAT} or before, but {path / 'groups.parquet'} is in format"
        )
        self.refused(path, expected, "update grpo-lightning")

    def test_a_column_is_missing(self, path):
        self.rewrite(path / "tokens.parquet", lambda table: table.drop_columns(["logprob"]))
        self.refused(path, "expected the columns", path / "tokens.parquet")

    def test_rows_were_taken_out(self, path):
        self.rewrite(path / "tokens.parquet", lambda table: table.slice(0, table.num_rows - 5))
        self.refused(path, f"expected the tables in {path} to fit each other, but an action of 20 tokens has only 17")

    def test_episodes_were_taken_out(self, path):
        self.rewrite(path / "episodes.parquet", lambda table: table.slice(1))
        self.refused(
            path, f"expected the tables in {path} to fit each other, but there are rows of the episodes [(0, 0)"
        )

    def test_tables_of_two_epochs(self, path, tmp_path):
        other = write_epoch(tmp_path, made_epoch(groups=4, episodes=8, tokens=20, epoch=1))
        (other / "turns.parquet").rename(path / "turns.parquet")
        self.refused(path, f"expected the tables in {path} to fit each other, but the tables are of different epochs")
