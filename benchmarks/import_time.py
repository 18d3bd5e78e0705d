"""Seconds of `import cephalo_lite`, each in a fresh process.

    python -m benchmarks.import_time

`import transformers` alone loads neither torch nor a model: that comes with the first class that is
used. So the first model class of transformers is a contestant as well.
"""

from __future__ import annotations

import os
import subprocess
import sys

from benchmarks.common import ROOT, medians, parser, prepare, report, side_by_side, spread

CONTESTANTS = {
    "Python alone": "pass",
    "import torch": "import torch",
    "import transformers": "import transformers",
    "a model class of transformers": "from transformers import Phi3ForCausalLM",
    "import cephalo_lite": "import cephalo_lite",
}
COLUMNS = ("what", "seconds", "over import transformers", "over a model class of transformers")
NOTE = "Whole processes, Python's own start included"


def start(statement: str) -> None:
    """Run one statement in a fresh process."""
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
    environment = {**os.environ, **offline, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", statement], check=True, env=environment)


def main(arguments: list[str] | None = None) -> None:
    """Measure and write import_time.json."""
    options = prepare(parser(__doc__.splitlines()[0]).parse_args(arguments))
    wanted = dict(CONTESTANTS)
    if options.quick:
        options.repetitions = 1
        wanted.pop("import torch")
    functions = {name: (lambda code=code: start(code)) for name, code in wanted.items()}
    seconds = side_by_side(
        functions,
        options.repetitions,
        least_seconds=0,
        title="imports",
        silent=options.silent,
        warm_up=not options.quick,
    )
    middle = medians(seconds)
    shell, model = middle["import transformers"], middle["a model class of transformers"]
    rows = [[name, time, time / shell, time / model] for name, time in middle.items()]
    runs = {name: {"seconds": t, "spread": spread(t)} for name, t in seconds.items()}
    report("import_time", options, COLUMNS, rows, runs, NOTE)


if __name__ == "__main__":
    main()
