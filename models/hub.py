"""Where a byte-level model meets transformers: loading, saving, ``generate`` and pipelines."""

import time
from collections.abc import Callable, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from bytekernels import BOS, EOS
from models.byte_tokenizer import ByteTokenizer
from models.config import ByteLMConfig
from models.folder import check_folder
from models.hub_settings import HubSettings
from models.utf8 import to_bytes

if TYPE_CHECKING:
    from models.byte_lm import ByteLM
    from models.writer import Mode, Writer
    from models.written import Generation


class HubModel(PreTrainedModel, GenerationMixin):
    """What :class:`models.ByteLM` has from transformers, with its leniencies taken out."""

    config_class = ByteLMConfig
    supports_gradient_checkpointing = True

    def __init__(self, config: ByteLMConfig) -> None:
        super().__init__(config)
        self.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=EOS)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Buffers that are not saved (rotary frequencies) keep their dtype, as they do when a model is loaded."""
        before = dict(self.named_non_persistent_buffers())
        super()._apply(fn, recurse)
        for name, buffer in self.named_non_persistent_buffers():
            if buffer.dtype != before[name].dtype:
                owner, _, leaf = name.rpartition(".")
                setattr(self.get_submodule(owner), leaf, before[name].to(buffer.device))
        return self

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike | None, *model_args: Any, **options: Any
    ) -> Self:
        """A model from a folder that :meth:`save_pretrained` made, in evaluation mode.

        Weights come from safetensors alone, and must be the model's own, all of them. A local folder is checked
        before anything is loaded.

        Args:
            pretrained_model_name_or_path: a folder, or a repository's name.
            model_args, options: as in transformers; ``dtype`` is the saved one by default.

        Raises:
            OSError: a file is missing, or there is no such folder or repository.
            ValueError: a file is damaged; tensors are missing, unexpected or of another shape; other weights than
                safetensors are asked for.
        """
        if options.get("use_safetensors") is False:
            raise ValueError("use_safetensors=False: weights are loaded from safetensors alone; leave it out")
        where = pretrained_model_name_or_path
        if where is not None:
            folder = Path(where, options.get("subfolder") or "")
            if folder.is_dir():
                check_folder(folder, cls.config_class.model_type, options.get("variant"))
            elif folder.exists() or Path(where).is_absolute() or fspath(where).count("/") > 1:
                raise NotADirectoryError(f"{folder} is no folder: name the one that save_pretrained made")
        with_info = options.pop("output_loading_info", False)
        lenient = options.pop("ignore_mismatched_sizes", False)
        options |= dict(use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True)
        loaded: Any = super().from_pretrained(where, *model_args, **options)
        _check_loaded(where, loaded[1], lenient)
        return loaded if with_info else loaded[0]

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | PathLike, is_main_process: bool = True, **options: Any
    ) -> None:
        """Save weights, configuration, generation settings and tokenizer: all that AutoModel and pipelines need.

        Raises:
            NotADirectoryError: there is a file of that name.
        """
        if Path(save_directory).is_file():
            raise NotADirectoryError(f"{save_directory} is a file: name a folder")
        if is_main_process:
            ByteTokenizer().save_pretrained(save_directory)
        super().save_pretrained(save_directory, is_main_process=is_main_process, **options)

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        streamer: BaseStreamer | None = None,
        tokenizer: Any = None,
        mode: "Mode" = "joint",
        **arguments: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Continue prompts of bytes, through transformers' arguments.

        An argument of the call is stronger than ``generation_config``, and that stronger than the model's own. Without
        any limit 200 bytes are written. ``do_sample=True`` draws among all pairs of byte and chunk end unless
        ``top_k``, ``top_p`` or ``min_p`` say otherwise, with seeds from torch's global generator; else the likeliest
        is taken. EOS (0xFF) always ends a text; other ids in ``eos_token_id`` and ``stop_strings`` do too, and stay
        in the result. What can't be honoured (beams, logits processors, scores, an assistant) is refused by name.

        Args:
            inputs, input_ids: integers [B, L], the prompts' bytes, with BOS (0xFE) first or without; None is one
                empty prompt.
            attention_mask: [B, L], 0 at padding on either side. Without it 0xFF at either end is padding.
            streamer: is given the prompt and then each byte as it is written; for one sequence.
            tokenizer: not needed; transformers asks for it beside ``stop_strings``.
            mode: ``joint`` or ``multibyte``, as in :func:`models.generate`.
            arguments: ``max_new_tokens``, ``max_length``, ``do_sample``, ``temperature``, ``top_k``, ``top_p``,
                ``min_p``, ``repetition_penalty``, ``num_return_sequences``, ``stop_strings``, ``eos_token_id``,
                ``pad_token_id``, ``max_time`` (seconds), ``return_dict_in_generate``.

        Returns:
            int64 [B * num_return_sequences, L + longest text]: prompts as they were given, new bytes, EOS where the
            model ended the document, then padding.

        Raises:
            TypeError: ids or mask are no tensors.
            ValueError: an argument that can't be honoured, a value out of range, ids that are no prompt, or a streamer
                for more than one sequence.
        """
        from models.writer import Writer

        if inputs is not None and input_ids is not None:
            raise ValueError("inputs and input_ids are the same argument: give one of them")
        begin = time.monotonic()
        settings = HubSettings.of([self.generation_config, generation_config], arguments)
        ids = inputs if inputs is not None else input_ids
        ids = torch.tensor([[BOS]], device=self.device) if ids is None else ids
        prompts = [prompt for prompt in prompts_of(ids, attention_mask) for _ in range(settings.copies)]
        if streamer is not None and len(prompts) != 1:
            raise ValueError(f"a streamer takes one sequence, got {len(prompts)}: leave it out, or give one prompt")
        max_new = settings.new_bytes(ids.shape[1])
        sampling = settings.samplings(len(prompts))
        writer = Writer(cast("ByteLM", self), prompts, sampling=sampling, stop=settings.stop, mode=mode)
        if streamer is None and settings.max_time is None:
            written = writer.write(max_new)
        else:
            written = _stream(writer, max_new, ids, streamer, begin, settings.max_time)
        sequences = _padded(ids.repeat_interleave(settings.copies, dim=0), written, settings.pad)
        return GenerateDecoderOnlyOutput(cast(torch.LongTensor, sequences)) if settings.as_dict else sequences


def prompts_of(ids: Tensor, attention_mask: Tensor | None) -> list[bytes]:
    """The prompts in padded ids [B, L], without BOS; see :meth:`HubModel.generate`.

    Raises:
        TypeError: ids or mask are no tensors.
        ValueError: ids that are not [B, L] of bytes, a mask of another shape, or a mark inside a prompt.
    """
    for name, value in (("input_ids", ids), ("attention_mask", attention_mask)):
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor [B, L], got {type(value).__name__}: use torch.tensor")
    if ids.ndim != 2 or ids.is_floating_point():
        raise ValueError(f"input_ids must be integers [B, L], got {ids.dtype} {list(ids.shape)}: use tensor[None]")
    if attention_mask is not None and attention_mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask must be {list(ids.shape)} as input_ids is, got {list(attention_mask.shape)}: pad both"
        )
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) <= 255:
        raise ValueError(
            f"input_ids must be bytes, 0 to 255, got {int(ids.min())} to {int(ids.max())}: use ByteTokenizer"
        )
    prompts = []
    for row, values in enumerate(ids.cpu().to(torch.uint8)):
        if attention_mask is None:
            data = bytes(values.tolist()).strip(bytes([EOS]))
        else:
            data = bytes(values[attention_mask[row].cpu().bool()].tolist())
        try:
            prompts.append(to_bytes(data.removeprefix(bytes([BOS]))))
        except ValueError as error:
            raise ValueError(f"input_ids row {row}: after BOS and padding, {error}") from None
    return prompts


def _stream(
    writer: "Writer", max_new: int, ids: Tensor, streamer: BaseStreamer | None, begin: float, max_time: float | None
) -> list["Generation"]:
    """Write piece by piece, to a streamer or against the clock."""
    shown = 0
    if streamer is not None:
        streamer.put(ids.cpu().long())
    for piece in writer.stream(max_new):
        if streamer is not None and piece.data:
            streamer.put(torch.tensor(list(piece.data)))
            shown += len(piece.data)
        if max_time is not None and time.monotonic() - begin > max_time:
            break
    written = writer.write(0)
    if streamer is not None:
        if rest := _with_end(written[0])[shown:]:
            streamer.put(torch.tensor(list(rest)))
        streamer.end()
    return written


def _with_end(generation: "Generation") -> bytes:
    """The new bytes with what ended them."""
    end = bytes([EOS]) if generation.finish_reason == "eos" else generation.stop or b""
    return generation.new + end


def _padded(ids: Tensor, written: Sequence["Generation"], pad: int) -> Tensor:
    """ids [B, L] and what was written after them, int64 [B, L + longest]."""
    new = [_with_end(generation) for generation in written]
    longest = max(map(len, new), default=0)
    rows = [[*data, *[pad] * (longest - len(data))] for data in new]
    return torch.cat(
        [ids.long(), torch.tensor(rows, dtype=torch.int64, device=ids.device).view(len(new), longest)], dim=1
    )


def _check_loaded(where: Any, info: dict[str, Any], lenient: bool) -> None:
    """Refuse weights that are not exactly the model's."""
    other = (
        [] if lenient else [f"{name} {list(theirs)} for {list(ours)}" for name, theirs, ours in info["mismatched_keys"]]
    )
    wrong = {
        "are missing": sorted(info["missing_keys"]),
        "belong to no part of the model": sorted(info["unexpected_keys"]),
        "have another shape": sorted(other),
    }
    reasons = [f"{len(names)} tensors {what} ({_few(names)})" for what, names in wrong.items() if names]
    reasons += info["error_msgs"]
    if reasons:
        raise ValueError(
            f"{where}: {'; '.join(reasons)}: weights and config.json are not of one model; save both together again"
        )


def _few(names: Sequence[str], shown: int = 5) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
