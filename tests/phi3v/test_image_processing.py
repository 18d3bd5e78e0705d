"""Pictures to crops, bit for bit as the original; and pictures in whatever form they come."""

import base64
import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cephalo_lite import Phi3VImageProcessor
from cephalo_lite.phi3v.image_processing import load_picture

RECORDS = json.loads((Path(__file__).parents[1] / "data/golden/improc/improc.json").read_text())


def digest(pixels: torch.Tensor) -> str:
    return hashlib.sha256(pixels.numpy().tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("record", RECORDS["cases"], ids=lambda r: f"{r['name']}-{r['num_crops']}")
def test_pixels_are_bit_equal(record, synth, golden):
    picture = synth(record["width"], record["height"], record["mode"], record["kind"])
    if record["file"]:
        saved = Image.open(golden / "improc" / record["file"])
        assert np.array_equal(np.array(saved.convert("RGB")), np.array(picture.convert("RGB")))
    processor = Phi3VImageProcessor(num_crops=record["num_crops"])
    out = processor(picture)
    assert list(out["pixel_values"].shape) == record["pixel_values_shape"]
    assert out["image_sizes"].tolist() == [record["image_sizes"]]
    assert out["num_img_tokens"] == [record["num_img_tokens"]]
    assert processor.calc_num_image_tokens(picture) == [record["num_img_tokens"]]
    flat = out["pixel_values"].flatten()
    assert flat[record["sample_flat_index"]].tolist() == record["sample_values"]
    assert digest(out["pixel_values"]) == record["sha256_16"]


@pytest.mark.parametrize("case", ["plain_image_landscape", "plain_batch2_nopos"])
def test_pixels_of_the_golden_prompts(golden, golden_meta, golden_processor, case):
    record = golden_meta["cases"][case]
    pictures = [Image.open(golden / "images" / f"{name}.png") for name in record["images"]]
    pixels = golden_processor.image_processor(pictures)["pixel_values"]
    assert list(pixels.shape) == record["pixel_values_shape"]
    assert digest(pixels) == record["pixel_values_sha"]


@pytest.mark.parametrize("name", ["land", "port"])
def test_hd_transform(golden, name):
    padded = Phi3VImageProcessor(num_crops=4).hd_transform(
        Image.open(golden / "images" / f"{name}.png")
    )
    assert np.array_equal(
        np.array(padded), np.array(Image.open(golden / "images" / f"{name}.hd4.png"))
    )


@pytest.mark.parametrize("row", RECORDS["size_table"], ids=lambda row: f"{row['w']}x{row['h']}")
@pytest.mark.parametrize("num_crops", [1, 4, 6, 9, 16])
def test_size_table(row, num_crops):
    """The original's [width, height, image tokens]; where it has a side of 0, we raise."""
    width, height, tokens = row[str(num_crops)]
    processor = Phi3VImageProcessor(num_crops=num_crops)
    picture = Image.new("RGB", (row["w"], row["h"]))
    if 0 in (width, height):
        with pytest.raises(ValueError, match="too thin"):
            processor.hd_transform(picture)
        return
    assert processor.hd_transform(picture).size == (width, height)
    assert processor.calc_num_image_tokens([picture]) == [tokens]


def test_several_pictures(synth):
    shapes, sizes, tokens = (
        RECORDS["multi_pt"][key] for key in ("pixel_values", "image_sizes", "num_img_tokens")
    )
    out = Phi3VImageProcessor(num_crops=4)([synth(64, 64), synth(300, 90)])
    assert list(out["pixel_values"].shape) == shapes[0]
    assert out["image_sizes"].tolist() == sizes[2]
    assert out["num_img_tokens"] == tokens[2]


@pytest.mark.parametrize("size", [28, 112])
def test_other_crop_sizes(synth, size):
    """Crops are as large as the tower wants them, and the number of tokens follows."""
    tokens = (size // 14 // 2) ** 2
    processor = Phi3VImageProcessor(num_crops=4, crop_size=size, num_img_tokens=tokens)
    out = processor(synth(120, 40))
    assert out["pixel_values"].shape == (1, 5, 3, size, size)
    assert out["image_sizes"].tolist() == [[size, 3 * size]]
    assert out["num_img_tokens"] == [4 * tokens + 1 + 2 * size // 28]
    assert not out["pixel_values"][0, 4].any()  # three crops and one of zeros


def encoded(picture: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


def test_every_form_of_a_picture(synth, tmp_path):
    picture = synth(40, 30)
    array = np.array(picture)  # (H, W, 3)
    path = tmp_path / "picture.png"
    picture.save(path)
    code = base64.b64encode(encoded(picture)).decode()
    forms = {
        "PIL": picture,
        "numpy (H, W, C)": array,
        "numpy (C, H, W)": array.transpose(2, 0, 1),
        "numpy floats in 0..1": array / 255,
        "numpy floats in 0..255": array.astype(np.float32),
        "numpy int64": array.astype(np.int64),
        "torch (C, H, W)": torch.from_numpy(array).permute(2, 0, 1),
        "torch floats": torch.from_numpy(array).permute(2, 0, 1) / 255,
        "torch (H, W, C)": torch.from_numpy(array),
        "path as a string": str(path),
        "path": path,
        "data URI": f"data:image/png;base64,{code}",
        "bytes": encoded(picture),
    }
    for form, given in forms.items():
        assert np.array_equal(np.array(load_picture(given)), array), form


def test_grey_and_four_channels(synth):
    grey = np.array(synth(40, 30, "L"))  # (H, W)
    want = np.stack([grey] * 3, -1)
    for form in (grey, grey[..., None], grey[None], grey / 255, torch.from_numpy(grey)):
        assert np.array_equal(np.array(load_picture(form)), want)
    colours = synth(40, 30, "RGBA")
    array = np.array(colours)
    for form in (colours, array, array.transpose(2, 0, 1)):
        assert np.array_equal(
            np.array(load_picture(form)), array[..., :3]
        )  # alpha is dropped, as published


def test_white_and_black_floats_and_integers():
    """An integer array is read as 0..255 even where it is nearly black."""
    assert np.array(load_picture(np.ones((4, 4, 3)))).min() == 255
    assert np.array(load_picture(np.ones((4, 4, 3), dtype=np.int64))).max() == 1


def test_a_photograph_taken_upright_is_read_upright(synth):
    picture = synth(40, 30)
    exif = picture.getexif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", exif=exif)
    assert load_picture(buffer.getvalue()).size == (30, 40)


def test_numpy_output(synth):
    processor = Phi3VImageProcessor(num_crops=1)
    want = processor(synth(40, 30))
    got = processor(synth(40, 30), return_tensors="np")
    assert isinstance(got["pixel_values"], np.ndarray) and isinstance(
        got["image_sizes"], np.ndarray
    )
    assert np.array_equal(got["pixel_values"], want["pixel_values"].numpy())


def test_round_trip(tmp_path):
    Phi3VImageProcessor(num_crops=7, crop_size=112, num_img_tokens=16).save_pretrained(tmp_path)
    again = Phi3VImageProcessor.from_pretrained(tmp_path)
    assert (again.num_crops, again.crop_size, again.num_img_tokens) == (7, 112, 16)
