"""The same faulty and healthy runs, shown to other tools that watch GRPO runs."""
