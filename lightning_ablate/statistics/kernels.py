"""Triton kernels that read a batch of activations once; the plain torch code beside each use is their reference.

Programs run over a block of neurons (along the grid's first axis) and a share of the positions (along its second).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_NEURONS = 64  # of a program: 128 bytes of bfloat16, what a GPU reads at once
_POSITIONS = 32  # that it reads at once
_SHARES = 64  # into which the positions are divided at most


def count_inside(rows: Tensor, scale: Tensor, first: Tensor, span: Tensor, counts: Tensor) -> Tensor:
    """Counts what lies in each neuron's window, and sums the rest up.

    Args:
        rows: ``(positions, neurons)``, floating.
        scale: ``(neurons,)``, the inverse of a bin's width; float64 if the rows are, or else float32.
        first: ``(neurons,)``, the number of the window's first bin, counted from 0; of the dtype of ``scale``.
        span: ``(neurons,)``, the number of bins, 0 where there is no window yet; of the dtype of ``scale``.
        counts: ``(neurons, bins)`` int32, any row stride; added to, exact zeros left out.

    Returns:
        ``(4, neurons)`` of the dtype of ``scale``: minimum and maximum, both NaN if a value was not finite; the number
        of exact zeros, and of values outside of the window.
    """
    grid, shape = _grid(rows)
    found = scale.new_empty(4, grid[1], rows.shape[1])
    _count_inside[grid](rows, scale, first, span, counts, found, *shape, counts.stride(0), _POSITIONS, _NEURONS)
    low, high, zeros, outside = found
    return torch.stack([low.amin(0), high.amax(0), zeros.sum(0), outside.sum(0)])


def count_outside(
    rows: Tensor, old: tuple[Tensor, Tensor, Tensor], new: tuple[Tensor, Tensor, Tensor], skip: Tensor, counts: Tensor
) -> None:
    """Counts in a new window what :func:`count_inside` left out of an old one, exact zeros apart.

    Blocks of neurons that left nothing out are not read.

    Args:
        rows: ``(positions, neurons)``, floating.
        old: scale, first bin and span, as :func:`count_inside` had them.
        new: the same of the window that counts now.
        skip: ``(neurons,)`` bool, where nothing was left out.
        counts: ``(neurons, bins)`` int32, any row stride; added to.
    """
    grid, shape = _grid(rows)
    _count_outside[grid](rows, *old, *new, skip, counts, *shape, counts.stride(0), _POSITIONS, _NEURONS)


def power_sums(rows: Tensor, reference: Tensor) -> Tensor:
    """Sums of the first to fourth powers of the deviations from the reference, ``(4, neurons)`` float64.

    Args:
        rows: ``(positions, neurons)``, floating.
        reference: ``(neurons,)`` float64.
    """
    grid, shape = _grid(rows)
    found = reference.new_empty(4, grid[1], rows.shape[1])
    _power_sums[grid](rows, reference, found, *shape, _POSITIONS, _NEURONS)
    return found.sum(1)


def _grid(rows: Tensor) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """The grid; and positions, neurons, the rows' stride and the positions of a share."""
    positions, neurons = rows.shape
    share = triton.cdiv(triton.cdiv(positions, _SHARES), _POSITIONS) * _POSITIONS
    grid = triton.cdiv(neurons, _NEURONS), triton.cdiv(positions, share)
    return grid, (positions, neurons, rows.stride(0), share)


@triton.jit  # type: ignore[untyped-decorator]
def _count_inside(
    rows,
    scale,
    first,
    span,
    counts,
    found,
    positions,
    neurons,
    stride,
    share,
    counts_stride,
    BT: tl.constexpr,
    BN: tl.constexpr,
):
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    there = column < neurons
    by = tl.load(scale + column, there, other=1.0)[None, :]
    begin = tl.load(first + column, there, other=0.0)[None, :]
    end = begin + tl.load(span + column, there, other=0.0)[None, :]
    low = tl.full((BN,), float("inf"), by.dtype)
    high = tl.full((BN,), float("-inf"), by.dtype)
    zeros = tl.zeros((BN,), by.dtype)
    outside = tl.zeros((BN,), by.dtype)
    bad = tl.zeros((BN,), tl.int32)
    start = tl.program_id(1) * share
    for offset in range(start, tl.minimum(start + share, positions), BT):
        position = offset + tl.arange(0, BT)
        use = (position < positions)[:, None] & there[None, :]
        place = position.to(tl.int64)[:, None] * stride + column[None, :]
        x = tl.load(rows + place, use, other=0.0).to(by.dtype)
        bin_ = tl.floor(x * by)
        bin_ = tl.where((x < 0) & (bin_ == 0), -1.0, bin_)  # the product was too small
        inside = (bin_ >= begin) & (bin_ < end)
        counted = use & inside & (x != 0)
        cell = column.to(tl.int64)[None, :] * counts_stride + tl.where(inside, bin_ - begin, 0.0).to(tl.int32)
        tl.atomic_add(counts + cell, 1, counted, sem="relaxed")
        low = tl.minimum(low, tl.min(tl.where(use, x, float("inf")), 0))
        high = tl.maximum(high, tl.max(tl.where(use, x, float("-inf")), 0))
        zeros += tl.sum((use & (x == 0)).to(by.dtype), 0)
        outside += tl.sum((use & (inside == 0) & (x != 0)).to(by.dtype), 0)
        bad += tl.sum((use & ((x - x) != 0)).to(tl.int32), 0)  # NaN is not 0
    low = tl.where(bad > 0, float("nan"), low)
    high = tl.where(bad > 0, float("nan"), high)
    shares = tl.num_programs(1)
    to = found + tl.program_id(1) * neurons + column
    tl.store(to, low, there)
    tl.store(to + shares * neurons, high, there)
    tl.store(to + 2 * shares * neurons, zeros, there)
    tl.store(to + 3 * shares * neurons, outside, there)


@triton.jit  # type: ignore[untyped-decorator]
def _count_outside(
    rows,
    old_scale,
    old_first,
    old_span,
    scale,
    first,
    span,
    skip,
    counts,
    positions,
    neurons,
    stride,
    share,
    counts_stride,
    BT: tl.constexpr,
    BN: tl.constexpr,
):
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    there = column < neurons
    left_out = there & (tl.load(skip + column, there, other=1) == 0)
    if tl.sum(left_out.to(tl.int32), 0) > 0:
        old_by = tl.load(old_scale + column, there, other=1.0)[None, :]
        old_begin = tl.load(old_first + column, there, other=0.0)[None, :]
        old_end = old_begin + tl.load(old_span + column, there, other=0.0)[None, :]
        by = tl.load(scale + column, there, other=1.0)[None, :]
        begin = tl.load(first + column, there, other=0.0)[None, :]
        end = begin + tl.load(span + column, there, other=0.0)[None, :]
        start = tl.program_id(1) * share
        for offset in range(start, tl.minimum(start + share, positions), BT):
            position = offset + tl.arange(0, BT)
            use = (position < positions)[:, None] & left_out[None, :]
            place = position.to(tl.int64)[:, None] * stride + column[None, :]
            x = tl.load(rows + place, use, other=0.0).to(by.dtype)
            old_bin = tl.floor(x * old_by)
            old_bin = tl.where((x < 0) & (old_bin == 0), -1.0, old_bin)
            bin_ = tl.floor(x * by)
            bin_ = tl.where((x < 0) & (bin_ == 0), -1.0, bin_)
            inside = (bin_ >= begin) & (bin_ < end)
            counted = use & inside & ((old_bin >= old_begin) & (old_bin < old_end) == 0) & (x != 0)
            cell = column.to(tl.int64)[None, :] * counts_stride + tl.where(inside, bin_ - begin, 0.0).to(tl.int32)
            tl.atomic_add(counts + cell, 1, counted, sem="relaxed")


@triton.jit  # type: ignore[untyped-decorator]
def _power_sums(
    rows,
    reference,
    found,
    positions,
    neurons,
    stride,
    share,
    BT: tl.constexpr,
    BN: tl.constexpr,
):
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    there = column < neurons
    center = tl.load(reference + column, there, other=0.0)[None, :]
    first = tl.zeros((BN,), tl.float64)
    second = tl.zeros((BN,), tl.float64)
    third = tl.zeros((BN,), tl.float64)
    fourth = tl.zeros((BN,), tl.float64)
    start = tl.program_id(1) * share
    for offset in range(start, tl.minimum(start + share, positions), BT):
        position = offset + tl.arange(0, BT)
        use = (position < positions)[:, None] & there[None, :]
        place = position.to(tl.int64)[:, None] * stride + column[None, :]
        deviation = tl.where(use, tl.load(rows + place, use, other=0.0).to(tl.float64) - center, 0.0)
        square = deviation * deviation
        first += tl.sum(deviation, 0)
        second += tl.sum(square, 0)
        third += tl.sum(deviation * square, 0)
        fourth += tl.sum(square * square, 0)
    shares = tl.num_programs(1)
    to = found + tl.program_id(1) * neurons + column
    tl.store(to, first, there)
    tl.store(to + shares * neurons, second, there)
    tl.store(to + 2 * shares * neurons, third, there)
    tl.store(to + 3 * shares * neurons, fourth, there)
