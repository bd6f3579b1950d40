"""Record what mamba-ssm's ``Mamba2`` module computes: its state dict, inputs, outputs and gradients, in ``mamba2.npz``.

``python tests/models/data/record_mamba2.py`` wherever mamba-ssm can be imported (its CUDA extension is not needed:
``MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE pip install --no-build-isolation --no-deps mamba-ssm einops``).
Its Triton kernels run on the CPU, in Triton's interpreter, in float32.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # so that the command works without an install

import numpy
import torch
from torch import Tensor, nn

from benchmarks import machine, public

FILE = Path(__file__).with_name("mamba2.npz")
LENGTHS = (70, 33)  # of two sequences, each given to the module alone; both end inside a chunk
SIZES = dict(d_model=16, d_state=16, headdim=8, chunk_size=32)  # expand 2: four heads
GROUPS = (1, 2)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Let mamba-ssm launch its kernels on CPU tensors, where TRITON_INTERPRET=1 was set before Triton was imported.

    It enters the device of its tensors and asks for its properties, and tuning would need a GPU's clock: the first
    configuration of each kernel serves.
    """
    from triton.runtime.autotuner import Autotuner

    run = Autotuner.run

    def run_first(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.configs = self.configs[:1]
        return run(self, *args, **kwargs)

    with (
        mock.patch.object(Autotuner, "run", run_first),
        mock.patch("torch.cuda.device", return_value=contextlib.nullcontext()),
        mock.patch("torch.cuda.get_device_properties", return_value=SimpleNamespace(multi_processor_count=1)),
    ):
        yield


def public_module(groups: int, **settings: Any) -> nn.Module:
    """mamba-ssm's Mamba2 with random weights, the norm's and the skip's among them."""
    torch.manual_seed(groups)
    module = public.mamba_ssm("modules.mamba2").Mamba2(ngroups=groups, use_mem_eff_path=False, **SIZES, **settings)
    with torch.no_grad():
        module.norm.weight.uniform_(0.5, 1.5)
        module.D.uniform_(0.5, 1.5)
    return module


def run_public(module: nn.Module, inputs: list[Tensor], cotangents: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of each sequence alone, and the gradients of the inputs, then of the parameters by name."""
    with interpreted():
        outputs = [module(value[None])[0] for value in inputs]
        parameters = [value for _, value in sorted(module.named_parameters())]
        gradients = torch.autograd.grad(outputs, [*inputs, *parameters], cotangents)
    return outputs, list(gradients)


def random_rows(seed: int) -> list[Tensor]:
    """[L, d_model] for each of LENGTHS."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, SIZES["d_model"], generator=generator) for length in LENGTHS]


def main() -> None:
    recorded: dict[str, Any] = {}
    for groups in GROUPS:
        module = public_module(groups)
        inputs = [rows.requires_grad_() for rows in random_rows(0)]
        cotangents = random_rows(1)
        outputs, gradients = run_public(module, inputs, cotangents)
        values = {f"state.{name}": value for name, value in module.state_dict().items()}
        dinputs, dparameters = gradients[: len(inputs)], gradients[len(inputs) :]
        sequences = dict(input=inputs, cotangent=cotangents, output=outputs, dinput=dinputs)
        values |= {f"{kind}.{i}": rows for kind, packed in sequences.items() for i, rows in enumerate(packed)}
        names = [name for name, _ in sorted(module.named_parameters())]
        values |= {f"gradient.{name}": value for name, value in zip(names, dparameters, strict=True)}
        recorded |= {f"groups={groups}.{name}": value.detach().numpy() for name, value in values.items()}
    versions = {name: machine.version(name) for name in ("mamba-ssm", "triton", "torch", "numpy")}
    recorded["made_with"] = numpy.array(" ".join(f"{name}=={version}" for name, version in versions.items()))
    numpy.savez_compressed(FILE, **recorded)
    print(f"{FILE}: {FILE.stat().st_size} bytes, {recorded['made_with']}")


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    main()
