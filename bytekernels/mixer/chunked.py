"""The mixer with the scan in chunks of matrix products: what serves any device and dtype where no kernel does."""

from typing import Any

from torch import Tensor

import bytekernels.conv.reference as conv_room
import bytekernels.norm.reference as norm_room
import bytekernels.ssd.chunked as ssd_room
from bytekernels import dispatch
from bytekernels.mixer.reference import composed


def mamba2_mixer(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return composed(conv_room, ssd_room, norm_room, *args)


def mamba2_mixer_backward(
    dout: Tensor, dconv_states: Tensor | None, dssm_states: Tensor | None, y: Tensor, conved: Tensor, *args: Any
) -> list[Tensor]:
    return dispatch.vjp(mamba2_mixer, args, (dout, None, None, dconv_states, dssm_states))
