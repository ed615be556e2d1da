"""What goes wrong in a kernel, as exceptions that say where."""


class PtxError(Exception):
    """A kernel did what PTX does not allow, or what is not known here.

    ``where`` is filled by the scheduler: program, warps, instruction and line of the kernel's source.
    """

    def __init__(self, message: str):
        super().__init__(message)
        self.where = ""

    def __str__(self) -> str:
        return f"{self.args[0]}\n{self.where}" if self.where else self.args[0]


class UnknownInstruction(PtxError):
    """The table has no entry for this instruction, or not in this form."""


class Race(PtxError):
    """Two accesses of which at least one writes, and nothing orders them."""


class OutOfBounds(PtxError):
    """An address that belongs to no tensor or to no shared memory, or that is not a multiple of the access's size."""


class Uninitialised(PtxError):
    """Something depends on a register or a byte that nobody wrote."""


class Stuck(PtxError):
    """Nobody can go on: a barrier that some never reach, a wait that never ends."""


class Misuse(PtxError):
    """An asynchronous operation without the fence, wait or set-up that it needs."""
