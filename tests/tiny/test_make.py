"""Making the family: a few steps of everything, and the parts that training rests on."""

import json

import numpy as np
import pytest
import torch

import cephalo_lite as cl
from cephalo_lite.tiny import make
from cephalo_lite.tiny.alphabet import CLASSES, TYPED, page, pages
from cephalo_lite.tiny.data import batch, prepare
from cephalo_lite.tiny.family import tiny_config, tiny_processor
from cephalo_lite.tiny.training import Neighbourly, train_expert
from cephalo_lite.tiny.world import make_samples


@pytest.fixture(scope="module")
def processor():
    return tiny_processor(corpus_size=90)


class InOrder:
    def permutation(self, count):
        return range(count)


def test_training_rows_are_what_the_processor_makes(processor):
    samples = make_samples("materials", 3) + make_samples("latex", 2)
    made = batch(prepare(samples, processor), processor, InOrder())
    texts = [
        processor.apply_chat_template(sample.messages()).removesuffix("\n") for sample in samples
    ]
    pictures = [[sample.image] for sample in samples]
    wanted = processor(
        images=pictures, text=texts, padding=True, padding_side="right", return_labels=True
    )
    assert set(made) == set(wanted)
    for name, value in made.items():
        assert torch.equal(value, wanted[name]), name


def test_quick_make_writes_a_family_that_loads(tmp_path, capsys):
    make.main(["--quick", "--silent", "--output", str(tmp_path / "family")])
    assert "| latex |" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["family"]  # nothing partial is left
    assert json.loads((tmp_path / "family" / "family.json").read_text())["plan"]["base_steps"] == 3
    model, processor = cl.load(tmp_path / "family" / "latex")
    assert cl.ask(model, processor, "What is shown?", max_new_tokens=2).tokens >= 1


def test_an_expert_keeps_all_but_its_mlps(processor):
    torch.manual_seed(0)
    base = cl.Phi3VForCausalLM(tiny_config(processor))
    rows = prepare(make_samples("general", 6), processor)
    expert = train_expert(base, rows, processor, steps=2, batch_size=3, lr=1e-3, progress=False)
    before, after = base.state_dict(), expert.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key for key in before if key.startswith("model.layers") and ".mlp." in key}


def test_neighbourly_sends_a_share_of_tokens_to_the_base():
    mine, base = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False)
    layer, hidden = Neighbourly(mine, base, share=0.2), torch.randn(200, 50, 4)
    torch.manual_seed(0)
    away = (layer(hidden) == base(hidden)).all(-1).float()
    assert abs(away.mean().item() - 0.2) < 0.02
    assert torch.equal(layer.eval()(hidden), mine(hidden))


def test_pages_name_the_symbol_of_each_patch():
    pixels, symbols = pages(20, patch=14, seed=1)
    assert pixels.shape == (20, 3, 112, 112) and symbols.shape == (20, 64)
    assert symbols.max() < CLASSES and set(symbols.unique().tolist()) > {0}
    drawn, where = page(np.random.default_rng(5))
    if where.max() <= len(TYPED):  # typeset: bare paper is white
        assert (drawn[where == 0] == 255).all()
    assert torch.equal(symbols, pages(20, patch=14, seed=1)[1])
