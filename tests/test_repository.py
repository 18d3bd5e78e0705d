"""The repository as a whole: links, requirements, sizes, packaging, words that must not stay."""

import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LARGEST = 12 * 2**20
TEXT = {".py", ".md", ".toml", ".txt", ".yml", ".cff", ".svg", ".json", ".ipynb", ".jinja", ""}
# Written in halves, so that this file does not find itself.
FORBIDDEN = [
    "TO" + "DO", "FIX" + "ME", "XX" + "X", "/wo" + "rk/", "/" + "root/", "../sha" + "red",
    "lorem " + "ipsum",
]  # fmt: skip


def repository_files() -> list[Path]:
    """Tracked files and new ones that git does not ignore; without git, all but hidden folders."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others"]
    try:
        done = subprocess.run([*command, "--exclude-standard"], capture_output=True, check=True)
        paths = {ROOT / name for name in done.stdout.decode().split("\0") if name}
    except (OSError, subprocess.CalledProcessError):
        inner = (path.relative_to(ROOT) for path in ROOT.rglob("*"))
        paths = {ROOT / p for p in inner if not any(part.startswith(".") for part in p.parts[:-1])}
    return sorted(path for path in paths if path.is_file())


def forbidden_words(text: str) -> list[str]:
    return [word for word in FORBIDDEN if re.search(rf"(?<![\w]){re.escape(word)}", text)]


def local_links(markdown: str) -> list[str]:
    """Targets of links and images that are neither on the web nor inside the page."""
    prose = re.sub(r"^(```|~~~).*?^\1", "", markdown, flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\(([^)\s]+)[^)]*\)", prose)
    targets += re.findall(r'<(?:img|a|source)[^>]+(?:src|href|srcset)="([^"]+)"', prose)
    local = [t for t in targets if not re.match(r"[a-z]+:|#", t)]
    return [t.split("#")[0] for t in local]


def requirement_lines(text: str) -> list[str]:
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    return [line for line in lines if line]


def pyproject() -> dict:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10; pytest brings tomli there
        import tomli as tomllib
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def readme_tables():
    spec = importlib.util.spec_from_file_location(
        "readme_tables", ROOT / "benchmarks" / "readme_tables.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def markdown_of(path: Path) -> str:
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


def test_readme_and_notebooks_name_each_other():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"\]\(notebooks/([^)]+\.ipynb)\)", readme)
    present = [path.name for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
    assert named == present, "README's table and notebooks/ differ, in names or in order"
    for name in named:
        assert f"cephalo_lite/blob/main/notebooks/{name})" in readme, f"no Colab badge for {name}"


def test_local_links_lead_somewhere():
    pages = [p for p in repository_files() if p.suffix in {".md", ".ipynb"}]
    assert ROOT / "README.md" in pages
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in pages
        for target in local_links(markdown_of(page))
        if not (page.parent / target).exists()
    ]
    assert not broken, "\n".join(broken)


def test_link_finder_sees_links_and_images():
    text = "![a](images/x.svg) [b](y.md#part) [c](https://z.org) [d](#here)\n```\n[e](no)\n```\n"
    text += '<img src="images/w.png">'
    assert local_links(text) == ["images/x.svg", "y.md", "images/w.png"]


def test_requirements_equal_pyproject():
    project = pyproject()["project"]
    extras = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *(line for extra in extras for line in extra)]
    given = requirement_lines((ROOT / "requirements.txt").read_text(encoding="utf-8"))
    assert sorted(given) == sorted(wanted)
    assert all("<" in line for line in given), "every requirement has an upper bound"


def test_makefile_torch_is_within_bounds():
    from packaging.requirements import Requirement

    pin = re.search(r"torch==(\S+)", (ROOT / "Makefile").read_text(encoding="utf-8"))[1]
    bounds = {r.name: r.specifier for r in map(Requirement, pyproject()["project"]["dependencies"])}
    assert bounds["torch"].contains(pin)


def test_versions_agree():
    version = pyproject()["project"]["version"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {version}\n" in citation
    assert f"\n## {version}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_no_file_is_too_large():
    large = [str(p) for p in repository_files() if p.stat().st_size > LARGEST]
    assert not large, f"more than 12 MB: {large}"


def test_no_forbidden_words():
    found = []
    for path in repository_files():
        if path.suffix in TEXT:
            text = path.read_text(encoding="utf-8", errors="replace")
            text = re.sub(r'"image/png": "[^"]*"', "", text)  # encoded pictures spell anything
            words = forbidden_words(text)
            found += [f"{path.relative_to(ROOT)}: {word}" for word in words]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("word", FORBIDDEN)
def test_forbidden_words_are_found(word):
    assert forbidden_words(f"a line\n# {word}: later") == [word]


def test_ci_calls_make_test():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111, ".ci/run is not executable"
    assert script.read_text(encoding="utf-8").rstrip().endswith("make test")


def test_wheel_holds_the_whole_package(tmp_path):
    """A wheel built from the present files holds every one of the package's, weights included."""
    source = tmp_path / "source"
    inside = [p for p in repository_files() if (ROOT / "cephalo_lite") in p.parents]
    for path in [*inside, *(ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE"))]:
        target = source / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(tmp_path), str(source)], check=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    left_out = {p.relative_to(ROOT).as_posix() for p in inside} - set(names)
    assert not left_out, f"not in the wheel: {sorted(left_out)}"
    top = {name.split("/")[0].split("-")[0] for name in names}
    assert top == {"cephalo_lite"}, f"the wheel installs more than the package: {top}"


def test_readme_tables_are_up_to_date(tmp_path):
    """Those of the commit, where only results were made anew, as `make demo` does."""
    readme, results = (ROOT / "README.md").read_text(encoding="utf-8"), ROOT / "results"
    git = ["git", "-C", str(ROOT)]
    if subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "README.md"]).returncode == 0:
        archive = [*git, "archive", "--format=zip", "HEAD", "results"]
        with zipfile.ZipFile(io.BytesIO(subprocess.check_output(archive))) as committed:
            committed.extractall(tmp_path)
        results = tmp_path / "results"
    fresh = readme_tables().render(readme, results)
    assert fresh == readme, f"run {Path(sys.executable).name} benchmarks/readme_tables.py"


def test_readme_tables_follow_the_results(tmp_path):
    tables = readme_tables()
    page = "a\n<!-- results:speed -->\nold\n<!-- /results -->\nb\n"
    assert "not measured yet" in tables.render(page, tmp_path)
    result = {
        "table": {"columns": ["case", "ms", "x"], "rows": [["k=1", 1.2345, 3]]},
        "machine": "2 cores", "date": "2026-01-31", "versions": {"torch": "2"}, "repetitions": 7,
    }  # fmt: skip
    result["table"]["rows"].append(["GPU", None, 4000])
    (tmp_path / "speed.json").write_text(json.dumps(result))
    text = tables.render(page, tmp_path)
    assert "| case | ms | x |\n| --- | ---: | ---: |\n| k=1 | 1.23 | 3 |" in text
    assert "| GPU | not measured yet | 4,000 |" in text
    assert "2 cores; torch 2; 2026-01-31; 7 repetitions" in text
    assert tables.render(text, tmp_path) == text
    result["table"]["rows"].append(["too short"])
    (tmp_path / "speed.json").write_text(json.dumps(result))
    with pytest.raises(ValueError, match="3 columns, but a row has 1"):
        tables.render(page, tmp_path)
    with pytest.raises(ValueError, match="1 blocks are opened"):
        tables.render(page.replace("<!-- /results -->", ""), tmp_path)
