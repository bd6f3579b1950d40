"""sample as a torch.library op."""

import torch
from torch import Tensor

from bytekernels import dispatch
from bytekernels.ragged import validates
from bytekernels.sample import reference

MOST_IN_A_BLOCK = 1024  # logits that a Triton program ranks


def _why_not_native(logits: Tensor, *_: Tensor) -> str | None:
    if logits.dtype == torch.float64:
        return f"logits must be float32, bfloat16 or float16, got {logits.dtype}"
    return dispatch.extension_refusal()


def _why_not_triton(logits: Tensor, *_: Tensor) -> str | None:
    vocabulary = logits.shape[1]
    return None if vocabulary <= MOST_IN_A_BLOCK else f"takes rows of up to {MOST_IN_A_BLOCK} logits, got {vocabulary}"


_sample = dispatch.Dispatch(
    "sample",
    triton=dispatch.triton("sample", _why_not_triton),
    native=dispatch.Implementation("bytekernels.sample.native", devices=("cpu",), why_not=_why_not_native),
    reference=dispatch.reference("sample"),
)


def _draw(
    logits: Tensor, seeds: Tensor, counters: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    drawn = _sample(logits, seeds, counters, temperature, top_k, top_p, min_p)
    if validates(drawn) and -1 in (indices := drawn.tolist()):
        row = indices.index(-1)
        raise ValueError(_refusal(row, logits[row], *(v[row].item() for v in (temperature, top_k, top_p, min_p))))
    return drawn


# Defined by hand, as torch.library.custom_op would take longer than the draws of a small batch do on a CPU.
_SAMPLE = "bytekernels::sample"
torch.library.define(_SAMPLE, torch.library.infer_schema(_draw, mutates_args=()), tags=torch.Tag.pt2_compliant_tag)
torch.library.impl(_SAMPLE, "default", _draw)
sample_op = torch.ops.bytekernels.sample.default


@torch.library.register_fake(_SAMPLE)
def _(logits: Tensor, seeds: Tensor, *_: Tensor) -> Tensor:
    return seeds.new_empty(seeds.shape)


def sample(
    logits: Tensor,
    seeds: Tensor,
    counters: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
) -> Tensor:
    """One draw from each row of logits, each with settings of its own. Has no gradient.

    With temperature 0 the greatest logit, of several the one of the lowest index. Else from
    ``p = softmax(logits / temperature)``, of which are kept, one after the other and renormalised: the ``top_k``
    likeliest tokens (of equal ones those of lower indices); the shortest prefix of them, in order of falling
    probability, that reaches ``top_p``; those with ``p >= min_p * max p``. The draw is the first index at which the
    running sum over what is kept, in order of index, is greater than ``u = uniform(seed, counter)``
    (:func:`uniform`). Sums are float64 in every implementation.

    A row's draw depends on nothing but the row: it is the same alone and in any batch, and the next time. A logit of
    -inf is never drawn.

    Args:
        logits: [S, V], a floating dtype.
        seeds: int64 [S], any values.
        counters: int64 [S]; another one for each draw of a seed.
        temperature: float32 [S], finite and at least 0.
        top_k: int32 [S], at least 0; 0 keeps all.
        top_p: float32 [S] in [0, 1]; 1 keeps all, and at least one is kept.
        min_p: float32 [S] in [0, 1]; 0 keeps all.

    Returns:
        int64 [S], the indices drawn. On a CUDA device -1 for a row from which nothing can be drawn; with
        ``BYTEKERNELS_VALIDATE=1`` that raises there too, which waits for the device.

    Raises:
        TypeError: another dtype.
        ValueError: shapes that do not match; on the CPU a row that holds NaN, whose greatest logit is not finite, or
            whose settings are out of range.
    """
    if not logits.is_floating_point():
        raise TypeError(f"logits must have a floating dtype, got {logits.dtype}")
    if logits.dim() != 2 or logits.shape[1] < 1:
        raise ValueError(f"logits must have shape [S, V] with V >= 1, got {list(logits.shape)}")
    for name, value, dtype in (
        ("seeds", seeds, torch.int64),
        ("counters", counters, torch.int64),
        ("temperature", temperature, torch.float32),
        ("top_k", top_k, torch.int32),
        ("top_p", top_p, torch.float32),
        ("min_p", min_p, torch.float32),
    ):
        if value.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {value.dtype}: use {name}.to({dtype})")
        if value.shape != logits.shape[:1]:
            raise ValueError(f"{name} must have shape [S] = [{logits.shape[0]}], got {list(value.shape)}")
    return sample_op(logits, seeds, counters, temperature, top_k, top_p, min_p)


def uniform(seeds: Tensor, counters: Tensor) -> Tensor:
    """Numbers in [0, 1) that are functions of a seed and a counter, the same on every device.

    The counter'th output of SplitMix64 (Steele, Lea and Flood 2014) from the state ``mix(seed)``:
    ``mix(mix(seed) + gamma (counter + 1))`` modulo 2^64, whose upper 53 bits are the number.

    Args:
        seeds: int64 [...].
        counters: int64 [...], of the seeds' shape.

    Returns:
        float64 [...], multiples of 2^-53.

    Raises:
        TypeError: seeds or counters that are not int64.
        ValueError: shapes that differ.
    """
    for name, value in (("seeds", seeds), ("counters", counters)):
        if value.dtype != torch.int64:
            raise TypeError(f"{name} must be torch.int64, got {value.dtype}: use {name}.to(torch.int64)")
    if seeds.shape != counters.shape:
        raise ValueError(f"counters must have the seeds' shape {list(seeds.shape)}, got {list(counters.shape)}")
    return reference.uniform(seeds, counters)


def _refusal(row: int, logits: Tensor, temperature: float, top_k: float, top_p: float, min_p: float) -> str:
    """Why nothing can be drawn from a row."""
    if not 0 <= temperature < float("inf"):
        return f"temperature must be finite and at least 0, got {temperature} in row {row}: 0 takes the greatest logit"
    if top_k < 0:
        return f"top_k must be at least 0, got {top_k} in row {row}: 0 keeps all"
    for name, value, unlimited in (("top_p", top_p, 1), ("min_p", min_p, 0)):
        if not 0 <= value <= 1:
            return f"{name} must be in [0, 1], got {value} in row {row}: {unlimited} keeps all"
    found = "NaN" if bool(logits.isnan().any()) else f"{logits.max().item()} as the greatest"
    return f"logits must hold no NaN and their greatest must be finite, got {found} in row {row}: mask fewer tokens"
