// Chunk ends held to a vocabulary (bytekernels/constrain/reference.py says what is computed).
#pragma once

#include <cmath>

#include "trie.h"

namespace bytekernels {

constexpr int64_t kLongestChunk = 63;  // bytes
constexpr float kSurest = 1000;        // a log-odds further from 0 counts as this
constexpr double kNoString = 1e6;      // what a chunk costs that is no string

// The chunks that may begin at a row. The highest bit set is number `reach`: a chunk has 1 to `reach` bytes, those of
// `reach` bytes either end their sequence or cannot be longer. Bit n - 1 below it is set where n bytes are a string.
using Choices = uint64_t;

struct ConstrainedText {
  StringTrie strings;
  const uint8_t* ids;
  const float* log_odds;

  // Of a chunk that begins at `row` of a sequence that stops before row `stop`.
  RAGGED_INLINE Choices choices_from(int64_t row, int64_t stop) const {
    Choices found = 0;
    int64_t reach = 0;
    for (int64_t node = 0; reach < kLongestChunk && row + reach < stop; ++reach) {
      node = strings.trie.child(node, ids[row + reach]);
      if (node < 0) break;
      if (strings.ids[node] >= 0) found |= Choices{1} << reach;
    }
    if (reach == 0) reach = 1;  // a byte that begins no string is a chunk of its own
    return found | Choices{1} << reach;
  }

  RAGGED_INLINE double worth(int64_t row) const {
    const float odds = log_odds[row];
    if (odds != odds) return 0;
    return odds > kSurest ? kSurest : odds < -kSurest ? -kSurest : odds;
  }

  RAGGED_INLINE bool wanted(int64_t row) const { return worth(row) >= 0; }
};

// The best way to cut the rows of one sequence. `choices_of(row, stop)` is ConstrainedText::choices_from, looked up or
// computed. Working memory, by row of the text: `best`, the worth of the best way that ends a chunk there, and
// `before`, how many more rows that chunk has.
template <class ChoicesOf>
struct Cutter {
  const ConstrainedText& text;
  const ChoicesOf& choices_of;
  double* best;
  uint8_t* before;
  uint8_t* ends;  // flags of 0 and 1, none of them set before

  // Cuts a sequence of which the first `given` rows come first: their ends, but for the last row's, are set as if
  // nothing followed.
  RAGGED_INLINE void cut(Range rows, int64_t given) const {
    if (rows.size() <= 0) return;
    const int64_t context = given < rows.size() ? given : rows.size();
    int64_t open = rows.begin;
    if (context > 1) open = cut_open({rows.begin, rows.begin + context}, rows.begin, rows.end);
    const int64_t first_end = context > 1 ? rows.begin + context - 1 : rows.begin;
    cut_open({open, rows.end}, first_end, rows.end);
    ends[rows.end - 1] = text.wanted(rows.end - 1);
  }

 private:
  // Sets the ends of the best way to cut these rows with no end before `first_end` and the last chunk left open, and
  // returns where that chunk begins.
  RAGGED_INLINE int64_t cut_open(Range rows, int64_t first_end, int64_t stop) const {
    for (int64_t row = rows.begin; row < rows.end; ++row) best[row] = -HUGE_VAL;
    double worth_of_open = -HUGE_VAL;
    int64_t open = rows.begin;
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const double so_far = row == rows.begin ? 0 : best[row - 1];
      if (so_far == -HUGE_VAL) continue;  // no chunk ends before it
      bool is_string = false;
      bool open_is_string = false;
      int64_t end = row;
      for (Choices left = choices_of(row, stop); left > 1; left >>= 1, ++end) {
        is_string = (left & 1) != 0;
        if (!is_string) continue;
        end_chunk(row, end, so_far, first_end, rows.end);
        if (end == rows.end - 1) open_is_string = true;
      }
      if (!is_string) end_chunk(row, end - 1, so_far - kNoString, first_end, rows.end);
      const double worth = open_is_string ? so_far : so_far - kNoString;
      if (end >= rows.end && worth > worth_of_open) {
        worth_of_open = worth;
        open = row;
      }
    }
    for (int64_t row = open - 1; row >= rows.begin; row -= 1 + before[row]) ends[row] = 1;
    return open;
  }

  // A chunk from row `begin` to row `last`, that one too, if one may end there.
  RAGGED_INLINE void end_chunk(int64_t begin, int64_t last, double so_far, int64_t first_end, int64_t stop) const {
    if (last < first_end || last >= stop - 1) return;
    const double worth = so_far + text.worth(last);
    if (worth > best[last]) {
      best[last] = worth;
      before[last] = static_cast<uint8_t>(last - begin);
    }
  }
};

// All sequences; writes all of ends. `given`: rows of each sequence that come first.
void constrain_ends(const ConstrainedText& text, const int32_t* cu, const int32_t* given, int64_t sequences,
                    int64_t total, uint8_t* ends, int threads);

}  // namespace bytekernels
