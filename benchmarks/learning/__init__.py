"""How well each algorithm learns, on a task and a model that are small enough for one processor core."""
