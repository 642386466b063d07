"""Speed and memory of decoding, prompts and training steps, and the limits of the machine."""
