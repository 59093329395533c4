"""Lightning's logger for Trackio, which keeps its runs in local SQLite files."""

import contextlib
import importlib.util
import os
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.logger import _add_prefix, _convert_params, _flatten_dict
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from grpo_lightning.errors import ConfigurationError
from grpo_lightning.redact import redact

_REMOTE_VARIABLES = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_BUCKET_ID")


class TrackioLogger(Logger):
    """Logs to Trackio: on this machine only, unless a Space is given by ``space_id``.

    See the runs with ``trackio show --project PROJECT`` (with the environment variable ``TRACKIO_DIR`` set to
    ``dir``, where one is given).

    Args:
        project: Project that the run belongs to.
        name: Name of the run; Trackio makes one up by default.
        dir: Directory of Trackio's files; Trackio's own (``TRACKIO_DIR``) by default. Trackio has one for the whole
            process.
        group: Group of runs within the project.
        resume: Whether a run of the same name is continued: ``"never"``, ``"allow"``, or ``"must"``.
        prefix: Put before the name of every metric.
        space_id: Hugging Face Space to log to. Only this makes Trackio use the network; the environment variables
            that point Trackio elsewhere have no effect here.
        private: Whether a Space that does not exist yet is made private.

    Raises:
        ConfigurationError: If trackio is not installed, or already writes to another directory in this process.
    """

    LOGGER_JOIN_CHAR = "-"

    def __init__(
        self,
        project: str,
        name: str | None = None,
        dir: str | os.PathLike[str] | None = None,
        *,
        group: str | None = None,
        resume: Literal["never", "allow", "must"] = "never",
        prefix: str = "",
        space_id: str | None = None,
        private: bool = True,
    ) -> None:
        super().__init__()
        if importlib.util.find_spec("trackio") is None:
            raise ConfigurationError("TrackioLogger needs trackio: install grpo-lightning[trackio]")
        self._project = project
        self._run_name = name
        self._dir = None if dir is None else os.fspath(dir)
        self._prefix = prefix
        self._space_id = space_id
        self._init: dict[str, Any] = {"group": group, "resume": resume, "private": private}
        self._experiment: Any = None
        if self._dir is not None:
            _use_directory(Path(self._dir).absolute())

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Trackio's `Run`; it is started when it is first asked for."""
        if self._experiment is None:
            import trackio

            with contextlib.nullcontext() if self._space_id else _local_only():
                self._experiment = trackio.init(
                    self._project,
                    self._run_name,
                    space_id=self._space_id,
                    embed=False,
                    auto_log_cpu=False,
                    auto_log_gpu=False,
                    **self._init,
                )
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log values of one step.

        Args:
            metrics: Values by name.
            step: Their step; the one after the last by default.
        """
        self.experiment.log(dict(_add_prefix(metrics, self._prefix, self.LOGGER_JOIN_CHAR)), step=step)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Add settings to the run's configuration, which Trackio stores with the first metrics.

        Args:
            params: Settings; nested names are joined by ``/``. Trackio reserves names that begin with ``_``.
            *args: Not used.
            **kwargs: Not used.
        """
        flat = _flatten_dict(redact(_convert_params(params)))
        self.experiment.config.update({k: v for k, v in flat.items() if not k.startswith("_")})

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is queued. The run can be logged to again afterwards."""
        if self._experiment is not None:
            self._experiment.finish()

    @property
    def save_dir(self) -> str | None:
        """Directory of Trackio's files, if one was given."""
        return self._dir

    @property
    def name(self) -> str:
        """The project."""
        return self._project

    @property
    def version(self) -> str | None:
        """The run: its name, which may repeat, and the beginning of its id, which does not."""
        if self._experiment is None:
            return self._run_name
        return f"{self._experiment.name}-{self._experiment.id[:8]}"


def _use_directory(path: Path) -> None:
    if "trackio" not in sys.modules:
        os.environ["TRACKIO_DIR"] = str(path)
    import trackio.utils

    current = Path(trackio.utils.TRACKIO_DIR)
    if current.absolute() != path:
        raise ConfigurationError(
            f"expected Trackio to write to {current}, as it already does in this process, but got dir={str(path)!r}; "
            "give all Trackio loggers the same dir, or set TRACKIO_DIR before Python starts"
        )


@contextlib.contextmanager
def _local_only() -> Iterator[None]:
    """Keep Trackio from following the environment to a server, and from asking the Hugging Face hub who this is."""
    import huggingface_hub.constants

    offline = huggingface_hub.constants.HF_HUB_OFFLINE
    hidden = {name: os.environ.pop(name) for name in _REMOTE_VARIABLES if name in os.environ}
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = offline
        os.environ.update(hidden)
