"""Traces are laid back on text and pictures, and drawn."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from cephalo_lite.moe.trace import trace_routing
from cephalo_lite.moe.trace.colours import ink_on, looks, tint
from cephalo_lite.moe.trace.picture import TracedPicture
from cephalo_lite.moe.trace.text import chips, pieces

NAMES = ["materials", "general", "latex"]
LONG = "<|user|>\n<|image_1|>\nWhat is shown?<|end|>\n<|assistant|>\nA honeycomb.<|end|>\n"
SHORT = "<|user|>\nWhy?<|end|>\n<|assistant|>\nFibres.<|end|>\n"


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
    inputs = processor(images=picture, text=text, add_special_tokens=False)  # nothing between
    trace = trace_routing(model, inputs, processor)
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
