"""Operations of a decode step on a CPU: few library calls, each over all rows of the pass."""
