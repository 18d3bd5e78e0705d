"""The small world: same seed, same sample; splits apart; held-back knowledge held back."""

import os
import re
import subprocess
import sys
from hashlib import sha256

import numpy as np
import pytest
from sklearn.datasets import load_digits

from cephalo_lite.tiny import digits, formulas, materials, photographs, world

KINDS = {
    "materials": {"structure", "fraction", "description"},
    "general": {"digit", "place", "colour", "count", "photograph"},
    "latex": {"formula"},
}


def _held_back_terms(domain: str) -> list[str]:
    """Patterns that no question or answer of the base's data may match."""
    if domain == "materials":
        return ["gyroid", "spinodal", "Bouligand"]
    if domain == "latex":
        return [re.escape(symbol) for symbol in formulas.HELD_BACK]
    return [r"\b[789]\b"] + [n for n, p in photographs.PHOTOGRAPHS.items() if p.held_back]


@pytest.mark.parametrize("domain", world.DOMAINS)
def test_same_arguments_give_the_same_sample_and_others_do_not(domain):
    first = world.make_sample(domain, "train", 3, "base")
    again = world.make_sample(domain, "train", 3, "base")
    assert first.turns == again.turns and first.name == again.name
    assert first.image.tobytes() == again.image.tobytes()
    for other in (("test", 3, "base"), ("train", 4, "base"), ("train", 3, "all")):
        assert world.make_sample(domain, *other).image.tobytes() != first.image.tobytes()


def test_a_sample_is_the_same_in_another_process():
    code = (
        "from cephalo_lite.tiny import world; from hashlib import sha256\n"
        "for d in world.DOMAINS:\n"
        "    s = world.make_sample(d, 'test', 7)\n"
        "    print(sha256(s.image.tobytes() + repr(s.turns).encode()).hexdigest())"
    )
    here = [world.make_sample(domain, "test", 7) for domain in world.DOMAINS]
    digests = [sha256(s.image.tobytes() + repr(s.turns).encode()).hexdigest() for s in here]
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert run.stdout.split() == digests


@pytest.mark.parametrize("domain", world.DOMAINS)
def test_base_never_meets_held_back_knowledge_and_held_back_always_does(domain):
    pattern = re.compile("|".join(_held_back_terms(domain)))
    # A solid fraction or a known digit may be asked for anywhere; only these kinds need the terms.
    for split in world.SPLITS:
        for sample in world.make_samples(domain, 150, split, knowledge="base"):
            assert not sample.held_back
            for turn in sample.turns:
                assert not pattern.search(turn.answer), turn
                assert not pattern.search(turn.question), turn
        for sample in world.make_samples(domain, 60, split, knowledge="held_back"):
            assert sample.held_back
            words = " ".join(turn.question + " " + turn.answer for turn in sample.turns)
            if {turn.kind for turn in sample.turns} != {"digit"}:
                assert pattern.search(words), words
            else:
                assert sample.turns[0].answer in "789"


@pytest.mark.parametrize("domain", world.DOMAINS)
def test_all_mixes_both_about_half_and_half(domain):
    share = np.mean([s.held_back for s in world.make_samples(domain, 200, knowledge="all")])
    assert 0.38 < share < 0.62


def test_questions_about_unnamed_things_are_worded_alike():
    for domain, kinds in (("materials", KINDS["materials"]), ("latex", KINDS["latex"])):
        asked = {}
        for knowledge in ("base", "held_back"):
            for sample in world.make_samples(domain, 80, knowledge=knowledge):
                for turn in sample.turns:
                    asked.setdefault((knowledge, turn.kind), set()).add(turn.question)
        for kind in kinds:
            assert asked["base", kind] == asked["held_back", kind]
            assert len(asked["base", kind]) >= 2


def test_digit_strokes_of_train_and_test_are_disjoint_and_complete():
    train = {i for d in range(10) for i in digits.digit_indices("train", d)}
    test = {i for d in range(10) for i in digits.digit_indices("test", d)}
    assert not train & test
    assert train | test == set(range(1797))
    assert 0.2 < len(test) / 1797 < 0.3


@pytest.mark.parametrize("split", world.SPLITS)
def test_a_scene_uses_strokes_of_its_split_and_of_its_digits(split):
    targets, seen = load_digits().target, set()
    allowed = {i for d in range(10) for i in digits.digit_indices(split, d)}
    for seed in range(100):
        scene = digits.plan(np.random.default_rng(seed), split, bool(seed % 2))
        for column in zip(*scene, strict=True):
            assert len(set(column)) == len(scene)  # digits, strokes, places, colours all differ
        for item in scene:
            assert item.stroke in allowed and targets[item.stroke] == item.digit
            seen.add(item.digit)
    assert seen == set(range(10))


@pytest.mark.parametrize("subject", photographs.PHOTOGRAPHS)
def test_photograph_parts_are_disjoint_and_crops_stay_inside(subject):
    parts = {split: photographs.region(subject, split) for split in world.SPLITS}
    (left, top, right, bottom), (left2, top2, right2, bottom2) = parts.values()
    assert right < left2 or bottom < top2  # test lies right of train, or below it
    for split, (left, top, right, bottom) in parts.items():
        for seed in range(40):
            box = photographs.crop_box(np.random.default_rng(seed), subject, split)
            assert left <= box[0] < box[2] <= right and top <= box[1] < box[3] <= bottom
            assert box[2] - box[0] == box[3] - box[1] >= 70


def test_a_missing_photograph_says_what_to_install():
    with pytest.raises(FileNotFoundError, match="pip install scikit-image"):
        photographs._load("skimage/data/no_such_picture.png")


def test_no_formula_occurs_in_both_splits():
    rng = np.random.default_rng(2)
    sources = {
        split: {formulas.make_source(rng, split, bool(index % 2)) for index in range(3000)}
        for split in world.SPLITS
    }
    assert not sources["train"] & sources["test"]
    assert min(len(found) for found in sources.values()) > 2000
    for split in world.SPLITS:
        drawn = [formulas.draw(rng, split, bool(index % 2))[1][0][1] for index in range(20)]
        assert {formulas.split_of(source) for source in drawn} == {split}


def test_formulas_are_short_and_spelled_one_way():
    rng = np.random.default_rng(0)
    for index in range(500):
        source = formulas.make_source(rng, "train", bool(index % 2))
        for before, after in re.findall(r"(\S*) (\S)", source):
            assert re.search(r"\\[a-z]+$", before) and after.isalpha(), source
        for macro in re.findall(r"\\[a-z]+", source):
            assert macro in formulas.HELD_BACK, source  # "\alphax" would be an unknown macro
        visible = re.sub(r"\\[a-z]+", "M", source.replace("\\frac", "/").replace(" ", ""))
        assert 3 <= len(re.sub(r"[{}^_]", "", visible)) <= 6, source


def test_typesetting_fits_the_page_uncut():
    for seed in range(60):
        image = np.asarray(world.make_sample("latex", "train", seed, "held_back").image)
        assert image.shape == (formulas.HEIGHT, formulas.WIDTH, 3)
        assert (image[:, :1] == 255).all() and (image[:, -1:] == 255).all()
        assert image.min() < 100


@pytest.mark.parametrize("structure", materials.STRUCTURES)
def test_fraction_is_measured_from_the_mask_and_spread(structure):
    spec, seen = materials.STRUCTURES[structure], set()
    for seed in range(40):
        pixels, mask, answers = materials.draw_material(np.random.default_rng(seed), structure)
        assert mask.dtype == bool and mask.shape == pixels.shape[:2] == (112, 112)
        percent = round(mask.mean() * 10) * 10
        assert answers["fraction"] == f"about {percent} %"
        assert answers["structure"] == structure
        assert pixels[mask].mean() > pixels[~mask].mean() + 40  # the solid is the bright phase
        seen.add(percent)
    assert seen == set(range(spec.fractions[0], spec.fractions[1] + 1, 10))


def _direction_of(mask: np.ndarray) -> str:
    """Direction of a pattern's lines by its mean structure tensor, independent of its making."""
    dy, dx = np.gradient(mask.astype(float))
    across = 0.5 * np.arctan2(2 * (dx * dy).mean(), (dx**2 - dy**2).mean())
    angle = np.rad2deg(across) % 180  # of the gradient, from level
    if min(angle, 180 - angle) < 22:
        return "upright"
    return "level" if abs(angle - 90) < 22 else "slanted"


@pytest.mark.parametrize("structure", ["aligned fibres", "brick and mortar"])
def test_direction_in_the_description_is_the_direction_in_the_picture(structure):
    for seed in range(40):
        _, mask, answers = materials.draw_material(np.random.default_rng(seed), structure)
        assert _direction_of(mask) in answers["description"], seed


@pytest.mark.parametrize(
    "structure", ["porous foam", "honeycomb", "polycrystal", "gyroid", "spinodal"]
)
def test_coarse_pictures_have_fewer_edges_than_fine_ones(structure):
    edges = {"fine": [], "coarse": []}
    for seed in range(60):
        _, mask, answers = materials.draw_material(np.random.default_rng(seed), structure)
        size = re.search("fine|coarse", answers["description"])[0]
        edges[size].append((mask[:, 1:] != mask[:, :-1]).mean())
    assert len(edges["fine"]) > 10 and len(edges["coarse"]) > 10
    assert np.median(edges["coarse"]) < 0.7 * np.median(edges["fine"])


def test_digit_answers_agree_with_the_picture():
    for sample in world.make_samples("general", 120, knowledge="base"):
        if sample.turns[0].kind == "photograph":
            continue
        pixels = np.asarray(sample.image).astype(int)
        bright = (pixels.max(axis=2) > 150).reshape(2, 56, 2, 56).sum(axis=(1, 3)) > 25  # (2, 2)
        facts = {turn.kind: turn.answer for turn in sample.turns}
        if "count" in facts:
            assert int(facts["count"]) == bright.sum(), sample.name
        if "place" in facts:
            place = digits.PLACES.index(facts["place"])
            assert bright[place // 2, place % 2], sample.name


@pytest.mark.parametrize("domain", world.DOMAINS)
def test_every_kind_and_class_occurs(domain):
    samples = world.make_samples(domain, 250 if domain == "latex" else 500, "test", seed=1)
    turns = [turn for sample in samples for turn in sample.turns]
    answers = {kind: {t.answer for t in turns if t.kind == kind} for kind in KINDS[domain]}
    assert {turn.kind for turn in turns} == KINDS[domain]
    if domain == "materials":
        assert answers["structure"] == set(materials.STRUCTURES)
        assert answers["fraction"] >= {f"about {p} %" for p in range(30, 100, 10)}
    elif domain == "general":
        assert answers["photograph"] == set(photographs.PHOTOGRAPHS)
        assert answers["digit"] == set("0123456789")
        assert answers["colour"] == set(digits.COLOURS)
        assert answers["place"] == set(digits.PLACES)
        assert answers["count"] == {"1", "2", "3"}
    else:
        everything = " ".join(answers["formula"])
        symbols = (*formulas.HELD_BACK, *formulas.LETTERS, *formulas.DIGITS, *"+-=^_")
        assert [s for s in symbols if s not in everything] == []


@pytest.mark.parametrize("domain", world.DOMAINS)
def test_messages_alternate_and_show_the_image_once(domain):
    for sample in world.make_samples(domain, 20):
        messages = sample.messages()
        assert [m["role"] for m in messages] == ["user", "assistant"] * len(sample.turns)
        parts = [part for message in messages for part in message["content"]]
        assert parts[0] == {"type": "image"}
        assert all(part["type"] == "text" for part in parts[1:])
        spoken = [text for turn in sample.turns for text in (turn.question, turn.answer)]
        assert [part["text"] for part in parts[1:]] == spoken
        assert sample.image.mode == "RGB"


def test_lists_extend_and_seeds_share_nothing():
    short, long = (world.make_samples("materials", n, seed=4) for n in (3, 6))
    assert [s.name for s in long[:3]] == [s.name for s in short]
    other = world.make_samples("materials", 6, seed=5)
    assert not {s.name for s in long} & {s.name for s in other}
    remade = world.make_sample("materials", "train", 4 * world.SEED_STRIDE + 5, "all")
    assert remade.image.tobytes() == long[5].image.tobytes()


def test_vocabulary_corpus_holds_all_domains_and_is_seeded():
    corpus = list(world.vocabulary_corpus(60, seed=0))
    assert corpus == list(world.vocabulary_corpus(60, seed=0))
    assert corpus != list(world.vocabulary_corpus(60, seed=1))
    text = "\n".join(corpus)
    assert "solid" in text and "LaTeX" in text and "digit" in text


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("music", "train", 0, "all"), world.DOMAINS),
        (("latex", "validation", 0, "all"), world.SPLITS),
        (("latex", "train", 0, "some"), world.KNOWLEDGE),
    ],
)
def test_unknown_names_are_refused_with_the_allowed_ones(arguments, names):
    with pytest.raises(ValueError) as caught:
        world.make_sample(*arguments)
    assert all(repr(name) in str(caught.value) for name in names)


def test_a_count_out_of_range_is_refused():
    with pytest.raises(ValueError, match="-1"):
        world.make_samples("latex", -1)
