// Rows and signals of ranks that no pointer reaches: what travels by put-with-signal.
//
// To a peer beyond pointers nothing is stored and no counter of it is added to.  Whoever has something
// for it stages it where it is contiguous, and one put moves it and then sets one word, which nobody
// else writes:
//
//   dispatch  a source stages its rows for an expert in its own return buffer, in send order: where
//             their results will come to lie, which cannot be before the owner has the rows.  Its CTAs
//             add what they staged to `staged`; who completes it puts the expert's rows into the
//             owner's pool, and the owner's word of (source, expert) becomes (epoch << 32 | rows).
//   return    an owner stores GEMM2's rows over the pool's rows that they come from, which all GEMM1
//             tiles of that row tile have read by then.  Who completes the row tile puts the rows of
//             each source into its return buffer, and its word in `returned` becomes the epoch.
//   counts, abort   a signal alone, without rows.
//
// Neither staging place is touched again before the peer is known to have the rows: the launch's
// results, or the next launch's counts, prove it.
#pragma once

#include <cstdint>

#include "core/heap.h"
#include "core/plan.h"
#include "core/shape.h"

namespace flashmoe {

// Rows of `source` for expert e that are here: (epoch << 32 | rows), set by the source alone.
FLASHMOE_HD uint64_t arrived_at(const HeapLayout& l, const Shape& s, uint32_t source, uint32_t e) {
  return l.arrived + 8 * (static_cast<uint64_t>(source) * s.experts + e);
}
// The source's own counter of rows staged for expert e.
FLASHMOE_HD uint64_t* staged_counter(const Heap& h, const HeapLayout& l, const Shape& s,
                                     uint32_t epoch, uint32_t e) {
  return h.at<uint64_t>(l.staged) + static_cast<uint64_t>(epoch & 1) * s.experts + e;
}

FLASHMOE_HD uint64_t tagged(uint32_t epoch, uint32_t rows) {
  return static_cast<uint64_t>(epoch) << 32 | rows;
}

// What a row tile has of one source: `rows` of it, and `prefix`, how many of the source's rows for the
// expert there are up to the tile's end.  Both 0 where it has none.
struct SourceShare {
  uint32_t rows;
  uint32_t prefix;
};

FLASHMOE_HD SourceShare share_of(const PlanTables& p, const Shape& s, const Tile& t,
                                 uint32_t source) {
  const uint32_t start = source_start(p, source, t.expert);
  const uint32_t begin = max_u32(t.row0, start);
  const uint32_t end = min_u32(t.row0 + t.rows, start + source_rows(p, s, source, t.expert));
  return begin < end ? SourceShare{end - begin, end - start} : SourceShare{0, 0};
}

// A GEMM1 tile may begin when its counter holds the rows due from those who reach this rank by
// pointer, and each other source's word has reached its prefix.  `peers` is this rank's table.
FLASHMOE_HD uint32_t rows_counted(const PlanTables& p, const Shape& s, const Tile& t,
                                  const Heap* peers) {
  uint32_t rows = t.rows;
  for (uint32_t source = 0; source < s.world; ++source) {
    if (peers[source].base == nullptr) rows -= share_of(p, s, t, source).rows;
  }
  return rows;
}

}  // namespace flashmoe
