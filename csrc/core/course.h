// How a rank's launch goes, as far as its shape and its tokens say: worked out once, by the host.
//
// Divisions are long code, and no launch has its code at hand: what every CTA would work out before it does
// anything else is copied from the arguments instead.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/heap.h"
#include "core/plan.h"
#include "core/shape.h"

namespace flashmoe {

// One task is being computed while the loads of the next run.  Where tiles have many rows, one more is at hand, so that
// nobody waits for the scheduler; where they have few, the last tasks would be hoarded.
inline constexpr uint32_t kTasksAhead = 3;
inline constexpr uint32_t kManyRows = 128;  // of an expert, on average

// Few tokens of a rank alone may go by units (device/few.h): tiles of 128 weight rows by up to 8 rows of an expert.
inline constexpr uint32_t kFewTokens = 8;
inline constexpr uint32_t kFewRows = kMostChoices;   // tokens times k
inline constexpr uint32_t kFewProducts = 2;          // of a unit, 64 weight rows each
inline constexpr uint32_t kFewWidth = kResultWidth;  // columns of a GEMM2 unit
inline constexpr uint32_t kFewStreams = 2;           // of a CTA
// A unit then fills most of a ring, and what is noted of two may lie in turn.
inline constexpr uint32_t kFewLeastInter = 256;

struct FewCourse {
  uint32_t columns[2];  // units of an expert, of GEMM1 and of GEMM2
  // 2^32 over them, rounded up: the upper half of a product with it is a division.
  uint32_t inverse[2];
  uint32_t streams;  // of the rank
};

struct Course {
  TileOrder order;
  uint32_t absent;        // a fault: no CTA of the rank runs
  uint32_t gathers;       // GEMM1 reads its rows out of x
  uint32_t few;           // by units
  uint32_t sliced;        // the gate goes in slices
  uint32_t slices;        // of all experts, for 8 tokens
  uint32_t chunk_tokens;  // chunk_size()
  uint32_t pool_tiles;    // max_pool_tiles()
  uint32_t ahead;         // tasks at hand
  uint32_t group;         // experts of an owner whose rows are dispatched together
  uint32_t groups;        // of the owner with the most experts
  FewCourse by_unit;
};

inline bool gate_in_slices(const Shape& s, uint32_t tokens) {
  return s.routing != RoutingKind::kExternal && s.hidden % kSliceDepth == 0 && tokens != 0 &&
         tokens <= most_sliced_tokens(s);
}

// Whether a rank's `tokens` tokens may go by units.  A warp tells a token's choices, a lane each.
inline bool may_go_by_units(const Shape& s, uint32_t tokens) {
  return s.world == 1 && tokens <= kFewTokens && s.top_k <= 32 && tokens * s.top_k <= kFewRows &&
         tokens * s.top_k <= s.pool_rows && gate_in_slices(s, tokens) &&
         s.hidden >= 2 * kFewWidth && s.inter % 64 == 0 && s.inter >= kFewLeastInter;
}

// Experts of an owner whose rows, for every owner, are dispatched together: an eighth of a wave, so that tiles can begin
// before all of it is there; but no fewer than some 32 rows of a chunk are for, which is what a group takes by itself.
inline uint32_t dispatch_group(const Shape& s, uint32_t chunk_tokens) {
  constexpr uint32_t kOfWave = 8, kRows = 32;
  const uint32_t owned = max_owned_experts(s);
  const uint64_t rows = uint64_t{max_u32(chunk_tokens, 1)} * s.top_k;
  const uint64_t least = (uint64_t{kRows} * owned + rows - 1) / rows;
  return static_cast<uint32_t>(
      std::min<uint64_t>(std::max<uint64_t>(ceil_div(s.wave_experts, kOfWave), least), owned));
}

// The same shape with units for tiles: all of GEMM1 before all of GEMM2, expert by expert.  Their products are of
// kFewTokens rows in either dtype: computed_rows() of half a step.
inline Shape shape_by_units(Shape s) {
  s.tile_step = 2 * kFewTokens;
  s.tile_n1 = is_gated(s.activation) ? kFewWidth / 2 : kFewWidth;
  s.tile_n2 = kFewWidth;
  s.wave_experts = s.experts;
  return s;
}

// `units`: whether few tokens may go by them.  `in_place`: whether rows may stay in x.
inline Course course_of(const Shape& s, uint32_t rank, uint32_t tokens, bool units, bool in_place) {
  Course c{};
  c.order = tile_order(s, rank);
  c.gathers = in_place && gathers_rows(s, tokens);
  c.few = units && may_go_by_units(s, tokens);
  c.sliced = gate_in_slices(s, tokens);
  c.slices = gate_slices(s);
  c.chunk_tokens = chunk_size(s, tokens);
  c.pool_tiles = max_pool_tiles(s);
  c.group = dispatch_group(s, c.chunk_tokens);
  c.groups = ceil_div(max_owned_experts(s), c.group);
  const uint64_t rows = uint64_t{tokens} * s.world * s.top_k;
  c.ahead = rows >= uint64_t{kManyRows} * s.experts ? kTasksAhead : kTasksAhead - 1;
  if (c.few != 0) {
    const Shape cut = shape_by_units(s);
    c.by_unit.streams = kFewStreams * s.chunks;
    for (uint32_t gemm = 1; gemm <= 2; ++gemm) {
      // At least two, so that 32 bits hold the inverse.
      const uint32_t columns = column_tiles(cut, gemm);
      c.by_unit.columns[gemm - 1] = columns;
      c.by_unit.inverse[gemm - 1] = static_cast<uint32_t>(((1ull << 32) + columns - 1) / columns);
    }
  }
  return c;
}

}  // namespace flashmoe
