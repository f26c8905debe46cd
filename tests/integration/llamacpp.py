"""llama.cpp through the functions of llama.h, in a process of its own: what it makes of GGUF files.

The functions come from the package xllamacpp, whose extension module exports them. Parameters of models and contexts
are llama.cpp's defaults: their structures are handed on without a look inside.
"""

import ctypes
import json
import subprocess
import sys
from ctypes import CDLL, c_bool, c_char_p, c_float, c_int32, c_uint64, c_void_p
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

Tokens = c_int32 * 4096


class Structure(ctypes.Structure):
    """Any of llama.h's structures that pass by value: longer than each of them."""

    _fields_ = [("content", c_uint64 * 64)]


SIGNATURES: dict[str, tuple[Any, list[Any]]] = {  # result and arguments
    "llama_log_set": (None, [c_void_p, c_void_p]),
    "llama_backend_init": (None, []),
    "llama_model_default_params": (Structure, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, Structure]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_model_free": (None, [c_void_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_vocab_get_add_bos": (c_bool, [c_void_p]),
    "llama_vocab_is_eog": (c_bool, [c_void_p, c_int32]),
    "llama_tokenize": (c_int32, [c_void_p, c_char_p, c_int32, c_void_p, c_int32, c_bool, c_bool]),
    "llama_context_default_params": (Structure, []),
    "llama_init_from_model": (c_void_p, [c_void_p, Structure]),
    "llama_set_n_threads": (None, [c_void_p, c_int32, c_int32]),
    "llama_batch_get_one": (Structure, [c_void_p, c_int32]),
    "llama_decode": (c_int32, [c_void_p, Structure]),
    "llama_get_logits_ith": (ctypes.POINTER(c_float), [c_void_p, c_int32]),
    "llama_free": (None, [c_void_p]),
}
IGNORE = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)(lambda level, text, data: None)


def is_installed() -> bool:
    return find_spec("xllamacpp") is not None


def ask(jobs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A job has `path`, and may have `texts`, `prompts` (token ids) and `count` (tokens to generate for each).

    The answer has `adds_bos`, `ends` (ids that end a generation), `tokens` (ids of each text) and `greedy` (for each
    prompt the likeliest tokens, and by how much their logits exceed the second ones'). It is None for a file that
    llama.cpp refuses.
    """
    run = subprocess.run(
        [sys.executable, __file__], input=json.dumps(jobs), capture_output=True, text=True, timeout=500
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


def open_library() -> CDLL:
    spec = find_spec("xllamacpp")
    assert spec is not None and spec.origin is not None
    [file] = Path(spec.origin).parent.glob("xllamacpp*.so")
    library = CDLL(str(file))
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.llama_log_set(IGNORE, None)
    library.llama_backend_init()
    return library


def answer(library: CDLL, job: dict[str, Any]) -> dict[str, Any] | None:
    model = library.llama_model_load_from_file(job["path"].encode(), library.llama_model_default_params())
    if not model:
        return None
    vocab = library.llama_model_get_vocab(model)
    ids = range(library.llama_vocab_n_tokens(vocab))
    said = {
        "adds_bos": library.llama_vocab_get_add_bos(vocab),
        "ends": [index for index in ids if library.llama_vocab_is_eog(vocab, index)],
        "tokens": [tokenize(library, vocab, text.encode()) for text in job.get("texts", [])],
        "greedy": [greedy(library, model, prompt, job["count"]) for prompt in job.get("prompts", [])],
    }
    library.llama_model_free(model)
    return said


def tokenize(library: CDLL, vocab: int, text: bytes) -> list[int]:
    """With what the file says is added, and control tokens where the text spells them."""
    found = Tokens()
    count = library.llama_tokenize(vocab, text, len(text), found, len(found), True, True)
    return found[:count]


def greedy(library: CDLL, model: int, prompt: list[int], count: int) -> list[tuple[int, float]]:
    context = library.llama_init_from_model(model, library.llama_context_default_params())
    library.llama_set_n_threads(context, 1, 1)
    num_tokens = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
    tokens, drawn = prompt, []
    for _ in range(count):
        given = (c_int32 * len(tokens))(*tokens)
        assert library.llama_decode(context, library.llama_batch_get_one(given, len(tokens))) == 0
        logits = np.ctypeslib.as_array(library.llama_get_logits_ith(context, -1), (num_tokens,))
        best = int(logits.argmax())
        second, first = np.partition(logits, -2)[-2:]
        drawn.append((best, float(first - second)))
        tokens = [best]
    library.llama_free(context)
    return drawn


if __name__ == "__main__":
    opened = open_library()
    print(json.dumps({name: answer(opened, job) for name, job in json.load(sys.stdin).items()}))
