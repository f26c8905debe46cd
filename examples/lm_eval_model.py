"""EleutherAI's lm-eval on the engine: pip install lm-eval, then python examples/lm_eval_model.py --tasks arc_easy"""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from sarathi import LLM, SamplingParams

Scored = tuple[float, bool]  # log-likelihood in nats, and whether greedy decoding would write the same


class EngineModel(TemplateLM):
    """lm-eval's model interface over an LLM: likelihoods come from the log probabilities of prompts."""

    def __init__(self, llm: LLM, prefix_token_id: int | None = None) -> None:
        """prefix_token_id: what stands before a text that is scored from its first token on; None: the end token."""
        super().__init__()
        if llm.tokenizer is None:
            raise ValueError("lm-eval scores text, and this model has no tokenizer")
        self._llm, self._tokenizer = llm, llm.tokenizer
        self._max_tokens = llm.engine.core.facts.max_model_len - 1  # the engine generates one token at least

        self._prefix_token_id = self.eot_token_id if prefix_token_id is None else prefix_token_id

    @property
    def eot_token_id(self) -> int:
        return min(self._tokenizer.eos_token_ids)

    @property
    def prefix_token_id(self) -> int:
        return self._prefix_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self._tokenizer.encode(string, add_special_tokens=add_special_tokens is not False)

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        return [sum(score for score, _ in self._rolling(*each.args, disable_tqdm)) for each in requests]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        prompts, options = zip(*(each.args for each in requests), strict=True)
        outputs = self._llm.generate(list(prompts), [_sampling(each) for each in options], not disable_tqdm)
        return [output.outputs[0].text for output in outputs]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[Scored]:
        """The end of what is too long is kept."""
        prompts = [[*context, *continuation][-self._max_tokens :] for _, context, continuation in requests]
        params = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False, prompt_logprobs=1)
        outputs = self._llm.generate(prompts, params, not disable_tqdm)
        return [
            _score(output.prompt_logprobs[-len(continuation) :], output.prompt_token_ids[-len(continuation) :])
            for output, (_, _, continuation) in zip(outputs, requests, strict=True)
        ]

    def _rolling(self, text: str, disable_tqdm: bool) -> list[Scored]:
        windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self._max_tokens - 1, 1)
        requests = [(None, *make_disjoint_window(window)) for window in windows]
        return self._loglikelihood_tokens(requests, disable_tqdm)


def _score(logprobs: Sequence[dict[int, Any]], token_ids: Sequence[int]) -> Scored:
    chosen = [entry[token_id].logprob for entry, token_id in zip(logprobs, token_ids, strict=True)]
    best = [max(each.logprob for each in entry.values()) for entry in logprobs]
    return sum(chosen), chosen == best


def _sampling(options: dict[str, Any]) -> SamplingParams:
    until = options.get("until") or []
    return SamplingParams(
        temperature=options.get("temperature", 0.0) if options.get("do_sample") else 0.0,
        max_tokens=options.get("max_gen_toks", 256),
        stop=[until] if isinstance(until, str) else until,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--prefix-token-id", type=int, metavar="ID", help="before texts without context, as BOS")
    parser.add_argument("--limit", type=int, help="examples of each task; default: all")
    options = parser.parse_args()
    with LLM(options.model) as llm:
        results = simple_evaluate(
            model=EngineModel(llm, options.prefix_token_id), tasks=options.tasks, limit=options.limit
        )
    print(json.dumps(results["results"], indent=2))


if __name__ == "__main__":
    main()
