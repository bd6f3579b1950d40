"""transformers' arguments of ``generate``, as a byte-level model's writer takes them."""

import operator
import reprlib
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from transformers import GenerationConfig
from transformers.generation import StopStringCriteria

from bytekernels import BOS, EOS
from models.sampling import Sampling
from models.utf8 import to_bytes

DEFAULT_NEW_BYTES = 200
HONOURED = {
    *("bos_token_id", "do_sample", "eos_token_id", "max_length", "max_new_tokens", "max_time", "min_p"),
    *("num_return_sequences", "pad_token_id", "repetition_penalty", "return_dict_in_generate", "stop_strings"),
    *("temperature", "top_k", "top_p"),
}
# Values that ask for nothing.
NEUTRAL = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "typical_p", "length_penalty", "encoder_repetition_penalty"), 1),
    **dict.fromkeys(("min_length", "min_new_tokens", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), 0),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "diversity_penalty"), 0),
    "use_cache": True,
    # Of an assistant that is not there: pipelines of transformers 5.6 say them.
    **dict(num_assistant_tokens=20, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.4),
    **dict(assistant_lookbehind=10, target_lookbehind=10),
}
DESCRIPTIONS = {"transformers_version", "_from_model_config", "_commit_hash"}  # of a GenerationConfig, not settings


@dataclass(frozen=True)
class HubSettings:
    """What one call of ``generate`` asks for.

    Attributes:
        sampling: of every sequence, but for its seed.
        max_new: bytes to write at most; None where ``max_length`` says it.
        max_length: of prompt and new bytes together, padding included; None where ``max_new`` says it.
        stop: strings and single bytes that end a text, besides EOS.
        copies: sequences for each prompt.
        pad: the id after the end of a text.
        max_time: seconds after which nothing more is written; None for no limit.
        as_dict: the result is a ``GenerateDecoderOnlyOutput``.
    """

    sampling: Sampling
    max_new: int | None
    max_length: int | None
    stop: tuple[bytes, ...]
    copies: int
    pad: int
    max_time: float | None
    as_dict: bool

    @classmethod
    def of(cls, levels: Iterable[GenerationConfig | None], arguments: Mapping[str, Any]) -> Self:
        """Settings from configurations, the weakest first, and a call's own arguments, which are the strongest.

        Raises:
            ValueError: an argument that a byte-level model can't honour, by name, or a value out of range.
        """
        given = {name: value for name, value in arguments.items() if not _asks_for_nothing(name, value)}
        stops = _stop_criteria(given.pop("stopping_criteria", []))
        found: dict[str, Any] = {}
        for level in [*(_settings_of(config) for config in levels if config is not None), given]:
            if {"max_new_tokens", "max_length"} & level.keys():
                found = {name: value for name, value in found.items() if name not in ("max_new_tokens", "max_length")}
            found.update(level)
        for name, value in found.items():
            if name not in HONOURED:
                raise ValueError(
                    f"a byte-level model can't honour {name}={reprlib.repr(value)}: leave it out (generate takes "
                    f"{', '.join(sorted(HONOURED))}, attention_mask, streamer and mode)"
                )
        sample = _bool(found, "do_sample")
        if not sample:
            idle = {name: given[name] for name in ("temperature", "top_k", "top_p", "min_p") if name in given}
            if idle:
                warnings.warn(f"{idle} change nothing without do_sample=True: the likeliest is taken", stacklevel=3)
        copies = _int(found, "num_return_sequences", 1, least=1)
        if copies > 1 and not sample:
            raise ValueError(f"num_return_sequences={copies} needs do_sample=True: without it all would be the same")
        if found.get("bos_token_id", BOS) != BOS:
            raise ValueError(f"bos_token_id must be {BOS}, got {found['bos_token_id']!r}: leave it out")
        by_length = "max_length" in found and "max_new_tokens" not in found
        return cls(
            sampling=_sampling(found, sample),
            max_new=None if by_length else _int(found, "max_new_tokens", DEFAULT_NEW_BYTES, least=1),
            max_length=_int(found, "max_length", 0, least=1) if by_length else None,
            stop=(*stops, *_strings(found.get("stop_strings", ())), *_end_ids(found.get("eos_token_id", EOS))),
            copies=copies,
            pad=_int(found, "pad_token_id", EOS, least=0, most=255),
            max_time=_seconds(found),
            as_dict=_bool(found, "return_dict_in_generate"),
        )

    def new_bytes(self, prompt_length: int) -> int:
        """Bytes to write after prompts of L ids, padding and BOS included.

        Raises:
            ValueError: ``max_length`` leaves no room.
        """
        if self.max_length is None:
            assert self.max_new is not None
            return self.max_new
        if self.max_length <= prompt_length:
            raise ValueError(
                f"max_length={self.max_length} leaves no room after {prompt_length} ids of prompt: raise it, or give "
                "max_new_tokens"
            )
        return self.max_length - prompt_length

    def samplings(self, sequences: int) -> list[Sampling]:
        """One for each sequence, with a seed from torch's global generator where there is anything to draw."""
        if not self.sampling.temperature:
            return [self.sampling] * sequences
        return [replace(self.sampling, seed=seed) for seed in torch.randint(2**63 - 1, (sequences,)).tolist()]


def _settings_of(config: GenerationConfig) -> dict[str, Any]:
    return {
        name: value
        for name, value in config.to_diff_dict().items()
        if name not in DESCRIPTIONS and not _asks_for_nothing(name, value)
    }


def _asks_for_nothing(name: str, value: Any) -> bool:
    if name in HONOURED:
        return value is None
    if value is None or value is False or (isinstance(value, list | tuple) and not value):
        return True
    return name in NEUTRAL and value == NEUTRAL[name]


def _sampling(found: Mapping[str, Any], sample: bool) -> Sampling:
    penalty = float(found.get("repetition_penalty", 1.0))
    if not sample:
        return Sampling(repetition_penalty=penalty)
    temperature = float(found.get("temperature", 1.0))
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0 with do_sample=True, got {temperature}: use do_sample=False")
    return Sampling(
        temperature=temperature,
        top_k=_int(found, "top_k", 0, least=0) or None,
        top_p=float(found.get("top_p", 1.0)),
        min_p=float(found.get("min_p", 0.0)),
        repetition_penalty=penalty,
    )


def _stop_criteria(criteria: Iterable[Any]) -> list[bytes]:
    stops: list[bytes] = []
    for criterion in criteria:
        if not isinstance(criterion, StopStringCriteria):
            raise ValueError(
                f"a byte-level model can't honour stopping_criteria with {type(criterion).__name__}: use stop_strings, "
                "eos_token_id, max_new_tokens or max_time"
            )
        stops += _strings(criterion.stop_strings)
    return stops


def _strings(strings: str | Iterable[str]) -> list[bytes]:
    return [to_bytes(one) for one in ([strings] if isinstance(strings, str) else strings)]


def _end_ids(ids: Any) -> list[bytes]:
    """The bytes besides EOS that end a text; EOS always does."""
    chosen = torch.as_tensor(ids).flatten().tolist()
    for one in chosen:
        if one not in range(256) or one == BOS:
            raise ValueError(f"eos_token_id must be bytes, 0 to 255 but for BOS ({BOS}), got {one!r}")
    return [bytes([one]) for one in chosen if one != EOS]


def _int(found: Mapping[str, Any], name: str, default: int, *, least: int, most: int | None = None) -> int:
    value = found.get(name, default)
    with suppress(TypeError):
        number = operator.index(value)  # numpy's too
        if not isinstance(value, bool) and least <= number and (most is None or number <= most):
            return number
    wanted = f"of at least {least}" if most is None else f"from {least} to {most}"
    raise ValueError(f"{name} must be an int {wanted}, got {value!r}")


def _seconds(found: Mapping[str, Any]) -> float | None:
    value = found.get("max_time")
    if value is not None and not value > 0:
        raise ValueError(f"max_time must be seconds above 0, got {value!r}")
    return value


def _bool(found: Mapping[str, Any], name: str) -> bool:
    value = found.get(name, False)
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return value
