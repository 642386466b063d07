"""Training: losses, mixer alignment, the distillation loop, shared parts of the TRL stages."""
