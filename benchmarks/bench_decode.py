"""How fast texts are written, in batches and one by one, beside whole forward passes and the teacher's own tokens."""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the command works without an install

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel

from benchmarks import harness, machine
from benchmarks.command import DTYPES, default_device
from benchmarks.report import aligned
from bytekernels import BOS, EOS
from bytekernels.files import write_json
from models import ByteLM, ByteLMConfig, Writer
from models.padding import pack_with_padding

PROVIDERS = ("bytekernels", "one by one", "recompute", "teacher")
RECOMPUTED = 32  # bytes that are written by whole forward passes


@dataclass(frozen=True)
class Row:
    """What a provider took for a batch.

    Attributes:
        provider: who wrote.
        batch: texts.
        new_bytes: written, all texts together.
        seconds: median over the repeats.
        bytes_per_second: of all texts together.
        ms_per_byte: time for a byte of every text.
    """

    provider: str
    batch: int
    new_bytes: int
    seconds: float
    bytes_per_second: float
    ms_per_byte: float


def prompts_of(count: int) -> list[str]:
    """Beginnings of Python's help topics, 16 to 79 characters long."""
    texts = [" ".join(text.split()) for _, text in sorted(topics.items())]
    return [texts[i % len(texts)][: 16 + 37 * i % 64] for i in range(count)]


def small_model() -> ByteLM:
    """The quickstart's sizes with random weights, to be timed and not to be read."""
    torch.manual_seed(0)
    core = LlamaConfig(
        vocab_size=4096, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=688, max_position_embeddings=2048,
    )  # fmt: skip
    sizes = dict(width=192, encoder_layers=2, decoder_layers=2, state_size=32, bridge_inner=384, router_inner=256)
    return ByteLM(ByteLMConfig(core={**core.to_dict(), "model_type": "llama"}, token_head=False, **sizes))


def write_together(model: ByteLM, prompts: Sequence[str], size: int) -> list[bytes]:
    return [text.new for text in Writer(model, prompts).write(size)]


def write_apart(model: ByteLM, prompts: Sequence[str], size: int) -> list[bytes]:
    return [Writer(model, [prompt]).write(size)[0].new for prompt in prompts]


@torch.no_grad()
def write_by_forward(model: ByteLM, prompts: Sequence[str], size: int) -> list[bytes]:
    """The same greedy texts with no state at all: for each byte a forward pass over everything so far, packed."""
    texts = [bytearray(prompt.encode()) for prompt in prompts]
    bits: list[list[bool]] = [[] for _ in prompts]
    ids, cu_seqlens = pack_with_padding([bytes(text) for text in texts], model.device)
    output = model(ids, cu_seqlens)
    for i, text in enumerate(texts):
        start, end = int(cu_seqlens[i]), int(cu_seqlens[i + 1])
        bits[i] = output.routing.boundary[start:end].tolist()
        if text and model.config.lookahead:
            halves = output.logits[end - 2, [text[-1], text[-1] + 256]]
            bits[i][-1] = bool(halves[1] > halves[0])
    ended = [False] * len(prompts)
    for _ in range(size):
        ids, cu_seqlens = pack_with_padding([bytes(text) for text in texts], model.device)
        boundary = torch.ones(len(ids), dtype=torch.bool)
        known = torch.tensor([bit for row in bits for bit in row])
        boundary[: len(known)] = known
        logits = model(ids, cu_seqlens, boundary.to(model.device)).logits
        rows = logits[cu_seqlens[1:-1].long() - 1].float()
        rows[:, [BOS, BOS + 256]] = -torch.inf
        for i, best in enumerate(rows.argmax(1).tolist()):
            ended[i] = ended[i] or best % 256 == EOS
            if not ended[i]:
                texts[i].append(best % 256)
                bits[i].append(best >= 256)
    return [bytes(text[len(prompt.encode()) :]) for text, prompt in zip(texts, prompts, strict=True)]


@torch.no_grad()
def write_tokens(teacher: PreTrainedModel, tokenizer: Any, prompts: Sequence[str], size: int) -> list[bytes]:
    """The teacher's greedy texts, token by token with its cache, of at least ``size`` bytes unless it ends before."""
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left").to(teacher.device)
    batch.pop("token_type_ids", None)
    out = teacher.generate(
        **batch, max_new_tokens=max(1, size // 4), do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    return [
        text.encode()
        for text in tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    ]


def time_it(write: Callable[[], list[bytes]], device: torch.device, repeats: int) -> tuple[float, list[bytes]]:
    """The median of the seconds that a call takes, after one to warm up, and what it wrote."""
    written, seconds = write(), []
    for _ in range(repeats):
        gc.collect()
        begin = time.perf_counter()
        write()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds), written


def writers(model: ByteLM, teacher: tuple[PreTrainedModel, Any] | None) -> dict[str, Callable[..., list[bytes]]]:
    """By provider, a function of (prompts, bytes)."""
    found: dict[str, Callable[..., list[bytes]]] = {
        "bytekernels": partial(write_together, model),
        "one by one": partial(write_apart, model),
        "recompute": lambda prompts, size: write_by_forward(model, prompts, min(size, RECOMPUTED)),
    }
    return found if teacher is None else {**found, "teacher": partial(write_tokens, *teacher)}


def measure(
    providers: Mapping[str, Callable[..., list[bytes]]],
    batches: Sequence[int],
    size: int,
    device: torch.device,
    repeats: int,
) -> tuple[list[Row], list[str]]:
    """A row for each batch and provider.

    Those of the same model must begin as the first one's greedy texts do, or are refused and not reported.

    Returns:
        The rows, and a line for each refusal.
    """
    rows: list[Row] = []
    refused = []
    for count in batches:
        prompts, first = prompts_of(count), None
        for name, write in providers.items():
            again = 1 if name in ("one by one", "recompute") else repeats
            seconds, written = time_it(partial(write, prompts, size), device, again)
            total = sum(map(len, written))
            same = name == "teacher" or first is None or all(map(bytes.startswith, first, written))
            first = first or written
            if not same or not total:
                refused.append(f"{name} at batch {count} " + ("wrote other bytes" if total else "wrote nothing"))
                continue
            rows.append(Row(name, count, total, seconds, total / seconds, 1e3 * seconds * count / total))
            print(f"{name}, batch {count}: {total / seconds:.0f} bytes/s", flush=True)
    return rows, refused


def table(rows: Sequence[Row]) -> str:
    """The rows in words."""
    cells = [["provider", "batch", "bytes", "bytes/s", "ms per byte of each"]]
    cells += [
        [row.provider, str(row.batch), str(row.new_bytes), f"{row.bytes_per_second:.0f}", f"{row.ms_per_byte:.3f}"]
        for row in rows
    ]
    return "\n".join(aligned(cells, left=1))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 1 where a provider was refused."""
    parser = argparse.ArgumentParser(prog="bench_decode.py", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--model", type=Path, help="a stage-2 model's folder (default: random weights of quickstart's sizes)"
    )
    parser.add_argument("--teacher", type=Path, help="a token-trained model's folder, to be timed beside it")
    parser.add_argument("--batch", type=int, nargs="+", help="texts at once (default: 1 8 64)")
    parser.add_argument("--bytes", type=int, help="to write after each prompt (default: 256)")
    parser.add_argument("--provider", nargs="+", choices=PROVIDERS, default=PROVIDERS)
    parser.add_argument("--repeats", type=int, default=3, help="of bytekernels and the teacher; the others run once")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: float32 on the CPU, bfloat16 on a GPU")
    parser.add_argument("--device", type=torch.device)
    parser.add_argument("--quick", action="store_true", help="two texts, 16 bytes")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    device = options.device or default_device()
    dtype = DTYPES[options.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    batches = options.batch or ([2] if options.quick else [1, 8, 64])
    size = options.bytes or (16 if options.quick else 256)
    if min(batches) < 1 or size < 1 or options.repeats < 1:
        parser.error(f"--batch, --bytes and --repeats must be at least 1, got {batches}, {size}, {options.repeats}")
    model = (ByteLM.from_pretrained(options.model) if options.model else small_model()).to(device, dtype).eval()
    teacher = None
    if options.teacher:
        tokenizer = AutoTokenizer.from_pretrained(options.teacher)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        teacher = AutoModelForCausalLM.from_pretrained(options.teacher, dtype=dtype).to(device).eval(), tokenizer
    what = str(options.model) if options.model else "random weights of quickstart's sizes: its texts mean nothing"
    print(f"{what}; {dtype} on {device}, greedy, {size} bytes a text", flush=True)
    chosen = {name: write for name, write in writers(model, teacher).items() if name in options.provider}
    rows, refused = measure(chosen, batches, size, device, options.repeats)
    facts = machine.facts(device, harness.copy_bandwidth(device, harness.QUICK))
    print(f"\n{table(rows)}\n", *refused, machine.line(facts), sep="\n")
    if options.json:
        report = {"model": what, "bytes": size, "dtype": str(dtype), "rows": [asdict(row) for row in rows]}
        write_json(options.json, {"machine": facts, "refused": refused, **report})
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
