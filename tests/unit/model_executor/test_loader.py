"""Loading: what is wrong with a checkpoint is named, GGUF reads as what it was made from, dummy weights repeat."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from sarathi.config.backend import BackendSpec
from sarathi.config.schema import ModelConfig
from sarathi.model_executor.architecture import ModelArchitecture
from sarathi.model_executor.attention.base import KernelUnavailableError, create_backend
from sarathi.model_executor.fields import UnsupportedModelError
from sarathi.model_executor.loader.checkpoint import CheckpointError
from sarathi.model_executor.loader.gguf_checkpoint import GGUFCheckpoint
from sarathi.model_executor.loader.loader import LoadFormatError, load_weights, open_checkpoint
from sarathi.model_executor.models import read_architecture
from sarathi.model_executor.models.decoder import Decoder
from sarathi.model_executor.placement import Placement

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
PLACE = Placement(torch.float32, torch.device("cpu"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    AutoModelForCausalLM.from_config(CONFIG).save_pretrained(tmp_path)
    return tmp_path


def make_decoder(arch: ModelArchitecture) -> Decoder:
    return Decoder(arch, PLACE, create_backend(BackendSpec.parse("sdpa_paged"), arch, PLACE))


def load(model: str | Path, load_format: str = "auto", seed: int = 0) -> Decoder:
    checkpoint = open_checkpoint(ModelConfig(model=str(model), load_format=load_format))
    decoder = make_decoder(checkpoint.architecture)
    load_weights(decoder, checkpoint, seed)
    return decoder


def edit(folder: Path, change) -> Path:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return file


def test_a_missing_tensor_is_named(folder: Path) -> None:
    file = edit(folder, lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.weight"))
    with pytest.raises(
        CheckpointError, match=rf"{file}: 1 tensors are missing: model\.layers\.1\.self_attn\.k_proj\.weight"
    ):
        load(folder)


def test_a_misshapen_tensor_is_named_with_both_shapes(folder: Path) -> None:
    file = edit(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}))
    with pytest.raises(
        CheckpointError, match=rf"{file}: tensor 'model\.norm\.weight' has shape \[31\], expected \[32\]"
    ):
        load(folder)


def test_a_tensor_without_a_place_is_named(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}))
    with pytest.raises(CheckpointError, match=r"'model\.layers\.0\.self_attn\.q_proj\.bias' has no place"):
        load(folder)


def test_tables_that_old_exporters_add_are_ignored(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    load(folder)


@pytest.mark.parametrize("keep", [0, 5, 200])
def test_a_truncated_file_is_named(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=f"{file}: corrupt or unreadable"):
        load(folder)


def test_a_shard_that_is_missing_is_named(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"gone\.safetensors"):
        load(folder)


def test_broken_and_foreign_configurations(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for change, message in [
        (
            {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"},
            "'GPT2LMHeadModel' is not supported; supported: LlamaForCausalLM",
        ),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        (
            {"rope_parameters": {"rope_type": "su", "factor": 4.0}},
            "'su' is not supported; supported: default, linear, llama3, yarn, dynamic, longrope",
        ),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "no 'rope_parameters.factor'"),
        ({"num_key_value_heads": 3}, "must be a multiple"),
    ]:
        path.write_text(json.dumps({**config, **change}))
        with pytest.raises(UnsupportedModelError, match=message):
            load(folder)
    path.write_text(json.dumps({key: value for key, value in config.items() if key != "vocab_size"}))
    with pytest.raises(UnsupportedModelError, match="no 'vocab_size'"):
        load(folder)
    path.write_text("{")
    with pytest.raises(CheckpointError, match="not a readable JSON"):
        load(folder)


def test_formats_that_do_not_match(folder: Path) -> None:
    with pytest.raises(LoadFormatError, match="load_format='gguf', but"):
        load(folder, "gguf")
    with pytest.raises(LoadFormatError, match="only load_format='dummy'"):
        load("llama-3-8b")


def test_dummy_weights_repeat_with_their_seed(folder: Path) -> None:
    def weights(seed: int) -> torch.Tensor:
        checkpoint = open_checkpoint(ModelConfig(model=str(folder), load_format="dummy"))
        decoder = make_decoder(checkpoint.architecture)
        parameters = dict(decoder.parameters())
        load_weights(decoder, checkpoint, seed)
        assert parameters["model.norm.weight"].eq(1).all()
        return parameters["model.embed_tokens.weight"]

    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))
    assert 0 < weights(1).abs().max() <= 0.02


def test_a_corrupt_gguf_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    for content in (b"", b"GGUF" + bytes(20), b"not a model at all" * 10):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{file}: corrupt or unreadable GGUF"):
            load(file)


def test_rope_divisors_of_a_gguf_file_become_frequencies(tmp_path: Path) -> None:
    file, divisors = tmp_path / "tiny.gguf", np.array([1.0, 2.0, 4.0, 8.0], dtype=np.float32)
    write_tiny_gguf(file, {"rope_freqs.weight": divisors})
    checkpoint = GGUFCheckpoint(file)
    arch = read_architecture(checkpoint.config())
    assert arch.rope.kind == "divided"
    found = make_decoder(arch).rotary.frequencies.base
    expected = torch.tensor([1.0, 0.1, 0.01, 0.001]) / torch.from_numpy(divisors)
    torch.testing.assert_close(found, expected)
    assert [named.name for named in checkpoint.tensors()] == ["model.embed_tokens.weight"]


@pytest.mark.parametrize("num_rows", [1, 7, 64, 100])
def test_quantised_rows_of_a_gguf_file_are_what_its_library_makes_of_them(num_rows: int, tmp_path: Path) -> None:
    values = np.random.default_rng(num_rows).normal(size=(num_rows, 96)).astype(np.float32)
    stored = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    write_tiny_gguf(tmp_path / "tiny.gguf", {"blk.0.ffn_up.weight": stored})
    *_, named = GGUFCheckpoint(tmp_path / "tiny.gguf").tensors()
    expected = gguf.dequantize(stored, gguf.GGMLQuantizationType.Q8_0)
    assert torch.equal(named.tensor, torch.from_numpy(expected))


def test_a_gguf_tensor_that_is_no_decoders_is_named(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "odd.gguf", {"blk.0.ffn_gate_exps.weight": np.ones((4, 4), dtype=np.float32)})
    with pytest.raises(CheckpointError, match=r"'blk\.0\.ffn_gate_exps\.weight' is none of a Llama-like decoder's"):
        list(GGUFCheckpoint(tmp_path / "odd.gguf").tensors())


def test_kernels_that_cannot_run_here() -> None:
    arch = read_architecture(CONFIG.to_dict() | {"architectures": ["LlamaForCausalLM"]})
    with pytest.raises(
        KernelUnavailableError, match=r"'fa3_vattn': kernel 'fa3' runs on cuda, not on cpu; on cpu use sdpa, no_op"
    ):
        create_backend(BackendSpec.parse("fa3_vattn"), arch, PLACE)
    cuda = Placement(torch.float16, torch.device("cuda"))
    with pytest.raises(KernelUnavailableError, match="pip install"):
        create_backend(BackendSpec.parse("fi_vattn"), arch, cuda)


def write_tiny_gguf(file: Path, tensors: dict[str, np.ndarray]) -> None:
    writer = gguf.GGUFWriter(file, "llama")
    for write, value in [
        (writer.add_block_count, 1), (writer.add_embedding_length, 16), (writer.add_feed_forward_length, 8),
        (writer.add_head_count, 2), (writer.add_head_count_kv, 2), (writer.add_context_length, 64),
        (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_rope_freq_base, 10000.0),
        (writer.add_token_types, [1, 3, 1]),
    ]:  # fmt: skip
        write(value)
    for name, tensor in {"token_embd.weight": np.ones((10, 16), dtype=np.float32), **tensors}.items():
        writer.add_tensor(name, tensor, raw_dtype=gguf.GGMLQuantizationType.Q8_0 if tensor.dtype == np.uint8 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
