"""Requests, sampling parameters and messages: what they refuse, count and survive."""

from __future__ import annotations

import pickle
import random
import subprocess
import sys

import pytest
from scheduler_simulation import make_pair, make_request

from sarathi.config.schema import SchedulerConfig
from sarathi.messages import CacheCapacity, SampledToken, StepResult
from sarathi.request import Request
from sarathi.sampling_params import SamplingParams

BAD_PARAMS = [
    ({"n": 0}, "n is 0: it must be at least 1"),
    ({"max_tokens": -1}, "max_tokens is -1: it must be at least 1"),
    ({"max_tokens": 2.5}, "max_tokens is 2.5: it must be an integer"),
    ({"max_tokens": True}, "max_tokens is True: it must be an integer"),
    ({"temperature": -0.1}, r"temperature is -0.1: it must be in \[0, 3.4\d+e\+38\]"),
    ({"temperature": float("nan")}, "temperature is nan: it must be a finite number"),
    ({"temperature": "hot"}, "temperature is 'hot': it must be a finite number"),
    ({"top_p": 0.0}, r"top_p is 0: it must lie in \(0, 1\]"),
    ({"top_p": 1.5}, r"top_p is 1.5: it must be in \[0, 1\]"),
    ({"top_k": -2}, "top_k is -2: it must be at least -1"),
    ({"min_p": 2}, r"min_p is 2: it must be in \[0, 1\]"),
    ({"presence_penalty": 3}, r"presence_penalty is 3: it must be in \[-2, 2\]"),
    ({"repetition_penalty": 0}, r"repetition_penalty is 0: it must be in \[1e-10, 1e\+10\]"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens is 9: it must not exceed max_tokens, 8"),
    ({"logprobs": -1}, "logprobs is -1: it must be at least 0"),
    ({"seed": "x"}, "seed is 'x': it must be an integer"),
    ({"stop": [""]}, "stop holds ''"),
    ({"stop": ["a", 3]}, "stop holds 3"),
    ({"stop_token_ids": [1, -1]}, "an entry of stop_token_ids is -1"),
    ({"ignore_eos": 1}, "ignore_eos is 1: it must be true or false"),
    ({"detokenize": None}, "detokenize is None: it must be true or false"),
    ({"prompt_logprobs": -1}, "prompt_logprobs is -1: it must be at least 0"),
    ({"allowed_token_ids": []}, "allowed_token_ids is empty"),
    ({"allowed_token_ids": [-1]}, "an entry of allowed_token_ids is -1"),
    ({"bad_words": "x"}, "bad_words is 'x': it must be a list of strings"),
    ({"bad_words": [""]}, "bad_words holds '': each entry must be text or a list of token ids"),
    ({"bad_words": [[1.5]]}, "a token id of bad_words is 1.5: it must be an integer"),
    ({"logits_processors": [3]}, "logits_processors holds 3: each entry must be a function"),
    ({"logit_bias": {"a": 1}}, "logit_bias is .*it must map token ids"),
    ({"n": 10**9}, "n is 1000000000: it must be at most 16384"),
    ({"max_tokens": 2**70}, f"max_tokens is {2**70}: it must be at most {2**63 - 1}"),
    ({"seed": 2**80}, f"seed is {2**80}: it must be at most {2**63 - 1}"),
    ({"seed": -(2**63) - 1}, f"seed is {-(2**63) - 1}: it must be at least {-(2**63)}"),
    ({"seed": 10**5000}, "seed is a int too long to be written: it must be at most"),
    ({"temperature": 10**400}, r"temperature is 10+\.\.\.: it must be in"),
    ({"temperature": 1e39}, r"temperature is 1e\+39: it must be in"),
    ({"repetition_penalty": 1e-40}, "repetition_penalty is 1e-40: it must be in"),
    ({"repetition_penalty": 1e39}, r"repetition_penalty is 1e\+39: it must be in"),
    ({"stop": 5}, "stop is 5: it must be a list of strings"),
    ({"stop": b"x"}, "stop is b'x': it must be a list of strings"),
    ({"stop": 0}, "stop is 0: it must be a list of strings"),
    ({"stop_token_ids": 5}, "stop_token_ids is 5: it must be a list of token ids"),
    ({"stop_token_ids": "5"}, "stop_token_ids is '5': it must be a list of token ids"),
    ({"logit_bias": 5}, "logit_bias is 5: it must map token ids"),
    ({"logit_bias": {1.5: 1}}, "logit_bias is .*it must map token ids"),
    ({"logit_bias": {"1": 10**400}}, r"logit_bias\[1\] is 10+\.\.\.: it must be in \[-100, 100\]"),
    ({"structured_outputs": 5}, "structured_outputs is 5: it must be a StructuredOutputsParams"),
    ({"structured_outputs": {}}, "structured_outputs has no limit: it must have exactly one of json, regex, choice"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs has regex and choice"),
    ({"structured_outputs": {"jsom": {}}}, "structured_outputs holds 'jsom': it may hold json, regex"),
    ({"structured_outputs": {"choice": []}}, r"choice is \[\]: it must be a list of one string or more"),
    ({"structured_outputs": {"choice": ["a", 3]}}, "choice holds 3"),
    ({"structured_outputs": {"json": "{"}}, "json is '{': it is no JSON"),
    ({"structured_outputs": {"json": "[" * 10**6}}, "json is .*it is no JSON"),
    ({"structured_outputs": {"json": 3}}, "json is 3: it must be a JSON schema"),
    ({"structured_outputs": {"regex": 3}}, "regex is 3: it must be a string"),
    ({"structured_outputs": {"json_object": 1}}, "json_object is 1: it must be true or false"),
    ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos is True: it must be False with struct"),
    ({"structured_outputs": {"regex": "a"}, "min_tokens": 2}, "min_tokens is 2: it must be 0 with structured_outputs"),
    ({"logit_bias": {5: 101}}, r"logit_bias\[5\] is 101: it must be in \[-100, 100\]"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_PARAMS)
def test_bad_parameters_are_refused_by_name_value_and_what_is_allowed(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**fields)


def test_parameters_are_made_uniform() -> None:
    params = SamplingParams(stop="END", stop_token_ids=[3, 4], logit_bias={"17": 2.0}, temperature=0)
    assert (params.stop, params.stop_token_ids, params.logit_bias) == (("END",), (3, 4), {17: 2.0})
    assert params.is_greedy and not SamplingParams().is_greedy
    assert SamplingParams(temperature=1e-38).is_greedy and not SamplingParams(temperature=1e-5).is_greedy
    assert SamplingParams(stop=None, stop_token_ids=None).stop == ()


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="request 'r': the prompt is empty"):
        Request("r", (), SamplingParams(), frozenset())


def test_one_counter_catches_up_with_another() -> None:
    request = Request("r", [1, 2, 3], SamplingParams(), frozenset())
    assert (request.num_tokens, request.num_remaining_tokens, request.num_prompt_tokens) == (3, 3, 3)
    request.num_computed_tokens, request.num_pending_tokens = 3, 1
    assert (request.num_tokens, request.num_remaining_tokens) == (4, 1)
    request.num_pending_tokens = 0
    request.token_ids.append(7)
    assert (request.num_tokens, request.num_remaining_tokens, request.output_token_ids) == (4, 1, [7])
    assert request != Request("r", (1, 2, 3)), "two requests are never the same"


def test_messages_survive_another_process_and_cannot_be_changed() -> None:
    scheduler, _ = make_pair(SchedulerConfig(chunk_size=8), "sdpa_paged_4", CacheCapacity(50, 1, 4), 100)
    for i in range(3):
        scheduler.add(make_request(f"r{i}", 5, stop="x", logit_bias={3: 1.0}))
    out = scheduler.schedule()
    assert out.num_tokens == 8 and pickle.loads(pickle.dumps(out)) == out
    result = StepResult(3, (SampledToken("r", 5, -0.5, ((5, -0.5),)),), 0.1)
    assert pickle.loads(pickle.dumps(result)) == result
    for message, field in (
        (out, "chunks"),
        (out.chunks[0], "start"),
        (out.new_requests[0], "token_ids"),
        (result, "tokens"),
    ):
        with pytest.raises(AttributeError):
            setattr(message, field, ())


def test_the_scheduler_runs_without_torch() -> None:
    """In a process of its own: nothing that a scheduler is made of imports torch, numpy or a device library."""
    rounds = random.randint(2, 5)
    program = f"""
import sys
from sarathi.config.load import make_config
from sarathi.core.factory import make_block_space_manager
from sarathi.core.scheduler import make_scheduler
from sarathi.messages import CacheCapacity, SampledToken, StepResult
from sarathi.request import Request
config = make_config(scheduler_type="vllm")
block_space_manager = make_block_space_manager(config.model.attention_backend, CacheCapacity(9, 1, 4))
scheduler = make_scheduler(config.scheduler, block_space_manager, 30)
scheduler.add(Request("r", (1, 2, 3)))
for _ in range({rounds}):
    out = scheduler.schedule()
    scheduler.update(out, StepResult(out.step_id, tuple(SampledToken(chunk.request_id, 5) for chunk in out.chunks)))
loaded = sorted(name for name in ("torch", "numpy", "transformers", "vattention") if name in sys.modules)
assert not loaded, loaded
print(out.step_id)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == (str(rounds - 1), "")
