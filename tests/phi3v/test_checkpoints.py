"""Published checkpoints in, published checkpoints out."""

import json

import pytest
import torch

from cephalo_lite import Phi3VConfig, Phi3VForCausalLM, Phi3VModel

WTE = "model.vision_embed_tokens.wte.weight"


def same(one: dict, other: dict) -> bool:
    """Bit-equal tensors under equal names."""
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and one[key].equal(other[key]) for key in one
    )


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("wte", [False, True])
@torch.no_grad()
def test_reading(released, golden_case, shards, wte):
    model, info = Phi3VForCausalLM.from_pretrained(
        released(shards=shards, wte=wte), output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    case = golden_case("plain_text_only")
    torch.testing.assert_close(model(case["input_ids"]).logits, case["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("shards", [1, 3])
def test_round_trip(released, read_weights, tmp_path, golden, golden_meta, shards):
    """Published names and bits; config.json as it was; a second trip changes nothing."""
    folder = released(shards=shards)
    model = Phi3VForCausalLM.from_pretrained(folder)
    size = "1GB" if shards == 1 else "300KB"
    model.save_pretrained(tmp_path / "first", max_shard_size=size)
    weights = read_weights(tmp_path / "first")
    assert same(weights, read_weights(golden / "plain"))
    assert sorted(weights) == sorted(golden_meta["plain_saved_keys"])
    assert (len(list((tmp_path / "first").glob("*.safetensors"))) > 1) == (shards > 1)
    written = json.loads((tmp_path / "first" / "config.json").read_text())
    for key, value in json.loads((golden / "plain" / "config.json").read_text()).items():
        if key not in ("torch_dtype", "transformers_version"):
            assert written[key] == value, key

    again = Phi3VForCausalLM.from_pretrained(tmp_path / "first")
    again.save_pretrained(tmp_path / "second", max_shard_size=size)
    assert same(read_weights(tmp_path / "second"), weights)
    assert (tmp_path / "second" / "config.json").read_text() == (
        tmp_path / "first" / "config.json"
    ).read_text()


def test_a_model_from_scratch_is_written_with_published_names(make_small, read_weights, tmp_path):
    model = make_small()
    model.save_pretrained(tmp_path)
    weights = read_weights(tmp_path)
    level = "model.vision_embed_tokens.img_processor.vision_model."
    assert (
        sum(key.startswith(level) for key in weights)
        == sum("img_processor" in key for key in weights)
        > 40
    )
    memory = {
        key.replace(level, level.replace("vision_model.", "")): value
        for key, value in weights.items()
    }
    assert same(memory, model.state_dict())
    assert same(Phi3VForCausalLM.from_pretrained(tmp_path).state_dict(), model.state_dict())


def test_bfloat16(released, read_weights, tmp_path):
    """A float32 checkpoint read as bfloat16, and a bfloat16 one read as it is."""
    model = Phi3VForCausalLM.from_pretrained(released(), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    assert {weight.dtype for weight in read_weights(tmp_path / "half").values()} == {torch.bfloat16}
    again = Phi3VForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert again.dtype == torch.bfloat16
    assert same(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("name", ["su", "longrope", "yarn"])
def test_position_scaling_on_disk(released, tmp_path, golden, name):
    scaling = json.loads((golden / "plain" / "config.json").read_text())["rope_scaling"] | {
        "type": name
    }
    model = Phi3VForCausalLM.from_pretrained(released(rope_scaling=scaling))
    model.save_pretrained(tmp_path / "written")
    assert json.loads((tmp_path / "written" / "config.json").read_text())["rope_scaling"] == scaling


def test_the_bare_model(released, golden_model):
    """Phi3VModel reads the same folder; the head is left out."""
    model = Phi3VModel.from_pretrained(released())
    assert same(model.state_dict(), golden_model.model.state_dict())


def test_released_size(golden):
    """On the meta device: 593 keys (one is wte), 4,146,621,440 parameters."""
    record = json.loads((golden / "real_config_keys.json").read_text())
    want = {}
    for key, shape in record["dense"].items():
        want |= {name: shape for name in expand(key)}
    assert len(want) == 593 and want.pop(WTE) == want["model.embed_tokens.weight"]
    scaling = {"type": "su", "short_factor": [1.05] * 48, "long_factor": [1.03] * 48}
    with torch.device("meta"):
        model = Phi3VForCausalLM(Phi3VConfig(rope_scaling=scaling, sliding_window=131072))
    level = "img_processor."
    state = {
        key.replace(level, level + "vision_model."): value
        for key, value in model.state_dict().items()
    }
    assert {key: list(value.shape) for key, value in state.items()} == want
    assert model.num_parameters() == record["dense_params"] == 4_146_621_440


def expand(key: str) -> list[str]:
    """Names behind a key of real_config_keys.json, in which {0..31} stands for the layers."""
    head, brace, rest = key.partition("{")
    if not brace:
        return [key]
    numbers, _, tail = rest.partition("}")
    first, _, last = numbers.partition("..")
    return [f"{head}{n}{end}" for n in range(int(first), int(last) + 1) for end in expand(tail)]
