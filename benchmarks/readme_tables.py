"""Write the README's measured tables from results/*.json.

    python benchmarks/readme_tables.py            # rewrite the README
    python benchmarks/readme_tables.py --check    # only tell whether it is up to date

Between `<!-- results:NAME -->` and `<!-- /results -->` goes the table of `results/NAME.json`:

    {"table": {"columns": ["case", "ms"], "rows": [["E=3, k=1", 1.23], ["on a GPU", null]]},
     "machine": "2 cores of ...", "date": "2026-01-31", "versions": {"torch": "2.13.0"},
     "repetitions": 7, "note": "one sentence, optional"}

Other keys (single runs, spread) are left to readers of the file. Numbers are shown with three
significant digits, `null` as "not measured yet", and so is a file that does not exist.
"""

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- results:(?P<name>\w+) -->\n).*?(<!-- /results -->)", re.DOTALL)
MISSING = "not measured yet"


def cell(value) -> str:
    """One value as the text of a table cell.

    Args:
        value: text, a number, a truth value or None.
    """
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def provenance(result: dict, name: str) -> str:
    """One line that says where, when and with what a result was measured.

    Args:
        result: the parsed JSON file.
        name: its file name without the suffix.
    """
    machine = result.get("machine")
    if isinstance(machine, dict):
        machine = ", ".join(f"{key} {cell(value)}" for key, value in machine.items())
    versions = ", ".join(f"{key} {value}" for key, value in result.get("versions", {}).items())
    count = result.get("repetitions")
    parts = [machine, versions, result.get("date"), f"{count} repetitions" if count else None]
    text = "; ".join(str(part) for part in parts if part)
    note = f"{result['note'].rstrip('.')}. " if result.get("note") else ""
    return f"<sub>{note}{text}. File: [results/{name}.json](results/{name}.json)</sub>"


def table(name: str, results: Path) -> str:
    """The Markdown table of one result.

    Args:
        name: the file's name without the suffix.
        results: the folder of result files.

    Returns:
        Table and provenance line, or "not measured yet" where there is no such file.

    Raises:
        ValueError: the file has no table, or a row's length differs from the columns'.
    """
    path = results / f"{name}.json"
    if not path.exists():
        return f"*{MISSING}*\n"
    result = json.loads(path.read_text(encoding="utf-8"))
    content = result.get("table")
    if not isinstance(content, dict) or not {"columns", "rows"} <= content.keys():
        raise ValueError(f'{path}: expected "table": {{"columns": [...], "rows": [[...], ...]}}')
    columns, rows = content["columns"], content["rows"]
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"{path}: {len(columns)} columns, but a row has {len(row)}: {row}")
    rule = ["---"] + ["---:"] * (len(columns) - 1)
    lines = [[cell(column) for column in columns], rule, *([cell(v) for v in row] for row in rows)]
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{body}\n\n{provenance(result, name)}\n"


def render(readme: str, results: Path) -> str:
    """The README's text with every marked block written anew.

    Args:
        readme: the present text.
        results: the folder of result files.

    Raises:
        ValueError: a block is opened but not closed, or the reverse.
    """
    opened, closed = len(re.findall(r"<!-- results:", readme)), readme.count("<!-- /results -->")
    if not opened == closed == len(BLOCK.findall(readme)):
        raise ValueError(f"README: {opened} blocks are opened by results markers, {closed} closed")
    return BLOCK.sub(lambda m: m[1] + table(m["name"], results) + m[3], readme)


def main(arguments: list[str] | None = None) -> int:
    """Rewrite the README, or check it; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write the README's tables from results/*.json.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if out of date")
    options = parser.parse_args(arguments)
    path = ROOT / "README.md"
    old = path.read_text(encoding="utf-8")
    new = render(old, ROOT / "results")
    if options.check:
        print("up to date" if new == old else "out of date: run python benchmarks/readme_tables.py")
        return int(new != old)
    path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
