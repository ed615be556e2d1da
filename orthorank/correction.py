"""The correction of a plan: a small linear map for each of its layers, in a file of tensors beside the plan.

A layer adds ``up (down x) + bias`` to a token that it leaves out, x being the token's normed state. The file is in the
format safetensors, which holds tensors and nothing that could run.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from orthorank.common.errors import OrthoRankError, check_choice, check_integer, shown
from orthorank.common.files import write_bytes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FILE_NAME = "correction.safetensors"
DTYPES = ("float32", "bfloat16", "float16")
_MOST = {"rank": 10**9, "hidden_size": 10**9}
_HEADER = 2**20  # bytes that the file's own table of contents may have
_LOST = 2**-6  # of a row, by rounding to a narrower dtype: four times what bfloat16 rounds a number by at most
_SHORT = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # as the file names them


class LayerMap(NamedTuple):
    """What a layer adds to a token that it leaves out: ``up (down x) + bias``.

    Args:
        down: ``[rank, hidden]``; up: ``[hidden, rank]``; bias: ``[hidden]``. Float32, bfloat16 or float16.
    """

    down: "Tensor"
    up: "Tensor"
    bias: "Tensor"


class Correction:
    """The maps of a plan's layers. It does not change: what it is made of is copied.

    Args:
        maps: by layer number; all of one rank and one hidden size.

    Attributes:
        file: what `load` read it from; None: it was made here.

    Raises:
        OrthoRankError: a map has another shape or dtype, or holds a number that is not finite.

    Example:
        >>> import torch
        >>> found = Correction({2: LayerMap(torch.ones(1, 4), torch.ones(4, 1), torch.zeros(4))})
        >>> found, found.hidden_size, found.sha256[:8]
        (Correction(rank=1, layers=[2]), 4, 'be130f13')
    """

    maps: dict[int, LayerMap]
    rank: int
    hidden_size: int
    file: Path | None = None

    def __init__(self, maps: Mapping[int, LayerMap]) -> None:
        if not maps:
            raise OrthoRankError("a correction has a map for one layer at least; without any, a plan's is None")
        self.maps = {}
        for layer in sorted(maps):
            check_integer("the number of a corrected layer", layer, 0)
            self.maps[layer] = LayerMap(*(part.detach().to("cpu", copy=True).contiguous() for part in maps[layer]))
        down = next(iter(self.maps.values())).down
        if down.dim() != 2:
            raise OrthoRankError(
                f"{name_of(min(maps), 'down')} has shape {list(down.shape)}; it must be [rank, hidden]"
            )
        self.rank, self.hidden_size = down.shape
        for name, part in tensors_of(self.maps).items():
            _check(name, tuple(part.shape), str(part.dtype).removeprefix("torch."), self.rank, self.hidden_size)
            _check_finite(name, part)
        self._sha256 = ""

    @property
    def layers(self) -> list[int]:
        """The numbers of the corrected layers."""
        return list(self.maps)

    @property
    def sha256(self) -> str:
        """Of all maps, their numbers, shapes and dtypes, in hexadecimal."""
        if not self._sha256:
            from torch import uint8

            digest = hashlib.sha256()
            for name, part in tensors_of(self.maps).items():
                digest.update(f"{name} {part.dtype} {list(part.shape)}".encode())
                digest.update(part.view(uint8).numpy().tobytes())
            self._sha256 = digest.hexdigest()
        return self._sha256

    def to_dict(self) -> dict[str, Any]:
        """What a plan's JSON says of it: all that `load` needs to know what the file beside it must hold."""
        return {"rank": self.rank, "hidden_size": self.hidden_size, "layers": self.layers, "sha256": self.sha256}

    def save(self, file: Path) -> None:
        """Write ``file``, replaced in one step.

        Raises:
            OrthoRankError: it cannot be written.
        """
        from safetensors.torch import save

        write_bytes(file, save(tensors_of(self.maps), {"format": "pt"}))

    def to(self, dtype: str) -> "Correction":
        """The same maps in ``"float32"``, ``"bfloat16"`` or ``"float16"``; this one where they are in it already.

        Raises:
            OrthoRankError: a number would be infinite, or a row of a map (the whole of a bias) would lose more than
                a 64th of its length: below 6e-5 float16 has fewer and fewer digits, and below 3e-8 none.

        Example:
            >>> import torch
            >>> large = Correction({2: LayerMap(torch.full((1, 4), 1e5), torch.ones(4, 1), torch.zeros(4))})
            >>> large.to("bfloat16").maps[2].down.dtype
            torch.bfloat16
            >>> large.to("float16")
            Traceback (most recent call last):
                ...
            orthorank.common.errors.OrthoRankError: layers.2.down holds 1e+05, and float16 ends at 6.55e+04; save the \
maps as bfloat16, which has float32's range, or as float32
        """
        import torch

        check_choice("maps_dtype", dtype, DTYPES)
        wanted: torch.dtype = getattr(torch, dtype)
        if all(part.dtype == wanted for part in tensors_of(self.maps).values()):
            return self
        for name, part in tensors_of(self.maps).items():
            _check_range(name, part.double(), wanted)
        return Correction({i: LayerMap(*(part.to(wanted) for part in parts)) for i, parts in self.maps.items()})

    @classmethod
    def load(cls, file: Path, record: "Record") -> "Correction":
        """The correction in ``file``, if it is what ``record``, from a plan's JSON, says.

        Its size, names, shapes and dtypes are compared before a tensor is read.

        Raises:
            OrthoRankError: it is another one, or the file is missing or broken.
        """
        rank, hidden, layers = record.rank, record.hidden_size, record.layers
        if not file.is_file():
            there = "which is no file" if file.exists() else "which is not there"
            raise OrthoRankError(
                f"the plan has a correction, whose maps are in {file}, {there}; keep both files in one folder, or take "
                "the key 'correction' out of the plan to follow it uncorrected"
            )
        if (size := file.stat().st_size) > record.most_bytes:
            raise OrthoRankError(
                f"{file} has {size:,} bytes; maps of rank {rank} and hidden size {hidden} for {len(layers)} layers, as "
                f"the plan says, have at most {record.most_bytes:,}: they are another plan's"
            )
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as tensors:
                wanted = [name_of(layer, part) for layer in layers for part in LayerMap._fields]
                _check_names(file, sorted(tensors.keys()), wanted)
                for name in wanted:
                    entry = tensors.get_slice(name)
                    dtype = _SHORT.get(entry.get_dtype(), entry.get_dtype())
                    _check(f"{file}: {name}", tuple(entry.get_shape()), dtype, rank, hidden)
                parts = {name: tensors.get_tensor(name) for name in wanted}
        except (SafetensorError, OSError) as error:
            raise OrthoRankError(f"{file} is not a file of tensors (safetensors) that can be read: {error}") from error
        for name, part in parts.items():
            _check_finite(f"{file}: {name}", part)
        found = cls({i: LayerMap(*(parts[name_of(i, part)] for part in LayerMap._fields)) for i in layers})
        if found.sha256 != record.sha256:
            raise OrthoRankError(
                f"{file} holds maps with the hash {found.sha256[:16]}..., and the plan was saved with "
                f"{record.sha256[:16]}...: they are of different plans; save the plan again, or copy both files"
            )
        found.file = file
        return found

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Correction) and self.sha256 == other.sha256)

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Correction":
        return self  # nothing in it changes

    def __repr__(self) -> str:
        return f"Correction(rank={self.rank}, layers={self.layers})"


def name_of(layer: int, part: str) -> str:
    """What the file calls a part of a layer's map.

    >>> name_of(12, "down")
    'layers.12.down'
    """
    return f"layers.{layer}.{part}"


def tensors_of(maps: Mapping[int, LayerMap]) -> dict[str, "Tensor"]:
    """All parts of ``maps``, by the names that a file gives them."""
    return {name_of(layer, name): part for layer, parts in maps.items() for name, part in parts._asdict().items()}


class Record(NamedTuple):
    """What a plan's JSON says of its correction."""

    rank: int
    hidden_size: int
    layers: list[int]
    sha256: str

    @property
    def most_bytes(self) -> int:
        """The largest that the file of maps may be: in float32."""
        return len(self.layers) * (2 * self.rank + 1) * self.hidden_size * 4 + _HEADER

    @classmethod
    def of(cls, record: Any) -> "Record":
        """``record`` as it stands in the JSON.

        Raises:
            OrthoRankError: it lacks something, or says what no correction has.
        """
        if not isinstance(record, dict) or (missing := [key for key in cls._fields if key not in record]):
            what = f"without {', '.join(missing)}" if isinstance(record, dict) else shown(record)
            keys = ", ".join(cls._fields)
            raise OrthoRankError(f"correction is a record {what}; a plan's JSON says {keys} of its correction")
        for name, most in _MOST.items():
            check_integer(f"correction[{name!r}]", record[name], 1, most)
        layers, digest = record["layers"], record["sha256"]
        if not isinstance(layers, list) or not layers or not all(type(i) is int and i >= 0 for i in layers):
            raise OrthoRankError(f"correction['layers'] is {shown(layers)}; it must be a list of layer numbers")
        if not isinstance(digest, str):
            raise OrthoRankError(f"correction['sha256'] is {shown(digest)}; it must be the hash of the maps, a string")
        return cls(record["rank"], record["hidden_size"], sorted(set(layers)), digest)


def _check_names(file: Path, found: list[str], wanted: list[str]) -> None:
    for name in sorted(set(found) ^ set(wanted)):
        what = "has no tensor" if name in wanted else "has the tensor"
        raise OrthoRankError(f"{file} {what} {shown(name)}; of this plan it must hold {_listed(wanted)}, and no others")


def _listed(names: list[str]) -> str:
    return ", ".join(names if len(names) <= 6 else [*names[:3], "...", names[-1]])


def _check(name: str, shape: tuple[int, ...], dtype: str, rank: int, hidden: int) -> None:
    """One part of a map; ``name`` ends with which."""
    wanted = {"down": (rank, hidden), "up": (hidden, rank), "bias": (hidden,)}[name.rpartition(".")[2]]
    if shape != wanted:
        raise OrthoRankError(
            f"{name} has shape {list(shape)}; with rank {rank} and hidden size {hidden} it must be {list(wanted)}"
        )
    if dtype not in DTYPES:
        raise OrthoRankError(f"{name} has dtype {dtype}; it may be {', '.join(DTYPES)}")


def _check_finite(name: str, part: "Tensor") -> None:
    if not bool(part.isfinite().all()):
        raise OrthoRankError(f"{name} holds infinite or NaN numbers in {part.dtype}; all of a map must be finite")


def _check_range(name: str, part: "Tensor", dtype: "torch.dtype") -> None:
    """``part``, in float64, survives ``dtype``."""
    import torch

    short = str(dtype).removeprefix("torch.")
    remedy = "save the maps as bfloat16, which has float32's range, or as float32"
    largest, end = float(part.abs().max()), torch.finfo(dtype).max
    rounded = part.to(dtype).double()
    if not bool(rounded.isfinite().all()):
        raise OrthoRankError(f"{name} holds {largest:.3g}, and {short} ends at {end:.3g}; {remedy}")
    rows, lost = (x.reshape(-1, x.shape[-1]).norm(dim=-1) for x in (part, rounded - part))
    shares = torch.where(rows > 0, lost / rows, 0)
    if float(shares.max()) > _LOST:
        row = int(shares.argmax())
        where = f"{name}" if part.dim() == 1 else f"row {row} of {name}"
        raise OrthoRankError(
            f"{where}, whose largest number is {float(part.reshape(len(rows), -1)[row].abs().max()):.3g}, would lose "
            f"{float(shares[row]):.0%} of its length in {short}, which has full precision from "
            f"{torch.finfo(dtype).smallest_normal:.3g} on; {remedy}"
        )
