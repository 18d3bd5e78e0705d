"""Charts, the domain that no tiny model knows: the pictures show what the answers say."""

import numpy as np
import pytest

from cephalo_lite import preset, tiny
from cephalo_lite.tiny.charts import INKS


def areas(image) -> dict[str, int]:
    """Pixels that are nearest to each ink, of those that are near to one."""
    pixels = np.asarray(image).reshape(-1, 3).astype(int)
    away = np.stack([np.abs(pixels - ink).sum(axis=1) for ink in INKS.values()])  # (inks, pixels)
    nearest, near = away.argmin(axis=0), away.min(axis=0) < 60
    return {name: int((nearest[near] == i).sum()) for i, name in enumerate(INKS)}


def charts(kind: str) -> list:
    samples = tiny.make_samples("charts", 150, "test", seed=2)
    found = [(s.image, t.answer) for s in samples for t in s.turns if t.kind == kind]
    assert len(found) > 10
    return found


@pytest.mark.parametrize("kind, best", [("tallest", max), ("slice", max), ("shortest", min)])
def test_the_largest_is_the_largest(kind, best):
    for image, answer in charts(kind):
        shown = {name: area for name, area in areas(image).items() if area > 30}
        assert best(shown, key=shown.get) == answer


@pytest.mark.parametrize("kind", ["bars", "slices"])
def test_as_many_as_are_counted(kind):
    for image, answer in charts(kind):
        assert sum(area > 30 for area in areas(image).values()) == int(answer)


def test_lines_go_where_they_are_said_to_go():
    for image, answer in charts("line"):
        pixels = np.asarray(image).astype(int)
        name = max(areas(image), key=areas(image).get)
        on = np.abs(pixels - np.asarray(INKS[name])).sum(axis=2) < 90
        height = [112 - np.flatnonzero(on[:, x]).mean() for x in range(14, 98) if on[:, x].any()]
        middle = len(height) // 2
        left, middle, right = (
            np.mean(part) for part in (height[:8], height[middle - 4 : middle + 4], height[-8:])
        )
        between = min(left, right) < middle < max(left, right)
        told = "it rises" if right > left else "it falls"
        if not between:
            told = "it rises, then falls" if middle > left else "it falls, then rises"
        assert told == answer


def test_charts_belong_to_no_expert():
    assert "charts" not in tiny.DOMAINS
    one, two = (tiny.make_sample("charts", "train", 4) for _ in range(2))
    assert one.image.tobytes() == two.image.tobytes() and one.turns == two.turns


def test_presets_give_rows_to_fine_tune_on():
    run = preset("tiny")
    pictures, chat, code = (run.rows(kind) for kind in ("pictures", "chat", "code"))
    assert len(pictures) == run.picture_count and len(chat) == len(code) == run.text_count
    assert pictures[0]["images"][0].size == (112, 112) and "messages" in chat[0]
    assert {"instruction", "output"} <= code[0].keys()
    with pytest.raises(KeyError):
        run.rows("sounds")
