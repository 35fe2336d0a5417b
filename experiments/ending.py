"""How a script ends that was given something it cannot use, or was interrupted."""

import contextlib
import sys
from collections.abc import Iterator

from ppo_jax.errors import InputError


@contextlib.contextmanager
def told_in_one_line(interrupted: str = "interrupted") -> Iterator[None]:
    """Ends the process, where what is done within fails by a mistake in the input: one line, and exit status 1.

    Args:
        interrupted: the line for Ctrl-C, whose exit status is 130.
    """
    try:
        yield
    except (InputError, OSError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        sys.exit(130)
