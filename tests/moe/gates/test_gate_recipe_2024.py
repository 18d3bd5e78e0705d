"""The published training of the gates, reproduced: golden means, weights, losses."""

import json

import pytest
import torch
from safetensors.torch import load_file

from cephalo_lite.moe.gates import set_gates, train_gates
from cephalo_lite.moe.gates.recipe_2024 import fit_means, gates_as_in_2024, prompt_means
from cephalo_lite.phi3v import Phi3VImageProcessor, Phi3VProcessor

STEPS = [1, 2, 5, 10, 50, 100, 200]


@pytest.fixture(scope="module")
def settings(golden) -> dict:
    return json.loads((golden / "gate" / "gate.json").read_text())


@pytest.fixture(scope="module")
def want(golden) -> dict[str, torch.Tensor]:
    return load_file(golden / "gate" / "gate_fp32.safetensors")


@pytest.fixture(scope="module")
def processor(golden_tokenizer, settings) -> Phi3VProcessor:
    return Phi3VProcessor(Phi3VImageProcessor(num_crops=settings["num_crops"]), golden_tokenizer)


@pytest.fixture(scope="module")
def prompts(settings, synth):
    """Per expert [(text, picture)], as the golden run had them."""
    pictures = {
        f"synth({width},{height},kind={kind})": synth(width, height, kind=kind)
        for width, height, kind in ((48, 48, 0), (56, 48, 1), (64, 48, 2))
    }
    return [
        [(text, pictures.get(name)) for text, name in zip(texts, names, strict=True)]
        for texts, names in zip(settings["prompts"], settings["images"], strict=True)
    ]


@pytest.fixture(scope="module")
def measured(golden_mixture, processor, prompts):
    """Means of all six prompts under the golden model's random gates."""
    model = golden_mixture(1)
    return torch.cat([prompt_means(model, processor, own) for own in prompts])  # (6, L, D)


def per_layer(want, name, layers=3):
    parts = ("weight", "bias")
    return [{f"gate.{p}": want[f"layer{n}.{name}.{p}"] for p in parts} for n in range(layers)]


@pytest.mark.parametrize("steps", STEPS)
def test_weights_after_every_number_of_steps(settings, want, steps):
    means = torch.stack([want[f"layer{n}.inputs"] for n in range(3)], dim=1)  # (E, L, D)
    start = per_layer(want, "init")
    gates, losses = fit_means(means, steps, settings["lr"], start=start)
    for gate, golden_gate in zip(gates, per_layer(want, f"after{steps}"), strict=True):
        for name, tensor in golden_gate.items():
            torch.testing.assert_close(gate[name], tensor, rtol=1e-5, atol=1e-6)
    golden_losses = torch.stack([want[f"layer{n}.losses"] for n in range(3)]).mean(0)[:steps]
    torch.testing.assert_close(torch.tensor(losses).double(), golden_losses, rtol=1e-5, atol=1e-7)
    assert start[0]["gate.weight"].equal(want["layer0.init.weight"])  # not trained in place


def test_means_of_the_prompts(measured, want):
    torch.testing.assert_close(measured, want["prompt_means"][:, :3], rtol=1e-5, atol=2e-5)


def test_means_of_the_prompts_of_some_layers(load_moe, processor, prompts, measured):
    """Layers are numbered as in the model, not among the mixed ones."""
    model = load_moe(1)
    model.config.moe_layers = [0, 2]
    got = prompt_means(model, processor, prompts[0])
    torch.testing.assert_close(got, measured[:2][:, [0, 2]])


def test_trained_gates_in_the_golden_model_give_its_logits(golden, load_moe, want):
    model = load_moe(1)
    set_gates(model, per_layer(want, "final"))
    golden_text = load_file(golden / "gate" / "moe_k1_after_training_text_logits.safetensors")
    with torch.no_grad():
        logits = model(input_ids=golden_text["input_ids"]).logits
    torch.testing.assert_close(logits, golden_text["logits"], rtol=1e-5, atol=1e-4)


def test_from_prompts_to_gates(golden_mixture, processor, prompts, measured, settings):
    """Each expert has the mean of its own prompts, however many: the original mixes 2, 1, 1 up."""
    model = golden_mixture(1)
    unequal = [prompts[0], prompts[1][:1], prompts[2][1:]]
    gates, losses = gates_as_in_2024(model, processor, unequal, 20, settings["lr"], 3, False)
    means = torch.stack([measured[:2].mean(0), measured[2], measured[5]])
    expected, expected_losses = fit_means(means, 20, settings["lr"], seed=3)
    for gate, other in zip(gates, expected, strict=True):
        for name in ("gate.weight", "gate.bias"):
            torch.testing.assert_close(gate[name], other[name], rtol=1e-4, atol=1e-5)
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    wrong = torch.stack([measured[:2].mean(0), measured[[2, 5]].mean(0), measured[5]])
    assert not torch.allclose(fit_means(wrong, 20, settings["lr"], seed=3)[0][1]["gate.weight"],
                              gates[1]["gate.weight"], atol=1e-3)  # fmt: skip


def test_the_seed_decides_and_leaves_the_global_one_alone():
    means = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0))
    state = torch.random.get_rng_state()
    first, again, other = (fit_means(means, 2, 0.01, seed=seed)[0] for seed in (0, 0, 1))
    assert torch.random.get_rng_state().equal(state)
    assert first[1]["gate.weight"].equal(again[1]["gate.weight"])
    assert not first[1]["gate.weight"].equal(other[1]["gate.weight"])


def test_a_start_of_another_number_of_layers_is_refused(want):
    with pytest.raises(ValueError, match="shorter"):
        fit_means(torch.zeros(3, 3, 64), 1, 0.01, start=per_layer(want, "init", layers=2))


@pytest.mark.filterwarnings("ignore:The gates cannot tell:UserWarning")
def test_as_a_recipe_of_train_gates(make_mixture, small_processor, synth):
    """By its name; judged by the same held-out tokens as ours, and the model's mode comes back."""
    model = make_mixture().train()
    picture = synth(56, 56)
    samples = [
        [(f"<|user|>\n<|image_1|>\n{letter * n}<|end|>\n", picture) for n in range(3, 7)]
        for letter in "abc"
    ]
    report = train_gates(
        model, small_processor, samples, recipe="cephalo-2024", steps=30, lr=0.01, progress=False
    )
    assert report.recipe == "cephalo-2024"
    assert len(report.train_losses) == 30 and report.train_losses[-1] < report.train_losses[0]
    assert len(report.accuracy) == 2 and not report.held_out_losses
    assert all(module.training for module in model.modules())
