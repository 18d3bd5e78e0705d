"""Generated code: judged by what it does, in a process that it cannot leave."""

import sys

import pytest

from cephalo_lite.finetune.code_metric import code_in, pass_rate, run_function

ADD = "def solve(numbers):\n    return [n + 3 for n in numbers]"
unix = pytest.mark.skipif(sys.platform == "win32", reason="limits of the operating system")


def test_a_function_is_run_and_its_result_shown():
    result = run_function(ADD, "solve([1, 2])")
    assert (result.status, result.value, result.error) == ("ok", "[4, 5]", "")
    assert result.returns("[4, 5]") and result.returns("[4,5]")
    assert not result.returns("[4, 6]") and not result.returns("(4, 5)")
    assert not run_function("def solve():\n    return True", "solve()").returns("1")


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("def solve(numbers)\n    return 1", "SyntaxError"),
        ("def solve(numbers):\n    return numbers[9]", "IndexError"),
        ("def other(numbers):\n    return 1", "NameError"),
        ("raise SystemExit(0)", "SystemExit"),
        ("import numpy.nowhere", "ModuleNotFoundError"),
        ("def solve(n):\n    return solve(n)", "RecursionError"),
    ],
)
def test_errors_are_named(source, error):
    result = run_function(source, "solve([1])")
    assert result.status == "error" and result.error.startswith(error)
    assert not result.returns("")


@pytest.mark.parametrize("body", ["while True: pass", "import time; time.sleep(60)"])
def test_time_is_limited(body):
    result = run_function(f"def solve():\n    {body}", "solve()", seconds=0.5)
    assert result.status == "timeout" and "0.5 s" in result.error


@unix
def test_memory_is_limited():
    result = run_function("def solve():\n    return len(bytearray(4 << 30))", "solve()")
    assert result.status == "error" and result.error.startswith("MemoryError")


def test_printing_does_not_reach_the_report():
    source = "import os\ndef solve():\n    print('x')\n    os.write(1, b'{}')\n    return 7"
    assert run_function(source, "solve()").value == "7"
    flood = "def solve():\n    while True: print('x' * 10**6)"
    assert run_function(flood, "solve()", seconds=0.5).status == "timeout"
    assert len(run_function("", "'x' * 10**6").value) == 10_000
    assert run_function("import os\nos._exit(3)", "1").status == "crashed"


@pytest.mark.parametrize(
    "line",
    [
        "import socket; socket.socket()",
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true')",
        "import os; os.fork()",
        "import os; os.kill(os.getppid(), 0)",
        "import ctypes; ctypes.CDLL(None)",
        "open('left', 'w')",
        "import os; os.open('left', os.O_CREAT | os.O_WRONLY)",
        "import os; os.remove({path!r})",
        "import pathlib; pathlib.Path({path!r}).unlink()",
        "open({path!r}, 'r+')",
        "import shutil; shutil.rmtree({folder!r})",
    ],
)
@unix
def test_network_processes_and_files_are_refused(line, tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("all")
    line = line.format(path=str(kept), folder=str(tmp_path))
    result = run_function(f"def solve():\n    {line}", "solve()")
    assert result.status == "error" and "may not use" in result.error, result
    assert kept.read_text() == "all"


def test_the_child_sees_neither_this_folder_nor_the_environment(tmp_path, monkeypatch):
    (tmp_path / "secret_module.py").write_text("x = 1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert "ModuleNotFoundError" in run_function("import secret_module", "1").error
    seen = run_function("import os", "(os.getcwd(), sorted(os.listdir('.')))").value
    assert str(tmp_path) not in seen
    assert run_function("import math", "math.pi").value.startswith("3.14")  # the library is there


def test_code_stands_alone_or_in_a_fence():
    assert code_in(ADD) == ADD
    assert code_in(f"Sure:\n```python\n{ADD}\n```\nThis adds 3.") == ADD + "\n"
    assert code_in(f"```\n{ADD}") == ADD  # cut off before the fence was closed


def test_pass_rate_counts_what_works():
    rows = [{"call": "solve([1])", "expected": "[4]"}] * 5
    loop = "def solve(n):\n    while True: pass"
    answers = [ADD, f"```python\n{ADD}\n```", "no code here", ADD.replace("3", "4"), loop]
    score = pass_rate(answers, rows, seconds=1.0)
    assert score.passed == (True, True, False, False, False) and score.rate == 0.4
    assert score.outcomes == {"passed": 2, "error": 1, "wrong": 1, "timeout": 1}


def test_what_cannot_be_judged_is_refused():
    with pytest.raises(ValueError, match="1 answers for 2 rows"):
        pass_rate([ADD], [{"call": "", "expected": ""}] * 2)
    with pytest.raises(ValueError, match="above 0"):
        run_function(ADD, "solve([1])", seconds=0)
