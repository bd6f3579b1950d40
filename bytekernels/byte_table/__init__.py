"""Rows of a 256-row table by byte value: block 0 without a GEMM over T."""

from bytekernels.byte_table.op import byte_table

__all__ = ["byte_table"]
