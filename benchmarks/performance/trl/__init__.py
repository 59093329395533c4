"""Against TRL's `GRPOTrainer`: the same model, prompts, samples, lengths and updates on the same machine, in turns."""
