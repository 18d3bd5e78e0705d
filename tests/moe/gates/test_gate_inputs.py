"""The collected gate inputs are exactly what the routers saw, token by token."""

import pytest
import torch

from cephalo_lite.moe import Phi3VMoeForCausalLM, routers, select_expert
from cephalo_lite.moe.gates.inputs import KINDS, collect_gate_inputs, encode, in_mode, token_kinds

ASK = "<|user|>\n{}Say {}<|end|>\n<|assistant|>\n"
EVERYTHING = {"tokens_per_sample": None, "progress": False}


@pytest.fixture(scope="module")
def samples(synth):
    """Unequal lists: text only, one picture, two, with an answer and without, as messages."""
    one, two = synth(56, 56, kind=0), synth(90, 40, kind=1)
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Say it"}]},
        {"role": "assistant", "content": "bb"},
    ]
    return [
        [(ASK.format("", "aaa") + "aa<|end|>\n", None), (ASK.format("<|image_1|>\n", "a"), one)],
        [(turns, [two])],
        [
            (ASK.format("<|image_1|>\n<|image_2|>\n", "ccc") + "c<|end|>\n", [one, two]),
            (ASK.format("", "c") + "ccccc<|end|>\n", []),
            (ASK.format("<|image_1|>\n", "c") + "c<|end|>\n", two),
        ],
    ]


@pytest.fixture(scope="module")
def mixture(make_mixture):
    """A small mixture; tests leave it as it is."""
    return make_mixture(expert_names=["first", "second", "third"])


@pytest.fixture(scope="module")
def run_alone(small_processor):
    """A function that runs a sample by itself and gives what `post_attention_layernorm` put out."""

    def run(model, sample):
        inputs = encode(small_processor, [sample])
        kinds = token_kinds(inputs, model.config.image_token_id)[0]
        inputs.pop("labels")
        seen = []
        hooks = [
            layer.post_attention_layernorm.register_forward_hook(lambda *call: seen.append(call[2]))
            for layer in model.model.layers
        ]
        with torch.no_grad():
            model.model(**inputs)
        for hook in hooks:
            hook.remove()
        return torch.cat(seen), kinds  # (L, T, D), (T,)

    return run


def flat(samples):
    return [(expert, sample) for expert, own in enumerate(samples) for sample in own]


@pytest.mark.parametrize("batch_size", [1, 8])
def test_own_gives_what_each_dense_expert_would_see(
    make_small, make_mixture, small_processor, samples, run_alone, batch_size
):
    """A dense model with the base's attention and an expert's MLPs sees the very same states."""
    mixture = make_mixture()
    inputs = collect_gate_inputs(
        mixture, small_processor, samples, batch_size=batch_size, **EVERYTHING
    )
    assert inputs.hidden.dtype == torch.float32
    assert inputs.hidden.shape[1] == len(inputs.expert) == len(inputs.kind) == len(inputs.sample)
    for number, (expert, sample) in enumerate(flat(samples)):
        dense, source = make_small(), make_small(1 + expert)
        for layer, other in zip(dense.model.layers, source.model.layers, strict=True):
            layer.mlp = other.mlp
        want, kinds = run_alone(dense, sample)
        own = inputs.take(inputs.sample == number)
        assert own.expert.unique().tolist() == [expert]
        assert own.kind.equal(kinds)  # as many tokens, in order: padding is not among them
        torch.testing.assert_close(own.hidden, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("source", ["mixture", "second"])
def test_other_sources_by_name(mixture, small_processor, samples, run_alone, source):
    inputs = collect_gate_inputs(mixture, small_processor, samples, source, **EVERYTHING)
    own = collect_gate_inputs(mixture, small_processor, samples, **EVERYTHING)
    for number, (_, sample) in enumerate(flat(samples)):
        with select_expert(mixture, 1 if source == "second" else None):
            want, _ = run_alone(mixture, sample)
        got = inputs.take(inputs.sample == number).hidden
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(inputs.hidden[0], own.hidden[0])  # before any expert
    assert (inputs.hidden[1] - own.hidden[1]).abs().max() > 0.1


def test_some_layers_only(make_mixture, small_processor, samples, run_alone):
    mixture = make_mixture(moe_layers=[1])
    inputs = collect_gate_inputs(mixture, small_processor, samples, **EVERYTHING)
    assert inputs.hidden.shape[0] == 1
    with select_expert(mixture, 0):
        want, _ = run_alone(mixture, samples[0][0])
    got = inputs.take(inputs.sample == 0).hidden
    torch.testing.assert_close(got[0], want[1], rtol=1e-4, atol=1e-4)


def test_kinds_of_tokens(mixture, small_processor, samples):
    rows = [samples[0][0], samples[2][0]]
    inputs = encode(small_processor, rows)
    kinds = token_kinds(inputs, mixture.config.image_token_id)
    assert (kinds == -1).equal(inputs["attention_mask"] == 0)
    assert (kinds == KINDS.index("image")).equal(inputs["input_ids"] == 359)
    decode = small_processor.tokenizer.decode
    answers = [
        ids[k == KINDS.index("answer")] for ids, k in zip(inputs["input_ids"], kinds, strict=True)
    ]
    assert [decode(ids).replace(" ", "") for ids in answers] == ["aa<|end|>", "c<|end|>"]
    negative = {**inputs, "input_ids": inputs["input_ids"].where(inputs["input_ids"] != 359, -1)}
    assert token_kinds(negative, None).equal(kinds)  # as the 2024 processor wrote image tokens


def test_at_most_so_many_tokens_seeded(mixture, small_processor, samples):
    every = collect_gate_inputs(mixture, small_processor, samples, **EVERYTHING)
    few = [
        collect_gate_inputs(
            mixture, small_processor, samples, tokens_per_sample=40, seed=seed, progress=False
        )
        for seed in (0, 0, 1)
    ]
    full, drawn = torch.bincount(every.sample), torch.bincount(few[0].sample)
    assert drawn.equal(full.clamp(max=40)) and full.max() > 40 > full.min()
    assert few[0].hidden.equal(few[1].hidden)
    assert not few[0].hidden.equal(few[2].hidden)
    for number in range(len(full)):
        own, all_of_it = (x.take(x.sample == number).hidden[0] for x in (few[0], every))
        distance = torch.cdist(own, all_of_it, compute_mode="donot_use_mm_for_euclid_dist")
        assert distance.min(dim=1).values.max() < 1e-4  # each is one of the sample's tokens
        assert len(distance.argmin(dim=1).unique()) == len(own)  # none is drawn twice


def test_the_model_is_left_as_it_was(mixture, small_processor, samples):
    modes = {name: module.training for name, module in mixture.named_modules()}
    mixture.train()
    mixture.model.vision_embed_tokens.eval()  # a mixed state comes back as well
    before = [module.training for module in mixture.modules()]
    learns = [
        p.requires_grad_(n % 2 == 0).requires_grad for n, p in enumerate(mixture.parameters())
    ]
    broken = [*samples[:2], [("<|user|>\n<|image_1|>\nno picture<|end|>\n", [])]]
    try:
        collect_gate_inputs(mixture, small_processor, samples, **EVERYTHING)
        with pytest.raises(ValueError, match="names the pictures"):
            collect_gate_inputs(mixture, small_processor, broken, **EVERYTHING)
        assert [module.training for module in mixture.modules()] == before
        assert [p.requires_grad for p in mixture.parameters()] == learns
        assert [router.selected for router in routers(mixture)] == [None, None]
        assert not any(router._forward_pre_hooks for router in routers(mixture))
    finally:
        mixture.requires_grad_(True)
        for name, module in mixture.named_modules():
            module.training = modes[name]


def test_dropout_is_off_and_back_on_after_an_error(make_small):
    model = make_small().train()
    with pytest.raises(KeyError), in_mode(model, training=False):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert all(module.training for module in model.modules())


def test_half_precision_models_give_float32(make_small, small_processor, samples):
    model = Phi3VMoeForCausalLM.from_experts(make_small(), [make_small(1)] * 3).to(torch.bfloat16)
    inputs = collect_gate_inputs(model, small_processor, samples, **EVERYTHING)
    assert inputs.hidden.dtype == torch.float32 and inputs.hidden.isfinite().all()


def test_errors_say_what_is_missing(make_small, mixture, small_processor, samples):
    with pytest.raises(ValueError, match="2 lists; the model has 3 experts"):
        collect_gate_inputs(mixture, small_processor, samples[:2], progress=False)
    with pytest.raises(ValueError, match="No samples for expert 1"):
        collect_gate_inputs(mixture, small_processor, [samples[0], [], samples[2]], progress=False)
    with pytest.raises(
        ValueError, match="'base' is not one of 'own', 'mixture', 'first', 'second'"
    ):
        collect_gate_inputs(mixture, small_processor, samples, source="base", progress=False)
    with pytest.raises(ValueError, match="has no routers"):
        collect_gate_inputs(make_small(), small_processor, samples, progress=False)
