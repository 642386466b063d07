"""Speed and memory of decoding, prompts and training steps, and what the machine allows."""
