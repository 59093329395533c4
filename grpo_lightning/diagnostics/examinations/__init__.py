"""The doctor's parts, each seeing another side of a run."""
