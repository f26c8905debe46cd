"""vLLM behind the interface of load.py, its engine core in this process. Checked with 0.26.0.

Outputs are read directly from the engine core, without detokenization. The token budget of a step is changed in the
scheduler, the only place that reads it at run time.
"""

import importlib.util
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from sarathi.model_executor.loader.source import resolve_model

_STEPS_IN_FLIGHT = 4  # what may still come back after an abort
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the scheduler must be reachable
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # greedy sampling does not use it, and it need not be installed
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_CACHE_ROOT": "/tmp/vllmcache",
    "TRITON_CACHE_DIR": "/tmp/vllmcache/triton",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
}


class VllmEngine:
    """One vLLM engine with its defaults and random weights."""

    def __init__(
        self, model: str, max_model_len: int, seed: int, tensor_parallel_size: int = 1, *, prefix_caching: bool = False
    ) -> None:
        """model: a shipped configuration's name. Sets the environment that vLLM reads when it is imported."""
        if importlib.util.find_spec("vllm") is None:
            raise ImportError("vLLM cannot be imported here: pip install vllm")
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        import vllm

        folder = save_config(model, max_model_len, Path(tempfile.mkdtemp(prefix="vllm-model-")))
        llm = vllm.LLM(
            model=folder, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", max_model_len=max_model_len,
            enable_prefix_caching=prefix_caching, disable_log_stats=True, seed=seed,
            tensor_parallel_size=tensor_parallel_size,
        )  # fmt: skip
        self._engine = llm.llm_engine
        config = self._engine.vllm_config
        self._scheduler = self._engine.engine_core.engine_core.scheduler
        self._built_tokens = config.scheduler_config.max_num_batched_tokens
        self.backend = f"vllm-{vllm.__version__}"
        self.vocab_size: int = config.model_config.get_vocab_size()
        self.max_model_len = max_model_len
        self.max_num_seqs: int = config.scheduler_config.max_num_seqs
        self.capacity_tokens: int = config.cache_config.block_size * config.cache_config.num_gpu_blocks
        self._ids = map(str, count())
        self._arrived: list[tuple[str, Sequence[int]]] = []
        self._listen()

    @property
    def has_work(self) -> bool:
        return bool(self._engine.has_unfinished_requests())

    def add(self, prompt: list[int], output_tokens: int) -> str:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0.0, max_tokens=output_tokens, ignore_eos=True, detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        request_id: str = self._engine.add_request(next(self._ids), {"prompt_token_ids": prompt}, params)
        return request_id

    def step(self) -> Iterable[tuple[str, Sequence[int]]]:
        self._arrived.clear()
        self._engine.step()
        return tuple(self._arrived)

    def abort(self, request_ids: Sequence[str]) -> None:
        self._engine.abort_request(list(request_ids), internal=True)
        for _ in range(_STEPS_IN_FLIGHT):
            self._engine.step()

    def limit_step(self, tokens: int | None) -> None:
        self._scheduler.max_num_scheduled_tokens = tokens or self._built_tokens

    def _listen(self) -> None:
        core = self._engine.engine_core
        receive = core.get_output

        def listening() -> Any:
            outputs = receive()
            self._arrived.extend((each.request_id, each.new_token_ids) for each in outputs.outputs)
            return outputs

        core.get_output = listening


def save_config(model: str, max_model_len: int, folder: Path) -> str:
    """Write a shipped configuration with max_model_len positions, in transformers 5's format."""
    path = resolve_model(model, weights=False).path
    if path.suffix != ".json":
        raise ValueError(f"model is {model!r}: it must be an architecture or a folder with config.json")
    config = json.loads(path.read_text())
    rope = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    extra = {
        "max_position_embeddings": max(max_model_len, config["max_position_embeddings"]),
        "head_dim": config["hidden_size"] // config["num_attention_heads"],
        "rope_parameters": rope, "attention_bias": False, "mlp_bias": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**config, **extra}))
    return str(folder)
