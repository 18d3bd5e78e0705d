"""Signs, the domain that no tiny model knows: the pictures show what the answers say."""

import numpy as np
import pytest

from cephalo_lite import preset, tiny
from cephalo_lite.tiny.signs import CORNERS, INKS, outline


def masks(kind: str) -> list:
    """(answer, colour → where it is (112, 112) bool) of the samples with a question of a kind."""
    found = []
    for sample in tiny.make_samples("signs", 90, "test", seed=2):
        answer = {turn.kind: turn.answer for turn in sample.turns}.get(kind)
        if answer:
            pixels = np.asarray(sample.image).astype(int)
            near = {n: np.abs(pixels - ink).sum(axis=2) < 90 for n, ink in INKS.items()}
            found.append((answer, near))
    assert len(found) > 20
    return found


def test_the_colour_is_what_is_said():
    for answer, near in masks("ink"):
        assert max(near, key=lambda name: near[name].sum()) == answer


def test_the_sign_is_what_is_said():
    """Told by the share of its bounding box that is painted, and whether its middle is."""
    shares = {"circle": 0.785, "square": 0.87, "triangle": 0.48, "star": 0.33, "cross": 0.57}
    for answer, near in masks("sign"):
        on = max(near.values(), key=lambda mask: mask.sum())
        ys, xs = np.nonzero(on)
        box = on[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
        name = answer.removeprefix("a ")
        if name == "ring":
            assert not box[box.shape[0] // 2, box.shape[1] // 2]
        else:
            assert abs(box.mean() - shares[name]) < 0.15, (name, box.mean())


def test_corners_are_counted():
    assert all(len(outline(name)) == count for name, count in CORNERS.items() if count)
    assert {answer for answer, _ in masks("corners")} == {str(n) for n in CORNERS.values()}


def test_signs_belong_to_no_expert():
    assert "signs" not in tiny.DOMAINS
    one, two = (tiny.make_sample("signs", "train", 4) for _ in range(2))
    assert one.image.tobytes() == two.image.tobytes() and one.turns == two.turns


def test_presets_give_rows_to_fine_tune_on():
    run = preset("tiny")
    pictures, chat, code = (run.rows(kind) for kind in ("pictures", "chat", "code"))
    assert len(pictures) == run.picture_count and len(chat) == len(code) == run.text_count
    assert pictures[0]["images"][0].size == (112, 112) and "messages" in chat[0]
    assert {"instruction", "output"} <= code[0].keys()
    with pytest.raises(KeyError):
        run.rows("sounds")
