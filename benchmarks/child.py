"""A measurement in a process of its own, so that none pays for the memory and the imports of another."""

import json
import os
import subprocess
import sys
from typing import Any


def measured(what: str, module: str, *arguments: str, python: str = sys.executable, **environment: str) -> Any:
    """What `python -m module arguments` prints as JSON in its last line, with one CPU thread.

    Raises:
        SystemExit: It failed; the line names `what` was measured and how it ended.
    """
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    ended = subprocess.run(
        [python, "-m", module, *arguments], capture_output=True, text=True, env=variables, check=False
    )
    if ended.returncode:
        last = ended.stderr.strip().splitlines()[-1:]
        raise SystemExit(f"{what}: ended with {ended.returncode}. {''.join(last)[:200]}")
    return json.loads(ended.stdout.strip().splitlines()[-1])
