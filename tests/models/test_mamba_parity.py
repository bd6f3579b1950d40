"""The mixer against mamba-ssm's ``Mamba2`` module: its state dicts load, outputs and gradients are the same.

Recorded values (``data/record_mamba2.py``) are always compared with, the module itself where mamba-ssm is installed.
"""

import os

import numpy
import pytest
import torch

from benchmarks import public
from bytekernels.testing import assert_close, ragged
from models import ByteLMConfig
from models.local_stack import Mamba2Mixer
from tests.models.data import record_mamba2
from tests.models.data.record_mamba2 import GROUPS, LENGTHS, SIZES


def mixer_of(groups, state_dict):
    """Our mixer of the recorded sizes, with a public state dict in it."""
    config = ByteLMConfig(
        width=SIZES["d_model"], state_size=SIZES["d_state"], head_dim=SIZES["headdim"], num_groups=groups
    )
    mixer = Mamba2Mixer(config, num_layers=1)
    mixer.load_state_dict(state_dict)
    return mixer


@pytest.fixture(params=GROUPS, ids=lambda groups: f"groups={groups}")
def recorded(request):
    """One module's recorded values by name, with their number of groups."""
    prefix = f"groups={request.param}."
    with numpy.load(record_mamba2.FILE) as file:
        values = {
            name.removeprefix(prefix): torch.from_numpy(file[name]) for name in file.files if name.startswith(prefix)
        }
    return request.param, values


@pytest.fixture(params=GROUPS, ids=lambda groups: f"groups={groups}")
def live(request):
    """mamba-ssm's module itself, whose kernels are interpreted, with its number of groups."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("mamba-ssm's module is compared with in Triton's interpreter, that is on machines without a GPU")
    reason = public.missing(lambda: public.mamba_ssm("modules.mamba2"), "mamba-ssm", "mamba-ssm")
    if reason is not None:
        pytest.skip(reason.reason)
    return request.param, record_mamba2.public_module(request.param)


def hold(mixer, inputs, cotangents, outputs, dinputs, dparameters):
    """All sequences packed into one batch give each sequence's outputs and gradients."""
    cu_seqlens, _ = ragged([len(rows) for rows in inputs])
    packed = torch.cat([rows.detach() for rows in inputs]).requires_grad_()
    y = mixer(packed, cu_seqlens)
    names = sorted(name for name, _ in mixer.named_parameters())
    parameters = [mixer.get_parameter(name) for name in names]
    dx, *gradients = torch.autograd.grad(y, [packed, *parameters], torch.cat(cotangents))
    lengths = [len(rows) for rows in inputs]
    for i, (rows, drows) in enumerate(zip(y.split(lengths), dx.split(lengths), strict=True)):
        assert_close(rows, outputs[i], what=f"output of sequence {i}")
        assert_close(drows, dinputs[i], what=f"gradient of input {i}")
    for name, gradient in zip(names, gradients, strict=True):
        assert_close(gradient, dparameters[name], what=f"gradient of {name}")


def by_sequence(values, kind):
    return [values[f"{kind}.{i}"] for i in range(len(LENGTHS))]


def test_a_public_state_dict_gives_the_recorded_outputs_and_gradients(recorded):
    groups, values = recorded
    state_dict = {name.removeprefix("state."): v for name, v in values.items() if name.startswith("state.")}
    dparameters = {name.removeprefix("gradient."): v for name, v in values.items() if name.startswith("gradient.")}
    hold(
        mixer_of(groups, state_dict),
        *(by_sequence(values, kind) for kind in ("input", "cotangent", "output", "dinput")),
        dparameters,
    )


def test_steps_give_the_recorded_outputs(recorded):
    groups, values = recorded
    state_dict = {name.removeprefix("state."): v for name, v in values.items() if name.startswith("state.")}
    mixer = mixer_of(groups, state_dict)
    inputs, outputs = by_sequence(values, "input"), by_sequence(values, "output")
    shortest = min(LENGTHS)
    state = mixer.empty_state(len(LENGTHS))
    with torch.no_grad():
        steps = [mixer.step(torch.stack([rows[t] for rows in inputs]), state) for t in range(shortest)]
    assert_close(torch.stack(steps, 1), torch.stack([rows[:shortest] for rows in outputs]))


def test_the_public_module_agrees(live):
    groups, module = live
    inputs = [rows.requires_grad_() for rows in record_mamba2.random_rows(7)]
    cotangents = record_mamba2.random_rows(8)
    outputs, gradients = record_mamba2.run_public(module, inputs, cotangents)
    names = sorted(name for name, _ in module.named_parameters())
    dparameters = dict(zip(names, gradients[len(inputs) :], strict=True))
    mixer = mixer_of(groups, module.state_dict())
    hold(mixer, inputs, cotangents, outputs, gradients[: len(inputs)], dparameters)
