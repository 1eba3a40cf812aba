// Tiles: sched takes and readies them, load brings their operands as floats, math multiplies.
#pragma once

#include <algorithm>

#include "host/cta.h"

namespace flashmoe::host {

// Math lanes of a CTA: both add to a row tile's counters, once a column tile.
inline constexpr uint32_t kMathLanes = 2;

template <bool kTraced>
uint32_t Cta<kTraced>::tile_columns(const Tile& tile) const {
  const uint32_t width = tile.gemm == 1 ? s_.inter : s_.hidden;
  const uint32_t step = tile.gemm == 1 ? s_.tile_n1 : s_.tile_n2;
  return min_u32(step, width - tile.col_tile * step);
}

// Of several waits the lanes that share them record one, from the first begin to the last end, which
// names what came last.
template <bool kTraced>
SharedWait Cta<kTraced>::await_operands(LaneActor& a, const Tile& tile) {
  const bool rows = tile.gemm == 1;
  Awaited what{rows ? EventKind::k_wait_rows : EventKind::k_wait_h, kNoPeer,
               static_cast<uint16_t>(tile.expert), tile.row_tile};
  uint64_t* word =
      tile_counter(heap_, rows ? l_.rows_ready : l_.h_ready, s_, epoch_, tile.row_tile);
  const uint64_t target =
      rows ? rows_counted(tables_, s_, tile, peers_) : uint64_t{kMathLanes} * column_tiles(s_, 1);
  SharedWait all = await(a, what, word, Until::kAtLeast, target, true);
  for (uint32_t source = 0; rows && source < s_.world && all.status == Status::kOk; ++source) {
    if (peers_[source].base != nullptr) continue;
    const SourceShare share = share_of(tables_, s_, tile, source);
    if (share.rows == 0) continue;
    what.peer = static_cast<uint16_t>(source);
    SharedWait one = await(a, what, heap_.at<uint64_t>(arrived_at(l_, s_, source, tile.expert)),
                           Until::kPrefix, tagged(epoch_, share.prefix), true);
    if (all.to != 0) {
      one.from = all.from;
      one.lacking = all.lacking;
      if (one.to == 0) one.to = all.to;
    }
    all = one;
  }
  return all;
}

template <bool kTraced>
Status Cta<kTraced>::sched_lane(LaneActor& a) {
  const TileOrder order = tile_order(s_, rank_);
  const uint32_t tiles = tiles_of_rank(tables_, order);
  uint64_t* next_tile = next_tile_word(heap_, l_, epoch_);
  Status status = Status::kOk;
  for (;;) {
    Task& task = tasks_.acquire();
    a.skip();
    task = Task{};
    status = static_cast<Status>(HostPlatform::load(heap_.at<uint64_t>(l_.abort_word)));
    const uint64_t index =
        status == Status::kOk
            ? std::atomic_ref<uint64_t>(*next_tile).fetch_add(1, std::memory_order_relaxed)
            : tiles;
    if (index >= tiles) {
      task.exit = true;
    } else {
      task.tile = tile_at(tables_, s_, order, static_cast<uint32_t>(index));
      a.doing(EventKind::k_schedule, kNoPeer, static_cast<uint16_t>(task.tile.expert),
              task.tile.index);
      a.span(EventKind::k_schedule, kNoPeer, static_cast<uint16_t>(task.tile.expert),
             task.tile.index, 0);
      slow_down();
      task.wait = await_operands(a, task.tile);
      status = task.wait.status;
      task.exit = status != Status::kOk;
    }
    const bool last = task.exit;
    tasks_.publish();
    if (last) return status;
  }
}

// Brings K steps [k0, k0 + depth) of the tile's operands, as floats; columns beyond the tile's, up
// to the next multiple of kColumnStep, are zero.
template <bool kTraced>
void Cta<kTraced>::fill(const Tile& tile, uint32_t k0, uint32_t depth, Stage& stage) const {
  const bool up = tile.gemm == 1;
  const uint64_t width = up ? s_.hidden : s_.inter;  // K
  const uint16_t* rows = heap_.at<uint16_t>(up ? l_.pool : l_.h) + tile.pool_row0 * width + k0;
  for (uint32_t r = 0; r < tile.rows; ++r) {
    widen(m_.config.dtype, rows + r * width, stage.rows + r * kStageDepth, depth);
  }
  const uint32_t columns = tile_columns(tile);
  const uint32_t padded = static_cast<uint32_t>(align_up(columns, kColumnStep));
  auto panel = [&](const uint16_t* weights, uint32_t at) {
    widen_columns(m_.config.dtype, weights, width, stage.columns + at, kPanelColumns, columns,
                  depth);
    for (uint32_t c = columns; c < padded; ++c) {
      for (uint32_t k = 0; k < depth; ++k) stage.columns[k * kPanelColumns + at + c] = 0.0f;
    }
  };
  const bool gated = is_gated(s_.activation);
  if (up) {
    const uint64_t expert_rows = gated ? 2ull * s_.inter : s_.inter;
    const uint64_t row = tile.expert * expert_rows + tile.col_tile * s_.tile_n1;
    panel(m_.weights.up + row * width + k0, 0);
    if (gated) panel(m_.weights.up + (row + s_.inter) * width + k0, kTileN1);
  } else {
    const uint64_t row =
        static_cast<uint64_t>(tile.expert) * s_.hidden + tile.col_tile * s_.tile_n2;
    panel(m_.weights.down + row * width + k0, 0);
  }
}

template <bool kTraced>
Status Cta<kTraced>::load_lane(LaneActor& a) {
  for (;;) {
    const Task task = tasks_.take(0);
    tasks_.release(0);
    a.waited(task.wait.what, task.wait.from, task.wait.to, task.wait.lacking, task.wait.status);
    if (task.exit) return task.wait.status;
    a.skip();
    a.doing(EventKind::k_load, kNoPeer, static_cast<uint16_t>(task.tile.expert), task.tile.index);
    const uint64_t from = HostPlatform::cycles();
    uint64_t stall = 0;
    const uint32_t width = task.tile.gemm == 1 ? s_.hidden : s_.inter;
    for (uint32_t k0 = 0; k0 < width; k0 += kStageDepth) {
      const uint64_t stall_from = stages_->has_room() ? 0 : HostPlatform::cycles();
      Stage& stage = stages_->acquire();
      if (stall_from != 0) stall += HostPlatform::cycles() - stall_from;
      fill(task.tile, k0, min_u32(kStageDepth, width - k0), stage);
      stages_->publish();
    }
    a.span(EventKind::k_load, kNoPeer, static_cast<uint16_t>(task.tile.expert), task.tile.index,
           HostPlatform::cycles() - from, saturate_u32(stall));
  }
}

// Half of each tile's rows: the first lane has the larger half.
template <bool kTraced>
Status Cta<kTraced>::math_lane(LaneActor& a, uint32_t half) {
  std::vector<float> sums(kTileM * kPanelColumns);
  for (;;) {
    const Task task = tasks_.take(1 + half);
    tasks_.release(1 + half);
    a.waited(task.wait.what, task.wait.from, task.wait.to, task.wait.lacking, task.wait.status);
    if (task.exit) {
      if (task.wait.status != Status::kOk) return task.wait.status;
      return combine(a);
    }
    a.skip();
    const Tile& tile = task.tile;
    const EventKind kind = tile.gemm == 1 ? EventKind::k_gemm1 : EventKind::k_gemm2;
    const uint32_t first_half = ceil_div(tile.rows, kMathLanes);
    const uint32_t row0 = half == 0 ? 0 : first_half;
    const uint32_t rows = half == 0 ? first_half : tile.rows - first_half;
    a.doing(kind, kNoPeer, static_cast<uint16_t>(tile.expert), tile.index);
    const uint64_t from = HostPlatform::cycles();
    uint64_t stall = 0;
    const uint32_t width = tile.gemm == 1 ? s_.hidden : s_.inter;
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (uint32_t k0 = 0; k0 < width; k0 += kStageDepth) {
      const uint64_t stall_from = stages_->has_entry(half) ? 0 : HostPlatform::cycles();
      const Stage& stage = stages_->take(half);
      if (stall_from != 0) stall += HostPlatform::cycles() - stall_from;
      const uint32_t depth = min_u32(kStageDepth, width - k0);
      const uint32_t columns = static_cast<uint32_t>(align_up(tile_columns(tile), kColumnStep));
      m_.multiply_add(stage.rows + row0 * kStageDepth, kStageDepth, stage.columns, kPanelColumns,
                      sums.data(), kPanelColumns, rows, columns, depth);
      if (tile.gemm == 1 && is_gated(s_.activation)) {
        m_.multiply_add(stage.rows + row0 * kStageDepth, kStageDepth, stage.columns + kTileN1,
                        kPanelColumns, sums.data() + kTileN1, kPanelColumns, rows, columns, depth);
      }
      stages_->release(half);
    }
    if (tile.gemm == 1) {
      store_hidden(tile, row0, rows, sums.data());
      HostPlatform::add(tile_counter(heap_, l_.h_ready, s_, epoch_, tile.row_tile), 1);
    }
    // A lane whose half is empty only passed the stages on: that is no work.
    if (rows > 0) {
      a.span(kind, kNoPeer, static_cast<uint16_t>(tile.expert), tile.index,
             HostPlatform::cycles() - from, saturate_u32(stall));
    }
    if (tile.gemm == 2) give_back(a, tile, row0, rows, sums.data());
  }
}

template <bool kTraced>
void Cta<kTraced>::store_hidden(const Tile& tile, uint32_t row0, uint32_t rows, const float* sums) {
  const uint32_t columns = tile_columns(tile);
  float activated[kTileN1];
  uint16_t* h = heap_.at<uint16_t>(l_.h) + static_cast<uint64_t>(tile.pool_row0 + row0) * s_.inter +
                tile.col_tile * s_.tile_n1;
  for (uint32_t r = 0; r < rows; ++r) {
    const float* gate = sums + r * kPanelColumns;
    activate(s_.activation, gate, gate + kTileN1, activated, columns);
    narrow(m_.config.dtype, activated, h + static_cast<uint64_t>(r) * s_.inter, columns);
  }
}

// Stores a GEMM2 tile's rows into their sources' return buffers, or, for sources beyond pointers, over
// the rows of the pool that they come from; whoever completes the row tile tells its sources.
template <bool kTraced>
void Cta<kTraced>::give_back(LaneActor& a, const Tile& tile, uint32_t row0, uint32_t rows,
                             const float* sums) {
  const uint32_t columns = tile_columns(tile);
  const uint64_t column0 = tile.col_tile * s_.tile_n2;
  const uint64_t rows_sent = static_cast<uint64_t>(s_.max_tokens) * s_.top_k;
  const uint32_t begin = tile.row0 + row0, end = begin + rows;  // within the expert
  uint32_t given[kMaxRanks] = {};
  uint64_t all = 0;
  for (uint32_t source = 0; source < s_.world; ++source) {
    const uint32_t start = source_start(tables_, source, tile.expert);
    const uint32_t from = max_u32(begin, start);
    const uint32_t to = min_u32(end, start + source_rows(tables_, s_, source, tile.expert));
    const bool reached = peers_[source].base != nullptr;
    const Heap& heap = reached ? peers_[source] : heap_;
    uint16_t* base = heap.at<uint16_t>(reached ? l_.ret : l_.pool) + column0;
    for (uint32_t row = from; row < to; ++row) {
      const uint64_t place = reached ? return_row(tables_, s_, source, tile.expert, row - start)
                                     : tile.pool_row0 + (row - tile.row0);
      if (reached && place >= rows_sent) continue;  // only where a source lied about its counts
      narrow(m_.config.dtype, sums + (row - begin) * kPanelColumns, base + place * s_.hidden,
             columns);
      given[source] += 2 * columns;
    }
    all += given[source];
  }
  uint64_t* done = tile_counter(heap_, l_.y_ready, s_, epoch_, tile.row_tile);
  if (HostPlatform::add(done, 1) + 1 == uint64_t{kMathLanes} * column_tiles(s_, 2)) {
    tell_sources(tile);
  }
  if (rows == 0) return;
  const auto expert = static_cast<uint16_t>(tile.expert);
  a.span(EventKind::k_give_back, kNoPeer, expert, tile.index, all);
  for (uint32_t source = 0; source < s_.world; ++source) {
    if (given[source] == 0) continue;
    a.instant(EventKind::k_put, static_cast<uint16_t>(source), expert, tile.index, given[source]);
  }
}

// Marks a row tile whose results are all stored at each source that has rows in it; a source beyond
// pointers gets its rows with the mark.
template <bool kTraced>
void Cta<kTraced>::tell_sources(const Tile& tile) {
  const uint64_t row_bytes = 2ull * s_.hidden;
  const uint64_t rows_sent = static_cast<uint64_t>(s_.max_tokens) * s_.top_k;
  for (uint32_t source = 0; source < s_.world; ++source) {
    const SourceShare share = share_of(tables_, s_, tile, source);
    if (share.rows == 0) continue;
    const uint64_t mark = l_.returned + 8ull * tile.row_tile_global;
    if (peers_[source].base != nullptr) {
      send_signal(source, mark, epoch_);
      continue;
    }
    const uint32_t first = share.prefix - share.rows;  // of the source's rows for the expert
    const uint64_t to = return_row(tables_, s_, source, tile.expert, first);
    const uint64_t from =
        tile.pool_row0 + (source_start(tables_, source, tile.expert) + first - tile.row0);
    if (to + share.rows > rows_sent) continue;  // only where a source lied about its counts
    m_.transport->put_signal(source, l_.ret + to * row_bytes,
                             heap_.at<char>(l_.pool) + from * row_bytes, share.rows * row_bytes,
                             mark, epoch_);
  }
}

}  // namespace flashmoe::host
