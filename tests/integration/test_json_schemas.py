"""Outputs of a model with random weights, which draws any token that a grammar lets it: each fits its JSON schema."""

import json
import random
import re
from pathlib import Path

import jsonschema
import pytest
from json_schemas import random_schema
from small_models import save_tiny_config

from sarathi import LLM, SamplingParams
from sarathi.structured_outputs import StructuredOutputsParams, check_grammar

ENDLESS = re.compile(r"\d\d:\d\d:\d\d\.\d{100,}$")
"""A time's fraction of a second, the one part of these schemas that has no bound."""
SMALL = {"hidden_size": 32, "vocab_size": 49152, "max_position_embeddings": 2048}


@pytest.mark.parametrize("num_schemas", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_outputs_for_random_schemas_are_valid(tmp_path: Path, num_schemas: int) -> None:
    seed = random.randrange(10**9)
    print(f"seed {seed}")
    rng = random.Random(seed)
    schemas, refused = [], []
    while len(schemas) < num_schemas:
        schema = random_schema(rng)
        try:
            check_grammar(StructuredOutputsParams(json=schema))
        except ValueError as error:
            refused.append(str(error))
            continue
        schemas.append(schema)
    params = [
        SamplingParams(
            max_tokens=1500, seed=index, temperature=rng.choice([0.0, 0.7, 1.0, 2.0]),
            structured_outputs={"json": schema, "disable_any_whitespace": rng.random() < 0.5},
        )
        for index, schema in enumerate(schemas)
    ]  # fmt: skip
    folder = save_tiny_config(tmp_path / "model", **SMALL)
    settings = {"tokenizer": "smollm2-135m", "load_format": "dummy", "device": "cpu", "max_num_seqs": 32}
    with LLM(folder, memory_bytes="64mb", **settings) as llm:
        outputs = llm.generate(["Here:"] * len(params), params, use_tqdm=False)
    lengths = []
    for schema, output in zip(schemas, outputs, strict=True):
        [answer] = output.outputs
        if ENDLESS.search(answer.text):
            assert answer.finish_reason == "length" and any(kind in str(schema) for kind in ("'time'", "'date-time'"))
            continue
        assert answer.finish_reason == "stop", (schema, answer.text)
        jsonschema.validate(json.loads(answer.text), schema, cls=jsonschema.Draft202012Validator)
        lengths.append(answer.num_tokens)
    print(f"{sum(lengths)} tokens, {max(lengths)} at most; {len(refused)} schemas refused")
    assert sum(lengths) > 5 * num_schemas and len(refused) < num_schemas / 4, refused[:3]


@pytest.mark.parametrize("text", ['{"type": "object", "properties": 3}', '{"$ref": "#/nowhere"}', '{"type": "strin"}'])
def test_schemas_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"structured_outputs\.json is"):
        check_grammar(StructuredOutputsParams(json=text))
