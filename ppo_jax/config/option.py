"""Settings that document themselves."""

import dataclasses
from typing import Any


def option(default: Any, help: str) -> Any:
    """A dataclass field that documents itself: `--print_config` shows the help."""
    return dataclasses.field(default=default, metadata={"help": help})
