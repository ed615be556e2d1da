"""Fills the table: importing this module imports every file of instructions."""

from ptx_check import (  # noqa: F401
    ops_convert,
    ops_copy,
    ops_float,
    ops_integer,
    ops_matrix,
    ops_memory,
    ops_tcgen05,
    ops_tma,
    ops_warp,
    ops_wgmma,
)
