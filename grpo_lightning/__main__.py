"""``python -m grpo_lightning``: the same as ``grpo-lightning``."""

import sys

from grpo_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
