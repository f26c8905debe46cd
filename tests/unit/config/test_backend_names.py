"""Backend names over the whole product of their parts."""

from __future__ import annotations

import itertools
import random

import pytest

from sarathi.config.backend import KERNELS, BackendNameError, BackendSpec
from sarathi.config.units import format_bytes, parse_bytes

VATTN = [
    BackendSpec(kernel, "vattn", megacache, sync, page_bytes)
    for kernel, megacache, sync, page_bytes in itertools.product(
        KERNELS, (False, True), (False, True), (None, 4096, 65536, 2**18, 2**21, 3 * 2**20, 1536 * 1024)
    )
]
PAGED = [BackendSpec(kernel, "paged", block_size=size) for kernel in KERNELS for size in (None, 1, 16, 100, 256)]


@pytest.mark.parametrize("spec", VATTN + PAGED, ids=str)
def test_a_name_means_what_it_was_printed_from_in_any_order_and_case(spec: BackendSpec) -> None:
    assert BackendSpec.parse(str(spec)) == spec
    kernel, *rest = str(spec).replace("no_op", "no-op").split("_")
    for _ in range(4):
        random.shuffle(rest)
        name = "_".join((kernel, *rest)).replace("no-op", "no_op")
        assert BackendSpec.parse(name.upper()) == BackendSpec.parse(f" {name} ") == spec


def test_printed_names_are_canonical_and_differ() -> None:
    assert len({str(spec) for spec in VATTN + PAGED}) == len(VATTN + PAGED)
    assert str(BackendSpec.parse("FA_sync_2048KB_MEGACACHE_vattn")) == "fa_vattn_megacache_sync_2mb"
    assert str(BackendSpec.parse("sdpa_16_paged")) == "sdpa_paged_16"
    assert BackendSpec.parse("no_op") == BackendSpec("no_op", "vattn")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fa_vatn", "'vatn' is unknown; the nearest known word is 'vattn'"),
        ("flash_vattn", "'flash' is unknown"),
        ("spda_paged", "nearest known word is 'sdpa'"),
        ("", "is unknown"),
        ("fa", "no memory is named: write fa_vattn or fa_paged"),
        ("vattn_sync", "no kernel is named; known are sdpa"),
        ("fa_fi_vattn", "gives its kernel twice: the second time with 'fi'"),
        ("fa_vattn_paged", "gives its memory twice"),
        ("fa_vattn_sync_sync", "gives its sync twice"),
        ("fa_paged_megacache", "megacache is a layout of virtual memory"),
        ("fa_paged_sync", "sync says when virtual memory is mapped"),
        ("fa_paged_2mb", r"counted in tokens \(as _16\), not in bytes \(_2mb\)"),
        ("fa_paged_0", "a block of 0 tokens"),
        ("fa_vattn_16", r"pages of bytes \(as _64kb or _2mb\), not blocks of 16 tokens"),
        ("fa_vattn_16_2mb", "gives its size twice"),
        ("fa_vattn_100b", "a page of 100 bytes: it must be a multiple of 1kb"),
        ("fa_vattn_2qb", "'2qb' is not a size"),
    ],
)
def test_names_that_mean_nothing_are_refused_with_the_reason(name: str, message: str) -> None:
    with pytest.raises(BackendNameError, match=message) as caught:
        BackendSpec.parse(name)
    assert repr(name) in str(caught.value)


def test_auto_depends_on_the_device_and_nothing_else_does() -> None:
    assert BackendSpec.parse("auto") == BackendSpec.parse(" AUTO ") == BackendSpec()
    assert str(BackendSpec()) == "auto"
    assert str(BackendSpec().on("cpu")) == "sdpa_vattn"
    assert str(BackendSpec().on("cuda")) == "fa_vattn_megacache"
    for device_kind in ("cpu", "cuda"):
        assert BackendSpec().on(device_kind).memory == BackendSpec().memory  # chosen before the device is known
        assert str(BackendSpec.parse("FI_PAGED_16").on(device_kind)) == "fi_paged_16"
    with pytest.raises(BackendNameError, match="takes no other choice"):
        BackendSpec(sync=True)


def test_sizes_are_read_as_they_are_written() -> None:
    rng = random.Random(seed := random.randrange(2**32))
    for _ in range(300):
        num_bytes = rng.randint(1, 5000) << rng.choice((0, 10, 20, 30, 40))
        assert parse_bytes(format_bytes(num_bytes)) == num_bytes, seed
    assert [parse_bytes(text) for text in ("1.5g", "2 MiB", "64KB", "7", "7b")] == [3 * 2**29, 2**21, 2**16, 7, 7]
    for text in ("", "mb", "-1kb", "2 parsecs", "1e3"):
        with pytest.raises(ValueError, match="is not a size"):
            parse_bytes(text)
