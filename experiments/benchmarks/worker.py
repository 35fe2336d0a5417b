"""The process of one side of a comparison: prepares, and measures once for each line that it reads."""

import importlib
import json
import os
import sys


def main(side: dict) -> None:
    """Answers on the standard output, a line of JSON each; what libraries print there goes to the standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    module, _, name = side["function"].partition(":")
    measure = getattr(importlib.import_module(module), name)(**side["arguments"])
    if side["warm_up"]:
        measure()
    answers.write(json.dumps({"ready": True}) + "\n")
    for _ in sys.stdin:
        answers.write(json.dumps(measure()) + "\n")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
