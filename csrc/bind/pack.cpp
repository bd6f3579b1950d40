#include "pack.h"

#include <pybind11/stl.h>

#include <limits>
#include <optional>
#include <vector>

#include "bind/bos.h"
#include "bindings.h"

namespace bytekernels::pack_bindings {

// The memory of a list's documents, held until this is gone: nothing can free or resize it meanwhile.
class Documents {
 public:
  explicit Documents(const py::sequence& sequences) {
    const py::tuple items(sequences);
    views_.reserve(items.size());
    for (size_t s = 0; s < items.size(); ++s) add(items[s].ptr(), s);
  }
  Documents(const Documents&) = delete;
  Documents& operator=(const Documents&) = delete;
  ~Documents() { release(); }

  const std::vector<Py_buffer>& views() const { return views_; }

 private:
  void add(PyObject* item, size_t s) {
    views_.emplace_back();
    const bool held = PyObject_GetBuffer(item, &views_.back(), PyBUF_ND) == 0;
    if (held && views_.back().itemsize == 1) return;
    const std::string type = Py_TYPE(item)->tp_name;
    if (!held) {
      PyErr_Clear();
      views_.pop_back();
    }
    release();
    throw py::type_error("sequences[" + std::to_string(s) +
                         "] must be bytes, bytearray or a contiguous memoryview of " + "bytes, got " + type +
                         (type == "str" ? ": use .encode()" : ""));
  }

  void release() {
    for (Py_buffer& view : views_) PyBuffer_Release(&view);
    views_.clear();
  }

  std::vector<Py_buffer> views_;
};

// Refuses a padded length that is shorter than a sequence.
void check_length(const Offsets& offsets, int64_t length) {
  for (int64_t s = 0; s < offsets.sequences; ++s) {
    const int64_t rows = offsets.cu[s + 1] - offsets.cu[s];
    if (rows > length) refuse("sequence ", s, " has ", rows, " rows, more than the ", length, " of a padded one");
  }
}

int64_t document_offsets(const py::sequence& sequences, int bos, const Array& cu_out) {
  check_bos(bos);
  const Documents documents(sequences);
  const int64_t count = static_cast<int64_t>(documents.views().size());
  int32_t* cu = pointer<int32_t>(cu_out, count + 1, "cu_seqlens");
  int64_t total = 0;
  cu[0] = 0;
  for (int64_t s = 0; s < count; ++s) {
    total += documents.views()[s].len + (bos == kNoBos ? 0 : 1);
    if (total > std::numeric_limits<int32_t>::max()) {
      refuse("sequences hold more than 2^31 - 1 bytes, the most that int32 cu_seqlens count, from sequences[", s,
             "] on: pack them in several batches");
    }
    cu[s + 1] = static_cast<int32_t>(total);
  }
  return total;
}

void pack_documents_into(const py::sequence& sequences, int bos, const Array& cu_seqlens, const Array& ids,
                         int threads) {
  check_bos(bos);
  const Documents documents(sequences);
  const int64_t total = elements(ids, 1, "ids");
  const Offsets checked = offsets(cu_seqlens, total);
  if (checked.sequences != static_cast<int64_t>(documents.views().size())) {
    refuse("cu_seqlens cuts ", checked.sequences, " sequences, got ", documents.views().size());
  }
  std::vector<const uint8_t*> sources(checked.sequences);
  for (int64_t s = 0; s < checked.sequences; ++s) {
    const Py_buffer& view = documents.views()[s];
    if (checked.cu[s + 1] - checked.cu[s] != view.len + (bos == kNoBos ? 0 : 1)) {
      refuse("sequences[", s, "] changed its length while it was packed");
    }
    sources[s] = static_cast<const uint8_t*>(view.buf);
  }
  uint8_t* out = pointer<uint8_t>(ids, total, "ids");
  py::gil_scoped_release release;
  pack_documents(sources.data(), bos, checked.cu, checked.sequences, out, threads);
}

void pack_rows_into(const Array& padded, int64_t length, int bos, const Array& cu_seqlens, const Array& ids,
                    int threads) {
  check_bos(bos);
  if (length < 0) refuse("length must be at least 0, got ", length);
  const int64_t total = elements(ids, 1, "ids");
  const Offsets checked = offsets(cu_seqlens, total);
  const int64_t shift = bos == kNoBos ? 0 : 1;
  const auto* rows = pointer<const uint8_t>(padded, product({checked.sequences, length}), "padded");
  std::vector<const uint8_t*> sources(checked.sequences);
  for (int64_t s = 0; s < checked.sequences; ++s) {
    const int64_t bytes = checked.cu[s + 1] - checked.cu[s] - shift;
    if (bytes < 0 || bytes > length) refuse("row ", s, " must hold 0 to ", length, " bytes, got ", bytes);
    sources[s] = rows + s * length;
  }
  auto* out = pointer<uint8_t>(ids, total, "ids");
  py::gil_scoped_release release;
  pack_documents(sources.data(), bos, checked.cu, checked.sequences, out, threads);
}

void pack_flat_into(const Array& flat, const Array& flat_cu, int bos, const Array& cu_seqlens, const Array& ids,
                    int threads) {
  check_bos(bos);
  const int64_t bytes = elements(flat, 1, "flat");
  const int64_t total = elements(ids, 1, "ids");
  const Offsets documents = offsets(flat_cu, bytes, "flat_cu");
  const Offsets packed = offsets(cu_seqlens, total);
  if (packed.sequences != documents.sequences) {
    refuse("cu_seqlens cuts ", packed.sequences, " sequences, flat_cu ", documents.sequences);
  }
  const auto* data = pointer<const uint8_t>(flat, bytes, "flat");
  const int64_t shift = bos == kNoBos ? 0 : 1;
  std::vector<const uint8_t*> sources(packed.sequences);
  for (int64_t s = 0; s < packed.sequences; ++s) {
    if (packed.cu[s + 1] != documents.cu[s + 1] + (s + 1) * shift) {
      refuse("cu_seqlens must be ", documents.cu[s + 1] + (s + 1) * shift, " at index ", s + 1, ", got ",
             packed.cu[s + 1]);
    }
    sources[s] = data + documents.cu[s];
  }
  auto* out = pointer<uint8_t>(ids, total, "ids");
  py::gil_scoped_release release;
  pack_documents(sources.data(), bos, packed.cu, packed.sequences, out, threads);
}

void row_index_into(const Array& cu_seqlens, const Array& sequence, const Array& position, int threads) {
  const int64_t total = elements(sequence, sizeof(int32_t), "sequence");
  const Offsets checked = offsets(cu_seqlens, total);
  auto* sequence_out = pointer<int32_t>(sequence, total, "sequence");
  auto* position_out = pointer<int32_t>(position, total, "position");
  py::gil_scoped_release release;
  row_index(checked.cu, checked.sequences, sequence_out, position_out, threads);
}

void unpack_into(const Array& values, const Array& cu_seqlens, const Array& pad, int64_t row_bytes, int64_t total,
                 int64_t length, const Array& padded, int threads) {
  const Offsets checked = offsets(cu_seqlens, total);
  if (length < 0) refuse("length must be at least 0, got ", length);
  check_length(checked, length);
  const int64_t element_bytes = elements(pad, 1, "pad");
  if (element_bytes < 1 || row_bytes < 0 || row_bytes % element_bytes != 0) {
    refuse("row_bytes must be a multiple of pad's ", element_bytes, " bytes, got ", row_bytes);
  }
  const auto* source = pointer<const uint8_t>(values, product({total, row_bytes}), "values");
  const auto* element = pointer<const uint8_t>(pad, element_bytes, "pad");
  auto* out = pointer<uint8_t>(padded, product({checked.sequences, length, row_bytes}), "padded");
  py::gil_scoped_release release;
  unpack(source, checked.cu, checked.sequences, element, element_bytes, row_bytes, length, out, threads);
}

void pack_padded_into(const Array& padded, const Array& cu_seqlens, int64_t row_bytes, int64_t total, int64_t length,
                      const Array& values, int threads) {
  const Offsets checked = offsets(cu_seqlens, total);
  if (length < 0 || row_bytes < 0) refuse("length and row_bytes must be at least 0, got ", length, " and ", row_bytes);
  check_length(checked, length);
  const auto* source = pointer<const uint8_t>(padded, product({checked.sequences, length, row_bytes}), "padded");
  auto* out = pointer<uint8_t>(values, product({total, row_bytes}), "values");
  py::gil_scoped_release release;
  pack_padded(source, checked.cu, checked.sequences, length, row_bytes, out, threads);
}

void next_byte_targets_into(const Array& ids, const std::optional<Array>& boundary, const Array& cu_seqlens,
                            const Array& targets, int threads) {
  const int64_t total = elements(ids, 1, "ids");
  const Offsets checked = offsets(cu_seqlens, total);
  const auto* bytes = pointer<const uint8_t>(ids, total, "ids");
  const auto* ends = boundary ? pointer<const uint8_t>(*boundary, total, "boundary") : nullptr;
  auto* out = pointer<int64_t>(targets, total, "targets");
  py::gil_scoped_release release;
  next_byte_targets(bytes, ends, checked.cu, checked.sequences, total, out, threads);
}

void token_end_mask_into(const Array& token_lengths, const Array& token_cu, const Array& cu_seqlens, bool bos,
                         const Array& mask, int threads) {
  const int64_t total = elements(mask, 1, "mask");
  const int64_t tokens = elements(token_lengths, sizeof(int32_t), "token_lengths");
  const Offsets rows = offsets(cu_seqlens, total);
  const Offsets cuts = offsets(token_cu, tokens, "token_cu");
  if (cuts.sequences != rows.sequences) {
    refuse("token_cu cuts ", cuts.sequences, " sequences, cu_seqlens ", rows.sequences);
  }
  const auto* lengths = pointer<const int32_t>(token_lengths, tokens, "token_lengths");
  auto* ends = pointer<uint8_t>(mask, total, "mask");
  TokenFault fault;
  {
    py::gil_scoped_release release;
    fault = token_end_mask(lengths, cuts.cu, rows.cu, rows.sequences, total, bos, ends, threads);
  }
  if (fault.token >= 0) {
    refuse("token_lengths[", fault.token, "] is ", fault.sum, " (sequence ", fault.sequence,
           "): every token covers at least one byte, so leave out those that cover none");
  }
  if (fault.sequence >= 0) {
    const int64_t length = rows.cu[fault.sequence + 1] - rows.cu[fault.sequence];
    const int64_t covered = bos && length > 0 ? length - 1 : length;
    refuse("token_lengths of sequence ", fault.sequence, " sum to ", fault.sum, ", but it has ", covered, " bytes",
           bos ? " after BOS" : "");
  }
}

BYTEKERNELS_BIND(m) {
  using namespace pybind11::literals;

  m.def("document_offsets", &document_offsets, "sequences"_a, "bos"_a, "cu_seqlens"_a,
        "Writes the offsets of the documents, one byte longer each unless bos is -1, and returns their total.");
  m.def("pack_documents", &pack_documents_into, "sequences"_a, "bos"_a, "cu_seqlens"_a, "ids"_a, "threads"_a);
  m.def("pack_rows", &pack_rows_into, "padded"_a, "length"_a, "bos"_a, "cu_seqlens"_a, "ids"_a, "threads"_a);
  m.def("pack_flat", &pack_flat_into, "flat"_a, "flat_cu"_a, "bos"_a, "cu_seqlens"_a, "ids"_a, "threads"_a);
  m.def("row_index", &row_index_into, "cu_seqlens"_a, "sequence"_a, "position"_a, "threads"_a);
  m.def("unpack", &unpack_into, "values"_a, "cu_seqlens"_a, "pad"_a, "row_bytes"_a, "total"_a, "length"_a, "padded"_a,
        "threads"_a);
  m.def("pack_padded", &pack_padded_into, "padded"_a, "cu_seqlens"_a, "row_bytes"_a, "total"_a, "length"_a, "values"_a,
        "threads"_a);
  m.def("next_byte_targets", &next_byte_targets_into, "ids"_a, "boundary"_a, "cu_seqlens"_a, "targets"_a, "threads"_a);
  m.def("token_end_mask", &token_end_mask_into, "token_lengths"_a, "token_cu"_a, "cu_seqlens"_a, "bos"_a, "mask"_a,
        "threads"_a);
}

}  // namespace bytekernels::pack_bindings
