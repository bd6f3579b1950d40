"""Small models on which the promises are checked."""

from itertools import pairwise

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bytekernels import BOS
from bytekernels.testing import ragged
from models import ByteLM, ByteLMConfig
from models.byte_lm import core_settings
from models.suffix import Vocabulary

PROMPTS = [b"", b"hello world", "naïve 漢".encode(), b"\x80\xc3 not UTF-8", b"x"]
FAMILIES = ("llama", "qwen2", "qwen3", "olmo2", "olmo3")


def small_teacher(family: str = "llama", vocab_size: int = 50):
    torch.manual_seed(1)
    settings = dict(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=vocab_size,
        pad_token_id=None,
        bos_token_id=0,
        eos_token_id=0,
    )
    if family == "qwen3":
        settings["head_dim"] = 8
    if family == "olmo3":
        settings |= dict(sliding_window=4, layer_types=["sliding_attention", "full_attention"])
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).eval()


def small_model(seed: int = 0, **settings) -> ByteLM:
    """A model whose zero-initialised parts are random too, so that every path matters."""
    torch.manual_seed(seed)
    sizes = dict(
        width=24, encoder_layers=2, decoder_layers=2, state_size=8, head_dim=12, bridge_inner=40, router_inner=20
    )
    model = ByteLM(ByteLMConfig(**{"core": core_settings(small_teacher()), **sizes, **settings})).eval()
    with torch.no_grad():
        model.dechunk.null.normal_()
        model.dechunk.residual.weight.normal_(std=0.3)
        for part in (model.encoder, model.decoder, model.router.encoder):
            if part is not None:
                part.embed.weight.normal_(std=1.0)
        if model.config.marginal_head:
            model.decoder.head.weight.normal_(std=0.3)
            model.token_head.weight.normal_()
            model.token_head.weight[49] = 0  # so that texts seldom end
        if model.encoder.suffix is not None:
            vocabulary = Vocabulary(STRINGS, bos_id=48, eos_id=49)
            model.encoder.suffix.fill(vocabulary, torch.randn_like(model.encoder.suffix.table))
            model.encoder.suffix.map.weight.normal_(std=0.3)
            model.encoder.bridge.down.weight.normal_(std=0.3)
    return model


def packed_bytes(lengths, seed: int = 0):
    """Random packed sequences that begin with BOS: ids uint8 [T], cu_seqlens."""
    cu_seqlens, total = ragged(lengths)
    ids = torch.randint(0, 254, (total,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    starts = cu_seqlens[:-1][cu_seqlens[1:] > cu_seqlens[:-1]].long()
    ids[starts] = BOS
    return ids, cu_seqlens


STRINGS = [
    b"h",
    b"el",
    b"hell",
    b"o",
    b" wor",
    b"world",
    b"\x80",
    "漢".encode(),
    *(bytes([i]) for i in range(100, 140)),
]


def packed_tokens(lengths, seed: int = 0):
    """As :func:`packed_bytes`, of whole strings of the vocabulary for as long as they fit; and bool [T], their ends."""
    ids, cu_seqlens = packed_bytes(lengths, seed)
    ends, draw = ids == BOS, torch.Generator().manual_seed(seed)
    for start, stop in pairwise(cu_seqlens.tolist()):
        place = start + 1
        while place + max(map(len, STRINGS)) <= stop:
            string = STRINGS[int(torch.randint(0, 8, (1,), generator=draw))]
            ids[place : place + len(string)] = torch.tensor(list(string), dtype=torch.uint8)
            place += len(string)
            ends[place - 1] = True
    return ids, cu_seqlens, ends


SUFFIX = dict(suffix_bytes=sum(map(len, STRINGS)))
MARGINAL = dict(**SUFFIX, marginal_head=True)
CONSTRAINED = dict(**MARGINAL, constrain_chunks=True, suffix_scope="chunk", router="split", router_layers=1)
CHUNK = dict(**SUFFIX, suffix_scope="chunk", dechunk="causal")
ABLATED = dict(encoder="attention", attention_window=5, router="split", router_layers=1)


@pytest.fixture(
    params=[dict(dechunk="hold"), dict(dechunk="causal"), ABLATED, SUFFIX, CHUNK, MARGINAL, CONSTRAINED],
    ids=["hold", "causal", "ablated", "suffix", "chunk", "marginal", "constrained"],
)
def model(request) -> ByteLM:
    return small_model(**request.param)
