"""A saved model, loaded again, gives the same logits bit for bit."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from models import ByteLM
from tests.models.conftest import packed_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_logits_are_the_saved_models(model, dtype, tmp_path):
    model.to(dtype).save_pretrained(tmp_path)
    ids, cu_seqlens = packed_bytes([40, 1, 7])
    for loaded in (ByteLM.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert loaded.dtype == dtype
        assert torch.equal(loaded.eval()(ids, cu_seqlens).logits, model(ids, cu_seqlens).logits)
