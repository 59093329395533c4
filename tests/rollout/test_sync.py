from types import SimpleNamespace

import pytest

from grpo_lightning.callbacks import LoRAWeightSync
from grpo_lightning.errors import ConfigurationError, StaleRolloutError
from grpo_lightning.rollout.engine import EngineSpec
from grpo_lightning.rollout.sync import sync_engine
from grpo_lightning.rollout.types import AdapterRef


class Sync(LoRAWeightSync):
    """Publishes an empty adapter of the module's version, or of another one."""

    def __init__(self, folder, version=None, **settings):
        super().__init__(**settings)
        (folder / "adapter_config.json").write_text("{}")
        self._folder, self._version = folder, version

    def publish(self, module, engine):
        version = module.policy_version if self._version is None else self._version
        engine.load_adapter(AdapterRef(f"v{version}", version + 1, self._folder, version))


@pytest.fixture
def engine(fake_engine):
    fake_engine.start(EngineSpec("model", 4, 64, 4))
    return fake_engine


def served(engine, sync, versions):
    result = []
    for version in versions:
        sync_engine(engine, SimpleNamespace(policy_version=version), sync)
        result.append(engine.policy_version)
    return result


@pytest.mark.parametrize(
    ("lag", "expected"), [(0, [0, 1, 2, 3, 4, 5]), (1, [0, 0, 2, 2, 4, 4]), (2, [0, 0, 0, 3, 3, 3])]
)
def test_the_engine_may_be_as_old_as_declared(engine, tmp_path, lag, expected):
    sync = Sync(tmp_path, max_lag=lag)
    assert served(engine, sync, range(6)) == expected
    assert [ref.version for ref in engine.loads] == sorted(set(expected))


def test_an_engine_that_is_ahead_is_synced_as_well(engine, tmp_path):
    assert served(engine, Sync(tmp_path, max_lag=5), [7, 3]) == [7, 3]


def test_older_than_declared_is_refused(engine, tmp_path):
    with pytest.raises(
        StaleRolloutError,
        match=r"serves policy version 2, but the trainer is at version 5 and may be "
        r"ahead by 2: .* Sync.publish did not load",
    ):
        served(engine, Sync(tmp_path, version=2, max_lag=2), [5])
    assert served(engine, Sync(tmp_path, version=2, max_lag=2), [4]) == [2]


def test_without_a_sync(engine):
    with pytest.raises(StaleRolloutError, match=r"trainer is at version 0: training .* add one"):
        served(engine, None, [0])


def test_a_negative_lag_is_refused():
    with pytest.raises(ConfigurationError, match="expected max_lag >= 0, but got -1"):
        LoRAWeightSync(max_lag=-1)
