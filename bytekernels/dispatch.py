"""How an op finds its implementation, and the reason it gives when it can't.

The choice is made per call, by device and arguments. ``BYTEKERNELS_IMPL=reference`` (or ``native``, ``triton``), or
``with force("reference"):``, asks for one implementation; where that one can't run the call raises with the reason.
"""

import contextlib
import contextvars
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("bytekernels_impl", default=None)


@contextlib.contextmanager
def force(name: str | None) -> Iterator[None]:
    """Ask for one implementation inside the block; ``None`` restores the choice by device."""
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


@dataclass(frozen=True)
class Implementation:
    """One way of computing an op.

    Attributes:
        module: imported on first use, so that importing bytekernels imports neither Triton nor the extension.
        devices: device types that it serves, or None for all.
        on_request: device types that it serves besides, but only when it is forced.
        why_not: called with the op's arguments; the reason why it can't serve them, or None.
    """

    module: str
    devices: tuple[str, ...] | None = None
    on_request: tuple[str, ...] = ()
    why_not: Callable[..., str | None] = field(default=lambda *args: None)

    def function(self, name: str) -> Callable[..., Any]:
        return getattr(importlib.import_module(self.module), name)

    def refusal(self, device: str, args: tuple[Any, ...], *, forced: bool = False) -> str | None:
        served = forced and device in self.on_request
        if self.devices is not None and device not in self.devices and not served:
            return f"serves {' and '.join(self.devices)} tensors, got {device}"
        return self.why_not(*args)


class Dispatch:
    """The implementations of one op, best first. Calling it runs the first that can serve the arguments.

    Args:
        op: the name of the op and of the function in each implementation's module.
        implementations: name to :class:`Implementation`, in order of preference; ``reference`` comes last.
    """

    def __init__(self, op: str, **implementations: Implementation) -> None:
        self.op = op
        self.implementations = implementations

    def choose(self, device: str, args: tuple[Any, ...]) -> str:
        """Name of the implementation that serves these arguments.

        Raises:
            RuntimeError: the forced implementation does not exist or can't run (with the reason), or none can.
        """
        forced = _forced.get() or os.environ.get("BYTEKERNELS_IMPL") or None
        if forced is not None and forced not in self.implementations:
            raise RuntimeError(f"{self.op} has no {forced!r} implementation; it has {', '.join(self.implementations)}")
        refusals = []
        for name in [forced] if forced else self.implementations:
            reason = self.implementations[name].refusal(device, args, forced=forced is not None)
            if reason is None:
                return name
            refusals.append(f"{name}: {reason}")
        raise RuntimeError(f"{self.op} can't run: {'; '.join(refusals)}")

    def __call__(self, *args: Any) -> Any:
        return self._on(next(arg.device.type for arg in args if isinstance(arg, Tensor)), args)

    def on_host(self, *args: Any) -> Any:
        """Call an op of the CPU that takes no tensor to choose a device by."""
        return self._on("cpu", args)

    def _on(self, device: str, args: tuple[Any, ...]) -> Any:
        return self.implementations[self.choose(device, args)].function(self.op)(*args)


def extension_refusal() -> str | None:
    """Why the native extension can't be used, or None. Warns once when it has not been built."""
    try:
        importlib.import_module("bytekernels._C")
    except ImportError as error:
        reason = f"the extension bytekernels._C is not built ({error}); run `pip install -e .` in the checkout"
        warnings.warn(f"{reason}. Slower reference implementations serve the CPU until then.", stacklevel=2)
        return reason
    return None


def reference(room: str) -> Implementation:
    """The plain PyTorch implementation of the room, which serves every device and dtype."""
    return Implementation(f"bytekernels.{room}.reference")


def triton(room: str, why_not: Callable[..., str | None] | None = None) -> Implementation:
    """The room's Triton kernels: CUDA tensors, and on request CPU tensors through Triton's interpreter.

    float64 is left to the reference. The interpreter takes float32 alone: it gets narrower sums wrong without a word.
    ``why_not`` is asked besides, where Triton is installed.
    """

    def refusal(*args: Any) -> str | None:
        return _triton_refusal(*args) or (None if why_not is None else why_not(*args))

    return Implementation(f"bytekernels.{room}.triton", devices=("cuda",), on_request=("cpu",), why_not=refusal)


def _triton_refusal(*args: Any) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; run `pip install triton`"
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    if torch.float64 in dtypes:
        return "takes float32, float16 and bfloat16, got float64"
    if tensors[0].device.type != "cpu":
        return None
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "serves CPU tensors only where TRITON_INTERPRET=1 was set before Triton was imported"
    narrow = sorted(str(dtype) for dtype in dtypes - {torch.float32})
    return f"takes float32 alone on the CPU, got {', '.join(narrow)}" if narrow else None


def vjp(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    primals: Sequence[Any],
    cotangents: Sequence[Tensor | None],
) -> list[Tensor]:
    """Gradients of a reference function, for use as the body of a backward op.

    Args:
        function: differentiable, of the primals; returns a tensor or a tuple of tensors.
        primals: its arguments. Those that are floating-point tensors are differentiated, the others held fixed.
        cotangents: gradient of each output, None for zero.

    Returns:
        The gradients of the floating-point primals, in order, each with storage of its own. :func:`spread` puts them
        back in the arguments' places.
    """
    active = [i for i, primal in enumerate(primals) if _is_floating(primal)]

    def of_active(*values: Tensor) -> tuple[Tensor, ...]:
        arguments = list(primals)
        for i, value in zip(active, values, strict=True):
            arguments[i] = value
        outputs = function(*arguments)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    outputs, pull = torch.func.vjp(of_active, *(primals[i] for i in active))[:2]
    filled = tuple(
        torch.zeros_like(output) if cotangent is None else cotangent.to(output.dtype)
        for output, cotangent in zip(outputs, cotangents, strict=True)
    )
    taken = {tensor.untyped_storage().data_ptr() for tensor in (*filled, *(primals[i] for i in active))}
    gradients = []
    for gradient in pull(filled):
        gradient = gradient.contiguous()
        if gradient.untyped_storage().data_ptr() in taken:
            gradient = gradient.clone()
        taken.add(gradient.untyped_storage().data_ptr())
        gradients.append(gradient)
    return gradients


def fake_gradients(primals: Sequence[Any]) -> list[Tensor]:
    """Shapes of :func:`vjp`'s result, for the fake of a backward op."""
    return [torch.empty_like(p, memory_format=torch.contiguous_format) for p in primals if _is_floating(p)]


def register_gradients(op: Any, backward_op: Callable[..., list[Tensor]]) -> None:
    """Make ``backward_op`` the autograd formula of the custom op ``op``.

    Args:
        op: a ``torch.library.custom_op``.
        backward_op: called with the gradients of op's outputs, then op's inputs; returns the gradients of those inputs
            that are floating-point tensors, in order (:func:`vjp`).
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
        ctx.inputs = tuple(None if isinstance(value, Tensor) else value for value in inputs)
        ctx.is_tensor = tuple(isinstance(value, Tensor) for value in inputs)

    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        inputs = [
            next(saved) if is_tensor else value for is_tensor, value in zip(ctx.is_tensor, ctx.inputs, strict=True)
        ]
        gradients = iter(backward_op(*(cotangent.contiguous() for cotangent in cotangents), *inputs))
        return tuple(next(gradients) if _is_floating(value) else None for value in inputs)

    op.register_autograd(backward, setup_context=setup_context)


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
