"""What the rooms' ``native.py`` share: how arrays are handed to bytekernels._C, which knows no torch."""

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from bytekernels import dispatch

_LARGE = 32 << 20  # bytes from which the C library takes new pages at every allocation and gives them back


def fresh(like: Tensor, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor as ``like.new_empty(shape, dtype=dtype)`` makes it, of like's own shape by default.

    Large ones ask for huge pages: the first touch of ordinary ones costs several times what writing them does.
    """
    tensor = like.new_empty(like.shape if shape is None else shape, dtype=dtype)
    if tensor.numel() * tensor.element_size() >= _LARGE:
        from bytekernels import _C  # here, as this module is imported where the extension has not been built too

        _C.advise_huge_pages(array(tensor))
    return tensor


A = TypeVar("A", Tensor, np.ndarray)


def array(values: A) -> tuple[int, int, A]:
    """A contiguous array of the host as the extension takes it: (address, bytes, the array, kept alive for the call).

    Args:
        values: a CPU tensor, or a NumPy array in C order, which may be read-only where the extension only reads it.
    """
    if isinstance(values, np.ndarray):
        if not values.flags.c_contiguous:
            raise ValueError(
                f"the extension takes C-contiguous arrays, got strides {values.strides} for shape "
                f"{list(values.shape)}: use np.ascontiguousarray"
            )
        return values.ctypes.data, values.nbytes, values
    if not values.is_contiguous() or values.device.type != "cpu":
        raise ValueError(
            f"the extension takes contiguous CPU tensors, got strides {values.stride()} for shape "
            f"{list(values.shape)} on {values.device}: use .cpu().contiguous()"
        )
    return values.data_ptr(), values.numel() * values.element_size(), values


def array_on(tensor: Tensor) -> tuple[int, int, Tensor]:
    """A contiguous tensor of any device as the functions of ``_C.cuda`` take it."""
    return tensor.data_ptr(), tensor.numel() * tensor.element_size(), tensor


def where(tensor: Tensor) -> tuple[int, int]:
    """The tensor's device and that device's current stream, as the functions of ``_C.cuda`` take them last."""
    if not tensor.is_cuda:
        return -1, 0
    return tensor.get_device(), torch.cuda.current_stream(tensor.device).cuda_stream


def rows(tensor: Tensor) -> tuple[int, int, int, Tensor]:
    """A CPU tensor [T, ...] whose rows may be strided, as in a slice of columns: (address, bytes, row stride, tensor).

    Copies where the elements of a row do not lie together.
    """
    width = tensor.shape[1:].numel()
    stride = tensor.stride(0) if len(tensor) > 1 else width
    if not tensor[:1].is_contiguous() or stride < width or tensor.device.type != "cpu":
        tensor, stride = tensor.cpu().contiguous(), width
    elements = (len(tensor) - 1) * stride + width if tensor.numel() else 0
    return tensor.data_ptr(), elements * tensor.element_size(), stride, tensor


def threads() -> int:
    """Threads for an op's loops: as many as torch uses, on torch's own team (csrc/parallel.h)."""
    return torch.get_num_threads()


def native(room: str) -> dispatch.Implementation:
    """The room's implementation in the extension, which serves the CPU where it has been built."""

    def why_not(*args: Any) -> str | None:
        return dispatch.extension_refusal()

    return dispatch.Implementation(f"bytekernels.{room}.native", devices=("cpu",), why_not=why_not)


def cuda(room: str) -> dispatch.Implementation:
    """The room's CUDA kernels in the extension; on request their bodies run on the CPU (csrc/cuda/launch.h)."""

    def why_not(*args: Any) -> str | None:
        refusal = dispatch.extension_refusal()
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        if refusal is not None or device.type != "cuda":
            return refusal
        from bytekernels import _C  # here, as this module is imported where the extension has not been built too

        if not _C.cuda_architectures:
            return f"the extension was built without CUDA: {_C.cuda_refusal}"
        return _chip_refusal(torch.cuda.get_device_capability(device), _C.cuda_architectures)

    return dispatch.Implementation(f"bytekernels.{room}.cuda", devices=("cuda",), on_request=("cpu",), why_not=why_not)


def _chip_refusal(capability: tuple[int, int], architectures: Sequence[str]) -> str | None:
    """Why what was compiled for these does not run on a chip, or None: it does on later minors, PTX on all later."""
    chip = 10 * capability[0] + capability[1]
    compiled = [int(architecture.rstrip("af")) for architecture in architectures]
    if chip >= compiled[-1] or any(chip // 10 == built // 10 and chip >= built for built in compiled):
        return None
    return (
        f"the extension was compiled for sm_{', sm_'.join(architectures)}, the device is sm_{chip}: build it with "
        f"BYTEKERNELS_CUDA_ARCHITECTURES={chip}"
    )
