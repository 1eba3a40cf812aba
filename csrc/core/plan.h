// The routing plan: what every rank derives from the counts, and nothing else.
//
// A pool holds the rows of its rank's experts, expert after expert; inside one expert in the order
// (source, token, k).  A source's return buffer holds its rows expert after expert over all experts.
// Row tiles cut each expert's rows in steps of its tile_height(); no two experts share a tile.
//
// `Team` is who builds the tables together: the threads of a CTA, or one thread of the host engine.
// It gives rank(), size(), sync(), and scan(table, rows, n): in place, exclusive, over each of `rows`
// contiguous rows of n + 1 entries, whose last becomes the row's sum; all see it on return.
#pragma once

#include <cstdint>

#include "core/heap.h"
#include "core/shape.h"

namespace flashmoe {

// Views into one CTA's copy of the tables; see table_words().
struct PlanTables {
  uint32_t* prefix;  // [2 + W][E + 1]: rows, row tiles, then rows of each source, before expert e
  uint32_t* start;   // [W][E]: rows of sources before s within expert e
  uint32_t* chunk_prefix;  // [E + 1]: rows of this source's earlier chunks for expert e
  uint32_t* chunk_order;   // [E + 1]: rows of this chunk for experts before e
  uint32_t* height;        // [E]: rows of the expert's row tiles, but for the last one
  uint32_t* segments;      // [2 * experts owned + 1]: tiles before each segment of the order
};

// Where a CTA's tables lie in the heap, should they not fit a place nearer to it.
FLASHMOE_HD uint32_t* table_place(const Heap& h, const HeapLayout& l, const Shape& s,
                                  uint32_t chunk) {
  return h.at<uint32_t>(l.tables + chunk * align_up(4 * table_words(s), kLine));
}

// The tables at `at`, which has table_words(s) words.
FLASHMOE_HD PlanTables plan_tables(uint32_t* at, const Shape& s) {
  const uint32_t columns = s.experts + 1;
  PlanTables p;
  p.prefix = at;
  p.start = p.prefix + (2 + s.world) * columns;
  p.chunk_prefix = p.start + s.world * s.experts;
  p.chunk_order = p.chunk_prefix + columns;
  p.height = p.chunk_order + columns;
  p.segments = p.height + s.experts;
  return p;
}

FLASHMOE_HD uint32_t expert_rows(const PlanTables& p, uint32_t e) {
  return p.prefix[e + 1] - p.prefix[e];
}
FLASHMOE_HD uint32_t expert_row_tiles(const PlanTables& p, const Shape& s, uint32_t e) {
  const uint32_t* tiles = p.prefix + s.experts + 1;
  return tiles[e + 1] - tiles[e];
}
// Row tile j of expert e, over all experts, and within its owner's pool.
FLASHMOE_HD uint32_t global_tile(const PlanTables& p, const Shape& s, uint32_t e, uint32_t j) {
  return p.prefix[s.experts + 1 + e] + j;
}
FLASHMOE_HD uint32_t pool_tile(const PlanTables& p, const Shape& s, uint32_t e, uint32_t j) {
  const uint32_t* tiles = p.prefix + s.experts + 1;
  return tiles[e] - tiles[first_expert(s, owner_of(s, e))] + j;
}
// Row i of expert e in its owner's pool.
FLASHMOE_HD uint32_t pool_row(const PlanTables& p, const Shape& s, uint32_t e, uint32_t i) {
  return p.prefix[e] - p.prefix[first_expert(s, owner_of(s, e))] + i;
}
FLASHMOE_HD uint32_t pool_rows_of(const PlanTables& p, const Shape& s, uint32_t rank) {
  return p.prefix[first_expert(s, rank + 1)] - p.prefix[first_expert(s, rank)];
}
FLASHMOE_HD uint32_t source_rows(const PlanTables& p, const Shape& s, uint32_t source, uint32_t e) {
  const uint32_t* row = p.prefix + (2 + source) * (s.experts + 1);
  return row[e + 1] - row[e];
}
// The source's i-th row for expert e in its return buffer.
FLASHMOE_HD uint32_t return_row(const PlanTables& p, const Shape& s, uint32_t source, uint32_t e,
                                uint32_t i) {
  return p.prefix[(2 + source) * (s.experts + 1) + e] + i;
}
// The source's first row within expert e.
FLASHMOE_HD uint32_t source_start(const PlanTables& p, const Shape& s, uint32_t source,
                                  uint32_t e) {
  return p.start[source * s.experts + e];
}

// Order of a rank's tiles: block b holds GEMM1 of wave b, then GEMM2 of wave b - 1, so that no tile
// waits for one handed out later.  A segment is one expert's tiles of one GEMM.
struct Segment {
  uint32_t gemm;    // 1 or 2
  uint32_t expert;  // global id
};

FLASHMOE_HD uint32_t block_begin(uint32_t block, uint32_t wave, uint32_t owned) {
  return min_u32(block * wave, owned) + (block == 0 ? 0 : min_u32((block - 1) * wave, owned));
}

FLASHMOE_HD Segment segment_of(const Shape& s, uint32_t rank, uint32_t index) {
  const uint32_t owned = owned_experts(s, rank);
  const uint32_t wave = s.wave_experts;
  uint32_t block = index < wave ? 0 : 1 + (index - wave) / (2 * wave);
  // A short last wave makes its block shorter than 2 * wave, and with it the estimate too small.
  while (index >= block_begin(block + 1, wave, owned)) ++block;
  const uint32_t offset = index - block_begin(block, wave, owned);
  const uint32_t gemm1 = min_u32((block + 1) * wave, owned) - min_u32(block * wave, owned);
  const uint32_t local =
      offset < gemm1 ? block * wave + offset : (block - 1) * wave + offset - gemm1;
  return {offset < gemm1 ? 1u : 2u, first_expert(s, rank) + local};
}

// One unit of work for the tensor cores.
struct Tile {
  uint32_t index;     // position in the rank's order
  uint32_t gemm;      // 1 or 2
  uint32_t expert;    // global id
  uint32_t row_tile;  // within the pool
  uint32_t row_tile_global;
  uint32_t row0;       // first row within the expert
  uint32_t pool_row0;  // first row in the pool
  uint32_t rows;       // real rows, at most tile_m
  uint32_t col_tile;
};

FLASHMOE_HD uint32_t tiles_of_rank(const PlanTables& p, const Shape& s, uint32_t rank) {
  return p.segments[2 * owned_experts(s, rank)];
}

// Where the tile `within` a segment lies.  Row tile by row tile, so that the two tiles of a pair (2i and
// 2i + 1) have the same weights; where an expert has an odd number of row tiles, its last row tiles of
// two columns make a pair.
struct TilePosition {
  uint32_t col;
  uint32_t row;
};
FLASHMOE_HD TilePosition position_in_segment(uint32_t within, uint32_t rows, uint32_t columns) {
  const uint32_t block = within / (2 * rows), v = within - block * 2 * rows;
  const uint32_t col = 2 * block;
  if (rows % 2 == 0 || col + 1 == columns) return {col + v / rows, v % rows};
  const uint32_t even = rows - 1;
  if (v >= 2 * even) return {col + v - 2 * even, even};
  return {v < even ? col : col + 1, v < even ? v : v - even};
}

// The tile at `index` of the rank's order; index < tiles_of_rank().
FLASHMOE_HD Tile tile_at(const PlanTables& p, const Shape& s, uint32_t rank, uint32_t index) {
  uint32_t low = 0, high = 2 * owned_experts(s, rank);
  while (high - low > 1) {  // invariant: segments[low] <= index < segments[high]
    const uint32_t middle = (low + high) / 2;
    if (p.segments[middle] <= index)
      low = middle;
    else
      high = middle;
  }
  const Segment segment = segment_of(s, rank, low);
  const uint32_t row_tiles = expert_row_tiles(p, s, segment.expert);
  const TilePosition at =
      position_in_segment(index - p.segments[low], row_tiles, column_tiles(s, segment.gemm));
  const uint32_t col = at.col, j = at.row;
  Tile t;
  t.index = index;
  t.gemm = segment.gemm;
  t.expert = segment.expert;
  t.row_tile = pool_tile(p, s, segment.expert, j);
  t.row_tile_global = global_tile(p, s, segment.expert, j);
  t.row0 = j * p.height[segment.expert];
  t.pool_row0 = pool_row(p, s, segment.expert, t.row0);
  t.rows = min_u32(p.height[segment.expert], expert_rows(p, segment.expert) - t.row0);
  t.col_tile = col;
  return t;
}

// Fills prefix, start and segments from counts(source, expert) -> rows.
template <class Team, class Counts>
FLASHMOE_HD void build_plan(Team& team, const PlanTables& p, const Shape& s, uint32_t rank,
                            const Counts& counts) {
  const uint32_t columns = s.experts + 1;
  for (uint32_t e = team.rank(); e < s.experts; e += team.size()) {
    uint32_t total = 0;
    for (uint32_t source = 0; source < s.world; ++source) {
      const uint32_t rows = counts(source, e);
      p.start[source * s.experts + e] = total;
      p.prefix[(2 + source) * columns + e] = rows;
      total += rows;
    }
    p.prefix[e] = total;
    p.height[e] = tile_height(s, total);
    p.prefix[columns + e] = ceil_div(total, p.height[e]);
  }
  team.sync();
  team.scan(p.prefix, 2 + s.world, s.experts);
  const uint32_t segments = 2 * owned_experts(s, rank);
  for (uint32_t i = team.rank(); i < segments; i += team.size()) {
    const Segment segment = segment_of(s, rank, i);
    p.segments[i] = expert_row_tiles(p, s, segment.expert) * column_tiles(s, segment.gemm);
  }
  team.sync();
  team.scan(p.segments, 1, segments);
}

// Fills chunk_prefix and chunk_order from the rank's [chunks][E]: rows of each chunk, and of all the
// chunks before it.
template <class Team>
FLASHMOE_HD void build_chunk_tables(Team& team, const PlanTables& p, const Shape& s,
                                    const uint32_t* histogram, const uint32_t* chunk_rows,
                                    uint32_t chunk) {
  for (uint32_t e = team.rank(); e < s.experts; e += team.size()) {
    p.chunk_prefix[e] = chunk_rows[chunk * s.experts + e];
    p.chunk_order[e] = histogram[chunk * s.experts + e];
  }
  team.sync();
  team.scan(p.chunk_order, 1, s.experts);
}

// The largest pool any rank needs, rows; over pool_rows it is an overflow on all ranks alike.
FLASHMOE_HD uint32_t pool_rows_needed(const PlanTables& p, const Shape& s) {
  uint32_t needed = 0;
  for (uint32_t r = 0; r < s.world; ++r) needed = max_u32(needed, pool_rows_of(p, s, r));
  return needed;
}

}  // namespace flashmoe
