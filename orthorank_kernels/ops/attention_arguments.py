"""What the attention ops of all layouts share: checks of heads and options, and the outputs."""

from typing import Any

import torch

from orthorank_kernels import checks as _checks
from orthorank_kernels import dispatch
from orthorank_kernels.op import Operator
from orthorank_kernels.ops.rotary import check_tables

Out = torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None
SMALLEST_SCALE = 1e-10
LARGEST_SOFTCAP = 1e4
OUTPUTS = ("attended", "lse?")  # none is called `out`: torch.compile takes that for an `out=` of its own kind


def check_heads(name: str, kv_heads: int, heads: int, hint: str = "") -> None:
    """The key/value heads of ``name`` divide the query heads."""
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"q has {heads} heads and {name} has {kv_heads}; the heads of {name} must divide those of "
            f"q{hint and f': {hint}'}"
        )


def check_options(
    q: torch.Tensor,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    return_lse: bool,
) -> None:
    """The options that all layouts share are of the right kind and legal; dimension 1 of ``q`` is the heads."""
    _checks.number(
        "scale", scale, at_least=SMALLEST_SCALE, none="head_dim ** -0.5", because="to keep masked scores lowest"
    )
    _checks.integer("window", window, at_least=1, none="no window", because="since a query sees itself")
    _checks.number("softcap", softcap, above=0, none="no soft-capping")
    if softcap is not None and softcap > LARGEST_SOFTCAP:
        raise ValueError(
            f"softcap is {softcap}; it must be at most {LARGEST_SOFTCAP:g}, since scores lose softcap * 2^-23 of their "
            "precision: pass None for no soft-capping"
        )
    if q.shape[-1] == 0:
        raise ValueError(f"q has shape {list(q.shape)}; its head_dim must be at least 1")
    if sinks is not None:
        _checks.tensor("sinks", sinks, "[heads]")
        _checks.shape("sinks", sinks, [q.shape[1]], "q")
        _checks.same_device("q", q, sinks=sinks)
        _checks.unit_last_stride(sinks=sinks)
        if _checks.readable(sinks) and not sinks.isfinite().all():
            raise ValueError(
                "sinks holds a logit that is not finite; each must be a finite number: an infinite one takes all of "
                "the softmax, and a head without a sink has a large negative one, such as -1e4"
            )
    _checks.flag("return_lse", return_lse)


def check_rotary(
    q: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    interleaved: bool,
    rotary_dim: int | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, bool, int | None]:
    """The four arguments as the operators take them, ``rotary_dim`` resolved; q and positions are checked already."""
    _checks.flag("rotary_interleaved", interleaved)
    _checks.integer("rotary_dim", rotary_dim, at_least=2, none="what the tables are wide")
    if cos is None and sin is None:
        if rotary_dim is not None:
            raise ValueError(
                f"rotary_dim is {rotary_dim}; it must be None without tables: pass rotary_cos and rotary_sin, or leave "
                "it out"
            )
        return None, None, interleaved, None
    for name, table, other in (("rotary_cos", cos, "rotary_sin"), ("rotary_sin", sin, "rotary_cos")):
        if table is None:
            raise ValueError(f"{name} is None and {other} is not; pass both tables, or neither")
    assert cos is not None
    assert sin is not None
    batch = q.shape[0] if q.dim() == 4 else None
    width = check_tables(("rotary_cos", "rotary_sin"), cos, sin, "q", q, batch, rotary_dim)
    _checks.positions_inside(positions, cos.shape[-2], "rotary_cos")
    return cos, sin, interleaved, width


def run(
    op: Operator,
    args: tuple[Any, ...],
    q: torch.Tensor,
    backend: str,
    return_lse: bool,
    out: tuple[torch.Tensor, torch.Tensor | None] | None,
) -> Any:
    """Run ``op``; its output, or with ``return_lse`` the pair of its outputs."""
    result, lse = dispatch.run(op, args, backend=backend, device=q.device, out=out)
    return (result, lse) if return_lse else result


def split_out(out: Out, return_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """The caller's ``out`` as a pair; tensors are not checked yet."""
    if out is None:
        return None
    if isinstance(out, torch.Tensor) and not return_lse:
        return out, None
    if not isinstance(out, (tuple, list)) or len(out) != 1 + return_lse:
        expected = "a pair of tensors (out, lse)" if return_lse else "one tensor"
        got = _checks.kind_of(out)
        raise ValueError(f"out is {got}; with return_lse={return_lse} it must be {expected}")
    return out[0], out[1] if return_lse else None


def check_packed(q: torch.Tensor, positions: torch.Tensor, cu_selected: torch.Tensor) -> None:
    """Packed queries ``[n, heads, head_dim]`` with their positions ``[n]`` and sequences ``[seqs + 1]``."""
    check_index("positions", positions, "[n]", q, q.shape[0], "q")
    check_index("cu_selected", cu_selected, "[seqs + 1]", q)
    if cu_selected.shape[0] == 0:
        raise ValueError("cu_selected has shape [0]; it must be [seqs + 1], beginning with a 0")
    _checks.boundaries("cu_selected", cu_selected, q.shape[0], "q")


def check_longest(
    max_seqlen_k: int | None,
    cu_selected: torch.Tensor,
    *,
    lengths: torch.Tensor | None = None,
    boundaries: torch.Tensor | None = None,
) -> None:
    """No sequence with queries has more keys than the host says. Seen on a CPU; on a GPU keys would be left out.

    Args:
        lengths: keys of each sequence, or ``boundaries``: where each one's begin. Nothing is made of them on a GPU.
    """
    _checks.integer("max_seqlen_k", max_seqlen_k, at_least=0, none="no bound")
    if max_seqlen_k is None or not _checks.readable(lengths, boundaries, cu_selected):
        return
    keys = lengths if boundaries is None else boundaries.diff()
    assert keys is not None
    asked = keys[cu_selected.diff() > 0]
    if asked.numel() and (longest := int(asked.max())) > max_seqlen_k:
        raise ValueError(
            f"max_seqlen_k is {max_seqlen_k}, and a sequence has {longest} keys; pass as many or more, or None"
        )


def check_index(
    name: str, value: object, layout: str, like: torch.Tensor, length: int | None = None, because: str = ""
) -> None:
    """``value`` is an int32 tensor of one dimension on the device of ``like``, with ``length`` entries."""
    _checks.tensor(name, value, layout, (torch.int32,))
    assert isinstance(value, torch.Tensor)
    if length is not None:
        _checks.shape(name, value, [length], because)
    _checks.unit_last_stride(**{name: value})
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}; it must be on {like.device} like the other tensors")


def packed_out(q: torch.Tensor, out: Out, return_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """The caller's outputs for packed queries, checked."""
    pair = split_out(out, return_lse)
    if pair is not None:
        n, heads, head_dim = q.shape
        _checks.output("out", pair[0], [n, heads, head_dim], q.dtype, q)
        if pair[1] is not None:
            _checks.output("out[1]", pair[1], [n, heads], torch.float32, q)
    return pair


def packed_results(q: torch.Tensor, return_lse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What the ops on packed queries return, without values."""
    n, heads, head_dim = q.shape
    lse = q.new_empty((n, heads) if return_lse else (0,), dtype=torch.float32)
    return q.new_empty(n, heads, head_dim), lse
