"""What tests and benchmarks compare with: tolerances by dtype, float64 truth, poisoned memory, ragged shapes."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bytekernels.ragged import cu_seqlens_of

TOLERANCE = {  # relative error in the 2-norm, for outputs, states and gradients alike
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 5e-3,
}


def relative_error(value: Tensor, truth: Tensor) -> float:
    """``||value - truth|| / ||truth||`` in float64 (the absolute norm where the truth is zero)."""
    value, truth = value.detach().double().flatten(), truth.detach().double().flatten()
    if value.numel() == 0:
        return 0.0
    scale = truth.norm()
    return float((value - truth).norm() / (scale if scale > 0 else 1.0))


def assert_close(
    value: Tensor,
    truth: Tensor,
    *,
    dtype: torch.dtype | None = None,
    limit: float | None = None,
    what: str = "output",
) -> None:
    """Fail unless the value is within its dtype's :data:`TOLERANCE` of the truth, and finite or the truth's infinity.

    Args:
        value: what an implementation gave.
        truth: the same shape, normally float64 from the reference.
        dtype: whose tolerance applies; the value's by default (give the inputs' for float32 sums of bf16 inputs).
        limit: on the relative error, instead of a tolerance.
        what: named in the message.

    Raises:
        AssertionError: shape, NaN or error out of tolerance.
    """
    assert value.shape == truth.shape, f"{what}: shape {list(value.shape)}, expected {list(truth.shape)}"
    infinite = torch.isinf(truth) & (value == truth)
    wrong = ~torch.isfinite(value) & ~infinite
    assert not wrong.any(), f"{what}: {int(wrong.sum())} values are not finite"
    value, truth = value.masked_fill(infinite, 0), truth.masked_fill(infinite, 0)
    limit = TOLERANCE[dtype or value.dtype] if limit is None else limit
    error = relative_error(value, truth)
    assert error <= limit, f"{what}: relative error {error:.2e} exceeds {limit:.3g}"


def gradients(outputs: Tensor | Sequence[Tensor], inputs: Sequence[Tensor], seed: int = 0) -> list[Tensor]:
    """Gradients of a fixed random projection of the outputs (the same for equal shapes, whatever the dtype)."""
    outputs = [outputs] if isinstance(outputs, Tensor) else [o for o in outputs if o.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    cotangents = [
        torch.randn(o.shape, generator=generator, dtype=torch.float64).to(device=o.device, dtype=o.dtype)
        for o in outputs
    ]
    return list(torch.autograd.grad(outputs, inputs, cotangents))


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill what ``torch.empty`` gives with NaN (integers with their largest value), so that unwritten rows show."""
    before = torch.are_deterministic_algorithms_enabled()
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        settings.fill_uninitialized_memory = fill


@contextlib.contextmanager
def checked_pointers() -> Iterator[None]:
    """Hold every address that an interpreted Triton kernel loads from or stores to, to the memory of its arguments.

    The interpreter itself follows any pointer, and what a kernel writes beside its outputs shows much later, or never.

    Raises:
        triton.runtime.errors.InterpreterError: from the launch, naming the kernel.
    """
    from triton.runtime import interpreter

    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    arguments, load, store = executor._init_args_hst, builder.create_masked_load, builder.create_masked_store
    launched, memory = "", np.zeros((0, 2), np.uint64)

    def note(self: Any, args: Any, kwargs: Any) -> Any:
        nonlocal launched, memory
        found = arguments(self, args, kwargs)
        storages = [value.untyped_storage() for value in _tensors([*found[0], *found[1].values()])]
        spans = sorted({(one.data_ptr(), one.data_ptr() + one.nbytes()) for one in storages if one.nbytes()})
        launched, memory = self.fn.__name__, np.array(spans, np.uint64).reshape(-1, 2)
        return found

    def check(verb: str, pointers: Any, mask: Any) -> None:
        first = np.atleast_1d(pointers.data)[np.atleast_1d(mask.data).astype(bool)].astype(np.uint64)
        size = np.uint64(pointers.get_element_ty().primitive_bitwidth // 8)
        span = np.searchsorted(memory[:, 0], first, "right") - 1
        outside = span < 0
        if len(memory):
            outside |= first + size > memory[span, 1]
        if outside.any():
            raise IndexError(f"{launched} {verb} {int(outside.sum())} elements outside its arguments' memory")

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        check("reads", pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check("writes", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    executor._init_args_hst = note
    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
    try:
        yield
    finally:
        executor._init_args_hst = arguments
        builder.create_masked_load, builder.create_masked_store = load, store


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, tuple):
            yield from _tensors(value)
        elif isinstance(value, Tensor):
            yield value


def ragged(lengths: Sequence[int]) -> tuple[Tensor, int]:
    """``cu_seqlens`` int32 [S+1] of sequences of these lengths, and their total T."""
    return cu_seqlens_of(torch.tensor(list(lengths), dtype=torch.int32)), sum(lengths)


def ragged_lengths(max_sequences: int = 5, around: int = 8) -> Any:
    """Hypothesis strategy: lists of sequence lengths with empty and one-byte sequences, and lengths about a tile."""
    from hypothesis import strategies

    interesting = strategies.sampled_from([0, 1, 2, 3, 4, around - 1, around, around + 1, 2 * around + 1])
    return strategies.lists(interesting | strategies.integers(0, 3 * around), min_size=1, max_size=max_sequences)


def merged_strings(entries: int, seed: int = 0, longest: int = 16) -> list[bytes]:
    """Different strings, a vocabulary of any size, grown as merges of byte pairs grow one.

    Args:
        entries: how many: first the 256 bytes, then two earlier strings, mostly early ones, joined.
        seed: of what is drawn.
        longest: most bytes of a string.
    """
    generator = torch.Generator().manual_seed(seed)
    strings = [bytes([byte]) for byte in range(256)][:entries]
    known = set(strings)
    while len(strings) < entries:
        pairs = torch.rand(4096, 2, generator=generator, dtype=torch.float64).pow(3) * len(strings)
        for left, right in pairs.long().tolist():
            string = strings[left] + strings[right]
            if len(string) <= longest and string not in known and len(strings) < entries:
                known.add(string)
                strings.append(string)
    return strings
