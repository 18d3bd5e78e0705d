"""The README's commands and its snippet do what they say."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def code_blocks(heading: str, language: str) -> list[str]:
    """The fenced blocks of one language under one second-level heading."""
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", README, re.DOTALL | re.MULTILINE)
    assert section, f"the README has no section '{heading}'"
    return re.findall(rf"^```{language}\n(.*?)^```", section[1], re.DOTALL | re.MULTILINE)


def make_targets() -> list[str]:
    return re.findall(r"^make (\w+)", "".join(code_blocks("Start", "bash")), re.MULTILINE)


def test_two_commands_are_named():
    assert make_targets() == ["demo", "test"]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", ["demo", "test"])
def test_commands_are_known_to_make(target):
    """A dry run with the active environment: no set-up, and every module that it calls exists."""
    command = ["make", "-n", "VENV=", f"PYTHON={sys.executable}", target]
    outer = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    done = subprocess.run(command, cwd=ROOT, env=outer, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    modules = re.findall(r"-m ([\w.]+)", done.stdout)
    assert modules
    for module in modules:
        code = f"import importlib.util as u, sys; sys.exit(u.find_spec({module!r}) is None)"
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0, module


@pytest.mark.parametrize("heading", ["Use it in your code", "Fine-tune Phi-3.5 in 4 bits"])
def test_snippet_runs(heading, tmp_path):
    """The snippet as it stands, in a new process and an empty folder."""
    (snippet,) = code_blocks(heading, "python")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", snippet]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.strip().splitlines()) >= 2, "the snippet shows something"
