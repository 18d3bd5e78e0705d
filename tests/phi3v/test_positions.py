"""Positions: which factors scale them, and what a window leaves to be seen."""

import math

import pytest
import torch
from transformers import DynamicCache, StaticCache

from cephalo_lite import Phi3VConfig, Phi3VForCausalLM

FACTORS = {"short_factor": [1.0, 1.1, 1.3, 1.7], "long_factor": [1.0, 2.0, 5.0, 9.0]}


def ids(length: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 350, (rows, length), generator=torch.Generator().manual_seed(seed))


def rotation(config: Phi3VConfig, length: int, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (T, d/2) as the specification has them."""
    half = config.hidden_size // config.num_attention_heads // 2
    scaling = config.to_dict()["rope_scaling"]
    factors = scaling[
        "long_factor" if longest > config.original_max_position_embeddings else "short_factor"
    ]
    ratio = config.max_position_embeddings / config.original_max_position_embeddings
    if ratio <= 1:
        scale = 1.0
    elif scaling["type"] == "yarn":
        scale = 0.1 * math.log(ratio) + 1
    else:
        scale = math.sqrt(1 + math.log(ratio) / math.log(config.original_max_position_embeddings))
    angles = [[t / (factors[i] * 10000 ** (i / half)) for i in range(half)] for t in range(length)]
    return torch.tensor(angles).cos() * scale, torch.tensor(angles).sin() * scale


@pytest.mark.parametrize("kind", ["su", "longrope", "yarn"])
@pytest.mark.parametrize("maximum", [512, 64, 48])
@pytest.mark.parametrize("length", [64, 65])
def test_rotation(make_small, kind, maximum, length):
    """Short factors up to original_max_position_embeddings, long ones beyond, and back again."""
    model = make_small(
        rope_scaling={"type": kind, **FACTORS},
        max_position_embeddings=maximum,
        original_max_position_embeddings=64,
    )
    x = torch.zeros(1, 1, 1)
    for longest in (length, 10, length):
        cos, sin = model.model.rotary_emb(x, torch.arange(longest)[None])
        want_cos, want_sin = rotation(model.config, longest, longest)
        torch.testing.assert_close(cos[0, :, :4], want_cos, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(sin[0, :, :4], want_sin, atol=1e-5, rtol=1e-5)


def test_the_released_scale():
    config = Phi3VConfig(
        rope_scaling={"type": "su", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48}
    )
    ratio = config.rope_parameters["factor"]
    assert math.sqrt(1 + math.log(ratio) / math.log(4096)) == pytest.approx(1.19024, abs=1e-5)
    small = {"hidden_size": 3072, "num_hidden_layers": 0, "vocab_size": 8, "pad_token_id": 0}
    with torch.device("meta"):
        model = Phi3VForCausalLM(
            Phi3VConfig(**small, rope_scaling=config.to_dict()["rope_scaling"])
        )
    assert model.model.rotary_emb.attention_scaling == pytest.approx(1.19024, abs=1e-5)


def window_mask(length: int, window: int | None) -> torch.Tensor:
    """(T, T), true where query i sees key j: not later, and at most `window` tokens earlier."""
    rows = [
        [j <= i and (window is None or j >= i - window) for j in range(length)]
        for i in range(length)
    ]
    return torch.tensor(rows)


def reference_logits(
    model: Phi3VForCausalLM, tokens: torch.Tensor, window: int | None
) -> torch.Tensor:
    """Logits (T, V) of one row, head by head and without any mask function of transformers."""
    config, decoder = model.config, model.model
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    width = config.hidden_size // heads
    seen = window_mask(len(tokens), window)
    cos, sin = rotation(config, len(tokens), len(tokens))  # (T, d/2)

    def rotate(x):  # (T, d)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    x = decoder.embed_tokens(tokens)  # (T, D)
    for layer in decoder.layers:
        qkv = layer.self_attn.qkv_proj(layer.input_layernorm(x))
        q, k, v = qkv.split([heads * width, groups * width, groups * width], dim=-1)
        outputs = []
        for head in range(heads):
            group = head // (heads // groups)
            query = rotate(q[:, head * width : (head + 1) * width])
            key = rotate(k[:, group * width : (group + 1) * width])
            value = v[:, group * width : (group + 1) * width]
            scores = (query @ key.T / math.sqrt(width)).masked_fill(~seen, float("-inf"))
            outputs.append(scores.softmax(-1) @ value)
        x = x + layer.self_attn.o_proj(torch.cat(outputs, dim=-1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(decoder.norm(x))


def decode(model, tokens: torch.Tensor, cache) -> torch.Tensor:
    """Logits of a row read in pieces of 5, 1, 1, ... tokens into a cache."""
    pieces = [model(tokens[None, :5], past_key_values=cache).logits]
    pieces += [
        model(tokens[None, t : t + 1], past_key_values=cache).logits for t in range(5, len(tokens))
    ]
    return torch.cat(pieces, dim=1)[0]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("window", [None, 1, 4, 23, 200])
@torch.no_grad()
def test_window(make_small, implementation, window):
    """W earlier tokens and the token itself are seen, through every attention and cache."""
    model = make_small(
        sliding_window=window, max_position_embeddings=200, original_max_position_embeddings=64
    )
    model.set_attn_implementation(implementation)
    tokens = ids(24)[0]
    want = reference_logits(model, tokens, window)
    assert (
        window is None
        or window >= 23
        or not want.allclose(reference_logits(model, tokens, None), atol=1e-2)
    )
    got = [
        model(tokens[None]).logits[0],
        decode(model, tokens, DynamicCache(config=model.config)),
        decode(model, tokens, StaticCache(config=model.config, max_cache_len=32)),
    ]
    for logits in got:
        torch.testing.assert_close(logits, want, atol=1e-4, rtol=1e-4)
    cache = model(tokens[None], use_cache=True).past_key_values
    assert cache.is_sliding == [window is not None and window < 200] * 2


@torch.no_grad()
def test_left_padding_and_a_window(make_small):
    model = make_small(sliding_window=4)
    tokens = ids(16)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), tokens], dim=1)
    mask = (torch.arange(21) >= 5).long()[None]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    got = model(padded, attention_mask=mask, position_ids=positions).logits[:, 5:]
    torch.testing.assert_close(got, model(tokens).logits, atol=1e-5, rtol=1e-5)
    new = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    want = model.generate(tokens, **new)[:, 16:]
    assert model.generate(padded, attention_mask=mask, **new)[:, 21:].equal(want)
    assert model.generate(padded, attention_mask=mask, use_cache=False, **new)[:, 21:].equal(want)
