"""``grpo-lightning`` and ``python -m grpo_lightning``."""


def main() -> None:
    """Run the command line."""
    from grpo_lightning.cli import run

    run()


if __name__ == "__main__":
    main()
