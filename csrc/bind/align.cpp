#include "align.h"

#include <pybind11/stl.h>

#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "bindings.h"

namespace bytekernels::align_bindings {

constexpr int64_t kMost = std::numeric_limits<int32_t>::max();

// first_byte, bytes, first_token, tokens; each sequence adds BOS and may add EOS.
constexpr const char* kColumns[] = {"first_byte", "bytes", "first_token", "tokens"};

// What a batch takes, checked, in memory of its own: the numbers that were checked are those that are used.
struct Plan {
  std::vector<AlignSpan> spans;
  int64_t rows = 0;    // T
  int64_t tokens = 0;  // M
};

// Refuses a part that does not lie in [0, held).
void check_part(int64_t s, const int64_t* span, int column, const char* name, int64_t held) {
  const int64_t first = span[column], count = span[column + 1];
  for (const int i : {column, column + 1}) {
    if (span[i] < 0) refuse("spans[", s, "] has ", kColumns[i], " ", span[i], ": give what is at least 0");
  }
  if (first > held || count > held - first) {
    refuse("spans[", s, "] has ", kColumns[column], " ", first, " and ", kColumns[column + 1], " ", count, ", but ",
           name, " holds ", held, ": let each span end within it");
  }
}

void add(int64_t* total, int64_t count, int64_t s, const char* what, const char* offsets) {
  *total += count;
  if (*total > kMost) {
    refuse("spans hold more than 2^31 - 1 ", what, " with BOS and EOS, the most that int32 ", offsets,
           " counts, from spans[", s, "] on: pack them in several batches");
  }
}

Plan plan_of(int64_t text_bytes, int64_t token_count, const Array& spans, const std::optional<Array>& ends,
             bool has_eos_id) {
  constexpr int64_t kWidth = 4;
  const int64_t numbers = elements(spans, sizeof(int64_t), "spans");
  if (numbers % kWidth != 0) refuse("spans must have shape [S, ", kWidth, "], got ", numbers, " elements");
  const int64_t sequences = numbers / kWidth;
  const auto* from = pointer<const int64_t>(spans, numbers, "spans");
  const auto* flags = ends ? pointer<const uint8_t>(*ends, sequences, "ends") : nullptr;
  Plan plan;
  plan.spans.reserve(sequences);
  for (int64_t s = 0; s < sequences; ++s) {
    int64_t span[kWidth];
    for (int i = 0; i < kWidth; ++i) span[i] = from[s * kWidth + i];
    check_part(s, span, 0, "text", text_bytes);
    check_part(s, span, 2, "token_ids", token_count);
    const bool end = flags && flags[s];
    if (end && !has_eos_id) refuse("ends[", s, "] is true, but eos_id is None: give the id of the token at EOS");
    add(&plan.rows, 1 + span[1] + end, s, "bytes", "cu_seqlens");
    add(&plan.tokens, 1 + span[3] + end, s, "tokens", "token_cu");
    plan.spans.push_back({span[0], span[1], span[2], span[3], end});
  }
  return plan;
}

uint8_t byte(int value, const char* name) {
  if (value < 0 || value > 255) refuse(name, " must be a byte in [0, 255], got ", value);
  return static_cast<uint8_t>(value);
}

// T and M of the batch.
std::tuple<int64_t, int64_t> align_sizes(const Array& text, const Array& token_ids, const Array& spans,
                                         const std::optional<Array>& ends, bool has_eos_id) {
  const int64_t tokens = elements(token_ids, sizeof(int32_t), "token_ids");
  const Plan plan = plan_of(elements(text, 1, "text"), tokens, spans, ends, has_eos_id);
  return {plan.rows, plan.tokens};
}

// ids, cu_seqlens, token_end, token_ids, token_cu, targets.
using Outputs = std::tuple<Array, Array, Array, Array, Array, std::optional<Array>>;

template <class L>
void pack(const Array& text, const Array& token_ids, const Array& token_lengths, const Array& spans,
          const std::optional<Array>& ends, int64_t bos_id, std::optional<int64_t> eos_id, int bos, int eos,
          const Outputs& outputs, int threads) {
  const int64_t text_bytes = elements(text, 1, "text");
  const int64_t count = elements(token_ids, sizeof(int32_t), "token_ids");
  const Plan plan = plan_of(text_bytes, count, spans, ends, eos_id.has_value());
  const auto sequences = static_cast<int64_t>(plan.spans.size());
  const AlignInputs<L> inputs{pointer<const uint8_t>(text, text_bytes, "text"),
                              pointer<const int32_t>(token_ids, count, "token_ids"),
                              pointer<const L>(token_lengths, count, "token_lengths"),
                              plan.spans.data(),
                              bos_id,
                              eos_id.value_or(0),
                              byte(bos, "bos"),
                              byte(eos, "eos")};
  const auto& [ids_out, cu_out, end_out, token_ids_out, token_cu_out, targets_out] = outputs;
  auto* cu = pointer<int32_t>(cu_out, sequences + 1, "cu_seqlens");
  auto* token_cu = pointer<int32_t>(token_cu_out, sequences + 1, "token_cu");
  const AlignOutputs to{pointer<uint8_t>(ids_out, plan.rows, "ids"),
                        cu,
                        pointer<uint8_t>(end_out, plan.rows, "token_end"),
                        pointer<int64_t>(token_ids_out, plan.tokens, "the batch's token_ids"),
                        token_cu,
                        targets_out ? pointer<int64_t>(*targets_out, plan.rows, "targets") : nullptr};
  TokenFault fault;
  {
    py::gil_scoped_release release;
    cu[0] = token_cu[0] = 0;
    for (int64_t s = 0; s < sequences; ++s) {
      const AlignSpan& span = plan.spans[s];
      cu[s + 1] = cu[s] + static_cast<int32_t>(1 + span.bytes + span.end);
      token_cu[s + 1] = token_cu[s] + static_cast<int32_t>(1 + span.tokens + span.end);
    }
    fault = align_pack(inputs, sequences, to, threads);
  }
  if (fault.token >= 0) {
    refuse("token_lengths[", fault.token, "] is ", fault.sum, " (spans[", fault.sequence,
           "]): every token covers at least one byte, so leave out those that cover none");
  }
  if (fault.sequence >= 0) {
    refuse("token_lengths of spans[", fault.sequence, "] sum to ", fault.sum, ", but it has ",
           plan.spans[fault.sequence].bytes, " bytes: cut spans at token ends");
  }
}

BYTEKERNELS_BIND(m) {
  using namespace pybind11::literals;

  m.def("align_sizes", &align_sizes, "text"_a, "token_ids"_a, "spans"_a, "ends"_a, "has_eos_id"_a,
        "The bytes T and tokens M of the batch that the spans make.");
  m.def(
      "align_pack",
      [](bool narrow, const Array& text, const Array& token_ids, const Array& token_lengths, const Array& spans,
         const std::optional<Array>& ends, int64_t bos_id, std::optional<int64_t> eos_id, int bos, int eos,
         const Outputs& outputs, int threads) {
        (narrow ? pack<uint16_t> : pack<int32_t>)(text, token_ids, token_lengths, spans, ends, bos_id, eos_id, bos, eos,
                                                  outputs, threads);
      },
      "uint16_lengths"_a, "text"_a, "token_ids"_a, "token_lengths"_a, "spans"_a, "ends"_a, "bos_id"_a, "eos_id"_a,
      "bos"_a, "eos"_a, "outputs"_a, "threads"_a,
      "Writes the outputs: ids, cu_seqlens, token_end, token_ids, token_cu and, unless None, targets.");
}

}  // namespace bytekernels::align_bindings
