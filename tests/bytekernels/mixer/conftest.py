"""Inputs of the mixer, and its outputs and gradients by name."""

import pytest
import torch

import bytekernels
from bytekernels import MixerStates, dispatch
from bytekernels.testing import assert_close, poisoned_memory, ragged

OPTIONS = ("conv_bias", "D", "dt_bias", "states")
RAGGED = [0, 1, 3, 4, 63, 0, 64, 65]
SHORT = [0, 1, 3, 4, 0, 5]
SIZES = dict(heads=4, head_dim=4, d_state=3, groups=2, taps=4)


@pytest.fixture(autouse=True, scope="module")
def poison():
    with poisoned_memory():
        yield


class Case:
    """Inputs by name, the first parameters of mamba2_mixer, and its sizes."""

    def __init__(
        self, lengths, dtype=torch.float64, *, table=False, options=OPTIONS, device="cpu", seed=0, **sizes
    ) -> None:
        self.sizes = {**SIZES, **sizes}
        heads, head_dim, d_state, groups, taps = self.sizes.values()
        self.cu_seqlens, total = ragged(lengths)
        self.cu_seqlens = self.cu_seqlens.to(device)
        generator = torch.Generator().manual_seed(seed)
        inner, channels = heads * head_dim, heads * head_dim + 2 * groups * d_state
        ids = torch.randint(0, 256, (total,), generator=generator, dtype=torch.uint8)
        self.ids = ids.to(device) if table else None
        shapes = {
            "zxbcdt": (256 if table else total, inner + channels + heads),
            "conv_weight": (channels, taps),
            "conv_bias": (channels,),
            "A": (heads,),
            "D": (heads,),
            "dt_bias": (heads,),
            "norm_weight": (inner,),
            "conv": (len(lengths), channels, taps - 1),
            "ssm": (len(lengths), heads, head_dim, d_state),
        }
        values = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
        values["A"] = -4 * torch.rand(heads, generator=generator, dtype=torch.float64)
        wide = torch.promote_types(dtype, torch.float32)
        self.values = {
            name: value.to(device, dtype if name in ("zxbcdt", "conv") else wide)
            for name, value in values.items()
            if name not in OPTIONS or name in options
        }
        if "states" not in options:
            del self.values["conv"], self.values["ssm"]

    def of(self, values):
        """The same case with other values."""
        other = object.__new__(Case)
        other.__dict__ = {**self.__dict__, "values": values}
        return other

    def leaves(self, dtype=None):
        return self.of({n: v.detach().to(dtype or v.dtype).clone().requires_grad_() for n, v in self.values.items()})

    @property
    def weights(self):
        names = ("conv_weight", "conv_bias", "A", "D", "dt_bias", "norm_weight")
        return [self.values.get(name) for name in names]

    @property
    def keywords(self):
        return dict(head_dim=self.sizes["head_dim"], num_groups=self.sizes["groups"])

    def mix(self, **options):
        states = MixerStates(self.values["conv"], self.values["ssm"]) if "conv" in self.values else None
        out, final = bytekernels.mamba2_mixer(
            self.values["zxbcdt"],
            *self.weights,
            self.cu_seqlens,
            **self.keywords,
            ids=self.ids,
            initial_states=states,
            return_final_states=True,
            **options,
        )
        return out, *final

    def by_rooms(self):
        """The same from the rooms' public functions."""
        values, inner = self.values, self.values["norm_weight"].shape[0]
        conv_weight, conv_bias, A, D, dt_bias, norm_weight = self.weights
        rows = values["zxbcdt"] if self.ids is None else bytekernels.byte_table(self.ids, values["zxbcdt"])
        z, xbc, dt = rows.split([inner, len(conv_weight), len(A)], 1)
        xbc, final_conv = bytekernels.causal_conv1d(
            xbc,
            conv_weight,
            conv_bias,
            self.cu_seqlens,
            initial_states=values.get("conv"),
            return_final_states=True,
        )
        groups, shared = self.sizes["groups"], self.sizes["groups"] * self.sizes["d_state"]
        x, B, C = xbc.split([inner, shared, shared], 1)
        y, final_ssm = bytekernels.ssd_scan(
            x.unflatten(1, (len(A), -1)),
            dt,
            A,
            B.unflatten(1, (groups, -1)),
            C.unflatten(1, (groups, -1)),
            self.cu_seqlens,
            D=D,
            dt_bias=dt_bias,
            dt_softplus=True,
            initial_states=values.get("ssm"),
            return_final_states=True,
        )
        out = bytekernels.gated_rms_norm(y.flatten(1), z, norm_weight, inner // groups)
        return out, final_conv, final_ssm


NAMES = ("out", "final conv", "final ssm")


def spare_the_interpreter(fast) -> None:
    """Leave out what the rooms' own tests show of their kernels."""
    if fast.interpreted:
        pytest.skip("each program costs the interpreter milliseconds")


def make(fast, lengths, dtype=torch.float32, **settings):
    """A case on the implementation's device; of two heads for the interpreter."""
    small = dict(heads=2, groups=1) if fast.interpreted else {}
    return Case(lengths, dtype, device=fast.device, **{**small, **settings})


def run(case, function=Case.mix, dtype=None, **options):
    """Outputs and gradients by name, with cotangents that are the same for each dtype."""
    case = case.leaves(dtype)
    outputs = function(case, **options)
    generator = torch.Generator().manual_seed(1)
    cotangents = []
    for output in outputs:
        cotangent = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        cotangents.append(cotangent.bfloat16().to(output.device, output.dtype))
    found = torch.autograd.grad(outputs, list(case.values.values()), cotangents)
    return dict(zip((*NAMES, *(f"d{name}" for name in case.values)), (*outputs, *found), strict=True))


def assert_agrees(impl, case, truth="reference", **options):
    """``impl`` against ``truth`` on the same values in float64: outputs, states and every gradient."""
    with dispatch.force(impl):
        found = run(case, **options)
    with dispatch.force(truth):
        expected = run(case, dtype=torch.float64, **options)
    for name, value in expected.items():
        assert_close(found[name], value, what=name)
