"""What each rank holds of a model: ranges that make up the whole, sizes that are refused."""

from dataclasses import replace
from itertools import pairwise

import pytest

from sarathi.model_executor.models import read_architecture
from sarathi.model_executor.parallel.sharding import ShardingError, TensorShare, possible_sizes, shard_of

ARCH = read_architecture(
    {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 96, "intermediate_size": 120,
        "num_hidden_layers": 1, "num_attention_heads": 12, "num_key_value_heads": 4, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64, "vocab_size": 101,
    }
)  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_ranks_parts_follow_each_other_and_make_up_the_whole(size: int) -> None:
    shares = [TensorShare(ARCH, rank, size) for rank in range(size)]
    for name, whole in shares[0].shards().items():
        parts = [share.shards()[name] for share in shares]
        assert parts[0].start == 0 and parts[-1].stop == whole.size, name
        assert all(left.stop == right.start for left, right in pairwise(parts)), name
    assert {share.architecture.vocab_size for share in shares} == {-(-101 // size)}


def test_ranks_beyond_the_kv_heads_hold_the_one_of_their_queries() -> None:
    arch = replace(ARCH, num_kv_heads=2)
    for rank in range(4):
        shards = TensorShare(arch, rank, 4).shards()
        query, key = shards["q_proj.weight"], shards["k_proj.weight"]
        group = arch.num_heads // arch.num_kv_heads * arch.head_size  # columns of the queries of one KV head
        assert query.start // group == (query.stop - 1) // group == key.start // arch.head_size
        assert key.stop - key.start == arch.head_size
    assert TensorShare(arch, 3, 4).architecture.num_kv_heads == 1


def test_what_does_not_divide_is_refused_with_the_numbers() -> None:
    assert possible_sizes(ARCH) == [1, 2, 4, 12]
    with pytest.raises(ShardingError, match=r"size=3: .*num_key_value_heads=4; possible are 1, 2, 4, 12$"):
        TensorShare(ARCH, 0, 3)
    with pytest.raises(ShardingError, match=r"num_attention_heads=12, intermediate_size=120"):
        TensorShare(ARCH, 0, 7)


def test_names_find_their_part() -> None:
    shards = TensorShare(ARCH, 1, 2).shards()
    assert shard_of("model.layers.3.self_attn.o_proj.weight", shards) == (1, 48, 96, 96)
    assert shard_of("model.layers.3.mlp.up_proj.bias", shards) == (0, 60, 120, 120)
    assert shard_of("lm_head.weight", shards) == (0, 51, 101, 101)
    for name in ("model.norm.weight", "model.layers.3.self_attn.o_proj.bias", "model.layers.3.self_attn.q_norm.weight"):
        assert shard_of(name, shards) is None
