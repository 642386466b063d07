"""Work captured as CUDA graphs, and how long each takes."""

import statistics
from collections.abc import Callable, Sequence

import torch

WARMUP, REPEATS = 5, 40


def capture(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """A graph of `run`, which is called once before, to compile."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


class Timer:
    """Seconds between events around pieces of work, read when all of them are done."""

    def __init__(self) -> None:
        self.marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def run(self, work: Callable[[], None]) -> None:
        """Put `work` between two events."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        self.marks.append((begin, end))

    def seconds(self) -> list[float]:
        """Seconds of every piece, in order."""
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in self.marks]


def median_seconds(graphs: Sequence[torch.cuda.CUDAGraph]) -> list[float]:
    """Median seconds of each graph; they take turns, so that all see the same clocks."""
    timers = [Timer() for _ in graphs]
    for _ in range(WARMUP + REPEATS):
        for timer, graph in zip(timers, graphs, strict=True):
            timer.run(graph.replay)
    return [statistics.median(timer.seconds()[WARMUP:]) for timer in timers]
