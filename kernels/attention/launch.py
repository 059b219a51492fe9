"""Launching the attention kernels: the committed launch table, and how many programs share the keys of a query."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from .._launch import capability, next_power_of_2, num_sms, pdl
from .kernel import _attend_kernel, _merge_kernel

# longest query whose tokens are packed with the heads of a kv head, as decode does with its one token
MAX_SHORT_QUERY = 16
# a program of the merge holds all splits of a head at once; it comes in two sizes
_FEW_SPLITS, _MAX_SPLITS = 16, 128
_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@dataclass(frozen=True)
class Launch:
    """Launch parameters.

    Attributes:
        block_m: rows (queries) of a tile; decode's tiles have no more than a kv head's query heads need.
        block_n: keys of a tile.
        num_warps, num_stages: as Triton means them.
        programs_per_sm: keys are shared out over splits until there are this many programs for each SM.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs_per_sm: int


Table = dict[tuple[int, int, int], Launch]

# compute capability -> (padded head dim, bytes of an element of the pages, size) -> parameters. The size is requests
# x kv heads, and for prefill the longest query. (0, 0) is any other GPU: at most 64 KiB of shared memory up to head
# dim 256.
DECODE: dict[tuple[int, int], Table] = {
    (9, 0): {
        (64, 1, 4): Launch(64, 64, 4, 3, 4),
        (64, 2, 4): Launch(64, 64, 4, 3, 4),
        (64, 2, 256): Launch(64, 64, 4, 3, 2),
        (64, 4, 4): Launch(16, 32, 4, 2, 4),
        (128, 1, 4): Launch(64, 32, 4, 3, 1),
        (128, 1, 128): Launch(64, 128, 4, 2, 2),
        (128, 1, 512): Launch(64, 128, 4, 2, 2),
        (128, 2, 4): Launch(64, 32, 4, 3, 1),
        (128, 2, 128): Launch(64, 32, 4, 3, 2),
        (128, 2, 512): Launch(64, 32, 4, 3, 2),
        (128, 4, 4): Launch(16, 16, 4, 2, 4),
        (256, 1, 4): Launch(32, 32, 4, 3, 2),
        (256, 2, 4): Launch(32, 32, 4, 3, 2),
        (256, 4, 4): Launch(16, 16, 4, 2, 2),
        (1024, 1, 4): Launch(16, 16, 4, 2, 2),
        (1024, 2, 4): Launch(16, 16, 4, 2, 2),
        (1024, 4, 4): Launch(16, 16, 8, 1, 1),
    },
    (0, 0): {
        (128, 1, 4): Launch(32, 32, 4, 2, 4),
        (128, 2, 4): Launch(32, 32, 4, 2, 4),
        (128, 4, 4): Launch(16, 16, 4, 2, 4),
        (256, 1, 4): Launch(16, 16, 4, 2, 4),
        (256, 2, 4): Launch(16, 16, 4, 2, 4),
        (256, 4, 4): Launch(16, 16, 4, 1, 4),
        (1024, 1, 4): Launch(16, 16, 4, 1, 2),
        (1024, 2, 4): Launch(16, 16, 4, 1, 2),
        (1024, 4, 4): Launch(16, 16, 8, 1, 2),
    },
}
# queries of 2 to MAX_SHORT_QUERY tokens
VERIFY: dict[tuple[int, int], Table] = {
    (9, 0): {
        (64, 1, 4): Launch(64, 64, 4, 3, 2),
        (64, 2, 4): Launch(64, 64, 4, 3, 2),
        (64, 4, 4): Launch(32, 32, 4, 2, 2),
        (128, 1, 4): Launch(64, 64, 8, 3, 2),
        (128, 2, 4): Launch(64, 64, 8, 3, 2),
        (128, 4, 4): Launch(16, 16, 8, 2, 2),
        (256, 1, 4): Launch(32, 32, 8, 2, 2),
        (256, 2, 4): Launch(64, 32, 8, 2, 2),
        (256, 4, 4): Launch(16, 16, 4, 2, 2),
        (1024, 1, 4): Launch(16, 16, 4, 2, 2),
        (1024, 2, 4): Launch(16, 16, 4, 2, 2),
        (1024, 4, 4): Launch(16, 16, 8, 1, 1),
    },
    (0, 0): {
        (128, 1, 4): Launch(64, 32, 4, 2, 4),
        (128, 2, 4): Launch(64, 32, 4, 2, 4),
        (128, 4, 4): Launch(16, 16, 8, 2, 4),
        (256, 1, 4): Launch(32, 16, 4, 2, 4),
        (256, 2, 4): Launch(32, 16, 4, 2, 4),
        (256, 4, 4): Launch(16, 16, 4, 1, 4),
        (1024, 1, 4): Launch(16, 16, 4, 1, 2),
        (1024, 2, 4): Launch(16, 16, 4, 1, 2),
        (1024, 4, 4): Launch(16, 16, 8, 1, 2),
    },
}
PREFILL: dict[tuple[int, int], Table] = {
    (9, 0): {
        (64, 1, 64): Launch(64, 64, 4, 3, 1),
        (64, 1, 1024): Launch(128, 64, 8, 3, 1),
        (64, 2, 64): Launch(64, 64, 4, 3, 1),
        (64, 2, 1024): Launch(128, 64, 8, 3, 1),
        (64, 4, 64): Launch(32, 32, 4, 2, 1),
        (128, 1, 64): Launch(64, 64, 4, 3, 1),
        (128, 1, 1024): Launch(128, 128, 8, 2, 1),
        (128, 2, 64): Launch(64, 64, 4, 3, 1),
        (128, 2, 1024): Launch(128, 64, 8, 3, 1),
        (128, 4, 64): Launch(16, 16, 8, 2, 1),
        (256, 1, 64): Launch(32, 32, 8, 2, 1),
        (256, 2, 64): Launch(64, 32, 8, 2, 1),
        (256, 2, 1024): Launch(128, 32, 8, 3, 1),
        (256, 4, 64): Launch(16, 16, 4, 2, 1),
        (1024, 1, 64): Launch(16, 16, 4, 2, 1),
        (1024, 2, 64): Launch(16, 16, 4, 2, 1),
        (1024, 4, 64): Launch(16, 16, 8, 1, 1),
    },
    (0, 0): {
        (128, 1, 64): Launch(64, 32, 4, 2, 1),
        (128, 2, 64): Launch(64, 32, 4, 2, 1),
        (128, 4, 64): Launch(16, 16, 8, 2, 1),
        (256, 1, 64): Launch(32, 16, 4, 2, 1),
        (256, 2, 64): Launch(32, 16, 4, 2, 1),
        (256, 4, 64): Launch(16, 16, 4, 1, 1),
        (1024, 1, 64): Launch(16, 16, 4, 1, 1),
        (1024, 2, 64): Launch(16, 16, 4, 1, 1),
        (1024, 4, 64): Launch(16, 16, 8, 1, 1),
    },
}
TABLES = {"decode": DECODE, "verify": VERIFY, "prefill": PREFILL}


@lru_cache(maxsize=4096)
def choose(kind: str, arch: tuple[int, int], width: int, element: int, size: int, /) -> Launch:
    """The entry for a shape: the narrowest head dim that is wide enough, then the nearest size.

    Args:
        kind: which of TABLES.
        arch: compute capability.
        width: head dim, of keys or values, whichever is wider.
        element: bytes of an element of the pages.
        size: requests x kv heads (decode, verify), or the longest query (prefill).

    Raises:
        ValueError: the head dim is wider than any entry.
    """
    table = TABLES[kind].get(arch, TABLES[kind][0, 0])
    fitting = [key for key in table if key[0] >= width and key[1] == element]
    if not fitting:
        raise ValueError(f"head dim {width} is too wide: at most {max(key[0] for key in table)}")
    nearest = min(fitting, key=lambda key: (key[0], abs(math.log2(key[2] / max(size, 1)))))
    return table[nearest]


def kind_of(max_query_len: int) -> str:
    """Which of TABLES is for queries of this length."""
    return "decode" if max_query_len == 1 else "verify" if max_query_len <= MAX_SHORT_QUERY else "prefill"


def share_out(programs: int, wanted: int, tiles: int) -> int:
    """Splits: the largest power of two that gives at most ``wanted`` programs and no split less than a tile."""
    most = min(wanted // max(programs, 1), tiles, _MAX_SPLITS)
    return 1 << (most.bit_length() - 1) if most > 1 else 1


def launch(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    query_starts: torch.Tensor | None,
    max_query_len: int,
    *,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    spans: torch.Tensor | None,
    key_scale: float,
    value_scale: float,
    num_splits: int | None = None,
    params: Launch | None = None,
) -> torch.Tensor:
    """See :func:`..decode` (``query_starts`` None, ``max_query_len`` 1) and :func:`..prefill`.

    Args:
        params: instead of the table's entry, for tuning and tests.
    """
    tokens, heads, dim = query.shape
    kv_heads, page, dim_value = value_pages.shape[1:]
    requests, blocks = block_table.shape
    out = torch.empty((tokens, heads, dim_value), dtype=query.dtype, device=query.device)
    if not tokens or not requests:
        return out
    group = heads // kv_heads
    short = max_query_len <= MAX_SHORT_QUERY
    width, element = max(dim, dim_value), key_pages.element_size()
    if params is None:
        size = requests * kv_heads if short else max_query_len
        params = choose(kind_of(max_query_len), capability(query), width, element, size)
    pack = group if short else 1
    # the size of a tile does not follow the length of queries: every size would be compiled when it first comes
    block_m = min(params.block_m, max(16, next_power_of_2(pack))) if max_query_len == 1 else params.block_m
    tiles = triton.cdiv(max_query_len * pack, block_m)
    programs = requests * (heads // pack) * tiles
    if num_splits is not None and not 1 <= num_splits <= _MAX_SPLITS:
        raise ValueError(f"{num_splits} splits; 1 to {_MAX_SPLITS} are possible")
    if num_splits is None:
        seen = blocks * page
        if window is not None:
            seen = min(seen, window + triton.cdiv(block_m, pack) + params.block_n)
        # merging costs a pass over what the splits wrote: long queries must save more than one tile
        least = params.block_n if short else 4 * params.block_n
        num_splits = share_out(programs, params.programs_per_sm * num_sms(query), triton.cdiv(seen, least))
    partial = log_sums = None
    if num_splits > 1:
        partial = torch.empty((tokens, heads, num_splits, dim_value), dtype=torch.float32, device=query.device)
        log_sums = torch.empty((tokens, heads, num_splits), dtype=torch.float32, device=query.device)
    if not query.is_cuda:
        # the interpreter multiplies bfloat16 as if it were integers
        multiplied = tl.float32
    else:
        # every e4m3 number is a float16 number
        multiplied = tl.float16 if element == 1 and query.dtype != torch.float32 else _DTYPES[query.dtype]
    flag = pdl(query)
    _attend_kernel[(heads // pack, requests, tiles * num_splits)](
        query,
        key_pages,
        value_pages,
        block_table,
        context_lens,
        query_starts,
        spans,
        sinks,
        out,
        partial,
        log_sums,
        num_splits,
        scaling * key_scale,
        value_scale,
        query.stride(0),
        query.stride(1),
        key_pages.stride(0),
        key_pages.stride(1),
        key_pages.stride(2),
        value_pages.stride(0),
        value_pages.stride(1),
        value_pages.stride(2),
        block_table.stride(0),
        0 if spans is None else spans.stride(0),
        out.stride(0),
        out.stride(1),
        HEADS=heads,
        GROUP=group,
        PACK=pack,
        D=dim,
        DV=dim_value,
        BLOCK_M=block_m,
        BLOCK_N=params.block_n,
        BLOCK_D=max(16, next_power_of_2(dim)),
        BLOCK_DV=max(16, next_power_of_2(dim_value)),
        PAGE=page,
        WINDOW=window or 0,
        SOFTCAP=softcap or 0.0,
        PHASES=not short,
        DTYPE=multiplied,
        PRECISION="ieee" if multiplied == tl.float32 else "tf32",
        SAME_LAYOUT=key_pages.stride() == value_pages.stride(),
        PDL=flag,
        num_warps=params.num_warps,
        num_stages=params.num_stages,
        launch_pdl=flag,
    )
    if num_splits > 1:
        columns = min(128, next_power_of_2(dim_value))
        _merge_kernel[(tokens, heads, triton.cdiv(dim_value, columns))](
            partial,
            log_sums,
            sinks,
            out,
            num_splits,
            value_scale,
            out.stride(0),
            out.stride(1),
            HEADS=heads,
            DV=dim_value,
            BLOCK_S=_FEW_SPLITS if num_splits <= _FEW_SPLITS else _MAX_SPLITS,
            BLOCK_DV=columns,
            PDL=flag,
            num_warps=4,
            launch_pdl=flag,
        )
    return out


def warm_up(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    spans: bool = False,
) -> int:
    """Compile and load all that a layer of this kind can ask for, so that no request waits for a compiler.

    A prefill whose requests all have one token is left out: that is a decode.

    Args:
        query: [T, H, D], T >= 1, strides as in use. Nothing is read: the requests that are launched are padding.
        spans: whether prefills may come with spans.

    Returns:
        Number of launches.
    """
    width, element = max(query.shape[2], value_pages.shape[3]), key_pages.element_size()
    zeros = torch.zeros(4, dtype=torch.int32, device=query.device)
    launches = 0
    one_each = torch.arange(2, dtype=torch.int32, device=query.device)
    prefills = itertools.product((2, MAX_SHORT_QUERY + 1), (one_each,), {False, spans})
    for length, starts, with_spans in ((1, None, False), *prefills):
        table = TABLES[kind_of(length)]
        sizes = {key[2] for key in table.get(capability(query), table[0, 0])}
        for params in {choose(kind_of(length), capability(query), width, element, size) for size in sizes}:
            for num_splits in (1, _FEW_SPLITS, _MAX_SPLITS):
                launch(
                    query[:1],
                    key_pages,
                    value_pages,
                    zeros[:1].view(1, 1),
                    zeros[:1],
                    starts,
                    length,
                    scaling=1.0,
                    window=window,
                    softcap=softcap,
                    sinks=sinks,
                    spans=zeros[:2].view(1, 2) if with_spans else None,
                    key_scale=1.0,
                    value_scale=1.0,
                    num_splits=num_splits,
                    params=params,
                )
                launches += 1
    return launches
