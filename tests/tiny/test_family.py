"""The shipped family: complete checkpoints that know what the model card says."""

import json

import pytest
import torch

import cephalo_lite as cl
from cephalo_lite import tiny
from cephalo_lite.tiny.judge import accuracy, answers
from cephalo_lite.tiny.world import DOMAINS, make_samples


@pytest.fixture(scope="module")
def family():
    return {
        name: cl.load(path, dtype=torch.float32)[0] for name, path in tiny.checkpoints().items()
    }


@pytest.fixture(scope="module")
def processor():
    return cl.Phi3VProcessor.from_pretrained(tiny.checkpoints()["base"])


def test_all_together_are_small():
    total = sum(path.stat().st_size for path in tiny.WEIGHTS.rglob("*") if path.is_file())
    assert total <= 12e6


def test_experts_differ_from_the_base_in_their_mlps_only(family):
    base = family["base"].state_dict()
    for domain in DOMAINS:
        expert = family[domain].state_dict()
        changed = {key for key in base if not torch.equal(base[key], expert[key])}
        assert changed == {key for key in base if ".mlp." in key and key.startswith("model.layers")}


@pytest.mark.parametrize("domain", DOMAINS)
def test_each_expert_beats_the_base_in_its_own_domain(family, processor, domain):
    samples = make_samples(domain, 90, "test", seed=21)
    base = accuracy(family["base"], processor, samples)[domain]
    expert = accuracy(family[domain], processor, samples)[domain]
    assert expert >= base + 0.1


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_base_does_not_know_what_was_held_back(family, processor, domain):
    samples = [
        sample
        for sample in make_samples(domain, 90, "test", seed=22, knowledge="held_back")
        if sample.turns[0].kind in ("structure", "description", "photograph", "formula")
    ]
    told = answers(family["base"], processor, samples)
    right = [
        text == sample.turns[turn].answer
        for sample, turn, text in told
        if sample.turns[turn].kind in ("structure", "description", "photograph", "formula")
    ]
    assert len(right) >= 10
    assert sum(right) / len(right) <= 0.1


def test_the_card_tells_what_family_json_holds():
    report = json.loads((tiny.WEIGHTS / "family.json").read_text())
    card = (tiny.WEIGHTS / "README.md").read_text()
    for name, by_domain in report["accuracy"].items():
        assert all(f"{value:.0%}" in card for value in by_domain.values()), name
