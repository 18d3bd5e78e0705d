"""Traces tell what the routers did, token by token."""

import math
import re

import numpy as np
import pytest
import torch

import cephalo_lite as cl
from cephalo_lite.moe.trace import RoutingTrace, trace_routing, tracing

NAMES = ["materials", "general", "latex"]
LONG = "<|user|>\n<|image_1|>\nWhat is shown?<|end|>\n<|assistant|>\nA honeycomb.<|end|>\n"
SHORT = "<|user|>\nWhy?<|end|>\n<|assistant|>\nFibres.<|end|>\n"


@pytest.mark.parametrize("k, router", [(1, "cephalo"), (2, "cephalo"), (3, "renormalised")])
def test_the_trace_is_what_the_routers_said(k, router, make_mixture, processor, long):
    model = make_mixture(k, router=router)
    trace = trace_routing(model, long, processor)
    with torch.no_grad():
        scores = model(**long, output_router_logits=True).router_logits
    probs = torch.stack(scores).softmax(dim=-1)  # (L, N, E)
    assert torch.allclose(trace.probs, probs, atol=1e-5)
    values, chosen = probs.topk(k, dim=-1)
    assert torch.equal(trace.chosen, chosen)
    known = values.softmax(-1) if router == "cephalo" else values / values.sum(-1, keepdim=True)
    assert torch.allclose(trace.weights, known, atol=1e-5)
    assert torch.equal(trace.ids, long["input_ids"][0]) and trace.layers == [0, 1, 2]
    assert len(trace) == trace.probs.shape[1] and trace.expert_names == NAMES


def test_kinds_of_tokens(model, processor, picture, long):
    trace = trace_routing(model, long, processor)
    kinds = np.array(trace.kinds)
    assert np.array_equal(
        kinds == "image", (long["input_ids"][0] == processor.image_token_id).numpy()
    )
    answer = "".join(p for p, kind in zip(trace.pieces, kinds, strict=True) if kind == "answer")
    assert answer == "A honeycomb.<|end|>"
    labelled = processor(images=picture, text=LONG, return_labels=True)
    labels = labelled["labels"].clone()
    assert trace_routing(model, labelled).kinds == trace.kinds  # without a tokenizer, by labels
    assert torch.equal(labelled["labels"], labels)
    assert set(trace_routing(model, long).kinds) == {"image", "prompt"}


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out_of_a_batch(side, model, processor, picture, long):
    batch = processor(images=[[], [picture]], text=[SHORT, LONG], padding=True, padding_side=side)
    trace = trace_routing(model, batch, processor)
    alone = [
        trace_routing(model, processor(text=SHORT), processor),
        trace_routing(model, long, processor),
    ]
    assert len(trace) == int(batch["attention_mask"].sum()) == sum(map(len, alone))
    for row, own in enumerate(alone):
        part = trace.select(row=row)
        assert (
            torch.equal(part.ids, own.ids) and part.kinds == own.kinds and part.pieces == own.pieces
        )
        if side == "right":  # left-padded rows without position_ids are read at later positions
            assert torch.allclose(part.probs, own.probs, atol=1e-5)
        assert len(part.pictures) == row and trace.shares(row=row) == part.shares()
    assert len(trace.pieces) == len(trace)


def test_some_layers_only(make_mixture, processor, long):
    trace = trace_routing(make_mixture(moe_layers=[0, 2]), long, processor)
    assert trace.layers == [0, 2] and trace.probs.shape[0] == 2
    assert trace.shares_per_layer().shape == (2, 3)
    expert, _ = trace.leading(layer=2)
    assert torch.equal(expert, trace.chosen[1, :, 0])
    with pytest.raises(ValueError, match=r"Layer 1 has no experts; the layers \[0, 2\]"):
        trace.leading(layer=1)


def test_generated_tokens_are_traced_as_in_one_pass(make_mixture, processor, picture):
    model = make_mixture(2)
    prompt = LONG[: LONG.index("A honey")]
    inputs = processor(images=picture, text=prompt)
    with tracing(model, processor) as record:
        ids = model.generate(**inputs, max_new_tokens=9, do_sample=False)
    trace = record.trace()
    again = trace_routing(
        model, {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    )
    assert torch.equal(trace.ids, again.ids[:-1])
    assert torch.allclose(trace.probs, again.probs[:, :-1], atol=1e-4)
    length = inputs["input_ids"].shape[1]
    assert trace.kinds[length:] == ["answer"] * (ids.shape[1] - length - 1)
    with tracing(model) as record:
        model.generate(**inputs, max_new_tokens=9, do_sample=False, use_cache=False)
    slow = record.trace()  # the whole text is read again for each token
    assert torch.equal(slow.ids, trace.ids) and torch.allclose(slow.probs, trace.probs, atol=1e-4)


def test_a_finished_row_is_not_traced_further(model, processor):
    inputs = processor(
        text=[SHORT[: SHORT.index("Fibres")], "Hi"], padding=True, padding_side="left"
    )
    length = inputs["input_ids"].shape[1]
    stop = int(model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, length + 1])
    with tracing(model, processor, stops=[stop]) as record:
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=stop)
    trace = record.trace()
    assert stop not in ids[1, length:] and ids.shape[1] == length + 8
    assert trace.select(row=0).kinds.count("answer") == (ids[0, length] != stop)
    assert int((trace.rows == 1).sum()) == int(inputs["attention_mask"][1].sum()) + 7


def test_the_negative_ids_of_2024(make_mixture, processor, picture):
    model = make_mixture()
    other = picture.rotate(90, expand=True)
    text = "<|user|>\n<|image_2|>\nand\n<|image_1|>\n<|end|>\n"
    ours = processor(images=[picture, other], text=text)
    theirs = processor.image_processor([picture, other])
    ids, is_image = ours["input_ids"].clone(), ours["input_ids"] == processor.image_token_id
    first = int(is_image.sum()) - theirs["num_img_tokens"][0]
    ids[is_image] = torch.tensor([-2] * first + [-1] * theirs["num_img_tokens"][0])
    old = {"input_ids": ids, **{k: theirs[k] for k in ("pixel_values", "image_sizes")}}
    a, b = trace_routing(model, ours, processor), trace_routing(model, old, processor)
    assert (
        torch.allclose(a.probs, b.probs, atol=1e-5) and a.kinds == b.kinds and a.pieces == b.pieces
    )
    assert [p.crops for p in a.pictures] == [p.crops for p in b.pictures] == [(2, 1), (1, 2)]
    for one, two in zip(a.pictures, b.pictures, strict=True):
        assert one.start == two.start and torch.equal(one.detail, two.detail)


def test_model_and_inputs_stay_as_they_were(model, processor, long):
    before = {key: value.clone() for key, value in long.items()}
    hooks = [
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    ]
    model.train()
    trace = trace_routing(model, long, processor)
    assert model.training and not trace.probs.requires_grad
    model.eval()
    after = [
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    ]
    assert hooks == after and all(torch.equal(long[key], value) for key, value in before.items())


def by_hand(kinds=("prompt", "prompt", "image"), k=2):
    """A trace of 2 layers and 3 tokens with known shares."""
    probs = torch.tensor(
        [[[0.5, 0.5, 0.0], [0.8, 0.2, 0.0], [0.0, 0.4, 0.6]], [[1.0, 0.0, 0.0]] * 3]
    )
    weights, chosen = probs.topk(k, dim=-1)
    zeros = torch.zeros(3, dtype=torch.long)
    return RoutingTrace(
        probs,
        weights,
        chosen,
        zeros,
        zeros,
        torch.arange(3),
        list(kinds),
        [4, 7],
        list(NAMES),
        list("ab "),
    )


def test_shares_dead_experts_and_entropy_by_hand():
    trace = by_hand()
    assert torch.allclose(
        trace.shares_per_layer(), torch.tensor([[1.3 / 3, 1.1 / 3, 0.6 / 3], [1.0, 0.0, 0.0]])
    )
    assert trace.shares()["materials"] == pytest.approx((1.3 / 3 + 1) / 2)
    assert sum(trace.shares().values()) == pytest.approx(1)
    assert trace.shares("image") == pytest.approx({"materials": 0.5, "general": 0.2, "latex": 0.3})
    assert trace.shares("image", by="choice") != pytest.approx(trace.shares("image"))
    assert trace.select("image").shares_per_layer(by="choice")[0].tolist() == [0, 0.5, 0.5]
    single = by_hand(k=1)
    assert single.shares() == single.shares(by="choice")
    assert single.dead_experts() == {"general": [4, 7], "latex": [7]}
    log = -sum(p * math.log(p) for p in (0.5, 0.5, 0.8, 0.2, 0.4, 0.6)) / 3
    assert trace.entropy().tolist() == pytest.approx([log, 0])
    expert, strength = trace.leading()
    assert expert.tolist() == [0, 0, 0] and strength.tolist() == pytest.approx([0.75, 0.9, 0.5])
    expert, strength = trace.leading(layer=4)
    assert expert[1:].tolist() == [0, 2] and strength[1:].tolist() == pytest.approx([0.8, 0.6])


def test_the_table_tells_it_in_words():
    table = by_hand(k=1).table()
    assert "3 tokens, 2 layers, 1 of 3 experts per token" in table
    assert re.search(r"^image +1 +50\.0 % +0\.0 % +50\.0 % +0\.34$", table, re.M)
    assert re.search(r"^7 +100\.0 % +0\.0 % +0\.0 % +0\.00$", table, re.M)
    assert "latex: chosen by no token in layer 7" in table


def test_a_selected_expert_takes_all(model, processor, long):
    with cl.select_expert(model, 2):
        trace = trace_routing(model, long, processor)
    assert trace.shares() == {"materials": 0, "general": 0, "latex": 1}
    assert set(trace.dead_experts()) == {"materials", "general"}


def test_errors_say_what_is_wrong(model, make_mixture, processor, long):
    trace = trace_routing(model, long)
    for call, message in [
        (lambda: trace.select("video"), "'video' is not one of image, prompt, answer"),
        (lambda: trace.shares("answer"), "no answer tokens"),
        (lambda: trace.select(row=3), "no tokens in row 3"),
        (lambda: trace.shares(by="size"), "'size'"),
        (lambda: trace.text_html(), "pass the processor"),
        (lambda: trace.plot_picture(2), "has 1 pictures"),
        (lambda: trace_routing(model, {"inputs_embeds": torch.zeros(1, 2, 32)}), "input_ids"),
        (lambda: trace_routing(model, {**long, "labels": torch.zeros(1, 2)}), "do not fit"),
        (lambda: trace_routing(torch.nn.Linear(1, 1), long), "no routers"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match="Nothing was traced"), tracing(model) as record:
        record.trace()
    with pytest.raises(ValueError, match="not inputs_embeds"), tracing(model):
        model(inputs_embeds=torch.zeros(1, 2, 32))
