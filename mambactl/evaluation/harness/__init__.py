"""lm-evaluation-harness in process: tasks, prompts, scores."""
