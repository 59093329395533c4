"""``export``: a run's policy for other tools."""

import argparse
from pathlib import Path

from grpo_lightning.errors import ConfigurationError


def main(command: str, args: list[str]) -> None:
    """Write the policy of a run or checkpoint to a folder."""
    parser = argparse.ArgumentParser(
        "grpo-lightning export", description="Write the policy of a run or checkpoint for other tools."
    )
    parser.add_argument("source", type=Path, help="folder of a run, or a checkpoint")
    parser.add_argument("target", type=Path, help="folder to write")
    parser.add_argument("--merged", action="store_true", help="the whole model, with the adapter merged into it")
    parser.add_argument("--dtype", help="dtype of the merged weights, for example bfloat16; the model's by default")
    given = parser.parse_args(args)
    if not given.source.exists():
        raise ConfigurationError(f"expected a run's folder or a checkpoint, but there is nothing at {given.source}")
    from grpo_lightning.export import export

    notes = export(given.source, given.target, merged=given.merged, dtype=given.dtype)
    print(given.target, *notes, sep="\n")
