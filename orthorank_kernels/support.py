"""What runs where, asked before anything is allocated: `is_supported`."""

from dataclasses import dataclass

import torch

from orthorank_kernels import dispatch

_HALVES = (torch.float32, torch.float16, torch.bfloat16)
_WITH_DOUBLE = (*_HALVES, torch.float64)
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)  # the kernel converts them itself, so every GPU takes them


@dataclass(frozen=True)
class _Op:
    """Dtypes of an op's main argument, in PyTorch and in the kernel; which other questions it has; a limit."""

    pytorch: tuple[torch.dtype, ...] = _WITH_DOUBLE
    kernel: tuple[torch.dtype, ...] = _HALVES
    asks: tuple[str, ...] = ()
    largest_head_dim: int | None = None  # of the kernel


_ATTENTION = ("head_dim", "heads", "kv_heads")
OPS = {
    "rms_norm_score": _Op(pytorch=_HALVES),
    "select_tokens": _Op(pytorch=(torch.float32,), kernel=(torch.float32,)),
    "rms_norm_select": _Op(pytorch=_HALVES),
    "gather_rows": _Op(kernel=_WITH_DOUBLE),
    "gather_add_rms_norm": _Op(),
    "scatter_rows_": _Op(kernel=_WITH_DOUBLE),
    "scatter_add_rows_": _Op(),
    "silu_and_mul": _Op(),
    "add_low_rank": _Op(),
    "apply_rotary_at": _Op(asks=("head_dim", "heads")),
    "apply_rotary_and_cache_": _Op(asks=("head_dim", "kv_heads", "block_size")),
    "sparse_query_attention": _Op(asks=_ATTENTION, largest_head_dim=256),
    "sparse_query_attention_varlen": _Op(asks=_ATTENTION, largest_head_dim=256),
    "sparse_query_attention_paged": _Op(asks=(*_ATTENTION, "block_size", "kv_dtype"), largest_head_dim=256),
}


def is_supported(
    op: str,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    block_size: int | None = None,
    kv_dtype: torch.dtype | None = None,
) -> tuple[bool, str]:
    """Whether ``op`` runs with ``backend="auto"``, and why or why not. Nothing is allocated, compiled or launched.

    What is not given is not asked about: ``is_supported("sparse_query_attention", device="cuda", dtype=torch.float16)``
    says whether some head_dim is supported.

    Args:
        op: the name of a public op, such as ``"sparse_query_attention_paged"``.
        device: where the tensors would be.
        dtype: of hidden states, rows or queries; of ``select_tokens``, that of the scores.
        head_dim, heads, kv_heads: of the attention ops; ``apply_rotary_at`` has the first two, and
            ``apply_rotary_and_cache_`` the first and the last.
        block_size: tokens of a page, of the ops on a paged cache.
        kv_dtype: of the caches (``dtype`` if None), of the paged attention.

    Returns:
        ``(supported, reason)``: the implementation that runs, or what is in the way and what would help.

    Raises:
        ValueError: no such op, or one without what is asked about. TypeError: an argument of the wrong kind.

    >>> is_supported("gather_rows", device="cpu", dtype=torch.bfloat16)
    (True, 'CPUs run the ops in PyTorch')
    >>> is_supported("sparse_query_attention", device="cpu", dtype=torch.float16, heads=32, kv_heads=5)
    (False, 'kv_heads is 5 and heads 32: the key/value heads must divide the query heads')
    """
    sizes = {"head_dim": head_dim, "heads": heads, "kv_heads": kv_heads, "block_size": block_size}
    limits = _limits(op, {**sizes, "kv_dtype": kv_dtype})
    for name, value in sizes.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{name} is {value!r}; it must be an int, or None to leave it open")
    for name, given in (("dtype", dtype), ("kv_dtype", kv_dtype)):
        if not isinstance(given, torch.dtype) and (name == "dtype" or given is not None):
            raise TypeError(f"{name} is {given!r}; it must be a torch dtype such as torch.bfloat16")
    device = dispatch.device_of(device)
    backend, reason = dispatch.describe(device)
    if backend == "none":
        return False, reason
    refusal = _wrong_sizes(**sizes) or _wrong_dtypes(
        limits.kernel if backend == "triton" else limits.pytorch, dtype, kv_dtype
    )
    if refusal is None and backend == "triton":
        refusal = _kernel_refuses(device, limits.largest_head_dim, head_dim)
    if refusal is not None:
        return False, refusal
    return True, f"{reason}{_warning(device)}" if backend == "triton" else reason


def _limits(op: str, asked: dict[str, object]) -> _Op:
    if op not in OPS:
        raise ValueError(f"op is {op!r}; it may be one of {', '.join(OPS)}")
    for name, value in asked.items():
        if value is not None and name not in OPS[op].asks:
            raise ValueError(f"{name} is {value}, and {op} has no {name}; leave it out")
    return OPS[op]


def _wrong_sizes(**sizes: int | None) -> str | None:
    for name, value in sizes.items():
        if value is not None and value < 1:
            return f"{name} is {value}; it must be at least 1"
    heads, kv_heads = sizes["heads"], sizes["kv_heads"]
    if heads is not None and kv_heads is not None and heads % kv_heads:
        return f"kv_heads is {kv_heads} and heads {heads}: the key/value heads must divide the query heads"
    return None


def _wrong_dtypes(legal: tuple[torch.dtype, ...], dtype: torch.dtype, kv_dtype: torch.dtype | None) -> str | None:
    if dtype not in legal:
        return f"dtype is {_name(dtype)}; it may be {', '.join(map(_name, legal))}"
    if kv_dtype is not None and kv_dtype != dtype and kv_dtype not in _FP8:
        fp8 = " or ".join(map(_name, _FP8))
        return f"kv_dtype is {_name(kv_dtype)}; it may be that of the queries, {_name(dtype)}, or {fp8}"
    return None


def _kernel_refuses(device: torch.device, largest: int | None, head_dim: int | None) -> str | None:
    if not torch.cuda.is_available():
        return f"device is {device}, and PyTorch sees no GPU here; use device cpu"
    if head_dim is not None and largest is not None and head_dim > largest:
        return f'head_dim is {head_dim}; the kernel takes at most {largest}: pass backend="torch"'
    return None


def _warning(device: torch.device) -> str:
    """What there is to know of a GPU on which the kernels run."""
    if torch.version.hip or torch.cuda.get_device_capability(device) >= (8, 0):
        return ""
    return (
        "; its launch settings are a guess, since nothing was compiled or measured for GPUs before sm_80: run "
        "orthorank-kernels tune"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
