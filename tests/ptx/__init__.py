"""Runs the PTX that Triton emits for the kernels of this package, on a machine without a GPU.

Triton's interpreter runs the Python of a kernel; this runs what the compiler made of it, and checks what a GPU would
not report: races, barriers that are missing, memory that was never written. `docs/ptx.md` says what is checked and
what is not. The way through it:

    decode.py        text -> instructions        operands.py   an operand -> how to read or write it
    table.py         opcode -> what it does      ops_*.py      the entries of the table, one file for each kind
    clocks.py        what happened before what   shadow.py     who touched a byte last
    shared_memory.py, global_memory.py, mbarriers.py (tensor memory is in ops_tcgen05.py)
    block.py         a program instance: registers, warps, memory       scheduler.py   who runs next
    launch.py        runs one kernel             launchers.py  runs the launchers of `orthorank_kernels.triton`
    cases.py         what the test suite runs    worker.py     runs cases in a process of its own
    mutate.py        breaks a kernel on purpose, to see whether the checks notice
    snippet.py       a few instructions alone    exact.py      floating point with rational numbers
    uncovered.py     what is not run
"""
