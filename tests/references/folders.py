"""Model folders, beside transformers."""

from pathlib import Path
from typing import Any

import torch
from comparison import PROMPT, Values, compared, generate, said, set_keys
from safetensors.torch import load_file, save_file
from smollm2 import greedy
from tiny_models import TinyModel, build
from transformers import AutoModelForCausalLM, AutoTokenizer

from sarathi.config.schema import ModelConfig
from sarathi.engine.tokenizer.load import load_end_token_ids, load_tokenizer
from sarathi.model_executor.loader.loader import open_checkpoint
from sarathi.model_executor.loader.source import ModelSource

GENERATE = "transformers `generate`"
LOADER = "unit/model_executor/test_loader.py"
KEYS = "unit/model_executor/test_config_keys.py"
ROPE = "unit/worker/test_rope.py"
TOKENIZER = "unit/engine/test_tokenizer.py"


def both(folder: Path) -> Values:
    """Six greedy tokens behind the prompt; transformers reads the folder anew."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    return Values(greedy(model, PROMPT, 6), generate(folder))


def changed(name: str, folder: Path, **keys: Any) -> TinyModel:
    """A tiny model whose config.json has other keys than it was made with; None: without the key."""
    tiny = build(name, folder)
    set_keys(folder / "config.json", **keys)
    return tiny


@compared(
    "`tie_word_embeddings: true` beside an `lm_head.weight` of its own", GENERATE,
    f"{LOADER}::test_a_head_of_its_own_wins_over_the_flag_that_ties_it",
)  # fmt: skip
def own_head(folder: Path) -> Values:
    changed("llama2", folder, tie_word_embeddings=True)
    return both(folder)


WINDOWS = f"{KEYS}::test_windows_of_layers_are_those_of_transformers"


@compared("Qwen2, `layer_types` sliding, full, sliding", GENERATE, WINDOWS)
def layer_types(folder: Path) -> Values:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    changed("qwen2-windowed", folder, layer_types=kinds, max_window_layers=3)
    return both(folder)


@compared("Qwen2, `use_sliding_window`, neither `max_window_layers` (28) nor `layer_types`", GENERATE, WINDOWS)
def no_max_window_layers(folder: Path) -> Values:
    changed("qwen2-windowed", folder, layer_types=None, max_window_layers=None)
    return both(folder)


@compared(
    "`old.safetensors` and `consolidated.safetensors` beside `model.safetensors`", GENERATE,
    f"{LOADER}::test_other_files_beside_the_checkpoint_are_not_read",
)  # fmt: skip
def other_files(folder: Path) -> Values:
    tiny = build("llama2", folder / "shards")
    tiny.reference.save_pretrained(folder)
    wrong = {name: tensor * 0 + 7 for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(wrong, folder / "old.safetensors")
    save_file({"layers.0.attention.wk.weight": torch.zeros(2)}, folder / "consolidated.safetensors")
    return both(folder)


@compared(
    "`eos_token_id: [7, 9]` in config.json alone", "transformers `generation_config`",
    f"{TOKENIZER}::test_end_tokens_of_a_folder",
)  # fmt: skip
def ends_of_config(folder: Path) -> Values:
    changed("llama2", folder, eos_token_id=[7, 9])
    (folder / "generation_config.json").unlink()
    theirs = AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id
    return Values(theirs, sorted(load_end_token_ids(ModelSource("m", "safetensors", folder))))


@compared(
    "weights of float16, no `dtype` in config.json", "transformers `from_pretrained`",
    f"{LOADER}::test_the_type_is_that_of_the_weights_where_the_configuration_names_none",
)  # fmt: skip
def stored_type(folder: Path) -> Values:
    build("llama2", folder).reference.half().save_pretrained(folder, max_shard_size="40KB")
    set_keys(folder / "config.json", dtype=None, torch_dtype=None)
    theirs = str(AutoModelForCausalLM.from_pretrained(folder).dtype).removeprefix("torch.")
    return Values(theirs, open_checkpoint(ModelConfig(model=str(folder))).architecture.dtype)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ORIGINAL = f"{ROPE}::test_the_original_length_is_found_as_in_transformers"
SCALED = f"{ROPE}::test_logits_equal_transformers_below_across_and_above_the_original_length"


@compared("llama3 rope, `original_max_position_embeddings: 64` beside it", GENERATE, ORIGINAL)
def original_beside(folder: Path) -> Values:
    changed(
        "llama2", folder, rope_parameters=None, rope_theta=5e5, rope_scaling=LLAMA3, original_max_position_embeddings=64
    )
    return both(folder)


@compared("llama3 rope, `original_max_position_embeddings` nowhere", GENERATE, ORIGINAL)
def original_nowhere(folder: Path) -> Values:
    changed("llama2", folder, rope_parameters=None, rope_theta=5e5, rope_scaling=LLAMA3)
    return both(folder)


@compared("YaRN over 64 tokens, a prompt of 100", GENERATE, SCALED)
def yarn(folder: Path) -> Values:
    build("llama-yarn", folder)
    return both(folder)


@compared("dynamic NTK over 64 tokens, a prompt of 100", GENERATE, SCALED)
def dynamic(folder: Path) -> Values:
    build("llama-dynamic", folder)
    return both(folder)


@compared("longrope over 64 tokens, a prompt of 100", GENERATE, SCALED)
def longrope(folder: Path) -> Values:
    build("llama-longrope", folder)
    return both(folder)


@compared(
    "a tokenizer whose `auto_map` names code of the folder, without `trust_remote_code`",
    "transformers `AutoTokenizer`, `trust_remote_code=False`", f"{TOKENIZER}::test_code_of_a_model_folder_never_runs",
)  # fmt: skip
def remote_code(folder: Path) -> Values:
    changed("llama2", folder, model_type="evil", auto_map={"AutoConfig": "evil.EvilConfig"})
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", null]}}'
    )
    (folder / "evil.py").write_text("raise SystemExit('it ran')\n")
    theirs = said(lambda: AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
    return Values(theirs, said(lambda: load_tokenizer(ModelSource("m", "safetensors", folder))))
