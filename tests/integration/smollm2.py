"""SmolLM2 as transformers reads and runs it, and real prompts: the independent reference of the parity tests."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from unittest import mock

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from sarathi.model_executor.loader.source import resolve_model

_SHORT = [
    "The capital of France is", "2 + 2 =", "Once upon a time", "def fibonacci(n):", "Water boils at", "Hello",
    "The three primary colours are", "Roses are red,", "Q: Who wrote Hamlet?\nA:", "import numpy as np\n",
    "The quick brown fox", "To be or not to be,", "Dear Sir or Madam,", "In 1969, Neil Armstrong", "E = mc",
    "The largest planet in the solar system is", "Translate to French: good morning ->", "A haiku about the sea:\n",
]  # fmt: skip
_PASSAGE = (
    "The lighthouse had stood on the rocks for two hundred years, and in all that time its lamp had failed only once. "
    "On that night a fishing boat with eleven men aboard ran onto the reef below. The keeper, who had fallen asleep at "
    "his table, was woken by the bell that the youngest of them rang until the water reached him. Every year since "
    "then the village has lit a candle for each of the men, and a twelfth for the keeper, who never forgave himself. "
)
_QUESTIONS = [
    "Question: How many men were aboard?\nAnswer:", "Summary in one sentence:", "Why did the lamp fail?",
    "The moral is", "The keeper then", "List the people in the story:\n1.", "In French:", "A title for this story:",
]  # fmt: skip
PROMPTS = [*_SHORT, *(_PASSAGE * max(1, i - 4) + question for i, question in enumerate(_QUESTIONS))]


def load_reference() -> PreTrainedModel:
    """Transformers' own dequantisation of the file into its own model, in float32."""
    path = resolve_model("smollm2-135m").path
    with parsed_once():
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        with torch.device("meta"):  # a shape to find the names by
            shape = AutoModelForCausalLM.from_config(config)
        tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=shape)["tensors"]
    model = type(shape).from_pretrained(None, config=config, state_dict=tensors, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    return model


@contextmanager
def parsed_once() -> Iterator[None]:
    """Transformers reads a GGUF file twice and makes the map of its names for every module; slices of a memory map are
    slow. Three quarters of the time went into that."""
    with (
        mock.patch.object(np, "memmap", lambda path, mode, dtype=np.uint8: np.fromfile(path, dtype)),
        mock.patch.object(gguf, "GGUFReader", lambda path: read(str(path))),
        mock.patch.object(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map)),
    ):
        read = cache(gguf.gguf_reader.GGUFReader)
        yield


@torch.inference_mode()
def greedy(model: PreTrainedModel, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """What transformers generates, ends of text included."""
    ids = torch.tensor([prompt], device=model.device)
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=num_tokens, pad_token_id=0
    )
    return output[0, len(prompt) :].tolist()
