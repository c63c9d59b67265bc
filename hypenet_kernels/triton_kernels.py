"""Triton kernels of the norms and of swiglu, for CUDA. Imported at their first use, since there may be no Triton.

Mapping: a tile is ROWS whole rows, padded to BLOCK elements, a power of two. A program of a forward has one tile; one
of a backward has TILES of them, whose part of dweight it stores as a row of `partials`. All of these depend on shapes
alone, so results do not depend on the GPU. Arithmetic is in ACC, float32 or float64; 16-bit types are cast explicitly.
The math is at the top of csrc/cpu/rms_norm.cpp, with the same names.
"""

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl

TILE = 2048  # elements
MAX_PROGRAMS = 1024  # of a backward: rows of partials


@triton.jit
def load(x, offsets, mask, ACC: tl.constexpr):
    """Return x[offsets] in the arithmetic's type, 0 where the mask is false."""
    return tl.load(x + offsets, mask=mask, other=0.0).to(ACC)


@triton.jit
def store(x, offsets, value, mask):
    """Store a value of the arithmetic's type, to 16 bits by way of float32."""
    if x.dtype.element_ty.primitive_bitwidth < 32:
        value = value.to(tl.float32)
    tl.store(x + offsets, value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def tile_of(tile, rows, D, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the rows of a tile, and offsets and mask of their first `width` elements."""
    row = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (j < width)[None, :]
    return row, row[:, None] * D + j[None, :], mask


@triton.jit
def angle_offsets(row, T, H, D, SHARED: tl.constexpr, BLOCK: tl.constexpr):
    token = row // H
    if SHARED:
        token = token % T
    return token[:, None] * D + tl.arange(0, BLOCK)[None, :]


@triton.jit
def rms_norm_rope_fwd(
    x,
    weight,
    cos,
    sin,
    y,
    rows,
    T,
    H,
    D,
    width,
    eps,
    NORM: tl.constexpr,
    ROTATE: tl.constexpr,
    SHARED: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """width: half of D with a rotation, whose halves are a and b; otherwise D, and there is only a."""
    row, at, mask = tile_of(tl.program_id(0), rows, D, width, ROWS, BLOCK)
    j = tl.arange(0, BLOCK)
    a = load(x, at, mask, ACC)
    if ROTATE:
        b = load(x, at + width, mask, ACC)
    if NORM:
        squares = tl.sum(a * a, axis=1)
        if ROTATE:
            squares += tl.sum(b * b, axis=1)
        r = (1 / tl.sqrt(squares / D + eps))[:, None]
        a = a * r * load(weight, j, j < width, ACC)[None, :]
        if ROTATE:
            b = b * r * load(weight, j + width, j < width, ACC)[None, :]
    if ROTATE:
        angle = angle_offsets(row, T, H, D, SHARED, BLOCK)
        store(y, at, a * load(cos, angle, mask, ACC) - b * load(sin, angle, mask, ACC), mask)
        angle += width
        store(y, at + width, b * load(cos, angle, mask, ACC) + a * load(sin, angle, mask, ACC), mask)
    else:
        store(y, at, a, mask)


@triton.jit
def rms_norm_rope_bwd(
    x,
    weight,
    cos,
    sin,
    dy,
    dx,
    partials,
    rows,
    T,
    H,
    D,
    width,
    eps,
    NORM: tl.constexpr,
    ROTATE: tl.constexpr,
    SHARED: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    program, j = tl.program_id(0), tl.arange(0, BLOCK)
    if NORM:
        weight_a, sum_a = load(weight, j, j < width, ACC)[None, :], tl.zeros([BLOCK], ACC)
        if ROTATE:
            weight_b, sum_b = load(weight, j + width, j < width, ACC)[None, :], tl.zeros([BLOCK], ACC)
    for i in range(TILES):
        row, at, mask = tile_of(program * TILES + i, rows, D, width, ROWS, BLOCK)
        da = load(dy, at, mask, ACC)
        if ROTATE:
            db, angle = load(dy, at + width, mask, ACC), angle_offsets(row, T, H, D, SHARED, BLOCK)
            dn_a = da * load(cos, angle, mask, ACC) + db * load(sin, angle + width, mask, ACC)
            db = db * load(cos, angle + width, mask, ACC) - da * load(sin, angle, mask, ACC)
            da = dn_a
        if NORM:
            a = load(x, at, mask, ACC)
            squares, products = tl.sum(a * a, axis=1), tl.sum(da * weight_a * a, axis=1)
            if ROTATE:
                b = load(x, at + width, mask, ACC)
                squares += tl.sum(b * b, axis=1)
                products += tl.sum(db * weight_b * b, axis=1)
            r = 1 / tl.sqrt(squares / D + eps)
            c = (r * r * products / D)[:, None]
            r = r[:, None]
            sum_a += tl.sum(da * (r * a), axis=0)
            da = r * (da * weight_a - c * a)
            if ROTATE:
                sum_b += tl.sum(db * (r * b), axis=0)
                db = r * (db * weight_b - c * b)
        store(dx, at, da, mask)
        if ROTATE:
            store(dx, at + width, db, mask)
    if NORM:
        store(partials, program * D + j, sum_a, j < width)
        if ROTATE:
            store(partials, program * D + width + j, sum_b, j < width)


@triton.jit
def rms_norm_gated_fwd(
    x, g, weight, y, rows, D, eps, SILU: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    _, at, mask = tile_of(tl.program_id(0), rows, D, D, ROWS, BLOCK)
    j = tl.arange(0, BLOCK)
    a, gate = load(x, at, mask, ACC), load(g, at, mask, ACC)
    r = 1 / tl.sqrt(tl.sum(a * a, axis=1) / D + eps)
    activated = tl.sigmoid(gate)
    if SILU:
        activated = gate * activated
    store(y, at, a * r[:, None] * load(weight, j, j < D, ACC)[None, :] * activated, mask)


@triton.jit
def rms_norm_gated_bwd(
    x,
    g,
    weight,
    dy,
    dx,
    dg,
    partials,
    rows,
    D,
    eps,
    SILU: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    program, j = tl.program_id(0), tl.arange(0, BLOCK)
    w, dweight = load(weight, j, j < D, ACC)[None, :], tl.zeros([BLOCK], ACC)
    for i in range(TILES):
        _, at, mask = tile_of(program * TILES + i, rows, D, D, ROWS, BLOCK)
        a, gate, d = load(x, at, mask, ACC), load(g, at, mask, ACC), load(dy, at, mask, ACC)
        s = tl.sigmoid(gate)
        activated, slope = s, s * (1 - s)
        if SILU:
            activated, slope = gate * s, s * (1 + gate * (1 - s))
        r = 1 / tl.sqrt(tl.sum(a * a, axis=1) / D + eps)
        dn = d * activated
        c = (r * r * tl.sum(dn * w * a, axis=1) / D)[:, None]
        r = r[:, None]
        store(dg, at, d * (a * r * w) * slope, mask)
        store(dx, at, r * (dn * w - c * a), mask)
        dweight += tl.sum(dn * (r * a), axis=0)
    store(partials, program * D + j, dweight, j < D)


@triton.jit
def add_rms_norm_fwd(
    x, residual, weight, total, y, rows, D, eps, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    _, at, mask = tile_of(tl.program_id(0), rows, D, D, ROWS, BLOCK)
    j = tl.arange(0, BLOCK)
    rounded = (load(x, at, mask, ACC) + load(residual, at, mask, ACC)).to(total.dtype.element_ty)
    store(total, at, rounded, mask)
    a = rounded.to(ACC)
    r = 1 / tl.sqrt(tl.sum(a * a, axis=1) / D + eps)
    store(y, at, a * r[:, None] * load(weight, j, j < D, ACC)[None, :], mask)


@triton.jit
def add_rms_norm_bwd(
    total,
    dsum,
    dy,
    weight,
    dresidual,
    dx,
    partials,
    rows,
    D,
    eps,
    NARROW: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    program, j = tl.program_id(0), tl.arange(0, BLOCK)
    w, dweight = load(weight, j, j < D, ACC)[None, :], tl.zeros([BLOCK], ACC)
    for i in range(TILES):
        _, at, mask = tile_of(program * TILES + i, rows, D, D, ROWS, BLOCK)
        a, dn = load(total, at, mask, ACC), load(dy, at, mask, ACC)
        r = 1 / tl.sqrt(tl.sum(a * a, axis=1) / D + eps)
        c = (r * r * tl.sum(dn * w * a, axis=1) / D)[:, None]
        r = r[:, None]
        d = r * (dn * w - c * a) + load(dsum, at, mask, ACC)
        store(dresidual, at, d, mask)
        if NARROW:
            store(dx, at, d, mask)
        dweight += tl.sum(dn * (r * a), axis=0)
    store(partials, program * D + j, dweight, j < D)


@triton.jit
def swiglu_fwd(x, y, z, size, ACC: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    a = load(x, at, mask, ACC)
    store(z, at, a * tl.sigmoid(a) * load(y, at, mask, ACC), mask)


@triton.jit
def swiglu_bwd(x, y, dz, dx, dy, size, ACC: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    a, d = load(x, at, mask, ACC), load(dz, at, mask, ACC)
    s = tl.sigmoid(a)
    store(dx, at, d * load(y, at, mask, ACC) * (s * (1 + a * (1 - s))), mask)
    store(dy, at, d * (a * s), mask)


KERNELS = (
    *(rms_norm_rope_fwd, rms_norm_rope_bwd, rms_norm_gated_fwd, rms_norm_gated_bwd),
    *(add_rms_norm_fwd, add_rms_norm_bwd, swiglu_fwd, swiglu_bwd),
)
BY_NAME: dict[str, Any] = {kernel.__name__: kernel for kernel in KERNELS}


def launch(name: str, fields: dict[str, Any]) -> None:
    """Run the kernel `name` on contiguous tensors, given under the names that the C++ kernel's params struct has."""
    grid, arguments, num_warps = (plan_swiglu if name.startswith("swiglu") else plan_norm)(name, fields)
    device = next(x.device for x in fields.values() if isinstance(x, torch.Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        BY_NAME[name][grid](**arguments, num_warps=num_warps)
    if arguments.get("partials") is not None:
        torch.sum(arguments["partials"], 0, out=fields["dweight"])


def plan_swiglu(name: str, fields: dict[str, Any]) -> tuple[tuple[int], dict[str, Any], int]:
    """Return the grid, the arguments and the number of warps of a launch."""
    arguments = {key: x for key, x in fields.items() if key != "dtype"}
    arguments |= {"ACC": tl.float64 if fields["x"].dtype == torch.float64 else tl.float32, "BLOCK": TILE}
    return (triton.cdiv(fields["size"], TILE),), arguments, max(1, TILE // 256)


def plan_norm(name: str, fields: dict[str, Any]) -> tuple[tuple[int], dict[str, Any], int]:
    """Return the grid, the arguments and the number of warps of a launch."""
    rows, D, weight, rotated = fields["rows"], fields["D"], fields["weight"], fields.get("cos") is not None
    width = D // 2 if rotated else D
    block = triton.next_power_of_2(width)
    in_tile = max(1, TILE // block)
    tiles = triton.cdiv(rows, in_tile)
    first = fields["x"] if "x" in fields else fields["sum"]
    names = {"x", "g", "weight", "cos", "sin", "y", "dy", "dx", "dg", "residual", "dsum", "dresidual"}
    arguments = {key: x for key, x in fields.items() if key in names} | {"rows": rows, "D": D, "eps": fields["eps"]}
    wide = fields.get("residual", first)  # of the dtypes of add_rms_norm
    arguments |= {"ACC": tl.float64 if wide.dtype == torch.float64 else tl.float32, "ROWS": in_tile, "BLOCK": block}
    if name.startswith("rms_norm_rope"):
        arguments |= {"T": fields["T"], "H": fields["H"], "width": width, "NORM": weight is not None}
        arguments |= {"ROTATE": rotated, "SHARED": fields["shared_angles"]}
    elif name.startswith("rms_norm_gated"):
        arguments["SILU"] = fields["silu"]
    else:
        arguments["total"] = fields["sum"]
    if name == "add_rms_norm_bwd":
        arguments["NARROW"] = fields["dx"] is not None
    if name.endswith("_bwd"):
        arguments["TILES"] = triton.cdiv(tiles, MAX_PROGRAMS)
        tiles = triton.cdiv(tiles, arguments["TILES"])
        sums = fields.get("dweight")
        arguments["partials"] = None if sums is None else sums.new_empty(tiles, D)
    return (tiles,), arguments, min(16, max(4, in_tile * block // 256))
