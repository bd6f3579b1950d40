// Routing: boundaries, the chunks they make, and the rows at them (bytekernels/route/reference.py says what is
// computed).
#pragma once

#include <cstdint>

#include "rows.h"

namespace bytekernels {

// `rows` bytes in sequences cut by cu.
struct RouteShape {
  const int32_t* cu;
  int64_t sequences;
  int64_t rows;
};

// Where a layout goes: chunk_of [T], cu_chunks [S + 1], and index [room], -1 past the last chunk. Chunks beyond the
// room are counted and not listed.
struct Layout {
  int32_t* chunk_of;
  int32_t* index;
  int64_t room;
  int32_t* cu_chunks;
};

// Writes the layout of the given boundaries, 0 or 1 a byte. Returns the number of chunks.
int64_t chunk_layout(const RouteShape& shape, const uint8_t* boundary, const Layout& layout, int threads);

// E is float or bf16; q and k have rows of `width` elements.

// Writes prob [T], boundary [T] and their layout. `required` [T] may be null. Returns the number of chunks.
template <class E>
int64_t route(const RouteShape& shape, int64_t width, bool lookahead, Rows<const E> q, Rows<const E> k,
              const uint8_t* required, float* prob, uint8_t* boundary, const Layout& layout, int threads);

// Writes dq and dk [T, width], given the gradient of prob [T].
template <class E>
void route_backward(const RouteShape& shape, int64_t width, bool lookahead, const float* dprob, Rows<const E> q,
                    Rows<const E> k, E* dq, E* dk, int threads);

// out [count, row_bytes] = the row of h at each index, zeros at a negative one. Indices are below h's rows.
void gather_chunks(const int32_t* index, int64_t count, int64_t row_bytes, Rows<const uint8_t> h, uint8_t* out,
                   int threads);

// dh [rows, row_bytes] = row m of de [count, row_bytes] at the byte that index[m] names, zeros elsewhere.
void gather_chunks_backward(const int32_t* index, int64_t count, const int32_t* chunk_of, int64_t rows,
                            int64_t row_bytes, const uint8_t* de, uint8_t* dh, int threads);

}  // namespace bytekernels
