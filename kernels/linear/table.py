"""How the kernels of the linear layers are launched, by shape of the weight and rows of x.

Shapes are those of Qwen2.5-7B: fused q, k and v; output; fused gate and up; down; head. A weight of another shape takes
the entries of the nearest. ``benchmarks/kernels_linear.py --tune`` measures entries on a GPU and prints them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fma:
    """Launch of ``_fma_kernel``: at most 4 rows of x.

    Attributes:
        block_n: rows of the weight (with a gate: pairs of rows) a program works on at a time.
        block_k: columns it works on at a time; 256 * warps and multiples of it keep x where the weight's threads are.
        warps: per program.
        groups: how many times block_n rows a program owns. More: x is read and normed less often.
        prefetch: bytes of each row to bring to L2 while the kernel before this one still runs; a multiple of 16.
    """

    block_n: int
    block_k: int
    warps: int
    groups: int = 1
    prefetch: int = 0


@dataclass(frozen=True)
class Dot:
    """Launch of ``_dot_kernel``, which pads the rows of x to 16, 32, 64 or 128.

    Attributes:
        block_n: rows of the weight (with a gate: pairs) of a program; 64 or more use Hopper's tensor core instructions.
        block_k: columns a step works on.
        warps: per program.
        stages: steps whose loads are under way at the same time.
        splits: programs that share the columns of the same rows; more than one need a second kernel for the sum.
        prefetch: as for Fma.
    """

    block_n: int
    block_k: int
    warps: int
    stages: int
    splits: int = 1
    prefetch: int = 0


Entry = Fma | Dot

# (rows, columns) of the weight -> (most rows of x, entry), ascending; past the last, and for None, cuBLAS is faster
TABLE: dict[tuple[int, int], tuple[tuple[int, Entry | None], ...]] = {
    (4608, 3584): (
        (1, Fma(4, 512, 2, 1, 0)),
        (2, Dot(64, 64, 4, 8, 2, 0)),
        (4, Dot(64, 64, 4, 8, 2, 0)),
        (8, Dot(64, 64, 4, 8, 3, 512)),
        (16, Dot(64, 64, 4, 8, 3, 0)),
        (32, Dot(64, 128, 4, 4, 2, 512)),
        (64, None),
        (128, None),
    ),
    (3584, 3584): (
        (1, Fma(2, 1024, 2, 1, 1024)),
        (2, Fma(4, 512, 2, 1, 1024)),
        (4, Dot(64, 128, 4, 5, 4, 512)),
        (8, Dot(64, 128, 4, 5, 4, 512)),
        (16, Dot(64, 128, 4, 5, 4, 512)),
        (32, Dot(64, 128, 4, 4, 4, 512)),
        (64, None),
        (128, None),
    ),
    (37888, 3584): (
        (1, Fma(4, 512, 2, 2, 1024)),
        (2, Dot(32, 256, 4, 2, 1, 0)),
        (4, Dot(32, 256, 4, 2, 1, 0)),
        (8, Dot(32, 256, 4, 2, 1, 0)),
        (16, Dot(128, 64, 8, 3, 1, 0)),
        (32, Dot(128, 64, 8, 3, 1, 0)),
        (64, Dot(64, 128, 4, 4, 1, 0)),
        (128, None),
    ),
    (3584, 18944): (
        (1, Fma(2, 1024, 2, 1, 1024)),
        (2, Dot(64, 64, 4, 8, 4, 0)),
        (4, Dot(64, 64, 4, 8, 4, 0)),
        (8, Dot(64, 128, 4, 5, 3, 512)),
        (16, Dot(128, 128, 8, 3, 8, 0)),
        (32, Dot(64, 128, 4, 4, 4, 0)),
        (64, Dot(64, 128, 4, 3, 4, 512)),
        (128, Dot(64, 64, 4, 4, 4, 0)),
    ),
    (152064, 3584): (
        (1, Fma(1, 2048, 4, 2, 1024)),
        (2, Dot(64, 128, 4, 5, 1, 0)),
        (4, Dot(64, 128, 4, 5, 1, 0)),
        (8, Dot(64, 128, 4, 5, 1, 0)),
        (16, Dot(128, 128, 8, 6, 1, 0)),
        (32, Dot(128, 128, 8, 5, 1, 0)),
        (64, Dot(128, 128, 8, 4, 1, 0)),
        (128, None),
    ),
}
