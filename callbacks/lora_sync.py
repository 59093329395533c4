"""Publishing the adapter to the rollout engine."""

import itertools
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch import Callback, LightningModule, Trainer

from grpo_lightning.adapters import save_adapter
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.rollout.engine import FullWeightsEngine
from grpo_lightning.rollout.types import AdapterRef

if TYPE_CHECKING:
    from grpo_lightning.module import GRPOModule
    from grpo_lightning.rollout.engine import RolloutEngine

_TMPFS = Path("/dev/shm")


class LoRAWeightSync(Callback):
    """Publishes the policy's adapter: written once as float32, loaded once, under a name that is never reused.

    With full fine-tuning there is no adapter: the engine gets all weights, in memory.

    The data module calls `publish` before it generates, and only if the engine is too far behind; no Lightning hook
    comes at the right time for training, validation and resuming alike.

    Args:
        adapter_dir: Directory for the published adapters, visible to trainer and engine; memory (tmpfs) where there
            is one by default.
        max_lag: Changes of the policy, mostly optimizer steps, by which the engine may be behind when it generates,
            also for validation. 0 publishes before every rollout; with more a publication serves several of them.

    Attributes:
        latest: What was published last; None before that, and with full fine-tuning.

    Raises:
        ConfigurationError: If ``max_lag`` is negative.
    """

    def __init__(self, adapter_dir: str | None = None, max_lag: int = 0) -> None:
        if max_lag < 0:
            raise ConfigurationError(f"expected max_lag >= 0, but got {max_lag}")
        self.max_lag = max_lag
        self.latest: AdapterRef | None = None
        self._parent = adapter_dir
        self._directory: Path | None = None
        self._run = secrets.token_hex(4)
        # vLLM keeps an adapter silently if its id is known: ids start at random and only grow.
        self._ids = itertools.count(secrets.randbits(20) * 1000 + 1)

    def publish(self, module: "GRPOModule", engine: "RolloutEngine") -> None:
        """Write the adapter as it is now and have the engine load it. The previous one is deleted afterwards."""
        version = module.policy_version
        if not module.policy.has_adapter:
            assert isinstance(engine, FullWeightsEngine), "checked before the engine starts"
            engine.load_weights({n: p.detach() for n, p in module.policy.trainable_parameters().items()}, version)
            return
        number = next(self._ids)
        name = f"{self._run}-v{version}-{number}"
        previous = list(self._root().iterdir())
        path = self._root() / name
        save_adapter(module.policy, path)
        self.latest = AdapterRef(name, number, path, version)
        engine.load_adapter(self.latest)
        for old in previous:
            shutil.rmtree(old, ignore_errors=True)

    def _root(self) -> Path:
        if self._directory is None:
            parent = self._parent
            if parent is None and _TMPFS.is_dir():
                parent = str(_TMPFS)
            elif parent is not None:
                Path(parent).mkdir(parents=True, exist_ok=True)
            self._directory = Path(tempfile.mkdtemp(prefix="grpo-lightning-", dir=parent))
        return self._directory

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Delete what was published: the engine is gone."""
        self._clean()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same after an exception."""
        self._clean()

    def _clean(self) -> None:
        self.latest = None
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None
