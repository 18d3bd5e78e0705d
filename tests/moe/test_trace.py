"""Traces tell what the routers did, token by token, and lay it back on text and pictures."""

import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

import cephalo_lite as cl
from cephalo_lite.moe.trace import RoutingTrace, trace_routing, tracing
from cephalo_lite.moe.trace_colours import ink_on, looks, tint
from cephalo_lite.moe.trace_picture import TracedPicture
from cephalo_lite.moe.trace_text import chips, pieces
from cephalo_lite.tiny.tokenizer import make_tokenizer

NAMES = ["materials", "general", "latex"]
LONG = "<|user|>\n<|image_1|>\nWhat is shown?<|end|>\n<|assistant|>\nA honeycomb.<|end|>\n"
SHORT = "<|user|>\nWhy?<|end|>\n<|assistant|>\nFibres.<|end|>\n"


@pytest.fixture(scope="module")
def processor():
    pictures = cl.Phi3VImageProcessor(num_crops=2, crop_size=56, num_img_tokens=4)
    tokenizer = make_tokenizer(["What is shown? A honeycomb of fibres."], vocab_size=300)
    return cl.Phi3VProcessor(pictures, tokenizer)


@pytest.fixture(scope="module")
def make_mixture(processor):
    def make(k=1, moe_layers=None, router="cephalo", order="sub_glb"):
        torch.manual_seed(0)
        ids = processor.tokenizer.convert_tokens_to_ids
        config = cl.Phi3VMoeConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=512,
            original_max_position_embeddings=512,
            initializer_range=0.3,
            vocab_size=len(processor.tokenizer),
            image_token_id=processor.image_token_id,
            eos_token_id=[ids("<|end|>"), ids("<|endoftext|>")],
            pad_token_id=ids("<|endoftext|>"),
            embd_layer={"hd_transform_order": order},
            vision_config={
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 56,
                "patch_size": 14,
            },
            k=k,
            num_expert_models=3,
            expert_names=NAMES,
            moe_layers=moe_layers,
            router=router,
        )
        model = cl.Phi3VMoeForCausalLM(config).eval()
        for name, weight in model.named_parameters():
            if ".experts." in name or ".gate.weight" in name:
                torch.nn.init.normal_(weight, std=0.3 if ".experts." in name else 1)
        return model

    return make


@pytest.fixture(scope="module")
def model(make_mixture):
    return make_mixture()


@pytest.fixture(scope="module")
def picture():
    pixels = np.random.default_rng(0).integers(0, 255, (30, 60, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def long(processor, picture):
    return processor(images=picture, text=LONG)


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


@pytest.mark.parametrize("order", ["sub_glb", "glb_sub"])
def test_tokens_are_laid_back_where_they_come_from(order, make_mixture, processor):
    """The image embedding itself lays out numbered patches; the trace must find each again."""
    embedding = make_mixture(order=order).model.vision_embed_tokens
    rows, columns, side = 2, 3, 2
    blocks = torch.arange(float((1 + rows * columns) * side * side)).view(-1, side, side, 1)
    with torch.no_grad():
        embedding.sub_GN.fill_(-1)
    end = torch.nn.Parameter(torch.full((1, 1, 1, 1), -1.0))
    embedding.sub_GN = end
    parts = [embedding.lines(blocks[1:], rows, columns), torch.tensor([[-2.0]])]
    parts.append(embedding.lines(blocks[:1], 1, 1))
    values = torch.cat(parts if order == "sub_glb" else parts[::-1])[:, 0]
    picture = TracedPicture(0, 0, (rows, columns), side, order, None, None)
    assert picture.tokens == len(values) == processor.image_processor.num_tokens(rows, columns)
    grid = picture.lay_out(values)
    detail = blocks[1:, ..., 0].view(rows, columns, side, side).transpose(1, 2).reshape(4, 6)
    assert torch.equal(grid.detail, detail) and torch.equal(grid.overview, blocks[0, ..., 0])
    assert (grid.detail_ends == -1).all() and len(grid.detail_ends) == 4
    assert (
        (grid.overview_ends == -1).all() and len(grid.overview_ends) == 2 and grid.separator == -2
    )


def test_a_marked_patch_is_found_at_its_place(make_mixture, processor):
    """One black patch in a white picture goes to another expert: its token lies under it."""
    model = make_mixture()
    pixels = np.full((56, 112, 3), 255, np.uint8)
    pixels[28:, 84:] = 0  # the patch in row 1, column 3 of the 2 x 4 tokens
    inputs = processor(images=Image.fromarray(pixels), text="<|user|>\n<|image_1|>\nWhat?<|end|>\n")
    trace = trace_routing(model, inputs, processor)
    (traced,) = trace.pictures
    shown = trace.select("image")
    grid = traced.lay_out(shown.probs[0, :, 0])
    away = (grid.detail - grid.detail.flatten().median()).abs()
    assert away.shape == (2, 4) and int(away.argmax()) == 7
    assert torch.equal(traced.detail, torch.from_numpy(pixels)) and traced.overview.shape == (
        56,
        56,
        3,
    )


def test_pieces_of_text_join_to_the_whole(processor):
    tokenizer = processor.tokenizer
    for text in ("What is shown? A honeycomb.", "Zug – ζβ 🧪 fibres", "<|user|>\nWhy?<|end|>\n"):
        ids = tokenizer(text)["input_ids"]
        assert "".join(pieces(ids, tokenizer)) == tokenizer.decode(ids)
        split = [*ids[:3], None, None, *ids[3:]]
        assert pieces(split, tokenizer)[3:5] == ["", ""]


def test_pieces_of_a_llama_tokenizer(golden_tokenizer):
    ids = golden_tokenizer("Hello Cephalo, what is silk?")["input_ids"]
    assert "".join(pieces(ids, golden_tokenizer)) == golden_tokenizer.decode(ids)


def test_text_as_html(model, processor, long):
    trace = trace_routing(model, long, processor)
    page = trace.text_html()
    spans = re.findall(r'<span title="([^"]+)" style="([^"]+)">([^<]*)</span>', page)
    row = chips(trace)
    assert len(spans) == len(row) and sum(chip.kind == "image" for chip in row) == 1
    for (tip, style, _), chip in zip(spans, row, strict=True):
        assert tip.startswith(NAMES[chip.expert])
        if chip.kind != "image":
            assert looks(NAMES)[chip.expert].colour in style
    text = "".join(chip.text for chip in row if chip.kind != "image")
    assert text == processor.tokenizer.decode(
        [i for i in trace.ids.tolist() if i != processor.image_token_id]
    )
    assert "&lt;|user|&gt;" in page and all(name in page for name in NAMES)
    assert trace.text_html(layer=1) != page


def test_two_pictures_side_by_side_are_two(model, processor, picture):
    text = "<|user|>\n<|image_1|><|image_1|>\nWhat?<|end|>\n"
    trace = trace_routing(model, processor(images=picture, text=text), processor)
    shown = [chip.text.strip() for chip in chips(trace) if chip.kind == "image"]
    tokens = trace.pictures[0].tokens
    assert shown == [f"picture 1: {tokens} tokens", f"picture 2: {tokens} tokens"]


def test_plots(model, processor, long):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    trace = trace_routing(model, long, processor)
    ax = trace.plot_layers("image")
    assert [label.get_text() for label in ax.get_yticklabels()] == NAMES
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "1", "2", "all"]
    shown = {text.get_text() for text in ax.texts}
    assert {f"{100 * share:.0f}" for share in trace.shares("image").values()} <= shown
    figure, own = plt.subplots()
    assert trace.plot_layers(ax=own) is own

    detail, overview = trace.plot_picture(layer=1)
    expert, _ = trace.select("image").leading(1)
    grid = trace.pictures[0].lay_out(expert)
    for number, look in enumerate(looks(NAMES)):
        colour = matplotlib.colors.to_rgba(look.colour)
        points = detail.collections[number].get_offsets()
        assert len(points) == int((grid.detail == number).sum())
        assert len(points) == 0 or tuple(detail.collections[number].get_facecolor()[0]) == colour
    legend = detail.figure.legends[0]
    assert [text.get_text().split()[0] for text in legend.get_texts()] == NAMES

    ax = trace.plot_text()
    written = "".join(text.get_text() for text in ax.texts)
    assert (
        "honeycomb" in written.replace(" ", "") and f"{trace.pictures[0].tokens} tokens" in written
    )
    for axes in (ax, detail, own):
        axes.figure.canvas.draw()
    plt.close("all")


def test_looks_are_the_projects_and_differ():
    assert [look.colour for look in looks(["latex", "Materials", "general"])] == [
        "#6C4FB3",
        "#0F8B8D",
        "#D9772B",
    ]
    mixed = looks(["polymers", "materials", *map(str, range(6))])
    assert len({look.colour for look in mixed}) == 8 and len({look.marker for look in mixed}) == 8
    assert len(looks([str(n) for n in range(64)])) == 64
    assert tint("#000000", 0) == (1, 1, 1) and tint("#0F8B8D", 1) == pytest.approx(
        (15 / 255, 139 / 255, 141 / 255)
    )
    assert ink_on((1, 1, 1)) != "white" and ink_on((0, 0, 0)) == "white"


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
