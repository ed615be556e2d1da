"""Rotary position embedding of tokens that were gathered out of their sequence."""

from torch import Tensor

from orthorank_kernels import checks as _checks
from orthorank_kernels import dispatch
from orthorank_kernels import op as _library
from orthorank_kernels.launch_plan import planned
from orthorank_kernels.layout import empty_ordered_like
from orthorank_kernels.pytorch import rotary as pytorch
from orthorank_kernels.reference import rows as reference

CLOSE = 1e-3  # a table's columns may differ by that and still be one: tables may be trained


@planned
def apply_rotary_at(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    interleaved: bool = False,
    rotary_dim: int | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Rotate queries or keys by the angles of their original positions (Su et al. 2021, RoFormer, equation 34).

    Entry ``i`` of batch row ``b`` is rotated by ``cos[b, positions[b, i]]`` and ``sin[b, positions[b, i]]``. The
    pairing is half-split, as in Hugging Face's ``rotate_half``: element ``j`` turns with element ``j + rotary_dim/2``;
    or interleaved, as in GPT-J and GLM: element ``2j`` turns with ``2j + 1``. Angle ``j`` is column ``j`` of the tables
    in both. Computed in float32 and rounded once, so a bfloat16 result is closer to the exact one than when each
    product and the sum are rounded.

    Args:
        x: ``[batch, heads, selected, head_dim]`` or packed ``[selected, heads, head_dim]``, floating point. Any
            strides, the last one 1: the transposed view of a projection's output is the normal case.
        cos: ``[batch or 1, tokens, width]`` or packed ``[tokens, width]``, floating point, any strides, the last one 1.
            ``width`` is ``rotary_dim``, as Hugging Face's rotary modules return it: the second half of the last
            dimension repeats the first (only the first is read). Or it is half of ``rotary_dim``, without the
            repetition (the two halves of vLLM's ``cos_sin_cache``, for example).
        sin: like ``cos``.
        positions: int32 ``[batch, selected]`` or ``[selected]``, indices into the token axis of ``cos``; -1 gives
            zeros. None: ``x`` holds all tokens, in order. A position past the token axis is an IndexError on a CPU,
            undefined on a GPU.
        interleaved: which elements are a pair.
        rotary_dim: elements of a head that are rotated, even and at most ``head_dim``; those from there on pass
            through. None: the whole head, and ``cos`` must be as wide. It has to be said where the tables are narrower,
            since they may be of a part of the head or without the repetition, and nothing in them tells which.
        out: where to write the result: its shape, dtype and strides; it may be ``x`` itself. None: new memory.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        Shape and dtype of ``x``; dense, with the dimensions in the same order in memory as in ``x``; ``out`` if it is
        given. Differentiable in ``x``, ``cos`` and ``sin``.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, stride or device; or on a CPU, the second
            half of a table does not repeat the first, as where each angle stands there twice, side by side.
        IndexError: on a CPU, a position is past the token axis.
        BackendError: ``backend="triton"`` cannot run here, or ``out`` is given and an input requires grad.

    >>> import torch
    >>> angle = torch.tensor([0.0, torch.pi / 2]).reshape(1, 2, 1).expand(1, 2, 4)
    >>> x = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    >>> apply_rotary_at(x, angle.cos(), angle.sin(), torch.tensor([[1]], dtype=torch.int32)).round(decimals=3)
    tensor([[[[-3., -4.,  1.,  2.]]]])
    >>> quarter = torch.tensor([[torch.pi / 2, torch.pi / 2]])
    >>> apply_rotary_at(x[0, 0][None], quarter.cos(), quarter.sin(), interleaved=True, rotary_dim=4).round(decimals=3)
    tensor([[[-2.,  1., -4.,  3.]]])
    """
    packed = isinstance(x, Tensor) and x.dim() == 3
    width = _check(x, cos, sin, positions, packed, interleaved, rotary_dim)
    if out is not None:
        _check_out(out, x)
    args = (x, cos, sin, positions, out)
    if packed:  # a batch of one, as views; [selected, heads, head_dim] is [1, heads, selected, head_dim]
        args = tuple(None if t is None else t.unsqueeze(0) for t in args)  # type: ignore[assignment]
        args = (args[0].transpose(1, 2), *args[1:4], None if args[4] is None else args[4].transpose(1, 2))
    result = dispatch.run(
        _APPLY_ROTARY_AT,
        (*args[:4], interleaved, width),
        backend=backend,
        device=x.device,
        out=None if out is None else args[4:],
    )
    if out is not None:
        return out
    return result.transpose(1, 2).squeeze(0) if packed else result


def _check(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    packed: bool,
    interleaved: bool,
    rotary_dim: int | None,
) -> int:
    """Check everything but ``out``; returns how many elements of a head are rotated."""
    layout = "[selected, heads, head_dim]" if packed else "[batch, heads, selected, head_dim]"
    _checks.tensor("x", x, layout, packed="packed [selected, heads, head_dim]")
    _checks.flag("interleaved", interleaved)
    batch, selected = None if packed else x.shape[0], x.shape[0 if packed else 2]
    width = check_tables(("cos", "sin"), cos, sin, "x", x, batch, rotary_dim)
    _checks.unit_last_stride(x=x)
    if positions is None:
        if cos.shape[-2] != selected:
            raise ValueError(
                f"cos has {cos.shape[-2]} tokens and x {selected}; pass positions to say which tokens x holds"
            )
        return width
    _checks.positions(positions, batch, x)
    _checks.shape("positions", positions, (selected,) if batch is None else (batch, selected), "the shape of x")
    _checks.positions_inside(positions, cos.shape[-2], "cos")
    return width


def check_tables(
    names: tuple[str, str],
    cos: Tensor,
    sin: Tensor,
    name: str,
    x: Tensor,
    batch: int | None,
    rotary_dim: int | None,
) -> int:
    """Check tables that rotate ``x``, by the names that the op's caller knows; returns how many elements they rotate.

    Args:
        batch: rows of x, or None where it is packed.
    """
    table = "[tokens, width]" if batch is None else "[batch or 1, tokens, width]"
    for each, value in zip(names, (cos, sin), strict=True):
        _checks.tensor(each, value, table)
    _checks.shape(names[1], sin, cos.shape, f"the shape of {names[0]}")
    _checks.same_dtype(names[0], cos, **{names[1]: sin})
    _checks.same_device(name, x, **{names[0]: cos, names[1]: sin})
    _checks.unit_last_stride(**{names[0]: cos, names[1]: sin})
    if batch is not None and cos.shape[0] not in (1, batch):
        raise ValueError(
            f"{names[0]} has shape {list(cos.shape)}; its first dimension must be the batch of {name}, {batch}, or 1"
        )
    return _rotated(names, cos, sin, name, rotary_dim, x.shape[-1])


def _rotated(names: tuple[str, str], cos: Tensor, sin: Tensor, name: str, rotary_dim: int | None, head_dim: int) -> int:
    """How many elements of a head are rotated, of which the tables must be as wide or half as wide."""
    width = cos.shape[-1]
    if rotary_dim is None:
        if width != head_dim or width % 2 or width == 0:
            raise ValueError(
                f"{names[0]} has shape {list(cos.shape)} and {name} a head_dim of {head_dim}; without rotary_dim the "
                f"last dimension of {names[0]} must be the head_dim, above 0 and even: pass rotary_dim, how many "
                f"elements of a head are rotated ({width} if that dimension's second half repeats the first, "
                f"{2 * width} if nothing does)"
            )
        rotary_dim = width
    _checks.integer("rotary_dim", rotary_dim, at_least=2, at_most=head_dim, none="the head_dim")
    if rotary_dim % 2 or width not in (rotary_dim, rotary_dim // 2):
        raise ValueError(
            f"rotary_dim is {rotary_dim} and {names[0]} has shape {list(cos.shape)}; rotary_dim must be even, and the "
            f"last dimension of {names[0]} as large, or half of it where nothing is repeated"
        )
    if width == rotary_dim:
        for each, table in zip(names, (cos, sin), strict=True):
            _check_repetition(each, table, rotary_dim // 2)
    return rotary_dim


def _check_repetition(name: str, table: Tensor, half: int) -> None:
    """On a CPU: angles do not stand side by side instead of in both halves. Looks at two tokens alone."""
    if not _checks.readable(table):
        return
    seen = table.detach().narrow(0, 0, min(2 if table.dim() == 2 else 1, table.shape[0]))
    seen = seen.narrow(-2, 0, min(2, seen.shape[-2]))
    apart = (seen[..., :half] - seen[..., half:]).abs()
    beside = (seen[..., ::2] - seen[..., 1::2]).abs()
    if (apart > CLOSE).any() and not (beside > CLOSE).any():  # NaN is neither
        raise ValueError(
            f"{name} has shape {list(table.shape)}, and the second half of its last dimension does not repeat the "
            f"first: each angle stands there twice, side by side (repeat_interleave); pass {name}[..., ::2] and "
            f"rotary_dim={2 * half}"
        )


def _check_out(out: Tensor, x: Tensor) -> None:
    if not isinstance(out, Tensor):
        raise TypeError(f"out is {_checks.type_of(out)}; it must be a tensor to write the op's output to")
    _checks.shape("out", out, x.shape, "the shape of x")
    _checks.same_dtype("x", x, out=out)
    _checks.same_device("x", x, out=out)
    _checks.unit_last_stride(out=out)
    _checks.no_overlap("out", out)


_APPLY_ROTARY_AT = _library.define(
    pytorch.apply_rotary_at,
    reference=reference.apply_rotary_at,
    triton="rotary.apply_rotary_at",
    fake=lambda call: empty_ordered_like(call.x),
    outputs=("out",),
    aliases=("x",),
)
