"""From a command's function to its exit code: every expected error is one line on stderr."""

import argparse
import asyncio
import os
import sys

from hotweights.cli.errors import CommandFailed
from hotweights.cli.output import one_line
from hotweights.wire.access import BadAccess
from hotweights.wire.endpoint import BadEndpoint
from hotweights.wire.errors import HotweightsError
from hotweights.worker_client.config import BadSetting

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_CLOSED_PIPE = 1, 2, 130, 141


def run_command(arguments: argparse.Namespace) -> int:
    """Runs `arguments.run`, a function or a coroutine function that returns the exit code."""
    try:
        outcome = arguments.run(arguments)
        code = asyncio.run(outcome) if asyncio.iscoroutine(outcome) else outcome
        sys.stdout.flush()
    except BrokenPipeError:
        # Nobody reads on. What Python would still flush at exit goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_CLOSED_PIPE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except CommandFailed as error:
        return _tell(error, error.exit_code)
    except (BadAccess, BadEndpoint, BadSetting) as error:
        return _tell(error, EXIT_USAGE)
    except (HotweightsError, OSError) as error:
        return _tell(error, EXIT_FAILED)
    assert isinstance(code, int)
    return code


def _tell(error: Exception, exit_code: int) -> int:
    print(f"hotweights: {one_line(str(error))}", file=sys.stderr)
    return exit_code
