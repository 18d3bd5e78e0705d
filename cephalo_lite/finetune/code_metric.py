"""Does generated Python do what it should? Functions are run, each in a process of its own.

Code that a model wrote may do anything by mistake: loop for ever, fill the memory, delete files.
It is therefore never run in this process. The child is an isolated interpreter (`python -I`: no
environment, no user packages) in an empty temporary folder, with limits on time, CPU, memory and
file size, and an audit hook (https://peps.python.org/pep-0578/) that refuses network, other
processes, `ctypes` and any change to files. This protects against accidents; against an attacker
run the whole evaluation in a container.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

MEMORY_BYTES = 512 << 20
LONGEST_RESULT = 10_000  # letters of a result's repr
START_SECONDS = 20.0  # an interpreter may take to start on a busy machine
FENCE = re.compile(r"```(?:[Pp]ython|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)

# What the child runs. The report goes through a copy of its standard output, taken before the
# generated code can write there; an alarm without handler ends the process when time is up.
RUNNER = """
import json, os, sys
job = json.load(sys.stdin)
report = os.fdopen(os.dup(1), "w", encoding="utf-8")
nowhere = os.open(os.devnull, os.O_RDWR)
for stream in (0, 1, 2):
    os.dup2(nowhere, stream)
try:
    import resource
    wanted = {"RLIMIT_AS": job["memory"], "RLIMIT_CPU": int(job["seconds"]) + 2,
              "RLIMIT_FSIZE": 1 << 20, "RLIMIT_CORE": 0}
    for name, most in wanted.items():
        try:
            resource.setrlimit(getattr(resource, name), (most, most))
        except (AttributeError, ValueError, OSError):
            pass  # this system has no such limit
except ImportError:
    pass
writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
families = {"socket", "subprocess", "ctypes", "shutil", "tempfile", "pty", "fcntl", "winreg",
            "msvcrt", "_winapi", "signal", "syslog", "sqlite3", "webbrowser", "resource", "mmap"}
looking = {"os.listdir", "os.scandir", "os.walk", "os.fwalk"}
def guard(event, arguments):
    family = event.split(".")[0]
    refused = family in families or (family == "os" and event not in looking)
    if event == "open":
        refused = bool((arguments[2] or 0) & writes)
    if refused:
        raise PermissionError("generated code may not use " + event)
result = {"status": "error", "value": "", "error": ""}
try:
    import signal
    signal.setitimer(signal.ITIMER_REAL, job["seconds"])
except (ImportError, AttributeError):
    pass  # the parent's clock ends it
sys.addaudithook(guard)
try:
    names = {"__name__": "generated"}
    exec(compile(job["source"], "<generated>", "exec"), names)
    result["value"] = repr(eval(compile(job["call"], "<call>", "eval"), names))[: job["longest"]]
    result["status"] = "ok"
except BaseException as error:
    result["error"] = (type(error).__name__ + ": " + str(error))[:500]
report.write(json.dumps(result))
report.flush()
os._exit(0)
"""


@dataclass(frozen=True)
class CodeResult:
    """What became of one call."""

    status: str  # "ok", "error" (it raised), "timeout", or "crashed" (it ended without a result)
    value: str = ""  # repr of what the call returned
    error: str = ""  # "ValueError: ..." and the like

    def returns(self, expected: str) -> bool:
        """Whether the call returned this value, given as its `repr`."""
        return self.status == "ok" and _same(self.value, expected)


@dataclass(frozen=True)
class PassRate:
    """How many of several answers do what they should."""

    results: tuple[CodeResult, ...]
    passed: tuple[bool, ...]

    @property
    def rate(self) -> float:
        """Share of answers that passed, in 0..1."""
        return sum(self.passed) / len(self.passed)

    @property
    def outcomes(self) -> dict[str, int]:
        """How often each outcome occurred: "passed", "wrong", "error", "timeout", "crashed"."""
        names = [
            "passed" if good else "wrong" if result.status == "ok" else result.status
            for good, result in zip(self.passed, self.results, strict=True)
        ]
        return dict(Counter(names).most_common())


def run_function(source: str, call: str, seconds: float = 2.0) -> CodeResult:
    r"""Define a function in another process and call it there.

    Args:
        source: Python that defines the function; only the standard library can be imported.
        call: an expression such as "solve([1, 2, 3])".
        seconds: the time that both may take together, without the start of the interpreter.

    Returns:
        The `repr` of the result, or what went wrong.

    Raises:
        ValueError: `seconds` is not above 0.

    Example:
        >>> run_function("def solve(n):\n    return n + 1", "solve(2)").value
        '3'
    """
    if not seconds > 0:
        raise ValueError(f"seconds={seconds} leaves no time to run: pass a number above 0.")
    job = {
        "source": source,
        "call": call,
        "seconds": seconds,
        "memory": MEMORY_BYTES,
        "longest": LONGEST_RESULT,
    }
    with tempfile.TemporaryDirectory(prefix="generated-", ignore_cleanup_errors=True) as folder:
        output = Path(folder) / "report"  # a file: what floods it ends at its size limit
        with open(output, "wb") as report:
            try:
                ended = subprocess.run(
                    [sys.executable, "-I", "-S", "-B", "-X", "utf8", "-c", RUNNER],
                    input=json.dumps(job).encode(),
                    stdout=report,
                    stderr=subprocess.DEVNULL,
                    cwd=folder,
                    timeout=seconds + START_SECONDS,
                )
            except subprocess.TimeoutExpired:
                return CodeResult("timeout", error=f"no result after {seconds:g} s")
        text = output.read_text("utf-8", errors="replace")
    if text:
        try:
            return CodeResult(**json.loads(text))
        except (json.JSONDecodeError, TypeError):
            return CodeResult("crashed", error="the report is unreadable")
    if -ended.returncode in _TIME_SIGNALS:
        return CodeResult("timeout", error=f"no result after {seconds:g} s")
    return CodeResult("crashed", error=f"exit status {ended.returncode}, no result")


def pass_rate(
    answers: Iterable[str],
    rows: Iterable[Mapping[str, str]],
    seconds: float = 2.0,
    workers: int = 2,
    progress: bool = False,
) -> PassRate:
    """Run the function in each answer and compare its result with the expected one.

    Args:
        answers: what a model wrote: bare Python, or a text with Python in a fence.
        rows: per answer `call` and `expected` (the `repr` of the right result).
        seconds: limit per call.
        workers: calls that run at the same time.
        progress: show a progress bar.

    Returns:
        Results in the order of the answers, and which passed.

    Raises:
        ValueError: no answers, or not as many as rows.
    """
    answers, rows = list(answers), list(rows)
    if not answers or len(answers) != len(rows):
        raise ValueError(
            f"{len(answers)} answers for {len(rows)} rows: pass one answer for each row."
        )
    with ThreadPoolExecutor(workers) as pool:  # threads: the work is in other processes
        jobs = pool.map(
            lambda pair: run_function(code_in(pair[0]), pair[1]["call"], seconds),
            zip(answers, rows, strict=True),
        )
        bar = tqdm(jobs, total=len(rows), desc="running", disable=not progress, leave=False)
        results = tuple(bar)
    passed = [r.returns(row["expected"]) for r, row in zip(results, rows, strict=True)]
    return PassRate(results, tuple(passed))


def code_in(answer: str) -> str:
    """The Python in an answer: what stands in its first fence, or all of it."""
    fenced = FENCE.search(answer)
    return fenced.group(1) if fenced else answer


def _same(value: str, expected: str) -> bool:
    """Equal as text, or as literals, whose spacing and quotes may differ: True is not 1."""
    if value == expected:
        return True
    try:
        one, two = ast.literal_eval(value), ast.literal_eval(expected)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False
    return repr(one) == repr(two)


def _time_signals() -> set[int]:
    import signal

    return {int(getattr(signal, n)) for n in ("SIGALRM", "SIGXCPU") if hasattr(signal, n)}


_TIME_SIGNALS = _time_signals()
