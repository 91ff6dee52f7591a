"""The child of `CodeReward`: runs one program under limits; a file that imports the standard library only."""

import contextlib
import json
import os
import resource
import sys


def main() -> None:
    """Read {code, tests, password, limits} from stdin; write the password to the descriptor that is named first."""
    task = json.load(sys.stdin)
    verdict = int(sys.argv[1])
    for name, value in task["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
        space = {"__name__": "__main__"}
        exec(compile(task["code"], "<response>", "exec"), space)
        exec(compile(task["tests"], "<tests>", "exec"), space)
    os.write(verdict, task["password"].encode())  # an early exit does not come here


if __name__ == "__main__":
    main()
