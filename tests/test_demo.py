"""The demo, run as a user runs it but on few pictures."""

import json
import subprocess
import sys

import pytest

from cephalo_lite import preset
from cephalo_lite.demo import table
from cephalo_lite.presets import SIZES
from cephalo_lite.results import table_text
from cephalo_lite.tiny import DOMAINS


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    command = [
        sys.executable,
        "-m",
        "cephalo_lite.demo",
        "--judged",
        "8",
        "--silent",
        "--output",
        folder / "results",
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout, folder / "results"


def test_it_prints_one_table_and_writes_it_with_a_figure(demo):
    printed, folder = demo
    result = json.loads((folder / "demo.json").read_text())
    assert table_text(result["table"]) in printed
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert {"machine", "date", "versions", "seconds"} <= set(result)


def test_the_table_has_every_model_and_where_the_tokens_go(demo):
    result = json.loads((demo[1] / "demo.json").read_text())
    rows = [row[0] for row in result["table"]["rows"]]
    assert rows == [
        "base",
        *(f"{domain} expert" for domain in DOMAINS),
        "MoE, untrained gates",
        "MoE, trained gates",
        *(f"tokens to the {domain} expert" for domain in DOMAINS),
    ]
    assert table(result) == result["table"]
    for domain in DOMAINS:
        assert sum(result["shares"][domain].values()) == pytest.approx(1)
        assert result["shares"][domain][domain] > 0.8  # trained gates find the domain's own expert


def test_presets_differ_only_in_numbers():
    tiny, full = (preset(size) for size in SIZES)
    assert list(tiny.experts) == list(full.experts) == list(DOMAINS)
    assert full.dtype == "bfloat16" and full.base.startswith("microsoft/")
    with pytest.raises(ValueError, match="tiny, full"):
        preset("huge")
