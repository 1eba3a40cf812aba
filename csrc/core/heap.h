// The heap of one rank: every section's offset, the same on all ranks, and who writes it.
//
// A rank's peers reach only the sections marked "peers".  Signal words are 64 bits.  Sections marked
// [2] alternate by the epoch's parity.  Of those that are counters the owner clears, during launch n,
// the set of launch n + 1; no peer can add to it before it has this rank's counts of launch n + 1.
// Words that hold an epoch are never cleared, nor are counters that are not marked.
#pragma once

#include <cstdint>

#include "core/shape.h"

namespace flashmoe {

// Words of the header, each on a line of its own so that polling one does not slow another.
struct HeapLayout {
  // header
  uint64_t abort_word;   // peers: Status, sticky; written by whoever gives up
  uint64_t epoch_word;   // launches completed; written by the last CTA to leave
  uint64_t status_word;  // Status of the last launch | rows needed << 32 (overflow)
  uint64_t barrier;      // counter: arrivals of all launches since reset
  uint64_t exits;        // counter: CTAs that left, of all launches since reset
  uint64_t next_tile;    // [2] counter: tiles handed out
  // signals
  uint64_t counts;      // peers: [2][W][E] (epoch << 32 | rows), row s written by source s
  uint64_t rows_ready;  // peers: [2][row tiles of the pool] counter: rows arrived
  uint64_t h_ready;     // [2][row tiles of the pool] counter: column tiles of GEMM1, as stored
  uint64_t y_ready;     // [2][row tiles of the pool] counter: column tiles of GEMM2, as stored
  uint64_t returned;    // peers: [row tiles over all experts] epoch, by the row tile's owner
  uint64_t arrived;     // peers: [W][E] (epoch << 32 | rows), row s by a source s beyond pointers
  uint64_t staged;      // [2][E] counter: rows staged for an expert whose owner is beyond pointers
  uint64_t logits;      // [most_sliced_tokens][E] (epoch << 32 | float), of a gate in slices
  // of few tokens, by token, then k: [64] (epoch << 32 | expert), then [64] (epoch << 32 | float)
  uint64_t choices;
  uint64_t columns_ready;  // [2][H / 128] counter: of few tokens, experts whose results are stored
  // rows
  // peers: [pool_rows][H] dtype, rows for this rank's experts; empty where no launch copies rows
  uint64_t pool;
  uint64_t ret;  // peers: [max_tokens * k][H] dtype, result rows in send order
  uint64_t h;    // [pool_rows][I] dtype
  // of this rank as a source
  uint64_t ids;      // [max_tokens][k] u32, experts chosen
  uint64_t weights;  // [max_tokens][k] f32
  uint64_t slots;    // [max_tokens][k] u32, index among the chunk's rows for that expert
  uint64_t sorted;   // [max_tokens * k] u32, token * k + j, by expert within each chunk
  uint64_t results;  // [max_tokens][k] Result, each chunk's tokens in the order they come back
  uint64_t
      origin;  // [pool_rows] u32, of one rank alone: the token of each row, which is then not copied
  uint64_t histogram;  // [chunks][E] u32, rows of each chunk for each expert
  // [chunks][E] u32, rows of earlier chunks, of the host engine alone: an expert's column is written by who sends its
  // count, before that, so whoever has the rank's own counts has these too
  uint64_t chunk_rows;
  uint64_t tables;  // [chunks] PlanTables, each CTA its own copy
  uint64_t bytes;   // of the whole heap
};

// One of the k result rows of a token.
struct alignas(16) Result {
  uint32_t token;
  uint32_t row;   // in the return buffer
  uint32_t tile;  // the row tile, over all experts, that it comes with
  float weight;
};

inline constexpr uint64_t kSectionAlign = 1024;
inline constexpr uint64_t kLine = 128;

// Upper bounds that the sections are sized by.
FLASHMOE_HD uint32_t max_pool_tiles(const Shape& s) {
  return s.pool_rows / s.tile_m + max_owned_experts(s) + 1;
}
FLASHMOE_HD uint32_t max_global_tiles(const Shape& s) {
  return static_cast<uint32_t>(static_cast<uint64_t>(s.world) * s.max_tokens * s.top_k / s.tile_m) +
         s.experts + 1;
}

// Of few tokens (core/course.h): choices, and column tiles of results.
inline constexpr uint32_t kMostChoices = 64;
inline constexpr uint32_t kResultWidth = 128;
FLASHMOE_HD uint32_t result_columns(const Shape& s) { return ceil_div(s.hidden, kResultWidth); }

// u32 words of one CTA's plan tables (core/plan.h).
FLASHMOE_HD uint64_t table_words(const Shape& s) {
  const uint64_t columns = s.experts + 1, owned = max_owned_experts(s);
  return 3 * columns                        // prefix
         + s.experts                        // start
         + (s.world - 1) * (2 * owned + 2)  // of_others
         + 2 * columns                      // chunk_prefix, chunk_order
         + s.experts                        // height
         + 4 * owned + 1;                   // segments, segment_of
}

// The rows a pool may have to hold: every token of every rank sends each of min(k, experts of the
// rank) rows here.
FLASHMOE_HD uint64_t worst_pool_rows(const Shape& s) {
  return static_cast<uint64_t>(s.world) * s.max_tokens * min_u32(s.top_k, max_owned_experts(s));
}

// Whether GEMM1 reads its rows out of x, instead of copies in the pool: where there is one rank.  What is not copied to
// the pool is not written and not read.
inline bool gathers_rows(const Shape& s, uint32_t tokens) {
  return s.world == 1 && tokens <= 0x7fffffff / s.hidden;  // rows are found by 32 bits from x
}

// `in_place`: whether launches let rows stay in x where they may.
inline HeapLayout heap_layout(const Shape& s, bool in_place = false) {
  constexpr uint64_t kElement = 2;  // bf16 and fp16
  HeapLayout l{};
  uint64_t at = 0;
  auto take = [&at](uint64_t bytes, uint64_t alignment) {
    at = align_up(at, alignment);
    const uint64_t offset = at;
    at += bytes;
    return offset;
  };
  const uint64_t rows_sent = static_cast<uint64_t>(s.max_tokens) * s.top_k;
  l.abort_word = take(8, kLine);
  l.epoch_word = take(8, kLine);
  l.status_word = take(8, kLine);
  l.barrier = take(8, kLine);
  l.exits = take(8, kLine);
  l.next_tile = take(2 * kLine, kLine);
  l.counts = take(16ull * s.world * s.experts, kSectionAlign);
  l.rows_ready = take(16ull * max_pool_tiles(s), kSectionAlign);
  l.h_ready = take(16ull * max_pool_tiles(s), kSectionAlign);
  l.y_ready = take(16ull * max_pool_tiles(s), kSectionAlign);
  l.returned = take(8ull * max_global_tiles(s), kSectionAlign);
  l.arrived = take(8ull * s.world * s.experts, kSectionAlign);
  l.staged = take(16ull * s.experts, kSectionAlign);
  l.logits = take(8ull * most_sliced_tokens(s) * s.experts, kSectionAlign);
  l.choices = take(16ull * kMostChoices, kSectionAlign);
  l.columns_ready = take(16ull * result_columns(s), kSectionAlign);
  // Whoever has fewer tokens gathers as well.
  const bool copies = !in_place || !gathers_rows(s, s.max_tokens);
  l.pool = take(copies ? kElement * s.pool_rows * s.hidden : 0, kSectionAlign);
  l.ret = take(kElement * rows_sent * s.hidden, kSectionAlign);
  l.h = take(kElement * s.pool_rows * s.inter, kSectionAlign);
  l.ids = take(4 * rows_sent, kSectionAlign);
  l.weights = take(4 * rows_sent, kSectionAlign);
  l.slots = take(4 * rows_sent, kSectionAlign);
  l.sorted = take(4 * rows_sent, kSectionAlign);
  l.results = take(sizeof(Result) * rows_sent, kSectionAlign);
  l.origin = take(4ull * s.pool_rows, kSectionAlign);
  l.histogram = take(4ull * s.chunks * s.experts, kSectionAlign);
  l.chunk_rows = take(4ull * s.chunks * s.experts, kSectionAlign);
  l.tables = take(s.chunks * align_up(4 * table_words(s), kLine), kSectionAlign);
  l.bytes = align_up(at, kSectionAlign);
  return l;
}

// Where the signals end: [0, signal_bytes) is what reset() clears.
FLASHMOE_HD uint64_t signal_bytes(const HeapLayout& l) { return l.pool; }

// The heap of one rank, seen from one rank: a base address and the layout.
struct Heap {
  char* base;  // null: no pointer reaches this rank

  template <class T>
  FLASHMOE_HD T* at(uint64_t offset) const {
    return reinterpret_cast<T*>(base + offset);
  }
};

FLASHMOE_HD uint64_t counts_at(const HeapLayout& l, const Shape& s, uint32_t epoch,
                               uint32_t source) {
  return l.counts + 8 * (static_cast<uint64_t>(epoch & 1) * s.world + source) * s.experts;
}
FLASHMOE_HD uint64_t* counts_words(const Heap& h, const HeapLayout& l, const Shape& s,
                                   uint32_t epoch, uint32_t source) {
  return h.at<uint64_t>(counts_at(l, s, epoch, source));
}
// `pool_tiles` is max_pool_tiles(), a division that not everybody repeats.
FLASHMOE_HD uint64_t* tile_counter(const Heap& h, uint64_t section, uint32_t pool_tiles,
                                   uint32_t epoch, uint32_t pool_tile) {
  return h.at<uint64_t>(section) + static_cast<uint64_t>(epoch & 1) * pool_tiles + pool_tile;
}
FLASHMOE_HD uint64_t* tile_counter(const Heap& h, uint64_t section, const Shape& s, uint32_t epoch,
                                   uint32_t pool_tile) {
  return tile_counter(h, section, max_pool_tiles(s), epoch, pool_tile);
}
FLASHMOE_HD uint64_t* columns_word(const Heap& h, const HeapLayout& l, const Shape& s,
                                   uint32_t epoch, uint32_t column) {
  return h.at<uint64_t>(l.columns_ready) + (epoch & 1) * result_columns(s) + column;
}
FLASHMOE_HD uint64_t* next_tile_word(const Heap& h, const HeapLayout& l, uint32_t epoch) {
  return h.at<uint64_t>(l.next_tile) + (epoch & 1) * (kLine / 8);
}

}  // namespace flashmoe
