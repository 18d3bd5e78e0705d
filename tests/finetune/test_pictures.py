"""Fine-tuning on pictures: the dense model and the mixture, in part, whole, and in 4 bits."""

import warnings

import pytest
import torch
from transformers import Trainer, TrainingArguments

from cephalo_lite import Phi3VMoeForCausalLM
from cephalo_lite.finetune import (
    RECIPES,
    AnswerCollator,
    freeze,
    fuse,
    load_adapters,
    load_trained,
    merge_adapters,
    moe_adapters,
    moe_gates,
    parameter_groups,
    save_adapters,
    tokenize_rows,
)
from cephalo_lite.finetune.exact_gates import exact_gates
from cephalo_lite.moe import routers
from cephalo_lite.quantize import PreflightError, load_4bit
from tests.finetune.on_pictures import HELD_OUT, TRAIN, changed_groups, loss_by_hand, short


@pytest.fixture
def run(make_run, small_processor):
    return make_run(small_processor, TRAIN, HELD_OUT)


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
