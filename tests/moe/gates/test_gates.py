"""Training the gates of a whole mixture: from samples to gates, to answers, and to the disk."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from cephalo_lite.moe import routers
from cephalo_lite.moe.gates import get_gates, load_gates, save_gates, set_gates, train_gates
from cephalo_lite.moe.gates.language import train_on_answers

QUIET = {"progress": False}
UNTOLD = "ignore:The gates cannot tell:UserWarning"


def same_gates(model, other) -> bool:
    pairs = zip(get_gates(model), get_gates(other), strict=True)
    return all(one[name].equal(two[name]) for one, two in pairs for name in one)


def others(model) -> dict[str, torch.Tensor]:
    """All weights but the gates'."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".gate." not in n}


@pytest.fixture(scope="module")
def samples(synth):
    """Per expert five to seven samples that differ in letters and pictures, with answers."""
    texts = [
        [f"<|user|>\n<|image_1|>\n{letter * (2 + n)}<|end|>\n<|assistant|>\n{letter}x<|end|>\n"
         for n in range(5 + number)]
        for number, letter in enumerate("kqz")
    ]  # fmt: skip
    return [
        [(text, synth(56, 56, kind=number)) for text in own] for number, own in enumerate(texts)
    ]


@pytest.fixture(scope="module")
def trained(make_mixture, small_processor, samples):
    """A mixture after training, the same before, and the report; tests leave them as they are."""
    model = make_mixture(expert_names=["k", "q", "z"])
    before = copy.deepcopy(model)
    return model, before, train_gates(model, small_processor, samples, **QUIET)


def test_gates_learn_to_route(trained):
    model, before, report = trained
    assert report.recipe == "tokens" and report.expert_names == ["k", "q", "z"]
    assert report.train_losses[-1] < 0.7 * report.train_losses[0]
    assert report.mean_accuracy > 0.75 and not report.warnings
    assert set(report.accuracy_by_kind) == {"image", "prompt", "answer"}
    assert not same_gates(model, before)
    for name, weight in others(before).items():
        assert weight.equal(model.get_parameter(name))


@pytest.mark.filterwarnings(UNTOLD)
def test_better_than_the_recipe_of_2024(trained, small_processor, samples):
    _, before, report = trained
    model = copy.deepcopy(before)
    published = train_gates(
        model, small_processor, samples, recipe="cephalo-2024", steps=200, lr=0.01, **QUIET
    )
    assert report.mean_accuracy > published.mean_accuracy


@pytest.mark.filterwarnings(UNTOLD)
@pytest.mark.parametrize("k", [1, 2])
def test_gates_learn_from_answers_and_nothing_else_does(make_mixture, small_processor, samples, k):
    model = make_mixture(k=k)
    model.model.embed_tokens.requires_grad_(False)
    before, learns = copy.deepcopy(model), [p.requires_grad for p in model.parameters()]
    report = train_gates(
        model, small_processor, samples, steps=1, language_steps=20, language_lr=0.05, **QUIET
    )
    assert len(report.language_losses) == 20
    assert sum(report.language_losses[-5:]) < sum(report.language_losses[:5])
    for name, weight in others(before).items():
        assert weight.equal(model.get_parameter(name)), name
    assert [p.requires_grad for p in model.parameters()] == learns
    assert not model.training and all(p.grad is None for p in model.parameters())


@pytest.mark.filterwarnings(UNTOLD)
def test_without_straight_through_one_expert_per_token_learns_nothing(
    make_mixture, small_processor, samples
):
    """The 2024 puzzle: with k=1 the weight is 1 whatever the gate says, so its gradient is 0."""
    model, fitted = make_mixture(), make_mixture()
    for router in routers(model):
        router.straight_through = False
    report = train_gates(model, small_processor, samples, steps=5, language_steps=3, **QUIET)
    train_gates(fitted, small_processor, samples, steps=5, **QUIET)
    assert same_gates(model, fitted) and len(report.language_losses) == 3
    for router in routers(model):
        router.straight_through = True
    train_gates(model, small_processor, samples, steps=5, language_steps=3, **QUIET)
    assert not same_gates(model, fitted)


def test_small_steps_are_not_lost_in_bfloat16(make_mixture, small_processor, samples):
    """Steps of 4e-4 at most; half the distance of bfloat16 numbers from 0.5 on is 2e-3."""
    model = make_mixture().bfloat16()
    before = get_gates(model)[0]["gate.weight"].float()
    train_on_answers(model, small_processor, samples, 12, lr=4e-4, batch_size=4, progress=False)
    moved = get_gates(model)[0]["gate.weight"].float() != before
    assert moved[before.abs().clamp(0.5, 1) == before.abs()].float().mean() > 0.2


def test_language_steps_need_answers(make_mixture, small_processor, samples):
    model = make_mixture().train()
    asked = [[(text.split("<|assistant|>")[0], image) for text, image in own] for own in samples]
    learns = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match="Samples without answers"):
        train_gates(model, small_processor, asked, language_steps=2, **QUIET)
    assert model.training and [p.requires_grad for p in model.parameters()] == learns
    report = train_gates(model, small_processor, asked, **QUIET)
    assert set(report.accuracy_by_kind) == {"image", "prompt"}


@pytest.mark.filterwarnings(UNTOLD)
def test_same_seed_same_gates(make_mixture, small_processor, samples):
    models = [make_mixture() for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        how = {"steps": 20, "language_steps": 2, "language_batch": 4, "tokens_per_sample": 9}
        train_gates(model, small_processor, samples, seed=seed, **how, **QUIET)
    assert same_gates(models[0], models[1]) and not same_gates(models[0], models[2])


@pytest.mark.filterwarnings(UNTOLD)
def test_one_sample_each_serves_for_both(make_mixture, small_processor, samples):
    few = [own[:1] for own in samples]
    report = train_gates(make_mixture(), small_processor, few, steps=20, **QUIET)
    assert report.mean_accuracy > 0.5


def test_errors_come_before_any_work(make_mixture, small_processor, samples):
    model = make_mixture()
    before = copy.deepcopy(model)
    for wrong, message in (
        ({"recipe": "2023"}, "recipe='2023' is not one of 'tokens', 'cephalo-2024'"),
        ({"source": "base"}, "source='base' is not one of"),
        ({"held_out": 1.0}, "held_out=1.0"),
        ({"samples_per_expert": samples[:2]}, "2 lists; the model has 3"),
        ({"samples_per_expert": [*samples[:2], []]}, "No samples for expert 2"),
    ):
        with pytest.raises(ValueError, match=message):
            train_gates(model, small_processor, **{"samples_per_expert": samples, **wrong}, **QUIET)
    assert same_gates(model, before)


def test_gates_to_disk_and_back(trained, make_mixture, tmp_path):
    model, before, _ = trained
    path = save_gates(model, tmp_path / "new" / "gates.safetensors")
    assert [file.name for file in path.parent.iterdir()] == ["gates.safetensors"]
    tensors = load_file(path)
    assert {k: tuple(t.shape) for k, t in tensors.items()} == {
        f"layers.{n}.gate.{part}": shape
        for n in (0, 1)
        for part, shape in (("weight", (3, 32)), ("bias", (3,)))
    }
    other = copy.deepcopy(before)
    load_gates(other, path)
    assert same_gates(other, model)
    with pytest.warns(UserWarning, match=r"written for the experts \['k', 'q', 'z'\]"):
        load_gates(make_mixture(), path)


def test_a_file_that_does_not_fit_changes_nothing(trained, make_mixture, tmp_path):
    model, _, _ = trained
    path = save_gates(model, tmp_path / "gates.safetensors")
    tensors = load_file(path)
    wrong, before = make_mixture(), make_mixture()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:-5])
    narrow = {**tensors, "layers.1.gate.bias": torch.zeros(2)}
    nan = {**tensors, "layers.1.gate.bias": torch.full((3,), torch.nan)}
    one_layer = {k: t for k, t in tensors.items() if ".0." in k}
    cases = [(cut, "not a whole safetensors file")]
    for number, (content, message) in enumerate(
        [(narrow, r"gate.bias is \(2,\)"), (nan, "NaN"), (one_layer, "layers.1.gate.bias")]
    ):
        cases.append((tmp_path / f"{number}.safetensors", message))
        save_file(content, cases[-1][0])
    for file, message in cases:
        with pytest.raises(ValueError, match=message):
            load_gates(wrong, file)
    with pytest.raises(FileNotFoundError):
        load_gates(wrong, tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="1 gates for 2 mixed layers"):
        set_gates(wrong, get_gates(wrong)[:1])
    with pytest.raises(ValueError, match="should have"):
        set_gates(wrong, [{"weight": torch.zeros(3, 32)}] * 2)
    assert same_gates(wrong, before)


def test_a_write_that_fails_leaves_the_old_file(trained, tmp_path, monkeypatch):
    """What is killed while writing leaves a partial name at most, never half a file."""
    model, before, _ = trained
    path = save_gates(before, tmp_path / "gates.safetensors")
    old = path.read_bytes()

    def full(tensors, file, metadata):
        assert file != path and file.parent == path.parent
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space"):
        save_gates(model, path)
    assert path.read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == ["gates.safetensors"]
