"""Loading: what is wrong with a checkpoint is named, GGUF reads as what it was made from, dummy weights repeat."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from sarathi.config.backend import BackendSpec
from sarathi.config.schema import ModelConfig
from sarathi.engine.tokenizer.load import load_tokenizer
from sarathi.model_executor.architecture import ModelArchitecture
from sarathi.model_executor.attention.base import KernelUnavailableError, create_backend
from sarathi.model_executor.fields import UnsupportedModelError
from sarathi.model_executor.loader.gguf_checkpoint import GGUFCheckpoint
from sarathi.model_executor.loader.loader import LoadFormatError, load_weights, open_checkpoint
from sarathi.model_executor.loader.reading import CheckpointError
from sarathi.model_executor.loader.source import ModelSource
from sarathi.model_executor.models import read_architecture
from sarathi.model_executor.models.decoder import Decoder
from sarathi.model_executor.ops.native import NativeOps
from sarathi.model_executor.placement import Placement
from sarathi.model_executor.rope import Rope

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
    backend = create_backend(BackendSpec.parse("sdpa_paged"), arch, PLACE)
    return Decoder(arch, PLACE, NativeOps(), backend, arch.max_positions)


def load(model: str | Path, load_format: str = "auto", seed: int = 0, packed: bool = True) -> Decoder:
    checkpoint = open_checkpoint(ModelConfig(model=str(model), load_format=load_format))
    decoder = make_decoder(checkpoint.architecture)
    load_weights(decoder, checkpoint, seed)
    if packed:
        decoder.pack()
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


def parameters(model: Decoder | str | Path) -> dict[str, torch.Tensor]:
    """Weights by name, not packed yet."""
    return dict((model if isinstance(model, Decoder) else load(model, packed=False)).parameters())


def set_keys(folder: Path, **changes) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))


@pytest.mark.parametrize("stored", ["both, different", "both, equal", "embedding", "head"])
def test_a_head_of_its_own_wins_over_the_flag_that_ties_it(folder: Path, stored: str) -> None:
    """As in transformers 5: tied only where the file has one of the two, or twice the same."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if stored == "both, equal":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors.pop({"embedding": "lm_head.weight", "head": "model.embed_tokens.weight"}.get(stored, ""), None)
    save_file(tensors, file, metadata={"format": "pt"})
    set_keys(folder, tie_word_embeddings=True)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = load(folder, packed=False)
    assert ours.tie_embeddings == (stored != "both, different")
    assert torch.equal(parameters(ours)["model.embed_tokens.weight"], theirs.model.embed_tokens.weight)
    head = parameters(ours).get("lm_head.weight", parameters(ours)["model.embed_tokens.weight"])
    assert torch.equal(head, theirs.lm_head.weight)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_type_is_that_of_the_weights_where_the_configuration_names_none(folder: Path, dtype: str) -> None:
    AutoModelForCausalLM.from_config(CONFIG).to(getattr(torch, dtype)).save_pretrained(folder)
    set_keys(folder, dtype="absent", torch_dtype="absent")
    assert open_checkpoint(ModelConfig(model=str(folder))).architecture.dtype == dtype
    set_keys(folder, dtype="float16")
    assert open_checkpoint(ModelConfig(model=str(folder))).architecture.dtype == "float16"


def test_other_files_beside_the_checkpoint_are_not_read(folder: Path) -> None:
    expected = parameters(folder)
    wrong = {name: tensor * 0 + 7 for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(wrong, folder / "old.safetensors")
    save_file({"layers.0.attention.wk.weight": torch.zeros(2)}, folder / "consolidated.safetensors")
    found = parameters(folder)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_sharded_checkpoint_is_what_its_index_names(folder: Path) -> None:
    expected = parameters(folder)
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_config(CONFIG).save_pretrained(folder, max_shard_size="20KB")
    stored = {name: tensor for file in folder.glob("model-*.safetensors") for name, tensor in load_file(file).items()}
    save_file({"model.norm.weight": torch.zeros(2)}, folder / "adapter_model.safetensors")
    found = parameters(folder)
    assert found.keys() == expected.keys() and len(list(folder.glob("model-*"))) > 2
    assert torch.equal(found["model.embed_tokens.weight"], stored["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    "weight_map", [{"a": "../model.safetensors"}, {"a": "/etc/passwd"}, {}, ["a"], {"a": 3}, None, {"a": {"b": "c"}}]
)
def test_an_index_that_names_no_files_of_its_folder_is_refused(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=str(index)):
        load(folder)


def test_a_tensor_in_two_files_is_named(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    save_file({"model.norm.weight": torch.ones(32)}, folder / "two.safetensors")
    names = {"a": "one.safetensors", "b": "two.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' is also in one\.safetensors"):
        load(folder)


def test_integers_are_no_weights(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}))
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' has type torch\.int8; read are bfloat16"):
        load(folder)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("pytorch_model.bin", r"weights are in pytorch_model\.bin.*convert them.*save_pretrained"),
        ("consolidated.safetensors", r"neither model\.safetensors nor .*index\.json; it holds consolidated"),
    ],
)
def test_a_folder_without_weights_that_are_read_says_what_to_do(folder: Path, file: str, message: str) -> None:
    (folder / "model.safetensors").rename(folder / file)
    with pytest.raises(LoadFormatError, match=message):
        load(folder)


@pytest.mark.parametrize("keep", [0, 5, 200])
def test_a_truncated_file_is_named(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=f"{file}: corrupt or unreadable"):
        load(folder)


def test_a_shard_that_is_missing_is_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
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
    with pytest.raises(CheckpointError, match="corrupt or unreadable JSON"):
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
    arch = checkpoint.architecture()
    assert arch.rope.kind == "divided"
    found = make_decoder(arch).frequencies.base
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


PROJECTIONS = {"attn_q": 16, "attn_k": 16, "attn_v": 16, "attn_output": 16, "ffn_up": 8, "ffn_gate": 8}


def random_gguf_tensors(biases: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {f"blk.0.{name}.weight": (rows, 16) for name, rows in PROJECTIONS.items()}
    shapes |= {"blk.0.ffn_down.weight": (16, 8), "output.weight": (10, 16), "output_norm.weight": (16,)}
    shapes |= {"blk.0.attn_norm.weight": (16,), "blk.0.ffn_norm.weight": (16,)}
    shapes |= {f"blk.0.{name}.bias": (PROJECTIONS.get(name, 16),) for name in biases}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def test_biases_of_a_gguf_file_are_what_it_holds(tmp_path: Path) -> None:
    """Those of query and key have the interleaved rows of their weights (llama.cpp's converter permutes both)."""
    file, tensors = tmp_path / "m.gguf", random_gguf_tensors(("attn_q", "attn_k", "attn_v", "attn_output"))
    write_tiny_gguf(file, tensors)
    decoder = parameters(file)
    rows = np.arange(16).reshape(2, 4, 2).swapaxes(1, 2).ravel()  # two heads of four pairs
    for name, stored in (("q_proj", "attn_q"), ("k_proj", "attn_k")):
        assert torch.equal(
            decoder[f"model.layers.0.self_attn.{name}.bias"], torch.from_numpy(tensors[f"blk.0.{stored}.bias"][rows])
        )
    for name, stored in (("v_proj", "attn_v"), ("o_proj", "attn_output")):
        found = decoder[f"model.layers.0.self_attn.{name}.bias"]
        assert torch.equal(found, torch.from_numpy(tensors[f"blk.0.{stored}.bias"]))
    write_tiny_gguf(file, random_gguf_tensors(("attn_q",)))
    with pytest.raises(CheckpointError, match=r"2 tensors are missing: .*k_proj\.bias, .*v_proj\.bias"):
        load(file)


def rope_of(file: Path, *extra) -> Rope:
    write_tiny_gguf(file, {}, *extra)
    return GGUFCheckpoint(file).architecture().rope


def test_rope_scaling_of_a_gguf_file_by_llama_cpps_rules(tmp_path: Path) -> None:
    file, linear = tmp_path / "m.gguf", gguf.RopeScalingType.LINEAR
    for extra in (
        [("add_rope_scaling_factor", 4.0)], [("add_float32", "llama.rope.scale_linear", 4.0)],
        [("add_rope_scaling_type", linear), ("add_rope_scaling_factor", 4.0)],
    ):  # fmt: skip
        assert rope_of(file, *extra) == Rope(10000.0, "linear", factor=4.0)
    for extra in ([("add_rope_scaling_factor", 0.0)], [("add_rope_scaling_type", linear)], [
        ("add_rope_scaling_type", gguf.RopeScalingType.NONE), ("add_rope_scaling_factor", 4.0)]):  # fmt: skip
        assert rope_of(file, *extra) == Rope(10000.0)
    yarn = [("add_rope_scaling_type", gguf.RopeScalingType.YARN), ("add_rope_scaling_factor", 4.0)]
    found = rope_of(file, *yarn, ("add_rope_scaling_orig_ctx_len", 16))
    assert (found.kind, found.factor, found.original_max_positions) == ("yarn", 4.0, 16)
    assert found.attention_factor == pytest.approx(1 + 0.1 * np.log(4))
    with pytest.raises(CheckpointError, match=r"llama\.rope\.scaling\.type is 'longrope'"):
        rope_of(file, ("add_rope_scaling_type", gguf.RopeScalingType.LONGROPE))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("add_uint32", "llama.expert_count", 8), r"llama\.expert_count is 8"),
        (("add_float32", "llama.attention.scale", 0.5), r"llama\.attention\.scale"),
        (("add_rope_dimension_count", 4), r"llama\.rope\.dimension_count is 4, a head has 8"),
        (("add_value_length", 16), r"llama\.attention\.value_length is 16"),
    ],
)
def test_keys_of_a_gguf_file_that_are_not_computed_are_refused(tmp_path: Path, extra: tuple, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        rope_of(tmp_path / "m.gguf", extra)


def test_a_file_in_parts_is_loaded_from_the_first(tmp_path: Path) -> None:
    tensors = random_gguf_tensors()
    write_tiny_gguf(tmp_path / "whole.gguf", tensors)
    expected = parameters(tmp_path / "whole.gguf")
    split_gguf(tmp_path, tensors)
    first, second = sorted(tmp_path.glob("m-*.gguf"))
    (tmp_path / "whole.gguf").unlink()
    for name in (first, tmp_path):
        found = parameters(name)
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    with pytest.raises(CheckpointError, match=r"part 2 of 2: load the first, .* -00001-of-00002\.gguf|part 2 of 2"):
        load(second)
    second.unlink()
    with pytest.raises(CheckpointError, match=r"1 of its parts are not there: m-00002-of-00002\.gguf"):
        load(first)


def split_gguf(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    names = list(tensors)
    for number, part in enumerate((names[:5], names[5:])):
        split = [("add_uint16", "split.no", number), ("add_uint16", "split.count", 2)]
        split.append(("add_int32", "split.tensors.count", len(tensors) + 1))
        file = folder / f"m-{number + 1:05d}-of-00002.gguf"
        write_tiny_gguf(file, {name: tensors[name] for name in part}, *split, with_model=number == 0)


def test_lengths_beyond_the_file_end_at_once(tmp_path: Path) -> None:
    """A count of 2^62 strings in 49 bytes was believed, and never came to an end."""
    file = tmp_path / "hang.gguf"
    pair = struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 8, 2**62)
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + pair)
    assert file.stat().st_size == 49
    for read in (GGUFCheckpoint, lambda path: load_tokenizer(ModelSource("m", "gguf", path))):
        with pytest.raises(CheckpointError, match=r"4611686018427387904 items of 8 bytes or more"):
            read(file)


def test_safetensors_and_dummy_weights_need_no_gguf_package(folder: Path) -> None:
    code = (
        "import sys; sys.modules['gguf'] = None; from sarathi import LLM\n"
        f"for format in ('auto', 'dummy'): LLM({str(folder)!r}, device='cpu', memory_bytes=2**22, load_format=format)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_kernels_that_cannot_run_here() -> None:
    arch = read_architecture(CONFIG.to_dict() | {"architectures": ["LlamaForCausalLM"]})
    with pytest.raises(
        KernelUnavailableError, match=r"'fa3_vattn': kernel 'fa3' runs on cuda, not on cpu; on cpu use sdpa, no_op"
    ):
        create_backend(BackendSpec.parse("fa3_vattn"), arch, PLACE)
    cuda = Placement(torch.float16, torch.device("cuda"))
    with pytest.raises(KernelUnavailableError, match="pip install"):
        create_backend(BackendSpec.parse("fi_vattn"), arch, cuda)


def write_tiny_gguf(file: Path, tensors: dict[str, np.ndarray], *extra: tuple, with_model: bool = True) -> None:
    """extra: names of the writer's methods, with their arguments. with_model: what the first of several parts holds."""
    writer = gguf.GGUFWriter(file, "llama")
    model = [
        ("add_block_count", 1), ("add_embedding_length", 16), ("add_feed_forward_length", 8), ("add_head_count", 2),
        ("add_head_count_kv", 2), ("add_context_length", 64), ("add_layer_norm_rms_eps", 1e-5),
        ("add_rope_freq_base", 10000.0), ("add_token_types", [1, 3, 1]),
    ]  # fmt: skip
    for method, *values in [*(model if with_model else []), *extra]:
        getattr(writer, method)(*values)
    if with_model:
        tensors = {"token_embd.weight": np.ones((10, 16), dtype=np.float32), **tensors}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor, raw_dtype=gguf.GGMLQuantizationType.Q8_0 if tensor.dtype == np.uint8 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
