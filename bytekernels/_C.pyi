# What csrc/bind/*.cpp define: tests/csrc/test_stubs.py holds this to the built module. Arrays that go together are
# tuples, whose lengths the module checks.
from collections.abc import Sequence
from typing import TypeAlias

# Contiguous memory of the host: address, bytes, and what keeps it alive.
Array: TypeAlias = tuple[int, int, object]
# Rows that may lie apart: address, bytes, elements from one row to the next, and what keeps them alive.
Rows: TypeAlias = tuple[int, int, int, object]

march: str  # the instruction set, as BYTEKERNELS_MARCH gave it
sanitizers: str  # such as "address,undefined"; "" in a release
cuda_architectures: tuple[str, ...]  # such as ("80", "90", "100"); () without the CUDA half
cuda_refusal: str  # why there is no CUDA half; "" where there is

def advise_huge_pages(memory: Array) -> None: ...
def align_pack(
    uint16_lengths: bool,
    text: Array,
    token_ids: Array,
    token_lengths: Array,
    spans: Array,
    ends: Array | None,
    bos_id: int,
    eos_id: int | None,
    bos: int,
    eos: int,
    outputs: tuple[Array | None, ...],
    threads: int,
) -> None: ...
def align_sizes(
    text: Array, token_ids: Array, spans: Array, ends: Array | None, has_eos_id: bool
) -> tuple[int, int]: ...
def byte_marginals(
    bf16: bool,
    sizes: tuple[int, int],
    logits: Rows,
    vocabulary: tuple[Array, ...],
    chunk_of: Array,
    prefix: Array,
    out: Array,
    threads: int,
) -> None: ...
def causal_conv1d(
    bf16: bool,
    sizes: tuple[int, int, int],
    cu_seqlens: Array,
    arguments: tuple[object, ...],
    y: Array,
    final_states: Array,
    threads: int,
) -> None: ...
def causal_conv1d_backward(
    bf16: bool,
    sizes: tuple[int, int, int],
    cu_seqlens: Array,
    arguments: tuple[object, ...],
    dy: Array,
    dfinal_states: Array,
    outputs: tuple[Array | None, ...],
    threads: int,
) -> None: ...
def chunk_layout(total: int, cu_seqlens: Array, boundary: Array, layout: tuple[Array, ...], threads: int) -> int: ...
def dechunk(
    bf16: bool,
    bf16_residual: bool,
    width: int,
    routing: tuple[Array, ...],
    chunks: Rows,
    weight: Array | None,
    null: Array | None,
    residual: Rows | None,
    out: Array,
    threads: int,
) -> None: ...
def dechunk_backward(
    bf16: bool,
    bf16_du: bool,
    width: int,
    routing: tuple[Array, ...],
    chunks: Rows,
    weight: Array | None,
    null: Array | None,
    du: Array,
    outputs: tuple[Array | None, ...],
    threads: int,
) -> None: ...
def document_offsets(sequences: Sequence[object], bos: int, cu_seqlens: Array) -> int: ...
def gated_rms_norm(
    bf16: bool, sizes: tuple[int, int, int, float], y: Rows, z: Rows, weight: Array, out: Array, threads: int
) -> None: ...
def gated_rms_norm_backward(
    bf16: bool,
    sizes: tuple[int, int, int, float],
    y: Rows,
    z: Rows,
    weight: Array,
    dout: Array,
    dy: Array,
    dz: Array,
    dweight: Array,
    threads: int,
) -> None: ...
def gather_chunks(total: int, row_bytes: int, index: Array, h: Rows, out: Array, threads: int) -> None: ...
def gather_chunks_backward(
    row_bytes: int, index: Array, chunk_of: Array, de: Array, dh: Array, threads: int
) -> None: ...
def longest_suffix(
    ids: Array, cu_seqlens: Array, rows: Array | None, trie: tuple[Array, ...], found: Array, threads: int
) -> None: ...
def longest_suffix_step(
    ids: Array,
    active: Array | None,
    recent: Array,
    counts: Array,
    trie: tuple[Array, ...],
    found: Array,
    threads: int,
) -> None: ...
def mamba2_mixer_step(
    bf16: bool,
    sizes: tuple[int, int, int, int, int, int],
    zxbcdt: Rows,
    parameters: tuple[Array | None, ...],
    options: tuple[float, float, float],
    state: tuple[Array, ...],
    active: Array | None,
    out: Array,
    threads: int,
) -> None: ...
def next_byte_targets(ids: Array, boundary: Array | None, cu_seqlens: Array, targets: Array, threads: int) -> None: ...
def pack_documents(sequences: Sequence[object], bos: int, cu_seqlens: Array, ids: Array, threads: int) -> None: ...
def pack_padded(
    padded: Array, cu_seqlens: Array, row_bytes: int, total: int, length: int, values: Array, threads: int
) -> None: ...
def pack_rows(padded: Array, length: int, bos: int, cu_seqlens: Array, ids: Array, threads: int) -> None: ...
def parallel_probe(n: int, threads: int, fail_at: int = -1) -> list[int]: ...
def parallel_runtime() -> str: ...
def rms_norm(
    bf16: bool,
    bf16_residual: bool,
    sizes: tuple[int, int, int, float],
    x: Rows,
    residual: Rows | None,
    weight: Array,
    y: Array,
    total: Array | None,
    threads: int,
) -> None: ...
def rms_norm_backward(
    bf16: bool,
    bf16_residual: bool,
    sizes: tuple[int, int, int, float],
    x: Rows,
    residual: Rows | None,
    weight: Array,
    dy: Array,
    dtotal: Array | None,
    dx: Array,
    dresidual: Array | None,
    dweight: Array,
    threads: int,
) -> None: ...
def route(
    bf16: bool,
    total: int,
    width: int,
    cu_seqlens: Array,
    lookahead: bool,
    q: Rows,
    k: Rows,
    required: Array | None,
    prob: Array,
    boundary: Array,
    layout: tuple[Array, ...],
    threads: int,
) -> int: ...
def route_backward(
    bf16: bool,
    total: int,
    width: int,
    cu_seqlens: Array,
    lookahead: bool,
    dprob: Array,
    q: Rows,
    k: Rows,
    dq: Array,
    dk: Array,
    threads: int,
) -> None: ...
def sample(
    sizes: tuple[int, int],
    logits: Array,
    seeds: Array,
    counters: Array,
    settings: tuple[Array, ...],
    drawn: Array,
    threads: int,
) -> None: ...
def ssd_scan(
    bf16: bool,
    sizes: tuple[int, int, int, int, int],
    cu_seqlens: Array,
    arguments: tuple[object, ...],
    y: Array,
    final_states: Array,
    threads: int,
) -> None: ...
def ssd_scan_backward(
    bf16: bool,
    sizes: tuple[int, int, int, int, int],
    cu_seqlens: Array,
    arguments: tuple[object, ...],
    dy: Array,
    dfinal_states: Array,
    outputs: tuple[Array | None, ...],
    threads: int,
) -> None: ...
def token_end_mask(
    token_lengths: Array, token_cu: Array, cu_seqlens: Array, bos: bool, mask: Array, threads: int
) -> None: ...
def token_prefix(
    ids: Array, cu_seqlens: Array, boundary: Array, edges: Array, children: Array, prefix: Array, threads: int
) -> None: ...
def constrain_ends(
    ids: Array,
    cu_seqlens: Array,
    log_odds: Array,
    given: Array,
    trie: tuple[Array, ...],
    ends: Array,
    threads: int,
) -> None: ...
def unpack(
    values: Array, cu_seqlens: Array, pad: Array, row_bytes: int, total: int, length: int, padded: Array, threads: int
) -> None: ...
def pack_flat(flat: Array, flat_cu: Array, bos: int, cu_seqlens: Array, ids: Array, threads: int) -> None: ...
def row_index(cu_seqlens: Array, sequence: Array, position: Array, threads: int) -> None: ...

class cuda:
    @staticmethod
    def pack_flat(
        flat: Array, flat_cu: Array, bos: int, cu_seqlens: Array, ids: Array, device: int, stream: int
    ) -> None: ...
    @staticmethod
    def pack_padded(
        padded: Array,
        cu_seqlens: Array,
        row_bytes: int,
        length: int,
        bos: int,
        values: Array,
        device: int,
        stream: int,
    ) -> None: ...
    @staticmethod
    def unpack(
        values: Array,
        cu_seqlens: Array,
        pad: bytes,
        row_bytes: int,
        total: int,
        length: int,
        padded: Array,
        device: int,
        stream: int,
    ) -> None: ...
    @staticmethod
    def next_byte_targets(
        ids: Array, boundary: Array | None, cu_seqlens: Array, targets: Array, device: int, stream: int
    ) -> None: ...
    @staticmethod
    def token_end_mask(
        sums: Array, token_cu: Array, cu_seqlens: Array, bos: bool, mask: Array, device: int, stream: int
    ) -> None: ...
    @staticmethod
    def row_index(cu_seqlens: Array, sequence: Array, position: Array, device: int, stream: int) -> None: ...
    @staticmethod
    def longest_suffix(
        ids: Array,
        cu_seqlens: Array,
        rows: Array | None,
        trie: tuple[Array, ...],
        found: Array,
        device: int,
        stream: int,
    ) -> None: ...
    @staticmethod
    def longest_suffix_step(
        ids: Array,
        active: Array | None,
        recent: Array,
        counts: Array,
        trie: tuple[Array, ...],
        found: Array,
        device: int,
        stream: int,
    ) -> None: ...
    @staticmethod
    def constrain_ends(
        ids: Array,
        cu_seqlens: Array,
        log_odds: Array,
        given: Array,
        trie: tuple[Array, ...],
        choices: Array,
        best: Array,
        before: Array,
        ends: Array,
        device: int,
        stream: int,
    ) -> None: ...
    @staticmethod
    def token_prefix(
        ids: Array,
        cu_seqlens: Array,
        boundary: Array,
        edges: Array,
        children: Array,
        prefix: Array,
        device: int,
        stream: int,
    ) -> None: ...
    @staticmethod
    def visit(items: int, most_blocks: int, visits: Array) -> None: ...
