"""Other trainers' logs: what a table of scalars can tell of a run, after it."""
