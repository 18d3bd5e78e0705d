"""From a picture to crops: the HD transform of Phi-3-Vision."""

from __future__ import annotations

import base64
import io
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
BASE64 = re.compile(
    r"[A-Za-z0-9+/]{100,}={0,2}"
)  # what no path looks like: long, and without a dot


def load_picture(source: Any) -> Image.Image:
    """Open a picture, whatever it comes as, in RGB.

    Args:
        source: PIL image; numpy or torch array (H, W), (H, W, C) or (C, H, W), integers in
            0..255 or floats in 0..1 (0..255 where one is above 1); path; `data:image/...;base64,`
            URI or base64 alone; http(s) URL; or the bytes of an image file.

    Raises:
        ValueError: the picture is empty, unreadable or truncated, or of an unknown type.
    """
    name = "picture"
    try:
        if isinstance(source, (str, Path)):
            name = str(source)[:80]
            if name.startswith("data:") or BASE64.fullmatch(str(source)):
                source = base64.b64decode(str(source).split(",", 1)[-1], validate=True)
            elif name.startswith(("http://", "https://")):
                from transformers.image_utils import load_image

                source = load_image(str(source))
            else:
                name = str(source)
                source = Path(source).read_bytes()
        if isinstance(source, (bytes, bytearray)):
            source = ImageOps.exif_transpose(Image.open(io.BytesIO(source)))
        if isinstance(source, (np.ndarray, torch.Tensor)):
            source = _from_array(source)
        if not isinstance(source, Image.Image):
            raise TypeError(f"{type(source).__name__} is not a picture")
        if 0 in source.size:
            raise ValueError(f"its size is {source.size[0]}x{source.size[1]} pixels")
        return source.convert("RGB")
    except Exception as error:  # decoders of damaged files raise almost anything
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"Could not read {name!r}: {reason}. Pass a PIL image, an array (H, W, 3), a path, "
            "a data URI or the bytes of a complete image file."
        ) from error


def _from_array(array: np.ndarray | torch.Tensor) -> Image.Image:
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
    if array.size == 0 or array.ndim not in (2, 3):
        raise ValueError(f"an array of shape {tuple(array.shape)} is not a picture")
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[-1] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)  # (C, H, W) -> (H, W, C)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim == 3 and array.shape[-1] not in (3, 4):
        raise ValueError(f"an array of shape {tuple(array.shape)} has no 1, 3 or 4 channels")
    if not np.isfinite(array).all():
        raise ValueError("the array has values that are not finite")
    if array.dtype != np.uint8:
        scale = 255 if array.dtype.kind in "fb" and array.max() <= 1 else 1
        if array.min() < 0 or array.max() * scale > 255:
            raise ValueError(
                f"values run from {array.min():g} to {array.max():g}; want 0..1 or 0..255"
            )
        array = np.round(array * scale).astype(np.uint8)
    return Image.fromarray(array)


class Phi3VImageProcessor(BaseImageProcessor):
    """Resize, pad and cut a picture into one global crop and up to `num_crops` detailed ones.

    The picture is enlarged (or shrunk) so that its long side spans as many crops as `num_crops`
    allows, padded with white to whole crops, normalised, and cut. The global crop is the padded
    picture, resized.

    Args:
        num_crops: most detailed crops of a picture; released: 16 (Phi-3-vision), 4
            (Phi-3.5-vision).
        crop_size: pixels of a crop's side, `vision_config.image_size` of the model.
        num_img_tokens: image tokens of one crop, (crop_size / patch_size / 2) ** 2.
        image_mean, image_std: per channel, in 0..1.

    Source: preprocessor_config.json of microsoft/Phi-3-vision-128k-instruct and measurements of its
        code.
    """

    model_input_names = ["pixel_values", "image_sizes", "num_img_tokens"]

    def __init__(
        self,
        num_crops: int = 16,
        crop_size: int = 336,
        num_img_tokens: int = 144,
        image_mean: tuple[float, ...] = CLIP_MEAN,
        image_std: tuple[float, ...] = CLIP_STD,
        do_convert_rgb: bool = True,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.num_crops, self.crop_size, self.num_img_tokens = num_crops, crop_size, num_img_tokens
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self.do_convert_rgb = do_convert_rgb

    def hd_size(self, width: int, height: int, num_crops: int | None = None) -> tuple[int, int]:
        """Size (width, height) in pixels that a picture is resized to before it is padded.

        Raises:
            ValueError: the picture is so thin that nothing of it would be left.
        """
        num_crops = num_crops or self.num_crops
        ratio = max(width, height) / min(width, height)
        scale = 1
        while (scale + 1) * math.ceil((scale + 1) / ratio) <= num_crops:
            scale += 1
        long_side = self.crop_size * scale
        short_side = int(long_side / ratio)
        if short_side < 1:
            raise ValueError(
                f"A picture of {width}x{height} pixels is too thin: its aspect ratio may be at "
                f"most {long_side} with num_crops={num_crops}. Cut it into parts or pad it."
            )
        return (long_side, short_side) if width >= height else (short_side, long_side)

    def hd_transform(self, picture: Image.Image, num_crops: int | None = None) -> Image.Image:
        """The picture resized and padded with white to whole crops."""
        width, height = self.hd_size(*picture.size, num_crops)
        size = self.crop_size
        if picture.size[0] >= picture.size[1]:
            resized = picture.resize((width, height), Image.Resampling.BILINEAR)
        else:  # upright pictures are resized lying down, as the published code does
            lying = picture.transpose(Image.Transpose.TRANSPOSE)
            lying = lying.resize((height, width), Image.Resampling.BILINEAR)
            resized = lying.transpose(Image.Transpose.TRANSPOSE)
        full = (size * math.ceil(width / size), size * math.ceil(height / size))
        padded = Image.new("RGB", full, (255, 255, 255))
        padded.paste(resized, (int((full[0] - width) / 2), int((full[1] - height) / 2)))
        return padded

    def num_tokens(self, rows: int, columns: int) -> int:
        """Image tokens of a picture of rows x columns crops: crops, line ends and the separator."""
        side = math.isqrt(self.num_img_tokens)
        return (rows * columns + 1) * self.num_img_tokens + 1 + (rows + 1) * side

    def calc_num_image_tokens(self, images: Any) -> list[int]:
        """Image tokens of each picture, without cutting it."""
        images = images if isinstance(images, (list, tuple)) else [images]
        sizes = [self.hd_size(*load_picture(image).size) for image in images]
        size = self.crop_size
        return [self.num_tokens(math.ceil(h / size), math.ceil(w / size)) for w, h in sizes]

    def preprocess(
        self, images: Any, num_crops: int | None = None, return_tensors: str | None = "pt", **kwargs
    ) -> BatchFeature:
        """Cut pictures into crops.

        Args:
            images: one picture or a list of them; see `load_picture` for what a picture may be.
            num_crops: instead of the processor's own.
            return_tensors: "pt" or "np".
            **kwargs: what transformers passes to other image processors; without effect.

        Returns:
            pixel_values (pictures, num_crops + 1, 3, crop_size, crop_size) float32: the global
            crop, the detailed crops row by row, zeros; image_sizes (pictures, 2): padded height and
            width in pixels;
            num_img_tokens: list of the image tokens of each picture.
        """
        images = images if isinstance(images, (list, tuple)) else [images]
        num_crops = num_crops or self.num_crops
        if not images:
            raise ValueError(
                "No pictures were given: pass images=None for a text without pictures."
            )
        pixels, sizes, counts = [], [], []
        for image in images:
            crops, (height, width) = self._crops(load_picture(image), num_crops)
            pixels.append(crops)
            sizes.append([height, width])
            counts.append(self.num_tokens(height // self.crop_size, width // self.crop_size))
        data = {"pixel_values": torch.stack(pixels), "image_sizes": torch.tensor(sizes)}
        if return_tensors == "np":
            data = {key: value.numpy() for key, value in data.items()}
        return BatchFeature({**data, "num_img_tokens": counts})

    def _crops(self, picture: Image.Image, num_crops: int) -> tuple[torch.Tensor, tuple[int, int]]:
        size = self.crop_size
        padded = self.hd_transform(picture, num_crops)
        array = torch.from_numpy(np.array(padded)).permute(2, 0, 1).contiguous()
        mean = torch.tensor(self.image_mean).view(3, 1, 1)
        std = torch.tensor(self.image_std).view(3, 1, 1)
        image = array.float().div(255).sub_(mean).div_(std)  # (3, H, W)
        _, height, width = image.shape
        overview = torch.nn.functional.interpolate(
            image[None], size=(size, size), mode="bicubic", align_corners=False
        )
        rows, columns = height // size, width // size
        parts = image.reshape(3, rows, size, columns, size).permute(1, 3, 0, 2, 4)
        crops = torch.zeros(num_crops + 1, 3, size, size)
        crops[0] = overview[0]
        crops[1 : 1 + rows * columns] = parts.reshape(-1, 3, size, size)
        return crops, (height, width)
