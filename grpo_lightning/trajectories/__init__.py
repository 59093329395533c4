"""What a run sampled, stored by epoch: written, loaded, replayed and looked at."""
