"""What every committed notebook must look like, checked without running it.

`problems(name, notebook, size, following)` lists what is wrong with one notebook; the tests at the
end break a good one in every way and expect each break to be named.
"""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
COLAB = "https://colab.research.google.com/github/cephalo-lite/cephalo_lite/blob/main/notebooks/"
LARGEST = 300 * 1024
LONGEST_CELL = 40


def source(cell: dict) -> str:
    return "".join(cell["source"])


def run_problems(notebook: dict, size: int) -> list[str]:
    """Outputs of one clean run, from top to bottom, and nothing else."""
    found = [] if size <= LARGEST else [f"size: {size // 1024} KB, at most {LARGEST // 1024}"]
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    counts = [cell.get("execution_count") for cell in code]
    if counts != list(range(1, len(code) + 1)):
        found.append(f"order: execution counts {counts}")
    for number, cell in enumerate(code, 1):
        for output in cell.get("outputs", []):
            if output["output_type"] == "error":
                found.append(f"error: output of code cell {number}")
            if output.get("name") == "stderr":
                found.append(f"stderr: code cell {number}: {''.join(output['text'])[:200]}")
            if any("widget" in mime for mime in output.get("data", {})):
                found.append(f"widget: output of code cell {number}")
    if "widgets" in notebook["metadata"]:
        found.append("widget: state in the metadata")
    return found


def opening_problems(name: str, cells: list[dict]) -> list[str]:
    """Title with badge and costs; install; imports; size switch."""
    if [cell["cell_type"] for cell in cells[:4]] != ["markdown", "code", "code", "code"]:
        return ["opening: the first four cells are title, install, imports, size"]
    title, install, imports, size = (source(cell) for cell in cells[:4])
    number = int(name[:2])
    wanted = {
        f"opening: title '# {number} · ...'": title.startswith(f"# {number} · "),
        "opening: Colab badge of this notebook": f"({COLAB}{name})" in title,
        "opening: 'You will'": "You will" in title,
        "opening: cost table": len(re.findall(r"^\|", title, re.MULTILINE)) >= 3,
        "opening: install cell": "pip" in install,
        "opening: versions and device": "import cephalo_lite as cl" in imports,
        "opening: size switch": 'os.environ.get("CEPHALO_SIZE", "tiny")' in size
        and "cl.preset(SIZE)" in size,
    }
    return [what for what, holds in wanted.items() if not holds]


def closing_problems(cells: list[dict], following: str | None) -> list[str]:
    """Check, What we learned, Exercises, next: in this order, at the very end."""
    tail = [source(cell) for cell in cells[-8:]]
    places = []
    for word in ("Check", "What we learned", "Exercises"):
        hits = [i for i, text in enumerate(tail) if re.search(rf"\b{word}\b", text)]
        if not hits:
            return [f"closing: '{word}' is missing"]
        places.append(hits[-1] if word != "Check" else hits[0])
    found = [] if places == sorted(places) else ["closing: wrong order"]
    if "assert " not in "".join(tail[places[0] : places[1]]):
        found.append("closing: no assert under 'Check'")
    if tail[places[2]].count("<details>") < 3:
        found.append("closing: three exercises with answers in <details>")
    target = following or "../README.md"
    if cells[-1]["cell_type"] != "markdown" or f"]({target})" not in tail[-1]:
        found.append(f"closing: the last cell links to {target}")
    return found


def body_problems(cells: list[dict], folder: Path) -> list[str]:
    """Short cells, no dead code, figures and links that exist."""
    found = []
    for number, cell in enumerate(cells, 1):
        text, is_code = source(cell), cell["cell_type"] == "code"
        if is_code and len(text.splitlines()) > LONGEST_CELL:
            found.append(f"long: cell {number} has more than {LONGEST_CELL} lines")
        if is_code and not text.strip():
            found.append(f"empty: cell {number}")
        if re.search(r"^\s*if (False|0|True)\s*:", text, re.MULTILINE) and is_code:
            found.append(f"dead: cell {number} has a switched-off branch")
        if cell.get("attachments") or "data:image" in text and not is_code:
            found.append(f"embedded: cell {number} carries a picture inside")
        if is_code:
            continue
        for mark, target in re.findall(r"(!?)\[[^\]]*\]\(([^)\s]+)", text):
            remote = target.startswith(("http:", "https:"))
            if mark and remote and not target.endswith("colab-badge.svg"):
                found.append(f"link: cell {number} shows a picture from elsewhere: {target}")
            elif not remote and not target.startswith("#"):
                if not (folder / target.split("#")[0]).exists():
                    found.append(f"link: cell {number}: {target} does not exist")
    if not any("assert " in source(cell) for cell in cells if cell["cell_type"] == "code"):
        found.append("assert: nothing is asserted")
    return found


def problems(name: str, notebook: dict, size: int, following: str | None, folder: Path) -> list:
    cells = notebook["cells"]
    return [
        *run_problems(notebook, size),
        *opening_problems(name, cells),
        *body_problems(cells, folder),
        *closing_problems(cells, following),
    ]


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 4
    assert all(re.fullmatch(r"\d\d_[a-z0-9_]+\.ipynb", path.name) for path in NOTEBOOKS)
    numbers = [int(path.name[:2]) for path in NOTEBOOKS]
    assert numbers == sorted(set(numbers))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path):
    place = NOTEBOOKS.index(path)
    following = NOTEBOOKS[place + 1].name if place + 1 < len(NOTEBOOKS) else None
    notebook = json.loads(path.read_text(encoding="utf-8"))
    found = problems(path.name, notebook, path.stat().st_size, following, path.parent)
    assert not found, "\n".join([path.name, *found])


def test_install_cells_are_identical():
    cells = {path.name: json.loads(path.read_text(encoding="utf-8"))["cells"] for path in NOTEBOOKS}
    assert len({source(cell[1]) for cell in cells.values()}) == 1, "install cells differ"


# --- the checks themselves -----------------------------------------------------------------------


def good_notebook() -> dict:
    def code(count, text):
        stream = {"output_type": "stream", "name": "stdout", "text": ["fine\n"]}
        return {"cell_type": "code", "execution_count": count, "source": text, "outputs": [stream]}

    def prose(text):
        return {"cell_type": "markdown", "source": text}

    badge = f"[![Colab](https://colab.research.google.com/x/colab-badge.svg)]({COLAB}01_a.ipynb)"
    title = f"# 1 · A\n\n{badge}\n\nYou will see.\n\n| size |\n|---|\n| tiny |"
    details = "<details>answer</details>\n"
    cells = [
        prose(title),
        code(1, "%pip install cephalo_lite"),
        code(2, "import cephalo_lite as cl"),
        code(3, 'SIZE = os.environ.get("CEPHALO_SIZE", "tiny")\nrun = cl.preset(SIZE)'),
        prose("![figure](figure.svg)"),
        prose("## Check"),
        code(4, "assert 1 + 1 == 2"),
        prose("## What we learned"),
        prose("## Exercises\n" + 3 * details),
        prose("[Next](02_b.ipynb)"),
    ]
    return {"cells": cells, "metadata": {}}


BREAKS = {
    "size": lambda n: None,
    "order": lambda n: n["cells"][6].update(execution_count=9),
    "error": lambda n: n["cells"][1]["outputs"].append({"output_type": "error"}),
    "stderr": lambda n: n["cells"][1]["outputs"][0].update(name="stderr"),
    "widget: output": lambda n: n["cells"][1]["outputs"].append(
        {"output_type": "display_data", "data": {"application/vnd.jupyter.widget-view+json": {}}}
    ),
    "widget: state": lambda n: n["metadata"].update(widgets={}),
    "opening: the first four": lambda n: n["cells"].insert(1, n["cells"][4]),
    "opening: title": lambda n: n["cells"][0].update(source="# A"),
    "opening: Colab": lambda n: n["cells"][0].update(source="# 1 · A"),
    "opening: cost": lambda n: n["cells"][0].update(source="# 1 · A"),
    "opening: 'You will'": lambda n: n["cells"][0].update(source="# 1 · A"),
    "opening: install": lambda n: n["cells"][1].update(source="x"),
    "opening: versions": lambda n: n["cells"][2].update(source="x"),
    "opening: size": lambda n: n["cells"][3].update(source="x"),
    "long": lambda n: n["cells"][6].update(source="assert 1\n" * 41),
    "empty": lambda n: n["cells"][6].update(source=""),
    "dead": lambda n: n["cells"][6].update(source="if False:\n    assert 0"),
    "embedded": lambda n: n["cells"][4].update(source="![a](data:image/png;base64,xx)"),
    "link: cell 5 shows": lambda n: n["cells"][4].update(source="![a](https://a.org/b.png)"),
    "link: cell 5: gone": lambda n: n["cells"][4].update(source="[a](gone.md)"),
    "assert": lambda n: n["cells"][6].update(source="x = 1"),
    "closing: no assert": lambda n: n["cells"][6].update(source="x = 1"),
    "closing: 'What we learned'": lambda n: n["cells"].pop(7),
    "closing: wrong order": lambda n: n["cells"].insert(7, n["cells"].pop(8)),
    "closing: three": lambda n: n["cells"][8].update(source="## Exercises <details>"),
    "closing: the last": lambda n: n["cells"].pop(),
}


@pytest.mark.parametrize("what", BREAKS)
def test_a_broken_notebook_is_caught(what, tmp_path):
    for name in ("figure.svg", "02_b.ipynb"):
        (tmp_path / name).touch()
    notebook = good_notebook()
    assert problems("01_a.ipynb", notebook, 1000, "02_b.ipynb", tmp_path) == []
    broken = copy.deepcopy(notebook)
    BREAKS[what](broken)
    size = LARGEST + 1 if what == "size" else 1000
    found = problems("01_a.ipynb", broken, size, "02_b.ipynb", tmp_path)
    assert any(line.startswith(what) for line in found), found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_own_words_are_spelt_right(path, tmp_path):
    """What models answered is left out: they may write what they like."""
    text = "\n".join(source(cell) for cell in json.loads(path.read_text())["cells"])
    (tmp_path / "words.txt").write_text(text)
    command = [sys.executable, "-m", "codespell_lib", "--toml", ROOT / "pyproject.toml"]
    done = subprocess.run([*command, tmp_path / "words.txt"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
