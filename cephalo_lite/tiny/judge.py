"""How often a model answers the world's questions exactly right."""

from __future__ import annotations

from collections import defaultdict

import torch
from tqdm.auto import tqdm

from ..phi3v import Phi3VProcessor
from .world import Sample


@torch.inference_mode()
def answers(
    model,
    processor: Phi3VProcessor,
    samples: list[Sample],
    batch_size: int = 48,
    progress: bool = False,
) -> list[tuple[Sample, int, str]]:
    """Greedy answers to one question per sample, the turns of a sample taken in rotation.

    Returns:
        (sample, number of the turn asked, answer) in the order of the samples.
    """
    asked = [(sample, index % len(sample.turns)) for index, sample in enumerate(samples)]
    order = sorted(range(len(asked)), key=lambda i: asked[i][0].image.size)
    out: list = [None] * len(asked)
    steps = range(0, len(order), batch_size)
    for start in tqdm(steps, desc="answering", disable=not progress, leave=False):
        part = order[start : start + batch_size]
        prompts = [
            f"<|user|>\n<|image_1|>\n{asked[i][0].turns[asked[i][1]].question}<|end|>\n<|assistant|>\n"
            for i in part
        ]
        pictures = [[asked[i][0].image] for i in part]
        inputs = processor(images=pictures, text=prompts, padding=True, padding_side="left").to(
            model.device
        )
        ids = model.generate(**inputs, max_new_tokens=32, do_sample=False)
        texts = processor.batch_decode(
            ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        for i, text in zip(part, texts, strict=True):
            out[i] = (*asked[i], text)
    return out


def accuracy(
    model,
    processor: Phi3VProcessor,
    samples: list[Sample],
    batch_size: int = 48,
    by: str = "domain",
) -> dict[str, float]:
    """Share of answers that equal the known one, letter by letter.

    Args:
        model: answers the questions.
        processor: of the model.
        samples: pictures with known answers, one question of each is asked.
        batch_size: samples answered at once.
        by: "domain", "kind" (of question), "held_back", or "knowledge" (domain and whether held
            back).

    Returns:
        Accuracy in 0..1 per group.
    """
    right: dict[str, list[bool]] = defaultdict(list)
    for sample, turn, text in answers(model, processor, samples, batch_size):
        group = {
            "domain": sample.domain,
            "kind": f"{sample.domain} {sample.turns[turn].kind}",
            "held_back": str(sample.held_back),
            "knowledge": f"{sample.domain} {'new' if sample.held_back else 'old'}",
        }[by]
        right[group].append(text.strip() == sample.turns[turn].answer)
    return {group: sum(hits) / len(hits) for group, hits in sorted(right.items())}
