// The routing plan: what every rank derives from the counts, and nothing else.
//
// A pool holds the rows of its rank's experts, expert after expert; inside one expert in the order
// (source, token, k).  A source's return buffer holds its rows expert after expert over all experts.
// Row tiles cut each expert's rows in steps of its tile_height(); no two experts share a tile.
//
// `Team` is who builds the tables together: the threads of a CTA, or one thread of the host engine.
// It gives rank(), size(), sync(); sums(n, count, value, to): n sums, the i-th of value(i, j), j < count, to *to(i),
// which all see after the next sync(); and scan(rows, row): exclusive sums in place over each of `rows` ScanRows, row(r)
// the r-th; all see them on return.
#pragma once

#include <cstdint>

#include "core/heap.h"
#include "core/shape.h"

namespace flashmoe {

// Views into one CTA's copy of the tables; see table_words().  A rank sends to every expert, and sends back what came
// for its own: so it knows of all experts what it has for them itself, and of its own ones what each source has.
struct PlanTables {
  uint32_t rank;
  uint32_t first;    // of the rank's own experts
  uint32_t most;     // experts that a rank owns
  uint32_t* prefix;  // [3][E + 1]: rows, row tiles, then the rank's own rows, before expert e
  uint32_t* start;   // [E]: rows of sources before this rank within expert e
  // [W - 1][2 * most + 2], of each other source: 0, its rows before each own expert and behind the last one, then the
  // rows of sources before it within each own expert.
  uint32_t* of_others;
  uint32_t* chunk_prefix;  // [E + 1]: rows of this source's earlier chunks for expert e
  uint32_t* chunk_order;   // [E + 1]: rows of this chunk for experts before e
  uint32_t* height;        // [E]: rows of the expert's row tiles, but for the last one
  uint32_t* segments;      // [2 * experts owned + 1]: tiles before each segment of the order
  uint32_t* segment_of;    // [2 * experts owned]: whose tiles a segment is of, see Segment
};

// n values, and a place for their sum behind them.
struct ScanRow {
  uint32_t* at;
  uint32_t n;
};

// Where a CTA's tables lie in the heap, should they not fit a place nearer to it.
FLASHMOE_HD uint32_t* table_place(const Heap& h, const HeapLayout& l, const Shape& s,
                                  uint32_t chunk) {
  return h.at<uint32_t>(l.tables + chunk * align_up(4 * table_words(s), kLine));
}

// The tables at `at`, which has table_words(s) words.
FLASHMOE_HD PlanTables plan_tables(uint32_t* at, const Shape& s, uint32_t rank) {
  const uint32_t columns = s.experts + 1;
  PlanTables p;
  p.rank = rank;
  p.first = first_expert(s, rank);
  p.most = max_owned_experts(s);
  p.prefix = at;
  p.start = p.prefix + 3 * columns;
  p.of_others = p.start + s.experts;
  p.chunk_prefix = p.of_others + (s.world - 1) * (2 * p.most + 2);
  p.chunk_order = p.chunk_prefix + columns;
  p.height = p.chunk_order + columns;
  p.segments = p.height + s.experts;
  p.segment_of = p.segments + 2 * p.most + 1;
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
// Another source's row of of_others.
FLASHMOE_HD uint32_t* of_other(const PlanTables& p, uint32_t source) {
  return p.of_others + (source - (source > p.rank ? 1 : 0)) * (2 * p.most + 2);
}
// Of a source, which must be the rank itself where the expert is not its own: where its rows for experts before e stand,
// and behind that for those before e + 1.
FLASHMOE_HD uint32_t* source_prefix(const PlanTables& p, const Shape& s, uint32_t source,
                                    uint32_t e) {
  return source == p.rank ? p.prefix + 2 * (s.experts + 1) + e
                          : of_other(p, source) + 1 + e - p.first;
}
FLASHMOE_HD uint32_t source_rows(const PlanTables& p, const Shape& s, uint32_t source, uint32_t e) {
  const uint32_t* before = source_prefix(p, s, source, e);
  return before[1] - before[0];
}
// The source's i-th row for expert e in its return buffer.
FLASHMOE_HD uint32_t return_row(const PlanTables& p, const Shape& s, uint32_t source, uint32_t e,
                                uint32_t i) {
  return *source_prefix(p, s, source, e) + i;
}
// The source's first row within expert e.
FLASHMOE_HD uint32_t* source_start_at(const PlanTables& p, uint32_t source, uint32_t e) {
  return source == p.rank ? p.start + e : of_other(p, source) + p.most + 2 + e - p.first;
}
FLASHMOE_HD uint32_t source_start(const PlanTables& p, uint32_t source, uint32_t e) {
  return *source_start_at(p, source, e);
}

// Order of a rank's tiles: block b holds GEMM1 of wave b, then GEMM2 of wave b - 1, so that no tile
// waits for one handed out later.  A segment is one expert's tiles of one GEMM.
FLASHMOE_HD uint32_t block_begin(uint32_t block, uint32_t wave, uint32_t owned) {
  return min_u32(block * wave, owned) + (block == 0 ? 0 : min_u32((block - 1) * wave, owned));
}

// What follows from the shape alone, worked out once: divisions are long code.
struct TileOrder {
  uint32_t first;        // expert that the rank owns
  uint32_t owned;        // experts
  uint32_t columns[2];   // column tiles of GEMM1 and of GEMM2
  uint32_t after_gemm1;  // the first segment behind all of GEMM1's
};
FLASHMOE_HD TileOrder tile_order(const Shape& s, uint32_t rank) {
  const uint32_t first = first_expert(s, rank), owned = first_expert(s, rank + 1) - first;
  const uint32_t wave = s.wave_experts, last = owned == 0 ? 0 : (owned - 1) / wave;
  return {first,
          owned,
          {column_tiles(s, 1), column_tiles(s, 2)},
          block_begin(last, wave, owned) + owned - last * wave};
}

// What PlanTables::segment_of holds: the rank's own expert, counted from its first, and the GEMM.
struct Segment {
  uint32_t gemm;   // 1 or 2
  uint32_t local;  // expert
  FLASHMOE_HD static Segment of(uint32_t word) { return {1 + (word & 1), word >> 1}; }
  FLASHMOE_HD uint32_t word() const { return local << 1 | (gemm - 1); }
};

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

FLASHMOE_HD uint32_t tiles_of_rank(const PlanTables& p, const TileOrder& order) {
  return p.segments[2 * order.owned];
}

// Where the tile `within` a segment lies.  Row tile by row tile, so that the two tiles of a pair (2i and
// 2i + 1) have the same weights; where an expert has an odd number of row tiles, its last row tiles of
// two columns make a pair.
struct TilePosition {
  uint32_t col;
  uint32_t row;
};
FLASHMOE_HD TilePosition position_in_segment(uint32_t within, uint32_t rows, uint32_t columns) {
  if (rows == 1) return {within, 0};  // as below, without divisions
  const uint32_t block = within / (2 * rows), v = within - block * 2 * rows;
  const uint32_t col = 2 * block;
  if (rows % 2 == 0 || col + 1 == columns) return {col + v / rows, v % rows};
  const uint32_t even = rows - 1;
  if (v >= 2 * even) return {col + v - 2 * even, even};
  return {v < even ? col : col + 1, v < even ? v : v - even};
}

// The tile at `index` of the rank's order; index < tiles_of_rank().
FLASHMOE_HD Tile tile_at(const PlanTables& p, const Shape& s, const TileOrder& order,
                         uint32_t index) {
  uint32_t low = 0, high = 2 * order.owned;
  while (high - low > 1) {  // invariant: segments[low] <= index < segments[high]
    const uint32_t middle = (low + high) / 2;
    if (p.segments[middle] <= index)
      low = middle;
    else
      high = middle;
  }
  const Segment segment = Segment::of(p.segment_of[low]);
  const uint32_t expert = order.first + segment.local;
  const uint32_t* tiles = p.prefix + s.experts + 1;
  const uint32_t row_tile = tiles[expert], height = p.height[expert];
  const TilePosition at = position_in_segment(index - p.segments[low], tiles[expert + 1] - row_tile,
                                              order.columns[segment.gemm - 1]);
  Tile t;
  t.index = index;
  t.gemm = segment.gemm;
  t.expert = expert;
  t.row_tile = row_tile - tiles[order.first] + at.row;
  t.row_tile_global = row_tile + at.row;
  t.row0 = at.row * height;
  t.pool_row0 = p.prefix[expert] - p.prefix[order.first] + t.row0;
  t.rows = min_u32(height, expert_rows(p, expert) - t.row0);
  t.col_tile = at.col;
  return t;
}

// Fills all tables but the chunk's from counts(source, expert) -> rows, and sums chunk_order.
template <class Team, class Counts>
FLASHMOE_HD void build_plan(Team& team, const PlanTables& p, const Shape& s, const TileOrder& order,
                            const Counts& counts) {
  const uint32_t columns = s.experts + 1, wave = s.wave_experts, owned = order.owned;
  auto other = [&](uint32_t i) { return i + (i >= p.rank ? 1 : 0); };
  team.sums(
      s.world - 1, p.first, [&](uint32_t i, uint32_t e) { return counts(other(i), e); },
      [&](uint32_t i) { return of_other(p, other(i)); });
  for (uint32_t e = team.rank(); e < s.experts; e += team.size()) {
    const bool own = e - p.first < owned;
    uint32_t total = 0;
    for (uint32_t source = 0; source < s.world; ++source) {
      const uint32_t rows = counts(source, e);
      if (own || source == p.rank) {
        *source_start_at(p, source, e) = total;
        *source_prefix(p, s, source, e) = rows;
      }
      total += rows;
    }
    const uint32_t height = tile_height(s, total);
    const uint32_t row_tiles = total <= height ? min_u32(total, 1) : ceil_div(total, height);
    p.prefix[e] = total;
    p.height[e] = height;
    p.prefix[columns + e] = row_tiles;
    const uint32_t local = e - order.first;
    if (local >= owned) continue;
    const uint32_t block = local / wave, within = local - block * wave;
    const uint32_t of_next =
        min_u32((block + 2) * wave, owned) - min_u32((block + 1) * wave, owned);
    const uint32_t at[2] = {block_begin(block, wave, owned) + within,
                            block_begin(block + 1, wave, owned) + of_next + within};
    for (uint32_t gemm = 1; gemm <= 2; ++gemm) {
      p.segments[at[gemm - 1]] = row_tiles * order.columns[gemm - 1];
      p.segment_of[at[gemm - 1]] = Segment{gemm, local}.word();
    }
  }
  team.sync();
  team.scan(4 + s.world, [&](uint32_t row) {
    if (row < 3) return ScanRow{p.prefix + row * columns, s.experts};
    if (row == 3) return ScanRow{p.segments, 2 * owned};
    if (row == 4) return ScanRow{p.chunk_order, s.experts};
    // The sum of what is before the first own expert stands first.
    return ScanRow{of_other(p, other(row - 5)), owned + 1};
  });
}

// Fills chunk_prefix and chunk_order from the rank's [chunks][E]: rows of each chunk, and of all the
// chunks before it.  build_plan() then sums chunk_order.  The host engine's alone: on a GPU each CTA has both from the
// gate and the histograms (gate.h, own_counts() in kernel.h).
template <class Team>
FLASHMOE_HD void build_chunk_tables(Team& team, const PlanTables& p, const Shape& s,
                                    const uint32_t* histogram, const uint32_t* chunk_rows,
                                    uint32_t chunk) {
  for (uint32_t e = team.rank(); e < s.experts; e += team.size()) {
    p.chunk_prefix[e] = chunk_rows[chunk * s.experts + e];
    p.chunk_order[e] = histogram[chunk * s.experts + e];
  }
}

// The largest pool any rank needs, rows; over pool_rows it is an overflow on all ranks alike.
FLASHMOE_HD uint32_t pool_rows_needed(const PlanTables& p, const Shape& s) {
  uint32_t needed = 0;
  uint32_t begin = 0;
  for (uint32_t r = 1; r <= s.world; ++r) {
    const uint32_t end = p.prefix[r == s.world ? s.experts : first_expert(s, r)];
    needed = max_u32(needed, end - begin);
    begin = end;
  }
  return needed;
}

}  // namespace flashmoe
