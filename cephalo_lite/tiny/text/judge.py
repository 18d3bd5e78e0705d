"""What a tiny language model can do: answer, complete functions, predict text, use its experts."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ...finetune.code_metric import PassRate, pass_rate
from ...finetune.text_data import messages_of
from .functions import make_program, make_values


@torch.inference_mode()
def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    max_new_tokens: int = 96,
    batch_size: int = 50,
    progress: bool = False,
) -> list[str]:
    """Greedy continuations of prompts that hold their special tokens already.

    Args:
        model: its generation configuration says where a text ends.
        tokenizer: of the model; pads at the left.
        prompts: texts to go on with.
        max_new_tokens: longest continuation.
        batch_size: prompts at once.
        progress: show a progress bar.

    Returns:
        What was added to each prompt, without special tokens.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts = [""] * len(prompts)
    bar = tqdm(total=len(prompts), desc="answering", disable=not progress, leave=False)
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        inputs = tokenizer([prompts[i] for i in part], padding=True, return_tensors="pt")
        inputs = inputs.to(model.device)
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = ids[:, inputs["input_ids"].shape[1] :]
        for i, text in zip(
            part, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True
        ):
            texts[i] = text
        bar.update(len(part))
    bar.close()
    return texts


def answer_code(model, tokenizer, rows: list[dict], progress: bool = False) -> PassRate:
    """Ask for the functions of `rows.code_rows`, and run what comes."""
    prompts = [_prompt(tokenizer, messages_of(row)[:-1]) for row in rows]
    return pass_rate(complete(model, tokenizer, prompts, progress=progress), rows)


def answer_chat(model, tokenizer, rows: list[dict], progress: bool = False) -> dict[str, float]:
    """Ask the last question of each of `rows.chat_rows`, the turns before it being right.

    Returns:
        Share of exact answers per topic, and of "all".
    """
    prompts = [_prompt(tokenizer, messages_of(row)[:-1]) for row in rows]
    answers = complete(model, tokenizer, prompts, max_new_tokens=32, progress=progress)
    right: dict[str, list[bool]] = defaultdict(list)
    for row, text in zip(rows, answers, strict=True):
        right[row["topic"]].append(text.strip() == row["messages"][-1]["content"])
    shares = {topic: sum(hits) / len(hits) for topic, hits in right.items()}
    return shares | {"all": sum(map(sum, right.values())) / len(rows)}


def complete_code(model, tokenizer, count: int, seed: int = 0, progress: bool = False) -> PassRate:
    """Give a description as a comment and the first line of a function; run what is added.

    The descriptions are of held-out shapes. This is how a base model is asked.
    """
    generator = np.random.default_rng((seed, 2))
    prompts, rows = [], []
    for _ in range(count):
        program = make_program("test", generator)
        words, values = program.words(generator), make_values(program.argument, generator)
        prompts.append(f"# {words[0].upper()}{words[1:]}.\ndef solve({program.argument}):")
        rows.append({"call": f"solve({values})", "expected": repr(program.run(values))})
    added = complete(model, tokenizer, prompts, progress=progress)
    functions = [p + text.split("\n\n")[0] for p, text in zip(prompts, added, strict=True)]
    return pass_rate(functions, rows)


@torch.inference_mode()
def text_loss(model: PreTrainedModel, blocks: torch.Tensor, batch_size: int = 16) -> float:
    """Mean next-token loss of blocks (blocks, tokens), in nats per token."""
    losses = [
        model(part, labels=part, use_cache=False).loss.item() * len(part)
        for part in blocks.split(batch_size)
    ]
    return sum(losses) / len(blocks)


@torch.inference_mode()
def expert_shares(model: nn.Module, blocks: torch.Tensor) -> torch.Tensor:
    """How a mixture's tokens are divided among its experts.

    Args:
        model: a `PhimoeForCausalLM`, in evaluation mode, where the highest logits are chosen.
        blocks: ids (B, T).

    Returns:
        (L, E), share of the chosen places per layer and expert; each row sums to 1.
    """
    logits = model(blocks, use_cache=False, output_router_logits=True).router_logits
    top = model.config.num_experts_per_tok
    counts = [
        torch.bincount(layer.topk(top, dim=-1).indices.flatten(), minlength=layer.shape[-1])
        for layer in logits
    ]
    return torch.stack([count / count.sum() for count in counts])


def _prompt(tokenizer: PreTrainedTokenizerFast, messages: list[dict]) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
