"""The losses and advantages of TRL and of this project on the same tensors."""
