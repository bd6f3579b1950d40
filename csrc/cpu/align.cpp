#include "align.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "parallel.h"

namespace bytekernels {
namespace {

constexpr int64_t kGrainRows = 32 * 1024;  // fewer are packed sooner than a thread wakes
constexpr int64_t kPieceRows = 8 * 1024;   // packed at a time: their ids and ends stay in the first cache

// targets[t] for rows [begin, end) of a sequence, whose row `end` has its id and its end.
void write_targets(const uint8_t* ids, const uint8_t* token_end, Range rows, int64_t* targets) {
  for (int64_t t = rows.begin; t < rows.end; ++t) {
    targets[t] = static_cast<uint16_t>(ids[t + 1] | token_end[t + 1] << 8);
  }
}

template <class L>
TokenFault pack_sequence(const AlignInputs<L>& inputs, int64_t s, const AlignOutputs& outputs) {
  const AlignSpan& span = inputs.spans[s];
  const int64_t start = outputs.cu[s];
  const int64_t begin = start + 1;  // of the text, after BOS
  const int64_t end = begin + span.bytes;
  uint8_t* const ids = outputs.ids;
  uint8_t* const ends = outputs.token_end;

  int64_t* token_ids = outputs.token_ids + outputs.token_cu[s];
  const int32_t* const from = inputs.token_ids + span.first_token;
  *token_ids++ = inputs.bos_id;
  for (int64_t i = 0; i < span.tokens; ++i) token_ids[i] = from[i];
  if (span.end) token_ids[span.tokens] = inputs.eos_id;

  ids[start] = inputs.bos;
  ends[start] = 1;
  if (span.end) {
    ids[end] = inputs.eos;
    ends[end] = 1;
  }

  const uint8_t* const text = inputs.text + span.first_byte;
  const L* const lengths = inputs.token_lengths;
  const int64_t last = span.first_token + span.tokens;
  int64_t token = span.first_token;
  int64_t row = begin;     // where that token starts
  int64_t target = start;  // the first row without a target
  for (int64_t piece = begin; piece < end; piece += kPieceRows) {
    const int64_t stop = std::min(piece + kPieceRows, end);
    std::memcpy(ids + piece, text + (piece - begin), stop - piece);
    std::memset(ends + piece, 0, stop - piece);
    for (; token < last; ++token) {
      const int64_t length = lengths[token];
      if (length < 1) return {s, token, length};
      if (row + length > stop) break;
      row += length;
      ends[row - 1] = 1;
    }
    if (outputs.targets) write_targets(ids, ends, {target, stop - 1}, outputs.targets);
    target = stop - 1;
  }
  if (outputs.targets) {
    const int64_t final = outputs.cu[s + 1] - 1;
    write_targets(ids, ends, {target, final}, outputs.targets);
    outputs.targets[final] = kIgnore;
  }

  for (; token < last; ++token) {
    const int64_t length = lengths[token];
    if (length < 1) return {s, token, length};
    row += length;
  }
  if (row != end) return {s, -1, row - begin};
  return {};
}

}  // namespace

template <class L>
TokenFault align_pack(const AlignInputs<L>& inputs, int64_t sequences, const AlignOutputs& outputs, int threads) {
  // Sequences, not rows, are shared out, by where they start: a token's end is known only from the sequence's start.
  const int64_t total = outputs.cu[sequences];
  const int shares = shares_for(total, kGrainRows, threads);
  std::vector<TokenFault> faults(shares);
  parallel_shares(shares, [&](int share) {
    const Range rows = share_of(total, shares, share);
    const int64_t last = first_starting_at(outputs.cu, sequences, rows.end);
    for (int64_t s = first_starting_at(outputs.cu, sequences, rows.begin); s < last; ++s) {
      faults[share] = pack_sequence(inputs, s, outputs);
      if (faults[share].sequence >= 0) return;
    }
  });
  for (const TokenFault& fault : faults) {
    if (fault.sequence >= 0) return fault;
  }
  return {};
}

template TokenFault align_pack(const AlignInputs<uint16_t>&, int64_t, const AlignOutputs&, int);
template TokenFault align_pack(const AlignInputs<int32_t>&, int64_t, const AlignOutputs&, int);

}  // namespace bytekernels
