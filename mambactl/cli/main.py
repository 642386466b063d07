"""The entry point: signals and every exception become one message and one documented exit code."""

import errno
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from mambactl.console import PLAIN_ERRORS, printable, secure_streams, set_verbosity
from mambactl.errors import ExitCode, MambactlError, UsageError
from mambactl.foreign import is_panic, reason
from mambactl.ranks import REPORTS, child_environment, is_main, launched, rank
from mambactl.requirements import extra_of, outside

MEMORY_SIGNS = ("can't allocate memory", "CUDA out of memory", "std::bad_alloc")
# what a process meets when another one of its run ends without a word
ECHO_SIGNS = (
    "losed by peer",
    "reset by peer",
    "remote process exited",
    "got 0 bytes",
    "roken pipe",
)
# seconds in which the main process of a run says itself what all of them met
PATIENCE = 10.0
# exit code of a command that a signal stopped, less the signal's number
STOPPED = 128
# seconds in which such a command undoes what it was at, and in which its process ends after that
UNDOING, ENDING = 10.0, 5.0
_PANIC_HINT = "the tokenizer.json of the checkpoint may be damaged: fetch it again"
DISK_SIGNS = ("No space left on device", "Disk quota exceeded")


class Stopped(KeyboardInterrupt):
    """The first SIGINT or SIGTERM; it unwinds the stack so that half-written files are removed."""


def main() -> NoReturn:
    """Run the command line and exit with its documented code."""
    # idle threads that spin make torch on a busy machine several times slower; read at its import
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # for what libraries start: `python -c` takes modules from the current folder otherwise
    os.environ.update(child_environment())
    secure_streams()
    code = run(sys.argv[1:])
    if code > STOPPED:
        # exit waits for threads, and up to 300 s for the compilers' pool
        _end_in(ENDING, code)
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run one command line in this process and return its exit code; messages go to stderr."""
    set_verbosity(1)
    stopped: list[int] = []
    failure: BaseException | None = None
    code: int = ExitCode.DONE
    try:
        with _stopping(stopped, arguments):
            code = _invoke(arguments)
    except SystemExit as error:
        # completion and Typer's own exits
        code = error.code if isinstance(error.code, int) else int(bool(error.code))
    except BaseException as error:
        failure = error
    if stopped:
        return _report_stop(stopped[0], failure, arguments)
    if failure is not None:
        return _report(failure, *explain(failure), arguments)
    return code


def explain(error: BaseException) -> tuple[int, str, str | None]:
    """Return exit code, sentence and hint for an exception."""
    if isinstance(error, MambactlError):
        return error.code, str(error), error.hint
    chain = list(_chain(error))
    text = " ".join(str(link) for link in chain)
    if any(_is_memory(link) for link in chain):
        return ExitCode.RESOURCE, "out of memory", "smaller --batch-size, --max-length or --dtype"
    full = any(isinstance(link, OSError) and link.errno == errno.ENOSPC for link in chain)
    if full or any(sign in text for sign in DISK_SIGNS):
        return ExitCode.RESOURCE, f"the disk is full: {error}", "free space, or use another -o"
    if isinstance(error, ModuleNotFoundError) and (extra := extra_of(error.name)):
        return ExitCode.RESOURCE, f"{error.name} is missing", extra.line
    if panic := next((link for link in chain if is_panic(link)), None):
        # of the tokenizer, whose file holds expressions that it may fail on at any text
        return ExitCode.MODEL, f"a library failed on its input ({reason(panic)})", _PANIC_HINT
    if format_message := getattr(error, "format_message", None):
        # a command line that Typer could not parse
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "mambactl"
        if (typed := getattr(error, "option_name", None)) and context is not None:
            from mambactl.cli.spellings import meant

            if known := meant(typed, context.command.params):
                return ExitCode.USAGE, f"{command} has no {typed}", f"did you mean {known}?"
        return ExitCode.USAGE, format_message(), f"{command} --help"
    said = f"{type(error).__name__}: {error}"
    if wrong := next(outside(), None):
        # what another version lacks, or has by another name, is no bug
        said = f"{said} (mambactl needs {wrong.package}{wrong.needed}, not {wrong.installed})"
        return ExitCode.RESOURCE, said, wrong.line
    return ExitCode.BUG, said, "this is a bug: please report it"


def _require_text(arguments: list[str]) -> None:
    """Raise UsageError for an argument of bytes that are no text: no result could repeat it."""
    for word in arguments:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise UsageError(f"{ascii(word)} is not UTF-8 text", "rename the file") from None


def _invoke(arguments: list[str]) -> int:
    from mambactl.cli.app import make_app
    from mambactl.console import guarded_stdout

    _require_text(arguments)
    words = arguments
    if os.environ.get("_MAMBACTL_COMPLETE"):
        # the line that a shell completes; the last word of it is not yet whole
        _join_words()
        line = os.environ.get("COMP_WORDS", os.environ.get("_TYPER_COMPLETE_ARGS", ""))
        words = line.split()[1:]
    app = make_app(words[0] if words else None)
    if not arguments and not os.environ.get("_MAMBACTL_COMPLETE"):
        with guarded_stdout():
            app(["--help"], prog_name="mambactl", standalone_mode=False)
        return ExitCode.USAGE
    result = app(arguments, prog_name="mambactl", standalone_mode=False)
    return result if isinstance(result, int) else ExitCode.DONE


def _join_words() -> None:
    """Join what bash broke at @, = and : on the line that it completes."""
    if os.environ["_MAMBACTL_COMPLETE"] != "complete_bash":
        return
    from mambactl.cli.suggestions import PREFIX, joined_words

    words = os.environ.get("COMP_WORDS", "").split("\n")
    if len(words) > 1 and (number := os.environ.get("COMP_CWORD", "")).isdecimal():
        joined, current, prefix = joined_words(words, int(number))
        os.environ |= {"COMP_WORDS": "\n".join(joined), "COMP_CWORD": str(current), PREFIX: prefix}


@contextmanager
def _stopping(stopped: list[int], arguments: list[str]) -> Iterator[None]:
    left = threading.Event()

    def insist() -> None:
        # a library may have swallowed `Stopped`
        if not left.wait(UNDOING):
            os._exit(_report_stop(stopped[0], None, arguments))

    def handler(number: int, frame: FrameType | None) -> None:
        if stopped:
            os._exit(STOPPED + number)
        stopped.append(number)
        threading.Thread(target=insist, name="stopping", daemon=True).start()
        raise Stopped(signal.Signals(number).name)

    before = {n: signal.signal(n, handler) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        left.set()
        for number, previous in before.items():
            signal.signal(number, previous)


def _end_in(seconds: float, code: int) -> None:
    def end() -> None:
        time.sleep(seconds)
        os._exit(code)

    threading.Thread(target=end, name="ending", daemon=True).start()


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_memory(error: BaseException) -> bool:
    # torch has its own class, which must not be imported here
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in MEMORY_SIGNS)


def _report_stop(number: int, failure: BaseException | None, arguments: list[str]) -> int:
    from mambactl.cli.app import continues

    again = continues(arguments)
    hint = "run it again; --resume continues where it stopped" if again else "run it again"
    message = f"stopped by {signal.Signals(number).name}"
    return _report(failure, STOPPED + number, message, hint, arguments)


def _report(
    error: BaseException | None, code: int, message: str, hint: str | None, arguments: list[str]
) -> int:
    if (trace := _trace(error, code)) and not launched():
        sys.stderr.write(printable(trace))
    if launched() and not _heard(error, code, message, hint, trace):
        return int(code)
    if "--json" in arguments and PLAIN_ERRORS not in os.environ:
        made = getattr(error, "made", {})
        lines = [json.dumps({"error": message, "hint": hint, "code": int(code), **made})]
    else:
        lines = [f"error: {message}"] + ([f"hint: {hint}"] if hint else [])
    sys.stderr.write(printable("\n".join(lines)) + "\n")
    return int(code)


def _trace(error: BaseException | None, code: int) -> str:
    """A traceback for bugs, and for who asks for it."""
    if error is None or not (code == ExitCode.BUG or os.environ.get("MAMBACTL_DEBUG") == "1"):
        return ""
    import traceback

    # of one of several processes, it came with what that one reported
    return getattr(error, "trace", None) or "".join(traceback.format_exception(error))


def _heard(
    error: BaseException | None, code: int, message: str, hint: str | None, trace: str
) -> bool:
    """True if one of several processes has to print its failure itself."""
    echo = code == ExitCode.BUG and any(
        sign in str(link) for link in _chain(error) for sign in ECHO_SIGNS
    )
    if (folder := os.environ.get(REPORTS)) is not None:
        # whoever started all of them prints one of the reports
        report = {"code": int(code), "message": message, "hint": hint, "trace": trace, "echo": echo}
        with open(os.path.join(folder, f"{rank()}.json"), "w", encoding="utf-8") as file:
            json.dump(report, file)
        return False
    if echo:
        sys.stderr.write("stopped: another process of this run ended\n")
        return False
    if not is_main():
        if code > ExitCode.CHECK:
            # stopped: the main one is as well, and says so
            return False
        # most failures are those of all; what started them ends this one when the main one ends
        time.sleep(PATIENCE)
    sys.stderr.write(printable(trace))
    return True
