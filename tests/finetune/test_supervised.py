"""Fine-tuning: on answers only, before and after, resumed, packed, balanced, and in silence."""

import dataclasses
import functools
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, PhimoeConfig, PhimoeForCausalLM
from trl import SFTConfig, SFTTrainer

from cephalo_lite.exporting import export
from cephalo_lite.finetune import (
    RECIPES,
    add_adapters,
    load_adapters,
    merge_adapters,
    phi35_mini,
    phi35_mini_code,
    phi35_moe,
    save_adapters,
    tokenize_rows,
)
from cephalo_lite.finetune.merging import random_probe
from cephalo_lite.quantize import (
    PreflightError,
    SequentialPhimoeForCausalLM,
    load_4bit,
    nf4_config,
)

COLOURS = ("red", "blue", "green", "pink", "grey", "gold", "teal", "plum")
ROWS = [
    {"instruction": f"Name colour {number}." + " Please." * (number % 3), "output": colour}
    for number, colour in enumerate(COLOURS)
]
TRAIN, TEST = ROWS[:6], ROWS[6:]
SHORT = {
    "r": 4, "learning_rate": 2e-2, "optimizer": "adamw_torch", "batch": 3, "accumulation": 1,
    "max_steps": 4, "max_length": 128, "eval_steps": 2, "dropout": 0.0,
}  # fmt: skip


def short(recipe, **changes):
    return dataclasses.replace(recipe, **{**SHORT, **changes})


@pytest.fixture
def run(make_run, tokenizer):
    return make_run(tokenizer, TRAIN, TEST)


@torch.no_grad()
def loss_by_hand(model, rows, tokenizer) -> float:
    """Cross entropy of the answers' tokens, row by row, without padding."""
    total, count = 0.0, 0
    for row in rows:
        question = [{"role": "user", "content": row["instruction"]}]
        prompt = tokenizer.apply_chat_template(
            question, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        answer = tokenizer(row["output"] + "<|end|>", add_special_tokens=False)["input_ids"]
        logits = model.eval()(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        targets = torch.tensor(answer)
        total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        count += len(answer)
    return total / count


def test_the_recipes_numbers():
    assert {"phi35_moe", "phi35_mini", "phi35_mini_code"} <= set(RECIPES)
    for recipe in (phi35_moe, phi35_mini, phi35_mini_code):
        assert (recipe.r, recipe.alpha, recipe.dropout) == (16, 16, 0.05)
        assert (recipe.learning_rate, recipe.schedule, recipe.warmup) == (1e-4, "linear", 0.1)
        assert (recipe.optimizer, recipe.max_length) == ("paged_adamw_8bit", 512)
        assert recipe.batch >= 4 and recipe.accumulation > 1 and recipe.held_out == 0.1
    assert phi35_moe.groups == ("attention", "experts")  # the router is frozen unless named
    assert phi35_mini.groups == phi35_mini_code.groups == ("attention", "mlp")


@pytest.mark.filterwarnings("error")
def test_answers_are_learnt_and_only_adapters_change(make_dense, tokenizer, run, capfd):
    plain = make_dense()
    model, report = run(make_dense(), short(phi35_mini, max_steps=12, eval_steps=6))
    assert capfd.readouterr() == ("", "")
    assert report.losses[-1][1] < 0.7 * report.losses[0][1]
    assert [step for step, _ in report.losses] == list(range(1, 13))
    assert [step for step, _ in report.eval_losses] == [6, 12]
    assert (report.steps, report.resumed_at, report.rows) == (12, 0, 6)
    assert report.adapters.groups.keys() == {"attention", "mlp"}
    # the losses are those of the answers' tokens, of the plain model and of the trained one
    assert report.eval_before == pytest.approx(loss_by_hand(plain, TEST, tokenizer), rel=1e-4)
    assert report.eval_after == pytest.approx(loss_by_hand(model, TEST, tokenizer), rel=1e-4)
    base = {n.replace(".base_layer", ""): p for n, p in model.get_base_model().named_parameters()}
    assert all(base[name].equal(parameter) for name, parameter in plain.named_parameters())
    assert not model.training and "forward" not in vars(model.get_base_model())
    assert not model.get_base_model().model.gradient_checkpointing
    assert report.table().splitlines()[1].split()[-2:] == [
        f"{report.eval_before:.3f}", f"{report.eval_after:.3f}",
    ]  # fmt: skip


def test_padding_and_length_groups_do_not_change_the_loss(make_dense, tokenizer, run):
    """The first step sees all rows at once: the loss is that of the rows one by one."""
    recipe = short(phi35_mini_code, batch=6, max_steps=1)
    assert recipe.group_by_length
    _, report = run(make_dense(), recipe)
    assert report.losses[0][1] == pytest.approx(loss_by_hand(make_dense(), TRAIN, tokenizer), 1e-3)


def test_packed_rows_do_not_see_each_other(make_dense, tokenizer, run):
    """All rows fit into one packed row, on an attention that is not FlashAttention."""
    recipe = short(phi35_mini, packing=True, max_length=256, batch=1, max_steps=1)
    _, report = run(make_dense(), recipe)
    assert report.losses[0][1] == pytest.approx(loss_by_hand(make_dense(), TRAIN, tokenizer), 1e-3)


def test_training_goes_on_where_it_stopped(make_dense, run, tmp_path):
    recipe = short(phi35_mini)
    whole, first = run(make_dense(), recipe)
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    again, second = run(make_dense(), recipe)
    assert (first.resumed_at, second.resumed_at, second.steps) == (0, 2, 4)
    assert [step for step, _ in second.losses] == [1, 2, 3, 4]
    assert [loss for _, loss in second.losses] == pytest.approx([x for _, x in first.losses], 1e-3)
    ours, theirs = whole.state_dict(), again.state_dict()
    for name in (name for name in ours if "lora" in name):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="checkpoints of another recipe"):
        run(make_dense(), short(phi35_mini, learning_rate=1e-3))
    assert run(make_dense(), short(phi35_mini, seed=1), resume=False)[1].resumed_at == 0


def test_the_mixture_learns_with_and_without_the_balance_loss(make_moe, run, tokenizer):
    model, report = run(make_moe(), short(phi35_moe, max_steps=8, eval_steps=8))
    assert report.adapters.groups.keys() == {"attention", "experts"}
    assert report.losses[-1][1] < 0.85 * report.losses[0][1]
    free = report.balance_losses  # measured also where they have no weight
    assert len(free) == 8
    changed = {n for n, p in model.named_parameters() if ".lora_B" in n and p.abs().sum() > 0}
    assert any(".w1." in name for name in changed) and any(".w2." in name for name in changed)
    groups = ("attention", "router")
    model, report = run(
        make_moe(), short(phi35_moe, groups=groups, balance=0.01), folder="balanced"
    )
    assert len(report.balance_losses) == 4 and all(loss > 0 for _, loss in report.balance_losses)
    router = model.get_base_model().model.layers[0].mlp.router
    assert not router.modules_to_save["default"].weight.equal(router.original_module.weight)
    assert "num_experts" not in model.config.to_dict()
    model, further = run(model, short(phi35_moe, groups=groups), folder="further")
    assert further.eval_before == pytest.approx(report.eval_after, rel=1e-4)


def test_trl_alone_fails_on_the_balance_loss(make_moe, tokenizer, tmp_path, monkeypatch):
    """Why the routers' losses are ours: TRL asks Phi-3.5-MoE for a field by another name."""
    names = {n: v for n, v in PhimoeConfig.attribute_map.items() if n != "num_experts"}
    monkeypatch.setattr(PhimoeConfig, "attribute_map", names)
    model, _ = add_adapters(make_moe(), "attention", r=2)
    data = tokenize_rows(TRAIN, tokenizer, 128).dataset
    settings = SFTConfig(
        str(tmp_path), use_cpu=True, bf16=False, max_steps=1, router_aux_loss_coef=0.01,
        report_to="none", disable_tqdm=True, dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    trainer = SFTTrainer(model, settings, train_dataset=data, processing_class=tokenizer)
    with pytest.raises(AttributeError, match="num_experts"):
        trainer.train()


def test_what_cannot_be_trained_is_said_first(make_dense, run, tmp_path):
    with pytest.raises(ValueError, match="nothing in group 'experts'"):
        run(make_dense(), short(phi35_moe))
    with pytest.raises(ValueError, match="No row has an answer"):
        run(make_dense(), short(phi35_mini, max_length=4))


def test_from_four_bits_to_a_released_folder(make_moe, tokenizer, run, tmp_path, capfd):
    """Trained on the 4-bit base, loaded there and on the unquantised one, merged, exported."""
    make_moe().save_pretrained(tmp_path / "moe")
    tokenizer.save_pretrained(tmp_path / "moe")
    base = functools.partial(load_4bit, tmp_path / "moe", torch.float32, progress=False)
    groups = ("attention", "experts", "router")
    recipe = short(phi35_moe, optimizer="paged_adamw_8bit", max_steps=8, groups=groups)
    trained, report = run(base()[0], recipe, progress=True)
    assert "fine-tuning: 100%" in capfd.readouterr().err
    assert report.losses[-1][1] < report.losses[0][1]
    assert report.eval_after < report.eval_before
    assert report.adapters.groups["experts"].modules == 2 * 4 * 3
    save_adapters(trained, tmp_path / "adapter")
    ids = random_probe(trained.get_base_model())["input_ids"]
    with torch.no_grad():
        again, _ = load_adapters(base()[0], tmp_path / "adapter")
        dtypes = [
            {p.dtype for n, p in m.named_parameters() if "lora" in n} for m in (again, trained)
        ]
        assert dtypes[0] == dtypes[1] == {torch.float32}
        torch.testing.assert_close(again(ids).logits, trained(ids).logits, rtol=1e-5, atol=1e-5)
        whole = SequentialPhimoeForCausalLM.from_pretrained(tmp_path / "moe")
        whole, _ = load_adapters(whole, tmp_path / "adapter")
        expected = whole(ids).logits
        merged, _ = merge_adapters(whole)
        with pytest.warns(UserWarning):
            export(merged, tokenizer, tmp_path / "released")
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "released")
        assert type(stock) is PhimoeForCausalLM
        torch.testing.assert_close(stock(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_base_that_is_not_in_four_bits_is_not_trained_as_if(make_moe, tokenizer, run, tmp_path):
    """transformers' own 4-bit loading leaves the experts alone; `sft` refuses such a model."""
    make_moe().save_pretrained(tmp_path / "moe")
    stock = PhimoeForCausalLM.from_pretrained(
        tmp_path / "moe", quantization_config=nf4_config(torch.float32)
    )
    with pytest.raises(PreflightError, match="not quantised"):
        run(stock, short(phi35_moe, groups=("attention",)))
