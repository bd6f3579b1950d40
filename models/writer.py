"""Writing bytes for a whole batch: chunk-synchronous, from prompts of any length, stopped and continued at will."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal, Self, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bytekernels import BOS, EOS
from bytekernels.files import write_whole
from models.byte_lm import ByteLM, Prefill
from models.decoding import BlockState, copy_of, tensors_of
from models.padding import pack_with_padding
from models.sampling import Draws, Sampling
from models.slots import ENDED, FULL, GOING, REASONS, STOPPED, WRITTEN, Slots
from models.stops import Release, Stops, StopTable, stops_for_each
from models.utf8 import to_bytes
from models.written import Generation, Piece

Mode = Literal["joint", "multibyte"]
LANES = 8  # slots come in eights: then the matrix library rounds each row alike, whoever shares the batch
PATIENCE = 8  # byte steps after which the core serves those who wait, though others' chunks are still open
FORMAT = "bytekernels.writer"  # the key of a saved writer's metadata


class Writer:
    """A batch of texts in the making.

    All sequences step bytes until each has closed its chunk, or for a few steps; one step of the core then serves all
    that wait. A sequence that waits, or has ended, is left as it is. What a sequence's text comes to does not depend on
    the others.

    ``mode="joint"`` draws each byte together with whether a chunk ends on it. ``mode="multibyte"`` draws the byte
    alone; a second head has drafted the byte after it, the encoder is stepped on the draft, the router decides whether
    the chunk ends, and the draft is forgotten.
    The prompt's bits are the router's; the bit of its last byte is found as those of written bytes are.

    Args:
        model: a byte-level model after stage 2, in evaluation mode.
        prompts: text, or bytes without 0xFE and 0xFF, valid UTF-8 or not; may be empty.
        sampling: for all prompts, or one for each; greedy by default.
        stop: strings that end a text, for all prompts, or a sequence of them for each.
        mode: how chunk ends are found.

    Raises:
        TypeError: prompts or stop strings that are neither str nor bytes.
        ValueError: a prompt holds a reserved byte, or more chunks than the core has positions; settings that are not as
            many as prompts; an empty stop string; a mode that the model has no head for; a model whose dechunk weight
            sees the next byte.
    """

    def __init__(
        self,
        model: ByteLM,
        prompts: Sequence[str | bytes],
        *,
        sampling: Sampling | Sequence[Sampling] | None = None,
        stop: Stops = (),
        mode: Mode = "joint",
    ) -> None:
        if isinstance(prompts, str | bytes | bytearray):
            raise TypeError(f"prompts must be a sequence of prompts, got one {type(prompts).__name__}: use [prompt]")
        for i, prompt in enumerate(prompts):
            if not isinstance(prompt, str | bytes):
                raise TypeError(f"prompt {i} must be str or bytes, got {type(prompt).__name__}: use bytes(prompt)")
        self.prompts = [to_bytes(prompt) for prompt in prompts]
        spare = -len(prompts) % LANES
        self._set_up(
            model,
            mode,
            [*range(len(prompts)), *[-1] * spare],
            _settings_for_each(sampling or Sampling(), len(prompts)),
            stops_for_each(stop, len(prompts)),
        )
        self._ended: dict[int, Generation] = {}
        self._prompt_bits: list[list[bool]] = []
        if prompts:
            self._read_prompts()

    def _set_up(
        self, model: ByteLM, mode: Mode, index: list[int], settings: list[Sampling], stops: list[list[bytes]]
    ) -> None:
        check_mode(model, mode)
        self.model, self.mode = model, mode
        self._settings, self._stops = settings, stops
        self._releases = [Release(strings) for strings in stops]
        self._place(index)

    def _place(self, index: list[int]) -> None:
        """Put prompts into slots, -1 for none."""
        self._index = index
        self._graph: torch.cuda.CUDAGraph | None = None
        device = self.model.device
        self._draws = Draws([self._settings[max(i, 0)] for i in index], device)
        longest = max((len(one) for strings in self._stops for one in strings), default=0)  # of all: tails stay as long
        self._table = StopTable.of([self._stops[i] if i >= 0 else [] for i in index], longest, device)

    @torch.no_grad()
    def _read_prompts(self) -> None:
        most_chunks = self.model.core.max_chunks
        ids, cu_seqlens = pack_with_padding(self.prompts, self.model.device, most_chunks=most_chunks)
        last = cu_seqlens[1 : len(self.prompts) + 1].long() - 1
        read = self.model.prefill(ids, cu_seqlens)
        slots = torch.tensor([max(i, 0) for i in self._index], device=ids.device)
        used = torch.tensor([i >= 0 for i in self._index], device=ids.device)
        self._state = read.state.select(slots)
        self._slots = Slots.before(ids[last][slots], read.h[slots], used, self._table.longest)
        self._scratch = self._scratch_states()
        if self._draws.seen is not None:
            for slot, prompt in enumerate(self.prompts):
                self._draws.seen[slot, list(prompt)] = True
        self._slots.bit.copy_(self._last_bits(read, read.boundary[last][slots], slots, used))
        read.boundary[last] = self._slots.bit[: len(self.prompts)]
        lengths = [len(prompt) + 1 for prompt in self.prompts]
        self._prompt_bits = [bits.tolist()[1:] for bits in read.boundary[: sum(lengths)].cpu().split(lengths)]

    def _last_bits(self, read: Prefill, routed: Tensor, slots: Tensor, used: Tensor) -> Tensor:
        """Whether a chunk ends on the last byte of each prompt: bool [S]."""
        s = self._slots
        if not self.model.config.lookahead:
            return routed
        if self.mode == "multibyte":
            assert read.draft is not None
            return self._look_ahead(read.router_read[slots], read.draft[slots], used) | (s.byte == BOS)
        byte = s.byte.long()[:, None]
        halves = read.logits[slots].gather(1, torch.cat([byte, byte + 256], dim=1)).float()
        return self._draws.index(halves, used).bool() | (s.byte == BOS)

    # ------------------------------------------------------------------------------------------------ what users call

    @torch.no_grad()
    def write(self, max_new_bytes: int) -> list[Generation]:
        """Write on until every text has ended or has this many more bytes; call again to continue.

        Args:
            max_new_bytes: for each text that has not ended (by EOS, a stop string, or the core's last position).

        Returns:
            For each prompt, all that has been written after it so far.

        Raises:
            ValueError: a negative number of bytes.
        """
        for _ in self._run(max_new_bytes):
            pass
        if self.prompts:
            self._collect()
            for i, reason in zip(self._index, self._slots.reason.tolist(), strict=True):
                if i >= 0 and max_new_bytes:
                    self._releases[i].take(drop=len(self._ended[i].stop or b""), hold=False, last=reason != WRITTEN)
        return [self._ended[i] for i in range(len(self.prompts))]

    @torch.no_grad()
    def stream(self, max_new_bytes: int, *, flush: bool = False) -> Iterator[Piece]:
        """As :meth:`write`, giving the bytes as they come.

        Bytes that begin a stop string are held back until it is complete or broken off, characters until they are
        whole. Where a text stops for its length alone they are held back beyond the call: the pieces of all streams
        join to the text, however it was cut, and what an abandoned stream has not given the next one gives. What
        :meth:`write` has written and returned is not given again; ``write(0)`` only looks.

        Args:
            max_new_bytes: for each text that has not ended.
            flush: do not hold anything back at the end, for texts that are not to be continued: the pieces then join to
                what :meth:`write` would have added.

        Raises:
            ValueError: a negative number of bytes.
        """
        going = dict.fromkeys(i for i in self._index if i >= 0)
        if self.prompts:
            self._collect()
        for i in range(len(self.prompts)):
            if i not in going:
                yield Piece(i, b"", (), "", self._ended[i].finish_reason)
        for _ in self._run(max_new_bytes):
            s = self._slots
            columns = torch.stack([s.wrote.long(), s.byte, s.bit, s.reason, s.stop]).tolist()
            for i, wrote, byte, bit, reason, stop in zip(self._index, *columns, strict=True):
                if i not in going or (reason == GOING and not wrote):
                    continue
                if wrote:
                    self._releases[i].add(bytes([byte]), [bool(bit)])
                drop = len(self._stops[i][stop]) if reason == STOPPED else 0
                last = reason not in (GOING, WRITTEN) or (flush and reason == WRITTEN)
                data, bits, text = self._releases[i].take(drop=drop, hold=not last, last=last)
                if reason != GOING:
                    del going[i]
                if data or reason != GOING:
                    yield Piece(i, data, bits, text, REASONS[reason])

    def save(self, path: str | Path) -> None:
        """Keep the writer in one safetensors file, from which :meth:`load` goes on; replaced whole or not at all."""
        tensors = {"draws.counters": self._draws.counters}
        if self.prompts:
            tensors |= {f"slots.{name}": tensor for name, tensor in self._slots.tensors().items()}
            tensors |= {f"state.{name}": tensor for name, tensor in self._state.tensors().items()}
        if self._draws.seen is not None:
            tensors["draws.seen"] = self._draws.seen
        about = {
            "mode": self.mode,
            "index": self._index,
            "prompts": [prompt.hex() for prompt in self.prompts],
            "prompt_bits": self._prompt_bits,
            "sampling": [asdict(one) for one in self._settings],
            "stop": [[one.hex() for one in strings] for strings in self._stops],
            "given": [(one.given, one.told) for one in self._releases],
            "ended": {i: one.to_json() for i, one in self._ended.items() if i not in self._index},
        }
        copies = {name: one.detach().cpu().contiguous().clone() for name, one in tensors.items()}
        write_whole(Path(path), lambda partial: save_file(copies, partial, metadata={FORMAT: json.dumps(about)}))

    @classmethod
    def load(cls, model: ByteLM, path: str | Path) -> Self:
        """A writer that goes on where a saved one was.

        Args:
            model: the same model, in the same dtype.
            path: what :meth:`save` wrote.

        Raises:
            OSError: there is no such file.
            ValueError: it is not a whole writer, or of another model.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                about = json.loads((file.metadata() or {}).get(FORMAT, "null"))
                tensors = {name: file.get_tensor(name).to(model.device) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error}): save the writer again") from None
        if about is None:
            raise ValueError(f"{path} holds no writer: it must be a file that Writer.save wrote")
        writer = cls.__new__(cls)
        writer.prompts = [bytes.fromhex(prompt) for prompt in about["prompts"]]
        writer._set_up(
            model,
            about["mode"],
            about["index"],
            [Sampling(**one) for one in about["sampling"]],
            [[bytes.fromhex(one) for one in strings] for strings in about["stop"]],
        )
        writer._releases = [Release(s, *given) for s, given in zip(writer._stops, about["given"], strict=True)]
        writer._prompt_bits = about["prompt_bits"]
        writer._ended = {int(i): Generation.from_json(one) for i, one in about["ended"].items()}
        if writer.prompts:
            writer._state = model.empty_state(len(writer._index))
            writer._state.restore(_under("state.", tensors))
            writer._slots = Slots(**_under("slots.", tensors))
            writer._scratch = writer._scratch_states()
        writer._draws.counters = tensors["draws.counters"]
        writer._draws.seen = tensors.get("draws.seen")
        return writer

    # ------------------------------------------------------------------------------------------------ the loop

    def _run(self, max_new_bytes: int) -> Iterator[None]:
        """Byte step after byte step, with a stop after each, and one before the first."""
        if max_new_bytes < 0:
            raise ValueError(f"max_new_bytes must be >= 0, got {max_new_bytes}")
        if not self.prompts:
            return
        s = self._slots
        goes_on = (s.reason == GOING) | (s.reason == WRITTEN)
        s.limit.copy_(torch.where(goes_on, s.count + max_new_bytes, s.limit))
        s.reason.masked_fill_(goes_on, GOING if max_new_bytes else WRITTEN)
        if s.make_room(int(s.limit.max())):
            self._graph = None
        s.wrote.zero_()
        yield
        since = 0  # byte steps since the core's last
        while True:
            s = self._slots
            going = s.reason == GOING
            signs = [going.any().long(), (going & ~s.bit).any().long(), self._state.cache.lengths.max()]
            some_go, some_are_open, self._state.cache.longest = torch.stack(signs).tolist()
            if not some_go:
                return
            if some_are_open and since < PATIENCE:
                since += 1
                s.active.copy_(going & ~s.bit)
                self._take_step()
            elif self._state.cache.longest >= self._state.cache.max_chunks and self._end_full():
                s.wrote.zero_()
            else:
                since = 0
                self._make_dense()
                s = self._slots
                s.active.copy_(s.reason == GOING)
                self.model.close_chunks(s.h, s.active & s.bit, self._state)
                self._take_step()
            yield

    def _end_full(self) -> bool:
        """End the texts for whose next chunk the core has no position; whether there were any."""
        s, cache = self._slots, self._state.cache
        full = (s.reason == GOING) & s.bit & (cache.lengths >= cache.max_chunks)
        s.reason.masked_fill_(full, FULL)
        return bool(full.any())

    def _take_step(self) -> None:
        if self.model.device.type != "cuda":
            self._step()
            return
        with torch.cuda.device(self.model.device):
            if self._graph is None:
                self._graph = self._capture()
            self._graph.replay()

    def _capture(self) -> torch.cuda.CUDAGraph:
        """The byte step as a CUDA graph. Until it is captured no slot is active, so that nothing changes."""
        active = self._slots.active.clone()
        self._slots.active.zero_()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):  # its own default is a stream of the first device that captured
            self._step()
        self._slots.active.copy_(active)
        return graph

    def _step(self) -> None:
        """Every active slot: the decoder reads its byte, the next one is drawn, the encoder reads that one."""
        s = self._slots
        logits, draft = self.model.step_decoder(s.h, s.byte, self._state, s.active)
        if self.mode == "joint":
            drawn = self._draws.pairs(logits, s.active)
        else:
            drawn = self._draws.pairs(torch.logaddexp(logits[:, :256].float(), logits[:, 256:].float()), s.active)
        s.byte.copy_(torch.where(s.active, drawn % 256, s.byte))
        h, read = self.model.step_encoder(s.byte, self._state, s.active)
        s.h.copy_(torch.where(s.active[:, None], h, s.h))
        bit = drawn >= 256 if draft is None or self.mode == "joint" else self._look_ahead(read, draft, s.active)
        s.bit.copy_(torch.where(s.active, bit, s.bit))
        self._note()

    def _look_ahead(self, read: Tensor, draft: Tensor, active: Tensor) -> Tensor:
        """Whether the router, having read [S, d_r], would end a chunk if the likeliest draft [S, 256] came next."""
        reader, states = self.model.router_source(self._state)
        for scratch, state in zip(self._scratch, states, strict=True):
            for name, tensor in tensors_of(state).items():
                getattr(scratch, name).copy_(tensor)
        following = reader.step(draft.argmax(1).to(torch.uint8), self._scratch, active)
        return self.model.router.pair(read, following) >= 0.5

    def _note(self) -> None:
        """Write down what the active slots drew, and who has ended."""
        s = self._slots
        ended = s.byte == EOS
        s.wrote.copy_(s.active & ~ended)
        self._draws.saw(s.byte, s.wrote)
        column = torch.where(s.wrote, s.count, s.new.shape[1] - 1)[:, None]
        s.new.scatter_(1, column, s.byte[:, None])
        s.bits.scatter_(1, column, s.bit[:, None])
        s.count += s.wrote
        reason = torch.where(s.count >= s.limit, WRITTEN, GOING)
        if self._table.longest:
            tail = torch.cat([s.tail[:, 1:], s.byte[:, None]], dim=1)
            s.tail.copy_(torch.where(s.wrote[:, None], tail, s.tail))
            found = self._table.matches(s.tail) & s.wrote[:, None]
            reason = torch.where(found.any(1), STOPPED, reason)
            s.stop.copy_(torch.where(s.active, found.int().argmax(1), s.stop))
        reason = torch.where(ended, ENDED, reason)
        s.reason.copy_(torch.where(s.active, reason, s.reason))

    def _make_dense(self) -> None:
        """Leave out the slots of texts that have ended, where that saves half of them."""
        if len(self._index) <= LANES:
            return
        kept = [slot for slot, reason in enumerate(self._slots.reason.tolist()) if reason in (GOING, WRITTEN)]
        spare = -len(kept) % LANES
        if 2 * (len(kept) + spare) > len(self._index):
            return
        self._collect()
        chosen = torch.tensor(kept + kept[:1] * spare, device=self.model.device)
        draws = self._draws
        self._place([self._index[slot] for slot in kept] + [-1] * spare)
        self._draws.counters = draws.counters[chosen]
        self._draws.seen = None if draws.seen is None else draws.seen[chosen]
        self._state, self._slots = self._state.select(chosen), self._slots.select(chosen)
        self._slots.reason[len(kept) :] = FULL
        self._scratch = self._scratch_states()

    def _scratch_states(self) -> list[BlockState]:
        """Where what the router reads bytes with is stepped on drafts."""
        if self.mode == "joint":
            return []
        return [copy_of(state) for state in self.model.router_source(self._state)[1]]

    def _collect(self) -> None:
        """Note what has been written so far."""
        s = self._slots
        columns = torch.stack([s.count, s.reason.long(), s.stop]).tolist()
        new, bits = s.new.cpu().numpy(), s.bits.cpu().numpy()
        for slot, (i, count, reason, which) in enumerate(zip(self._index, *columns, strict=True)):
            if i < 0:
                continue
            known = len(self._releases[i])
            self._releases[i].add(new[slot, known:count].tobytes(), bits[slot, known:count].tolist())
            stop = self._stops[i][which] if reason == STOPPED else None
            size = count - len(stop or b"")
            boundaries = (*self._prompt_bits[i], *bits[slot, :size].tolist())
            end = REASONS[reason] or "length"
            self._ended[i] = Generation(self.prompts[i], new[slot, :size].tobytes(), boundaries, end, stop)


def check_mode(model: ByteLM, mode: str) -> None:
    """Refuse a mode that is none, or that the model has no head for.

    Raises:
        ValueError: with what to use instead.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be 'joint' or 'multibyte', got {mode!r}")
    if mode == "multibyte" and not model.config.draft_head:
        raise ValueError("mode='multibyte' needs a model with a draft head (config.draft_head): use mode='joint'")


def _settings_for_each(sampling: Sampling | Sequence[Sampling], prompts: int) -> list[Sampling]:
    if isinstance(sampling, Sampling):
        return [sampling] * prompts
    if len(sampling) != prompts:
        raise ValueError(f"sampling must be one for all or one for each of {prompts} prompts, got {len(sampling)}")
    return list(sampling)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
