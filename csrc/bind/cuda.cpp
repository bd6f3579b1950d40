// The CUDA kernels as _C.cuda. Arrays are on the device whose number each function takes last, with the stream; with
// device -1 they are the host's, and the kernels' bodies run there (cuda/launch.h).
//
// What is on a device cannot be read here: there, sizes alone are checked. Kernels write outputs, and read sources,
// within the sizes given whatever the offsets say.
#include <pybind11/stl.h>

#include <optional>

#include "bind/bos.h"
#include "bind/constrain.h"
#include "bind/suffix.h"
#include "bindings.h"
#include "cuda/constrain.h"
#include "cuda/launch.h"
#include "cuda/pack.h"
#include "cuda/row_index.h"
#include "cuda/suffix.h"
#include "cuda/suffix_step.h"
#include "cuda/targets.h"
#include "cuda/token_ends.h"
#include "cuda/token_prefix.h"
#include "cuda/unpack.h"

namespace bytekernels::cuda_bindings {

// The offsets; on the host also checked against the rules of ragged.h.
Offsets offsets_at(const Array& array, int64_t total, const Where& where, const char* name = "cu_seqlens") {
  if (where.device < 0) return offsets(array, total, name);
  const int64_t count = elements(array, sizeof(int32_t), name);
  if (count == 0) refuse(name, " must have S + 1 elements, got none");
  if (count == 1 && total != 0) refuse(name, " cuts no sequences, but there are ", total, " rows");
  return {pointer<const int32_t>(array, count, name), count - 1};
}

Vectors vectors(const Array& array, int64_t bytes, const char* name) {
  return {pointer<uint8_t>(array, bytes, name), bytes};
}

template <class Body>
void run(const Body& body, const Where& where) {
  py::gil_scoped_release release;
  run_on_grid(body, where);
}

void pack_flat(const Array& flat, const Array& flat_cu, int bos, const Array& cu_seqlens, const Array& ids, int device,
               uintptr_t stream) {
  const Where where{device, stream};
  check_bos(bos);
  const int64_t bytes = elements(flat, 1, "flat");
  const Offsets documents = offsets_at(flat_cu, bytes, where, "flat_cu");
  const int64_t shift = bos == kNoBos ? 0 : 1;
  const Vectors out = vectors(ids, bytes + documents.sequences * shift, "ids");
  auto* cu_out = pointer<int32_t>(cu_seqlens, documents.sequences + 1, "cu_seqlens");
  const auto* source = pointer<const uint8_t>(flat, bytes, "flat");
  run(PackKernel{source, bytes, {documents.cu, 1, shift}, documents.sequences, -1, bos, out, cu_out}, where);
}

void pack_padded(const Array& padded, const Array& cu_seqlens, int64_t row_bytes, int64_t length, int bos,
                 const Array& values, int device, uintptr_t stream) {
  const Where where{device, stream};
  check_bos(bos);
  if (length < 0 || row_bytes < 0) refuse("length and row_bytes must be at least 0, got ", length, " and ", row_bytes);
  if (bos != kNoBos && row_bytes != 1) refuse("row_bytes must be 1 where there is a bos, got ", row_bytes);
  const int64_t bytes = elements(values, 1, "values");
  if (row_bytes == 0 ? bytes != 0 : bytes % row_bytes != 0) {
    refuse("values has ", bytes, " bytes, not a multiple of row_bytes ", row_bytes);
  }
  if (row_bytes == 0) return;
  const Offsets cuts = offsets_at(cu_seqlens, bytes / row_bytes, where);
  const int64_t source_bytes = product({cuts.sequences, length, row_bytes});
  const auto* source = pointer<const uint8_t>(padded, source_bytes, "padded");
  const Starts starts{cuts.cu, row_bytes, 0};
  const Vectors out = vectors(values, bytes, "values");
  run(PackKernel{source, source_bytes, starts, cuts.sequences, length * row_bytes, bos, out, nullptr}, where);
}

void unpack(const Array& values, const Array& cu_seqlens, const py::bytes& pad, int64_t row_bytes, int64_t total,
            int64_t length, const Array& padded, int device, uintptr_t stream) {
  const Where where{device, stream};
  const Offsets cuts = offsets_at(cu_seqlens, total, where);
  const std::string element = pad;
  const auto element_bytes = static_cast<int64_t>(element.size());
  if (element_bytes < 1 || Vector::kBytes % element_bytes != 0) {
    refuse("pad must have 1, 2, 4, 8 or 16 bytes, got ", element_bytes);
  }
  if (length < 0 || row_bytes < 0 || row_bytes % element_bytes != 0) {
    refuse("length and row_bytes must be at least 0 and row_bytes a multiple of pad's ", element_bytes, " bytes, got ",
           length, " and ", row_bytes);
  }
  const int64_t value_bytes = product({total, row_bytes});
  const auto* source = pointer<const uint8_t>(values, value_bytes, "values");
  const Vectors out = vectors(padded, product({cuts.sequences, length, row_bytes}), "padded");
  const Vector pattern = UnpackKernel::padding(reinterpret_cast<const uint8_t*>(element.data()), element_bytes, out);
  run(UnpackKernel{source, value_bytes, cuts.cu, row_bytes, length * row_bytes, pattern, out}, where);
}

void next_byte_targets(const Array& ids, const std::optional<Array>& boundary, const Array& cu_seqlens,
                       const Array& targets, int device, uintptr_t stream) {
  const Where where{device, stream};
  const int64_t total = elements(ids, 1, "ids");
  const Offsets cuts = offsets_at(cu_seqlens, total, where);
  const auto* bytes = pointer<const uint8_t>(ids, total, "ids");
  const auto* ends = boundary ? pointer<const uint8_t>(*boundary, total, "boundary") : nullptr;
  auto* out = reinterpret_cast<uint8_t*>(pointer<int64_t>(targets, total, "targets"));
  const Vectors rows{out, total * static_cast<int64_t>(sizeof(int64_t))};
  run(TargetsKernel{bytes, ends, cuts.cu, cuts.sequences, total, rows}, where);
}

void token_end_mask(const Array& sums, const Array& token_cu, const Array& cu_seqlens, bool bos, const Array& mask,
                    int device, uintptr_t stream) {
  const Where where{device, stream};
  const int64_t total = elements(mask, 1, "mask");
  const int64_t tokens = elements(sums, sizeof(int32_t), "sums");
  const Offsets rows = offsets_at(cu_seqlens, total, where);
  const Offsets cuts = offsets_at(token_cu, tokens, where, "token_cu");
  if (cuts.sequences != rows.sequences) {
    refuse("token_cu cuts ", cuts.sequences, " sequences, cu_seqlens ", rows.sequences);
  }
  const auto* ends = pointer<const int32_t>(sums, tokens, "sums");
  run(TokenEndsKernel{ends, tokens, cuts.cu, rows.cu, rows.sequences, bos, vectors(mask, total, "mask")}, where);
}

void row_index(const Array& cu_seqlens, const Array& sequence, const Array& position, int device, uintptr_t stream) {
  const Where where{device, stream};
  const int64_t total = elements(sequence, sizeof(int32_t), "sequence");
  const Offsets cuts = offsets_at(cu_seqlens, total, where);
  auto rows = [&](const Array& array, const char* name) {
    return Vectors{reinterpret_cast<uint8_t*>(pointer<int32_t>(array, total, name)),
                   total * static_cast<int64_t>(sizeof(int32_t))};
  };
  const RowIndexKernel body{cuts.cu, cuts.sequences, rows(sequence, "sequence"), rows(position, "position")};
  if (body.sequence.skew() != body.position.skew()) refuse("sequence and position must be aligned alike to 16 bytes");
  run(body, where);
}

void longest_suffix(const Array& ids, const Array& cu_seqlens, const std::optional<Array>& rows,
                    const StringTrieArrays& trie, const Array& found, int device, uintptr_t stream) {
  const Where where{device, stream};
  const int64_t total = elements(ids, 1, "ids");
  const Offsets cuts = offsets_at(cu_seqlens, total, where);
  const int64_t count = rows ? elements(*rows, sizeof(int32_t), "rows") : total;
  const auto* bytes = pointer<const uint8_t>(ids, total, "ids");
  const auto* asked = optional_pointer<const int32_t>(rows, count, "rows");
  auto* out = pointer<int32_t>(found, count, "found");
  run(SuffixKernel{string_trie_of(trie), bytes, total, cuts.cu, cuts.sequences, asked, count, out}, where);
}

void longest_suffix_step(const Array& ids, const std::optional<Array>& active, const Array& recent, const Array& counts,
                         const StringTrieArrays& trie, const Array& found, int device, uintptr_t stream) {
  const Where where{device, stream};
  const SuffixRing ring = ring_of(recent, counts);
  const auto* bytes = pointer<const uint8_t>(ids, ring.sequences, "ids");
  const auto* flags = optional_pointer<const uint8_t>(active, ring.sequences, "active");
  auto* out = pointer<int32_t>(found, ring.sequences, "found");
  run(SuffixStepKernel{string_trie_of(trie), bytes, flags, ring, out}, where);
}

void constrain_ends(const Array& ids, const Array& cu_seqlens, const Array& log_odds, const Array& given,
                    const StringTrieArrays& trie, const Array& choices, const Array& best, const Array& before,
                    const Array& ends, int device, uintptr_t stream) {
  const Where where{device, stream};
  const int64_t total = elements(ids, 1, "ids");
  const Offsets cuts = offsets_at(cu_seqlens, total, where);
  const ConstrainedText text = constrained_text_of(trie, ids, log_odds, total);
  const auto* context = pointer<const int32_t>(given, cuts.sequences, "given");
  auto* found = pointer<Choices>(choices, total, "choices");
  auto* worth = pointer<double>(best, total, "best");
  auto* rows = pointer<uint8_t>(before, total, "before");
  auto* out = pointer<uint8_t>(ends, total, "ends");
  run(ChoicesKernel{text, total, cuts.cu, cuts.sequences, found}, where);
  run(CutKernel{text, total, cuts.cu, context, cuts.sequences, found, worth, rows, out}, where);
}

// Writes the rows of prefix that a walk comes to; the others are left as they are.
void token_prefix(const Array& ids, const Array& cu_seqlens, const Array& boundary, const Array& edges,
                  const Array& children, const Array& prefix, int device, uintptr_t stream) {
  const Where where{device, stream};
  const int64_t total = elements(ids, 1, "ids");
  const Offsets cuts = offsets_at(cu_seqlens, total, where);
  const auto* bytes = pointer<const uint8_t>(ids, total, "ids");
  const auto* ends = pointer<const uint8_t>(boundary, total, "boundary");
  auto* out = pointer<int32_t>(prefix, total, "prefix");
  run(TokenPrefixKernel{trie_of(edges, children), bytes, total, cuts.cu, cuts.sequences, ends, out}, where);
}

// Adds to visits[i] for every visit of item i, by all threads of a grid of at most `most_blocks` blocks.
void visit(int64_t items, int64_t most_blocks, const Array& visits) {
  if (items < 0 || most_blocks < 1) {
    refuse("items must be at least 0 and most_blocks at least 1, got ", items, " and ", most_blocks);
  }
  auto* counts = pointer<uint8_t>(visits, items, "visits");
  const Grid grid = Grid::over(items, most_blocks);
  py::gil_scoped_release release;
  for (int64_t block = 0; block < grid.blocks; ++block) {
    for (int64_t thread = 0; thread < Grid::kThreads; ++thread) {
      for (int64_t item = grid.first(block, thread); item < grid.items; item = grid.next(item)) ++counts[item];
    }
  }
}

BYTEKERNELS_BIND(m) {
  using namespace pybind11::literals;
  auto cuda = m.def_submodule("cuda", "Kernels on a CUDA device, or (device -1) their bodies on the host.");

  cuda.def("pack_flat", &pack_flat, "flat"_a, "flat_cu"_a, "bos"_a, "cu_seqlens"_a, "ids"_a, "device"_a, "stream"_a);
  cuda.def("pack_padded", &pack_padded, "padded"_a, "cu_seqlens"_a, "row_bytes"_a, "length"_a, "bos"_a, "values"_a,
           "device"_a, "stream"_a);
  cuda.def("unpack", &unpack, "values"_a, "cu_seqlens"_a, "pad"_a, "row_bytes"_a, "total"_a, "length"_a, "padded"_a,
           "device"_a, "stream"_a);
  cuda.def("next_byte_targets", &next_byte_targets, "ids"_a, "boundary"_a, "cu_seqlens"_a, "targets"_a, "device"_a,
           "stream"_a);
  cuda.def("token_end_mask", &token_end_mask, "sums"_a, "token_cu"_a, "cu_seqlens"_a, "bos"_a, "mask"_a, "device"_a,
           "stream"_a);
  cuda.def("row_index", &row_index, "cu_seqlens"_a, "sequence"_a, "position"_a, "device"_a, "stream"_a);
  cuda.def("longest_suffix", &longest_suffix, "ids"_a, "cu_seqlens"_a, "rows"_a, "trie"_a, "found"_a, "device"_a,
           "stream"_a);
  cuda.def("longest_suffix_step", &longest_suffix_step, "ids"_a, "active"_a, "recent"_a, "counts"_a, "trie"_a,
           "found"_a, "device"_a, "stream"_a);
  cuda.def("constrain_ends", &constrain_ends, "ids"_a, "cu_seqlens"_a, "log_odds"_a, "given"_a, "trie"_a, "choices"_a,
           "best"_a, "before"_a, "ends"_a, "device"_a, "stream"_a,
           "Sets the chunk ends in ends, of zeros; choices, best and before are working memory of T rows.");
  cuda.def("token_prefix", &token_prefix, "ids"_a, "cu_seqlens"_a, "boundary"_a, "edges"_a, "children"_a, "prefix"_a,
           "device"_a, "stream"_a, "Writes the nodes of rows inside a string; the others are left as they are.");
  cuda.def("visit", &visit, "items"_a, "most_blocks"_a, "visits"_a,
           "Counts, on the host, how often the threads of a grid of at most most_blocks blocks serve each item.");
}

}  // namespace bytekernels::cuda_bindings
