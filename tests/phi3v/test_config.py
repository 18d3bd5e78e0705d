"""The configuration: published fields in and out, defaults, refusals."""

import json
import math

import pytest
from transformers import AutoConfig

from cephalo_lite import Phi3VConfig

FACTORS = {"short_factor": [1.0, 1.1, 1.3, 1.7], "long_factor": [1.0, 2.0, 5.0, 9.0]}
SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 64}
PUBLISHED = ("rope_scaling", "rope_theta", "sliding_window", "original_max_position_embeddings")


@pytest.fixture
def released_size(golden) -> Phi3VConfig:
    """The released configuration, as far as the specification gives it."""
    return Phi3VConfig(
        sliding_window=131072,
        rope_scaling={"type": "su", "short_factor": [1.05] * 48, "long_factor": [1.03] * 48},
        architectures=["Phi3VForCausalLM"],
    )


def test_defaults_are_the_released_sizes(released_size):
    config = released_size
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (
        3072,
        8192,
        32,
    )
    assert (config.max_position_embeddings, config.original_max_position_embeddings) == (
        131072,
        4096,
    )
    assert (config.vocab_size, config.image_token_id) == (32064, 32044)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 32000)
    tower = config.vision_config
    assert (tower.hidden_size, tower.image_size, tower.patch_size, tower.num_hidden_layers) == (
        1024,
        336,
        14,
        24,
    )
    assert config.image_tokens_per_crop == 144


def test_published_file_round_trip(golden, tmp_path, tiny_tower):
    """Every published field is written back as it was; a second trip changes nothing."""
    published = json.loads((golden / "plain" / "config.json").read_text())
    config = AutoConfig.from_pretrained(golden / "plain", vision_config=tiny_tower)
    assert type(config) is Phi3VConfig
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    renamed = {"torch_dtype": "dtype"}  # transformers 5 writes the dtype under its new name
    for key, value in published.items():
        if key != "transformers_version":
            assert written[renamed.get(key, key)] == value, key
    again = AutoConfig.from_pretrained(tmp_path)
    assert {**again.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}
    again.save_pretrained(tmp_path / "second")
    assert (tmp_path / "second" / "config.json").read_text() == (
        tmp_path / "config.json"
    ).read_text()


def test_fields_after_auto_map(golden, tmp_path):
    """auto_map entries and a missing vision_config, as released, need no remote code."""
    fields = json.loads((golden / "plain" / "config.json").read_text())
    fields["auto_map"] = {
        "AutoConfig": "configuration_phi3_v.Phi3VConfig",
        "AutoModelForCausalLM": "modeling_phi3_v.Phi3VForCausalLM",
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert type(AutoConfig.from_pretrained(tmp_path)) is Phi3VConfig


@pytest.mark.parametrize("name", ["su", "longrope", "yarn"])
def test_names_of_position_scaling(name):
    scaling = {"type": name, **FACTORS}
    config = Phi3VConfig(**SMALL, rope_scaling=scaling)
    assert config.to_dict()["rope_scaling"] == scaling
    assert config.rope_parameters["rope_type"] == "longrope"
    again = Phi3VConfig(**config.to_dict())
    assert again.to_dict() == config.to_dict() and again.rope_parameters == config.rope_parameters


def test_the_key_rope_type_is_read_too():
    config = Phi3VConfig(**SMALL, rope_scaling={"rope_type": "longrope", **FACTORS})
    assert config.to_dict()["rope_scaling"] == {"type": "longrope", **FACTORS}


def test_transformers_own_parameters_are_read_too():
    parameters = {"rope_type": "yarn", "rope_theta": 500.0, **FACTORS}
    config = Phi3VConfig(**SMALL, rope_parameters=parameters)
    same = Phi3VConfig(**SMALL, rope_theta=500.0, rope_scaling={"type": "yarn", **FACTORS})
    assert config.to_dict() == same.to_dict() and config.rope_parameters == same.rope_parameters
    assert config.rope_parameters["attention_factor"] == pytest.approx(0.1 * math.log(32) + 1)


def test_the_arguments_stay_as_they_are():
    scaling, tower = {"type": "su", **FACTORS}, {"image_size": 28, "patch_size": 14}
    Phi3VConfig(**SMALL, rope_scaling=scaling, vision_config=tower)
    assert scaling == {"type": "su", **FACTORS}
    assert tower == {"image_size": 28, "patch_size": 14}


def test_without_scaling():
    config = Phi3VConfig(**SMALL, rope_theta=5000.0)
    assert config.rope_parameters["rope_type"] == "default"
    assert config.to_dict()["rope_scaling"] is None
    assert config.to_dict()["rope_theta"] == 5000.0


@pytest.mark.parametrize(
    ("published", "counted"), [(131072, None), (64, None), (63, 64), (8, 9), (None, None)]
)
def test_sliding_window(published, counted):
    """On disk: earlier tokens seen. In memory: tokens seen, or None where nothing is left out."""
    config = Phi3VConfig(**SMALL, max_position_embeddings=64, sliding_window=published)
    assert config.sliding_window == counted
    assert config.to_dict()["sliding_window"] == published
    again = Phi3VConfig(**config.to_dict())
    assert (again.sliding_window, again.to_dict()["sliding_window"]) == (counted, published)


def test_crop_size_follows_the_tower(tiny_tower):
    config = Phi3VConfig(**SMALL, vision_config={**tiny_tower, "image_size": 112})
    assert config.image_tokens_per_crop == 16
    assert config.img_processor["num_img_tokens"] == 16


def test_refusals(tiny_tower):
    with pytest.raises(ValueError, match="even number"):
        Phi3VConfig(**SMALL, vision_config={**tiny_tower, "image_size": 42})
    with pytest.raises(ValueError, match="'linear' is not one of"):
        Phi3VConfig(**SMALL, rope_scaling={"type": "linear", "factor": 2.0})
    with pytest.raises(Exception, match="long_factor"):
        Phi3VConfig(**SMALL, rope_scaling={"type": "su", **FACTORS, "long_factor": [1.0]})
