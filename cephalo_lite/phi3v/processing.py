"""Text and pictures together: prompts, batches, padding and labels for Phi-3-Vision."""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast
from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .labels import IGNORED, answer_labels

TAG = re.compile(r"<\|image_(\d+)\|>")

CHAT_TEMPLATE = (
    "{%- set seen = namespace(images=0) -%}"
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>\\n' -}}"
    "{%- if message['content'] is string -%}"
    "{{- message['content'] -}}"
    "{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'text' -%}"
    "{{- part['text'] -}}"
    "{%- elif part['type'] in ('image', 'image_url') -%}"
    "{%- set seen.images = seen.images + 1 -%}"
    "{{- '<|image_' + seen.images | string + '|>\\n' -}}"
    "{%- else -%}"
    "{{- raise_exception('Phi-3-Vision reads text and image parts, not ' + part['type']) -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{- '<|end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt and messages[-1]['role'] != 'assistant' -%}"
    "{{- '<|assistant|>\\n' -}}"
    "{%- endif -%}"
)


class Phi3VProcessor(ProcessorMixin):
    """Turn prompts and pictures into model inputs.

    A prompt names its pictures with `<|image_1|>`, `<|image_2|>`, ... in any order, each as often
    as it likes. Text between the tags is tokenised piece by piece, as the published processor does.
    Where that wrote negative ids, the placeholder `<|image|>` stands for each image token, and
    pictures are sorted in the order in which the prompts use them.

    Args:
        image_processor: a `Phi3VImageProcessor`.
        tokenizer: a tokenizer with `<|image|>`, `<|user|>`, `<|assistant|>` and `<|end|>`.
        chat_template: Jinja template; by default one that takes `{"type": "image"}` parts as well
            as plain strings with tags.
    """

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        self.image_token = "<|image|>"
        vocabulary = tokenizer.get_vocab()
        absent = {self.image_token, "<|user|>", "<|assistant|>", "<|end|>"} - set(vocabulary)
        if absent:
            raise ValueError(
                f"The tokenizer lacks {', '.join(sorted(absent))}: it is not that of a "
                "Phi-3-Vision model."
            )
        self.image_token_id = vocabulary[self.image_token]
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = "pt",
        return_labels: bool = False,
        add_special_tokens: bool = True,
        num_crops: int | None = None,
        **kwargs,
    ) -> BatchFeature:
        """Prepare one prompt or a batch.

        Args:
            images: None; one picture; a list; or, for a batch, a list of lists (one per prompt). A
                flat list is dealt out to the prompts of a batch by their tags.
            text: one prompt or a list. The 2024 order of arguments (text, images) works as well.
            padding: True or "longest", "max_length" (with `max_length`), or False.
            truncation: cut prompts longer than `max_length` at the right; never through a picture.
            max_length: tokens per prompt; None is the tokenizer's own limit.
            padding_side: "left" or "right", by default the tokenizer's.
            return_tensors: "pt", "np", or None for lists.
            return_labels: add `labels` (B, T): the ids of the assistant's turns with their
                `<|end|>`, -100 elsewhere.
            add_special_tokens: begin each piece with the tokenizer's BOS, as published.
            num_crops: most detailed crops per picture, instead of the image processor's.
            **kwargs: what transformers passes to processors of other media; without effect.

        Returns:
            input_ids, attention_mask (B, T); with pictures pixel_values (pictures, crops + 1, 3, s,
            s) and image_sizes (pictures, 2).

        Raises:
            ValueError: pictures and tags do not match, a picture cannot be read, rows of different
                length without padding, or truncation would cut a picture.
        """
        tagged = text is None or _is_text(text)  # an untagged string is taken for a path then
        if _is_text(images, tagged) and not _is_text(text, tagged):
            images, text = text, images
        if not _is_text(text):
            raise ValueError(
                "No text was given: pass a prompt such as '<|user|>\\n<|image_1|>\\nWhat is "
                "shown?<|end|>\\n', or a list of prompts."
            )
        prompts = [text] if isinstance(text, str) else list(text)
        pictures, counts = self._deal(prompts, images)
        features = self._pictures(pictures, prompts, counts, num_crops)
        tokens = features.pop("tokens", None)
        rows, first = [], 0
        for prompt, count in zip(prompts, counts, strict=True):
            own = None if count is None else tokens[first : first + count]
            first += count or 0
            rows.append(self.encode_prompt(prompt, own, add_special_tokens))
        if truncation:
            max_length = max_length or self.tokenizer.model_max_length
            rows = [self._cut(row, max_length) for row in rows]
        data = self._pad(rows, padding, max_length, padding_side, return_labels)
        if return_tensors == "pt":
            data = {key: _tensor(value) for key, value in data.items()}
        elif return_tensors == "np":
            data = {key: _tensor(value).numpy() for key, value in data.items()}
            features = {key: value.numpy() for key, value in features.items()}
        return BatchFeature({**data, **features})

    def _deal(self, prompts: list[str], images: Any) -> tuple[list, list[int | None]]:
        """All pictures in a row, and how many each prompt gets (None: it was given none at all)."""
        tags = [{int(n) for n in TAG.findall(prompt)} for prompt in prompts]
        if images is None:
            if any(tags):
                warnings.warn(
                    "A prompt names pictures, but none were given: tags are read as text.",
                    stacklevel=3,
                )
            return [], [None] * len(prompts)
        images = list(images) if isinstance(images, (list, tuple)) else [images]
        if any(isinstance(entry, (list, tuple)) or entry is None for entry in images):
            if len(images) != len(prompts):
                raise ValueError(
                    f"{len(prompts)} prompts, but lists of pictures for {len(images)}."
                )
            images = [_listed(entry) for entry in images]
        elif len(prompts) == 1:
            images = [images]
        else:
            if len(images) != sum(map(len, tags)):
                raise ValueError(
                    f"The prompts name {sum(map(len, tags))} pictures, but {len(images)} were "
                    "given."
                )
            left = iter(images)
            images = [[next(left) for _ in tag] for tag in tags]
        for number, (named, given) in enumerate(zip(tags, images, strict=True)):
            if named != set(range(1, len(given) + 1)):
                raise ValueError(
                    f"Prompt {number}: it names the pictures {sorted(named)}, and {len(given)} "
                    "were given. Name each picture once or more, numbered from 1: <|image_1|>, "
                    "<|image_2|>, ..."
                )
        return [picture for given in images for picture in given], [len(given) for given in images]

    def _pictures(
        self, pictures: list, prompts: list[str], counts: list, num_crops: int | None
    ) -> dict:
        """Crops of all pictures in the order of use, and the image tokens of each by number."""
        if not pictures:
            return {"tokens": []}
        cut = self.image_processor(pictures, num_crops=num_crops, return_tensors="pt")
        order, first = [], 0
        for prompt, count in zip(prompts, counts, strict=True):
            order += [first + int(n) - 1 for n in TAG.findall(prompt)] if count else []
            first += count or 0
        return {
            "pixel_values": cut["pixel_values"][order],
            "image_sizes": cut["image_sizes"][order],
            "tokens": cut["num_img_tokens"],
        }

    def encode_prompt(
        self, prompt: str, tokens: list[int] | None, add_special_tokens: bool
    ) -> list[int]:
        """Ids of a prompt, with as many image ids for each tag as its picture has tokens.

        Args:
            prompt: text with tags such as <|image_1|>.
            tokens: number of tokens of each picture; None or empty where tags are plain text.
            add_special_tokens: whether each piece of text begins as the tokenizer likes.
        """
        pieces = [prompt] if not tokens else TAG.split(prompt)  # text, number, text, number, ...
        ids = []
        for position, piece in enumerate(pieces):
            if position % 2:
                ids += [self.image_token_id] * tokens[int(piece) - 1]
            else:
                ids += self.tokenizer(piece, add_special_tokens=add_special_tokens)["input_ids"]
        return ids

    def _cut(self, row: list[int], max_length: int) -> list[int]:
        if self.image_token_id in row[max_length:]:
            raise ValueError(
                f"Cutting the prompt of {len(row)} tokens to {max_length} would cut a picture: "
                "raise max_length or lower num_crops."
            )
        return row[:max_length]

    def _pad(self, rows, padding, max_length, side, return_labels) -> dict[str, list]:
        length = max(map(len, rows))
        if padding == "max_length":
            if max_length is None or length > max_length:
                raise ValueError(
                    f"padding='max_length' needs max_length >= {length}, not {max_length}."
                )
            length = max_length
        side = side or self.tokenizer.padding_side
        data = {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
        if return_labels:
            data["labels"] = [answer_labels(row, self.tokenizer) for row in rows]
        if not padding:
            return data
        pad = self.tokenizer.pad_token_id
        fillers = {
            "input_ids": pad if pad is not None else 0,
            "attention_mask": 0,
            "labels": IGNORED,
        }

        def fill(row: list[int], filler: int) -> list[int]:
            gap = [filler] * (length - len(row))
            return gap + row if side == "left" else row + gap

        return {key: [fill(row, fillers[key]) for row in value] for key, value in data.items()}

    @classmethod
    def _load_tokenizer_from_pretrained(cls, sub_processor_type, folder, subfolder="", **kwargs):
        """Read tokenizer.json as it is: LlamaTokenizer, which folders name, would rebuild it."""
        return PreTrainedTokenizerFast.from_pretrained(folder, subfolder=subfolder, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        """Names of what the model takes."""
        return ["input_ids", "attention_mask", "pixel_values", "image_sizes"]


def _is_text(value: Any, tagged: bool = False) -> bool:
    """Whether a value is a prompt or a list of them; a `tagged` one can be no path."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return bool(values) and all(isinstance(v, str) and ("<|" in v or not tagged) for v in values)


def _listed(entry: Any) -> list:
    if entry is None:
        return []
    return list(entry) if isinstance(entry, (list, tuple)) else [entry]


def _tensor(rows: list[list[int]]) -> torch.Tensor:
    if len({len(row) for row in rows}) > 1:
        raise ValueError(
            f"The prompts have {', '.join(str(len(row)) for row in rows)} tokens: pass "
            "padding=True."
        )
    return torch.tensor(rows)
