"""One signal ends a process with its code, whatever a library does with it or at exit."""

import os
import signal
import subprocess
import sys
import time

import pytest

SWALLOWED = """
        try:
            ready()
        except BaseException:
            pass
        ready()
"""
SLOW_EXIT = """
        # as the pool of the compilers does
        atexit.register(time.sleep, 300)
        threading.Thread(target=time.sleep, args=(300,)).start()
        ready()
"""


@pytest.mark.parametrize("body", [SWALLOWED, SLOW_EXIT], ids=["swallowed", "slow-exit"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_is_enough(body, number) -> None:
    script = f"""if True:
    import atexit, threading, time
    import mambactl.cli.main as entry

    def ready():
        print("ready", flush=True)
        time.sleep(300)

    def work(arguments):
{body}

    entry._invoke, entry.UNDOING, entry.ENDING = work, 0.3, 0.3
    entry.main()
    """
    command = [sys.executable, "-c", script, "sft"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        began = time.monotonic()
        process.send_signal(number)
        try:
            assert process.wait(20) == 128 + number
        finally:
            process.kill()
        assert time.monotonic() - began < 15
        told = process.stderr.read()
    assert f"stopped by {number.name}" in told and "--resume" in told
    assert told.count("error:") == 1
