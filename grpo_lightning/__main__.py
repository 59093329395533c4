"""``grpo-lightning`` and ``python -m grpo_lightning``."""

import sys


def main() -> None:
    """Run the command line."""
    from grpo_lightning.cli import run

    run(sys.argv[1:])


if __name__ == "__main__":
    main()
