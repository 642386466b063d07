"""Compiling many kernels at once: a pass compiles them one after the other, each for a second."""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import triton
from triton import JITFunction

# a fifth of a compilation holds Python's lock: more threads than this would wait for each other
MOST_THREADS = 8


@contextmanager
def compiled_together() -> Iterator[None]:
    """Compile the kernels that this thread launches in the block, several at once, and run none.

    All are ready at the end of the block. What a kernel would have written is not there, so
    nothing in the block may depend on it. A Triton that cannot do that runs the block as it is.
    """
    mode = getattr(triton, "AsyncCompileMode", None)
    if mode is None:
        yield
        return
    run, owner = JITFunction.run, threading.get_ident()

    def compiled(self: JITFunction, *args: object, warmup: bool, **options: object) -> object:
        # other threads go on with what they do
        warmup = warmup or threading.get_ident() == owner
        return run(self, *args, warmup=warmup, **options)

    workers = min(MOST_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool, mode(pool):
        JITFunction.run = compiled
        try:
            yield
        finally:
            JITFunction.run = run
