"""`evalkit` and `python -m evalkit`: run the command line, and turn every expected failure into one clear line."""

import errno
import os
import signal
import sys


class _Interrupted(BaseException):
    """Ctrl-C or SIGTERM, under a name that the command-line library does not turn into its own message."""


def _interrupt(*_: object) -> None:
    raise _Interrupted


def main() -> None:
    """Exit codes: 0 done, 2 wrong usage or input (one line on standard error), and `check` adds 1 and 3;
    EVALKIT_DEBUG=1 shows the traceback."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    # Threads that spin while they wait make torch four times slower on a CPU that has anything else to do.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        from evalkit.commands import app

        app()
    except _Interrupted:
        _say("interrupted; what is scored so far is kept, and the same command goes on from there")
    except (ImportError, ValueError, OSError) as error:
        if os.environ.get("EVALKIT_DEBUG"):
            raise
        _say(_os_line(error) if isinstance(error, OSError) else " ".join(str(error).split()))
    sys.exit(2)


def _os_line(error: OSError) -> str:
    where = f": {error.filename}" if error.filename else ""
    fix = (
        "; free some space and run the same command again, what is scored so far is kept"
        if error.errno == errno.ENOSPC
        else ""
    )
    return f"{error.strerror or error}{where}{fix}"


def _say(line: str) -> None:
    print(f"evalkit: {line}", file=sys.stderr)


if __name__ == "__main__":
    main()
