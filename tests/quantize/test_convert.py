"""Checkpoint to checkpoint: the same bytes as through the model, whatever interrupts it."""

import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from cephalo_lite.quantize import convert, convert_4bit, load_4bit, packing
from cephalo_lite.shards import TensorReader, read_checkpoint

INDEX = "model.safetensors.index.json"


def read(folder):
    weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    return weights


def run(source, target, **options):
    return convert_4bit(source, target, progress=False, **options)


@pytest.mark.parametrize("kind", ["phi3", "phimoe", "phi3_v", "phi3_v_moe"])
@pytest.mark.parametrize("shard_gb", [1.0, 2e-5])
def test_it_equals_what_a_loaded_model_saves(make_folder, tmp_path, text_ids, kind, shard_gb):
    source = make_folder(kind, torch.bfloat16)
    model, _ = load_4bit(source, device="cpu", progress=False)
    model.save_pretrained(tmp_path / "saved")
    report = run(source, tmp_path / "new", max_shard_gb=shard_gb)
    want, got = read(tmp_path / "saved"), read(tmp_path / "new")
    assert got.keys() == want.keys()
    for name, tensor in got.items():
        assert tensor.dtype == want[name].dtype and tensor.equal(want[name]), name
    assert (len(report.shards) > 2) is (shard_gb < 1)
    assert (tmp_path / "new" / INDEX).is_file() is (shard_gb < 1)
    assert report.packed + report.kept == len(read(source)) and report.packed >= 8
    configs = [json.loads((tmp_path / f / "config.json").read_text()) for f in ("saved", "new")]
    ours, theirs = (config["quantization_config"] for config in configs)
    assert ours == theirs
    assert {"lm_head", "gate", "router"} <= set(theirs["llm_int8_skip_modules"])
    assert "rope_theta" in configs[1]  # transformers 4 takes a default where it is missing
    again, _ = load_4bit(tmp_path / "new", device="cpu", progress=False)
    with torch.no_grad():
        torch.testing.assert_close(again(text_ids).logits, model(text_ids).logits)
    again.save_pretrained(tmp_path / "again")  # stock: NotImplementedError
    saved = read(tmp_path / "again")
    assert saved.keys() == want.keys() and all(saved[n].equal(want[n]) for n in want)


@pytest.mark.parametrize("kind", ["phi3", "phimoe"])
def test_what_is_stored_in_half_precision_is_computed_with_in_the_dtype_asked_for(
    make_folder, tmp_path, text_ids, kind
):
    source = make_folder(kind, torch.bfloat16)
    run(source, tmp_path / "new")
    (one, _), (two, _) = (
        load_4bit(folder, dtype=torch.float32, device="cpu", progress=False)
        for folder in (source, tmp_path / "new")
    )
    assert {p.dtype for p in two.parameters()} == {torch.uint8, torch.float32}
    with torch.no_grad():
        torch.testing.assert_close(two(text_ids).logits, one(text_ids).logits)


@pytest.mark.parametrize("shape", [(257, 64), (96, 48), (33, 10), (128, 200)])
def test_a_few_rows_at_a_time_give_the_same_bytes(tmp_path, monkeypatch, shape):
    from bitsandbytes.functional import quantize_4bit

    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    save_file({"w": weight}, tmp_path / "model.safetensors")
    packed, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    want = {f"weight.{name}": t for name, t in state.as_dict(packed=True).items()}
    want["weight"] = packed
    monkeypatch.setattr(packing, "CHUNK_BYTES", 1000)
    with TensorReader() as reader:
        got = packing.pack(read_checkpoint(tmp_path)["w"], reader)
    assert got.keys() == want.keys() and all(got[name].equal(want[name]) for name in want)


def test_it_goes_on_where_it_was_stopped(make_folder, tmp_path, monkeypatch):
    source, target = make_folder("phimoe", torch.bfloat16), tmp_path / "new"
    whole = run(source, tmp_path / "whole", max_shard_gb=2e-5)
    real, calls = convert.write_shard, []

    def stops(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(convert, "write_shard", stops)
    with pytest.raises(KeyboardInterrupt):
        run(source, target, max_shard_gb=2e-5)
    partial = tmp_path / ".new.partial-4bit"
    assert not target.exists() and len(list(partial.glob("*.safetensors"))) == 3
    with pytest.raises(FileExistsError, match="unfinished conversion with another"):
        run(source, target, max_shard_gb=3e-5)
    damaged = sorted(partial.glob("*.safetensors"))[1]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    (partial / ".writing-dead").write_bytes(b"half a shard")
    report = run(source, target, max_shard_gb=2e-5)
    assert report.resumed == 2  # the third was damaged and is written anew
    assert report.shards == whole.shards and not partial.exists()
    assert not list(target.glob(".writing-*"))
    for file, checksum in report.shards.items():
        assert hashlib.sha256((target / file).read_bytes()).hexdigest() == checksum
    assert json.loads((target / "conversion.json").read_text())["shards"] == report.shards


def test_a_source_that_changed_is_not_continued(make_folder, tmp_path, monkeypatch):
    source = shutil.copytree(make_folder("phi3"), tmp_path / "source")

    def stops(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(convert, "write_shard", stops)
        run(source, tmp_path / "new")
    weights = load_file(source / "model.safetensors")
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FileExistsError, match="delete it"):
        run(source, tmp_path / "new")


def test_refusals(make_folder, tmp_path):
    source = make_folder("phi3")
    run(source, tmp_path / "done")
    with pytest.raises(FileExistsError, match="exists"):
        run(source, tmp_path / "done")
    with pytest.raises(ValueError, match="in 4 bits already"):
        run(tmp_path / "done", tmp_path / "twice")
    with pytest.raises(OSError, match="shall stay free"):
        run(source, tmp_path / "large", reserve_bytes=10**18)
    fused = shutil.copytree(make_folder("phimoe"), tmp_path / "fused")
    weights = load_file(fused / "model.safetensors")
    weights["model.layers.0.mlp.experts.down_proj"] = torch.zeros(4, 64, 128)
    save_file(weights, fused / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="cannot be quantised: give the checkpoint as it was"):
        run(fused, tmp_path / "never")
    assert not (tmp_path / "never").exists() and not (tmp_path / "large").exists()
