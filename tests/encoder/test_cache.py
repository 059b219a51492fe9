"""The cache of embeddings."""

from __future__ import annotations

import pytest
import torch

from triptych.python_models.encoder.cache import EmbeddingCache

# Bytes of rows(1).
ROW = 16


def rows(count: int, value: float = 0.0) -> torch.Tensor:
    return torch.full((count, 4), value)


def test_gives_back_what_it_was_given() -> None:
    cache = EmbeddingCache(10 * ROW)
    assert cache.get("a") is None
    cache.put("a", rows(2, 7.0))
    found = cache.get("a")
    assert found is not None
    assert torch.equal(found, rows(2, 7.0))
    assert cache.used_bytes == 2 * ROW


def test_drops_the_least_recently_used() -> None:
    cache = EmbeddingCache(3 * ROW)
    for name in "abc":
        cache.put(name, rows(1))
    cache.get("a")
    cache.put("d", rows(1))
    assert [name for name in "abcd" if cache.get(name) is not None] == ["a", "c", "d"]
    cache.put("e", rows(3))
    assert [name for name in "abcde" if cache.get(name) is not None] == ["e"]
    assert cache.used_bytes == 3 * ROW
    assert len(cache) == 1


def test_an_entry_over_the_budget_pushes_nothing_out() -> None:
    cache = EmbeddingCache(3 * ROW)
    cache.put("a", rows(1))
    cache.put("b", rows(4))
    assert cache.get("a") is not None
    assert cache.get("b") is None


def test_no_budget_keeps_nothing() -> None:
    cache = EmbeddingCache(0)
    cache.put("a", rows(1))
    assert len(cache) == 0


def test_same_digest_counts_once() -> None:
    cache = EmbeddingCache(10 * ROW)
    cache.put("a", rows(1))
    cache.put("a", rows(1))
    assert cache.used_bytes == ROW


def test_keeps_no_batch_alive() -> None:
    batch = rows(100)
    cache = EmbeddingCache(10 * ROW)
    cache.put("a", batch[:1])
    found = cache.get("a")
    assert found is not None
    assert found.untyped_storage().nbytes() == ROW


def test_clear() -> None:
    cache = EmbeddingCache(10 * ROW)
    cache.put("a", rows(1))
    cache.clear()
    assert (len(cache), cache.used_bytes) == (0, 0)


def test_entries_may_be_kept_elsewhere() -> None:
    """Here they lose their values, since what is kept is where no memory is."""
    cache = EmbeddingCache(10 * ROW, "meta")
    cache.put("a", rows(2, 7.0))
    ((kept, home),) = cache._entries.values()
    assert isinstance(kept, torch.Tensor)
    assert (kept.device.type, home.type, cache.used_bytes) == ("meta", "cpu", 2 * ROW)


@pytest.mark.gpu
def test_host_memory_for_rows_of_a_gpu() -> None:
    cache = EmbeddingCache(64 * 2**20, "cpu")
    before = torch.cuda.memory_allocated()
    given = torch.randn(2**20, device="cuda")
    expected = given.cpu()
    cache.put("a", given)
    del given
    assert torch.cuda.memory_allocated() == before
    found = cache.get("a")
    assert isinstance(found, torch.Tensor)
    assert found.is_cuda
    assert torch.equal(found.cpu(), expected)
