"""Training: losses, mixer alignment, the distillation loop, what the TRL stages share."""
