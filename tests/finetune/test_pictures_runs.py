"""Runs on pictures: resumed, streamed, grouped, judged, refused, interrupted."""

import dataclasses
import shutil
import signal

import datasets
import pytest
import torch

from cephalo_lite import ask
from cephalo_lite.finetune import (
    Recipe,
    add_adapters,
    freeze,
    make_trainer,
    moe_adapters,
    moe_full,
    moe_gates,
    sft,
    tokenize_rows,
)
from cephalo_lite.moe import routers
from tests.finetune.on_pictures import HELD_OUT, TRAIN, make_rows, short


@pytest.fixture
def run(make_run, small_processor):
    return make_run(small_processor, TRAIN, HELD_OUT)


def test_training_of_gates_goes_on_where_it_stopped(make_mixture, run, tmp_path):
    recipe = short(moe_gates, schedule="linear")
    whole, first = run(make_mixture(), recipe)
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    again, second = run(make_mixture(), recipe)
    assert (second.resumed_at, second.steps) == (2, 4)
    for ours, theirs in zip(routers(whole), routers(again), strict=True):
        torch.testing.assert_close(ours.gate.weight, theirs.gate.weight, rtol=1e-4, atol=1e-6)
    assert [s for s, _ in second.losses] == [r.step for r in second.routing] == [1, 2, 3, 4]


def test_rows_that_stream_and_bad_ones_that_are_skipped(make_mixture, run):
    rows = [*TRAIN[:3], {**TRAIN[0], "answer": ""}, *TRAIN[3:]]
    stream = datasets.IterableDataset.from_generator(lambda: iter(rows))
    _, report = run(make_mixture(), short(moe_gates), train=stream, skip_bad=True)
    assert report.steps == 4 and report.rows is None
    assert [row.number for row in report.bad] == [3]
    with pytest.raises(ValueError, match="set max_steps"):
        run(make_mixture(), short(moe_gates, max_steps=-1), train=stream, folder="endless")
    _, report = run(make_mixture(), short(moe_gates), train=rows, skip_bad=True, folder="list")
    assert report.rows == 9 and len(report.bad) == 1


def test_rows_of_like_length_share_a_batch(make_mixture, small_processor, tmp_path):
    """Lengths count the tokens of pictures, and no picture is opened to group rows."""
    data = tokenize_rows(make_rows(48), small_processor, 128).dataset
    model = make_mixture()
    freeze(model, ("gates",))

    def padding(grouped: bool) -> int:
        recipe = short(moe_gates, batch=2, group_by_length=grouped)
        trainer = make_trainer(model, small_processor, data, data, recipe, tmp_path, progress=False)
        order = list(trainer.get_train_dataloader().batch_sampler)
        assert sorted(number for batch in order for number in batch) == list(range(48))
        sizes = [[data[number]["length"] for number in batch] for batch in order]
        return sum(max(size) - min(size) for size in sizes)

    assert padding(grouped=True) < padding(grouped=False) / 3


def test_a_judge_is_asked_before_during_and_after(make_mixture, run, small_processor):
    asked = []

    def judge(model):
        answer = ask(model, small_processor, "Which colour?", TRAIN[0]["image"], max_new_tokens=3)
        asked.append((model.training, torch.is_grad_enabled(), answer.text))
        torch.rand(5)  # must not change what the training draws
        return {"exact": len(asked) / 10}

    recipe = short(moe_adapters, max_steps=4, dropout=0.1)
    _, report = run(make_mixture(), recipe, judge=judge)
    assert report.judged == [(0, {"exact": 0.1}), (2, {"exact": 0.2}), (4, {"exact": 0.3})]
    assert [entry[:2] for entry in asked] == [(False, False)] * 3
    _, silent = run(make_mixture(), recipe, folder="silent")
    assert [x for _, x in silent.losses] == pytest.approx([x for _, x in report.losses], rel=1e-5)
    assert "exact" in report.table() and not silent.judged


def test_what_does_not_fit_is_said_first(make_mixture, make_small, run, small_processor, tmp_path):
    with pytest.raises(ValueError, match="either groups .* or whole"):
        Recipe()
    with pytest.raises(ValueError, match="needs its processor"):
        sft(make_small(), small_processor.tokenizer, TRAIN, HELD_OUT, short(moe_gates), tmp_path)
    with pytest.raises(ValueError, match="nothing in group 'gates'"):
        run(make_small(), short(moe_gates))
    with pytest.raises(ValueError, match="packing"):
        run(make_mixture(), short(moe_gates, packing=True))
    adapted, _ = add_adapters(make_mixture(), "attention", r=2)
    with pytest.raises(ValueError, match="merge_adapters"):
        run(adapted, short(moe_full))


@pytest.fixture
def interruptible():
    """A process that Ctrl-C ends; those of pytest-xdist ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_leaves_a_checkpoint_and_says_where(make_mixture, run, tmp_path):
    def interrupted(times: int, folder: str) -> str:
        """What is said where Ctrl-C is pressed during step 3 of 50."""
        model, steps = make_mixture(), iter(range(100))

        def press(module, args):
            if module.training and next(steps) == 2:
                for _ in range(times):
                    signal.raise_signal(signal.SIGINT)  # in this thread, one after the other

        model.model.register_forward_pre_hook(press)
        with pytest.raises(KeyboardInterrupt) as told:
            run(model, short(moe_gates, max_steps=50, eval_steps=50), folder=folder)
        return str(told.value)

    before = signal.getsignal(signal.SIGINT)
    checkpoint = tmp_path / "once" / "checkpoint-3"
    assert str(checkpoint) in (said := interrupted(1, "once"))
    assert said.startswith("Stopped after step 3 of 50") and "Call sft again" in said
    assert {"trained.safetensors", "optimizer.pt"} <= {file.name for file in checkpoint.iterdir()}
    assert not interrupted(2, "twice")  # the second stops at once, as ever
    assert not list((tmp_path / "twice").glob("checkpoint-*"))
    assert signal.getsignal(signal.SIGINT) is before
    recipe = short(moe_gates, max_steps=50, eval_steps=50)
    with pytest.raises(ValueError, match="checkpoints of another recipe"):
        run(make_mixture(), dataclasses.replace(recipe, max_steps=4), folder="once")
