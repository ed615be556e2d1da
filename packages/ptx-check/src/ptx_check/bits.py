"""Number formats: PTX type names as numpy types, and the formats that numpy lacks."""

import numpy as np

WARP = 32

# bfloat16 is carried as its bits; so are packed pairs.
TYPES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for names, kind in (
        ("b8 u8", "u1"), ("s8", "i1"), ("b16 u16 bf16", "u2"), ("s16", "i2"), ("f16", "f2"),
        ("b32 u32 bf16x2 f16x2 tf32", "u4"), ("s32", "i4"), ("f32", "f4"), ("b64 u64 f32x2", "u8"), ("s64", "i8"),
        ("f64", "f8"), ("pred", "?"),
    )
    for name in names.split()
}  # fmt: skip
RAW = {1: np.dtype("u1"), 2: np.dtype("u2"), 4: np.dtype("u4"), 8: np.dtype("u8")}
FLOATS = ("f16", "bf16", "f32", "f64")
CANONICAL_NAN = {"f16": 0x7FFF, "bf16": 0x7FFF, "f32": 0x7FFFFFFF}


def raw(x: np.ndarray) -> np.ndarray:
    """The same bits as unsigned integers; predicates stay as they are."""
    return x if x.dtype == np.bool_ else x.view(RAW[x.dtype.itemsize])


def widen_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 from bfloat16 bits."""
    return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)


def round_to_bfloat16(x: np.ndarray) -> np.ndarray:
    """bfloat16 bits, to nearest even; NaN becomes the canonical one (PTX ISA, cvt)."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def fma_to_odd(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x * y + z of float32 or narrower, in float64 rounded to odd: a result that is not exact gets its last bit set.

    Rounding that to a format of at most 51 bits is the same as rounding the exact result once (Boldo and Melquiond).
    """
    product, addend = x.astype(np.float64) * y.astype(np.float64), np.broadcast_to(z, x.shape).astype(np.float64)
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)  # Knuth's two-sum: what the addition lost
    inexact = (error != 0) & np.isfinite(total)
    if inexact.any():
        bits = total.view(np.int64)
        even = inexact & ((bits & 1) == 0)
        # Towards the exact result: away from zero if the error has the sum's sign, else towards zero.
        total = np.where(even, bits + np.where((error > 0) == (total > 0), 1, -1), bits).view(np.float64)
    return total


def fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x * y + z of float32 or narrower, rounded once to float32."""
    return fma_to_odd(x, y, z).astype(np.float32)


def narrow_odd(x: np.ndarray, kind: str) -> np.ndarray:
    """float64 that was rounded to odd, rounded to f16, bf16 or f32."""
    if kind.startswith("f16"):
        return canonical(x.astype(np.float16), "f16")
    if kind.startswith("bf16"):
        single = x.astype(np.float32)
        beyond = np.abs(single) > np.abs(x)
        single = np.where(beyond, np.nextafter(single, np.float32(0)), single)  # towards zero, then to odd
        bits = single.view(np.uint32) | ((single != x) & ~np.isnan(x)).astype(np.uint32)
        return round_to_bfloat16(bits.view(np.float32))
    return x.astype(np.float32)


def halves(x: np.ndarray, kind: str) -> np.ndarray:
    """[n, 2] float32 from n packed pairs of f16 or bf16, or [n, 2] from n f32x2."""
    x = np.ascontiguousarray(x)
    if kind == "f32x2":
        return x.view(np.float32).reshape(-1, 2)
    if kind.startswith("bf16"):
        return widen_bfloat16(x.view(np.uint16)).reshape(-1, 2)
    return x.view(np.float16).astype(np.float32).reshape(-1, 2)


def narrow(x: np.ndarray, kind: str) -> np.ndarray:
    """float32 (or float64) rounded to ``kind``, as that kind is carried."""
    if kind.startswith("bf16"):
        return round_to_bfloat16(x)
    if kind.startswith("f16"):
        return canonical(x.astype(np.float16), "f16")
    return x.astype(np.float32)


def canonical(x: np.ndarray, kind: str) -> np.ndarray:
    """NaN results of f16 and f32 arithmetic have one bit pattern on NVIDIA GPUs."""
    nan = np.isnan(x)
    if nan.any():
        bits = raw(np.ascontiguousarray(x))
        return np.where(nan, bits.dtype.type(CANONICAL_NAN[kind]), bits).view(x.dtype)
    return x


def pack(x: np.ndarray, kind: str) -> np.ndarray:
    """[n, 2] float32 packed into n registers of kind f16x2, bf16x2 or f32x2."""
    return np.ascontiguousarray(narrow(x, kind)).view(TYPES[kind]).reshape(-1)
