"""Fine-tuning on pictures: the dense model and the mixture, in part, whole, and in 4 bits."""

import dataclasses
import shutil
import signal
import warnings

import datasets
import pytest
import torch
from PIL import Image
from transformers import Trainer, TrainingArguments

from cephalo_lite import Phi3VMoeForCausalLM, ask
from cephalo_lite.finetune import (
    RECIPES,
    AnswerCollator,
    Recipe,
    add_adapters,
    conversation_of,
    freeze,
    fuse,
    load_adapters,
    load_trained,
    make_trainer,
    merge_adapters,
    moe_adapters,
    moe_full,
    moe_gates,
    parameter_groups,
    save_adapters,
    sft,
    tokenize_rows,
)
from cephalo_lite.finetune.exact_gates import exact_gates
from cephalo_lite.moe import routers
from cephalo_lite.quantize import PreflightError, load_4bit

COLOURS = ("red", "blue", "green", "white", "black", "gray")
SHORT = {
    "r": 4, "learning_rate": 1e-2, "optimizer": "adamw_torch", "batch": 3, "accumulation": 1,
    "max_steps": 4, "max_length": 128, "eval_steps": 2, "dropout": 0.0, "schedule": "constant",
    "warmup": 0.0,
}  # fmt: skip


def short(recipe, **changes) -> Recipe:
    return dataclasses.replace(recipe, **{**SHORT, **changes})


def make_rows(count: int) -> list[dict]:
    """Pictures of one colour, each third with two of them, and each fourth row without any."""
    rows = []
    for number in range(count):
        colour = COLOURS[number % len(COLOURS)]
        one = Image.new("RGB", (28 + 28 * (number % 2), 28), colour)
        if number % 4 == 3:
            rows.append({"query": f"Say {colour}.", "answer": colour})
        elif number % 3 == 2:
            rows.append({"images": [one, one], "query": "Both?", "answer": colour})
        else:
            rows.append({"image": one, "query": "Which colour?", "answer": f"It is {colour}."})
    return rows


TRAIN, HELD_OUT = make_rows(9), make_rows(14)[9:]


@pytest.fixture
def make_mixture(make_small):
    def make(k: int = 1, dtype=torch.float32):
        experts = [make_small(1), make_small(2)]
        return Phi3VMoeForCausalLM.from_experts(make_small(), experts, k).to(dtype)

    return make


@pytest.fixture
def run(small_processor, tmp_path):
    def run(model, recipe, train=TRAIN, folder="run", **options):
        options = {"progress": False, **options}
        return sft(model, small_processor, train, HELD_OUT, recipe, tmp_path / folder, **options)

    return run


@torch.no_grad()
def loss_by_hand(model, rows, processor) -> float:
    """Cross entropy of the answers' tokens, row by row, by the processor's own labels."""
    total, count = 0.0, 0
    for row in rows:
        read = conversation_of(row)
        text = processor.apply_chat_template(read.messages)
        inputs = processor(images=[read.pictures], text=[text], return_labels=True)
        labels = inputs.pop("labels")[0, 1:]
        logits = model.eval()(**inputs).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        count += (labels >= 0).sum().item()
    return total / count


def changed_groups(model, plain) -> set[str]:
    before = dict(plain.named_parameters())
    return {
        group
        for group, members in parameter_groups(model).items()
        if any(not parameter.equal(before[name]) for name, parameter in members)
    }


def test_the_gates_of_a_mixture_move_and_nothing_else(
    make_mixture, make_small, run, small_processor, tmp_path, capfd
):
    plain = make_mixture()
    recipe = short(moe_gates, batch=9, max_steps=8, eval_steps=4, balance=0.1, router_z=0.1)
    model, report = run(make_mixture(), recipe)
    assert capfd.readouterr() == ("", "")
    assert changed_groups(model, plain) == {"gates"} and report.trained == {"gates": 2 * (64 + 2)}
    # with a batch of all rows the first loss is that of the rows, and of the routers
    routed = 0.1 * report.balance_losses[0][1] + 0.1 * report.z_losses[0][1]
    want = loss_by_hand(plain, TRAIN, small_processor)
    assert report.losses[0][1] == pytest.approx(want + routed, rel=1e-4)
    assert report.losses[-1][1] < report.losses[0][1] - 0.01
    assert report.eval_after == pytest.approx(loss_by_hand(model, HELD_OUT, small_processor), 0.2)
    assert [record.step for record in report.routing] == list(range(1, 9))
    assert len(report.routing[0].load) == 2 and report.adapters is None
    assert not model.training and "trained parameters" in report.table()
    assert "forward" not in vars(model) and not model.model.gradient_checkpointing
    # a checkpoint holds the gates alone
    saved = tmp_path / "run" / "checkpoint-8"
    assert (saved / "trained.safetensors").stat().st_size < 2000
    assert not (saved / "model.safetensors").exists()
    again = make_mixture()
    assert len(load_trained(again, saved)) == 4 and changed_groups(again, model) == set()
    with pytest.raises(ValueError, match="has no place in this Phi3VForCausalLM"):
        load_trained(make_small(), saved)


@pytest.mark.parametrize("name", ["moe_adapters", "moe_full", "vision_adapters"])
def test_every_recipe_learns_and_what_is_saved_loads(
    name, make_mixture, make_small, run, small_processor, tmp_path
):
    recipe = RECIPES[name]
    make = make_small if name == "vision_adapters" else make_mixture
    model, report = run(make(), short(recipe, learning_rate=5e-3, max_steps=8, eval_steps=8))
    assert report.losses[-1][1] < 0.9 * report.losses[0][1]
    assert report.eval_after < report.eval_before
    want = loss_by_hand(model, TRAIN, small_processor)
    if name == "moe_full":
        assert {"gates", "experts", "projector", "vision", "head"} <= report.trained.keys()
        again = Phi3VMoeForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-8")
    else:
        assert {"moe_adapters": {"attention", "experts", "gates"}}.get(
            name, {"attention", "mlp"}
        ) == set(report.adapters.groups)
        save_adapters(model, tmp_path / "adapter")
        again, _ = load_adapters(make(), tmp_path / "adapter")
        torch.testing.assert_close(loss_by_hand(again, TRAIN, small_processor), want)
        again, merged = merge_adapters(again)  # raises where logits change by more than 1e-5
        fuse(again).save_pretrained(tmp_path / "merged")
        again = type(make()).from_pretrained(tmp_path / "merged")
    assert loss_by_hand(again, TRAIN, small_processor) == pytest.approx(want, rel=1e-4)


def test_vision_and_projector_have_adapters_too(make_mixture, run):
    groups = ("vision", "projector", "attention", "experts", "gates")
    model, report = run(make_mixture(2), short(moe_adapters, groups=groups, max_steps=2))
    assert set(report.adapters.groups) == set(groups)
    for group, members in parameter_groups(model).items():
        moved = [p.abs().max() > 0 for n, p in members if ".lora_B" in n and p.requires_grad]
        assert not moved or any(moved), group


def test_training_of_gates_goes_on_where_it_stopped(make_mixture, run, tmp_path):
    recipe = short(moe_gates, schedule="linear")
    whole, first = run(make_mixture(), recipe)
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    again, second = run(make_mixture(), recipe)
    assert (second.resumed_at, second.steps) == (2, 4)
    for ours, theirs in zip(routers(whole), routers(again), strict=True):
        torch.testing.assert_close(ours.gate.weight, theirs.gate.weight, rtol=1e-4, atol=1e-6)
    assert [s for s, _ in second.losses] == [r.step for r in second.routing] == [1, 2, 3, 4]


def test_gates_of_a_model_in_bfloat16_are_stepped_in_float32(make_mixture, run):
    """At this rate hardly a step is larger than what bfloat16 rounds away."""
    steps = {"learning_rate": 2e-5, "max_steps": 12, "eval_steps": 12, "checkpointing": False}
    plain = make_mixture(dtype=torch.bfloat16)
    with torch.no_grad():
        for router in routers(plain):
            router.gate.weight.fill_(0.5)
            router.gate.weight[0] += 0.25
    model = make_mixture(dtype=torch.bfloat16)
    model.load_state_dict(plain.state_dict())
    seen = []
    hook = routers(model)[0].register_forward_hook(
        lambda module, args, out: seen.append((args[0].dtype, module.gate.weight.dtype))
    )
    run(model, short(moe_gates, **steps))
    hook.remove()
    assert (torch.float32, torch.float32) in seen  # in training
    assert seen[-1] == (torch.bfloat16, torch.bfloat16)  # judged as it will be used
    freeze(model, ("gates",))
    with exact_gates(model):
        gate = routers(model)[0].gate.weight
        assert gate.dtype == torch.float32
        gate.data += 1e-4  # would be nothing in bfloat16
        assert not gate.data.eq(gate.data.bfloat16().float()).all()
    assert gate.dtype == torch.bfloat16 and not routers(model)[0]._forward_pre_hooks


def test_the_plain_trainer_with_our_collator(make_mixture, small_processor, tmp_path):
    model = make_mixture()
    freeze(model, ("gates",))
    data = tokenize_rows(TRAIN, small_processor, 128).dataset
    settings = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=9, max_steps=3, learning_rate=1e-2,
        logging_steps=1, report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no",
        remove_unused_columns=False,
    )  # fmt: skip
    trainer = Trainer(
        model, settings, train_dataset=data, data_collator=AnswerCollator(small_processor)
    )
    want = loss_by_hand(model, TRAIN, small_processor)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(want, rel=1e-3) and losses[-1] < losses[0]
    assert changed_groups(model, make_mixture()) == {"gates"}


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


def test_a_mixture_in_four_bits(make_mixture, run, small_processor, tmp_path):
    """QLoRA of experts and attention on pictures, checked first; merged into its source."""
    make_mixture(2).save_pretrained(tmp_path / "moe")
    small_processor.save_pretrained(tmp_path / "moe")

    def base():
        return load_4bit(tmp_path / "moe", torch.float32, device="cpu", progress=False)[0]

    recipe = short(moe_adapters, optimizer="paged_adamw_8bit", max_steps=6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of bitsandbytes: nothing is paged on a CPU
        trained, report = run(base(), recipe)
    assert report.adapters.groups["experts"].modules == 2 * 2 * 2
    assert report.eval_after < report.eval_before
    moved = [n for n, p in trained.named_parameters() if ".lora_B" in n and p.abs().max() > 0]
    assert any("experts" in name for name in moved) and any("self_attn" in name for name in moved)
    save_adapters(trained, tmp_path / "adapter")
    want = loss_by_hand(trained, TRAIN, small_processor)
    again, _ = load_adapters(base(), tmp_path / "adapter")
    assert loss_by_hand(again, TRAIN, small_processor) == pytest.approx(want, rel=1e-5)
    whole, _ = load_adapters(make_mixture(2), tmp_path / "adapter")
    expected = loss_by_hand(whole, TRAIN, small_processor)
    merged = fuse(merge_adapters(whole)[0])
    assert loss_by_hand(merged, TRAIN, small_processor) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="quantized weights"):
        run(base(), short(moe_adapters, groups=(), whole=("experts",)), folder="whole")
    broken = base()
    mlp = broken.model.layers[0].mlp
    mlp.experts[0].down_proj = torch.nn.Linear(48, 32, bias=False)  # as if left unquantised
    with pytest.raises(PreflightError, match="not quantised"):
        run(broken, recipe, folder="broken")


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
