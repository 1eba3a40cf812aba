// What travels by put-with-signal to and from ranks beyond pointers: dispatched rows, results, and the
// waits for both (core/arrival.h says where rows are staged, and who may touch them when).
//
// Nothing of this is in the flavour `p2p`: callers ask kPuts at compile time, and then whether the peer's
// entry in the table is null.
#pragma once

#include <cstdint>

#include "core/arrival.h"
#include "device/cta.h"

namespace flashmoe {

// Clears the counters of staged rows that the next launch adds to.
template <bool kTraced>
__device__ inline void clear_staged(const Shared<kTraced>& sh, const Place& place) {
  for (uint32_t e = place.chunk * kThreads + threadIdx.x; e < sh.shape.experts;
       e += sh.shape.chunks * kThreads) {
    *staged_counter(place.heap, sh.layout, sh.shape, place.epoch + 1, e) = 0;
  }
}

// Counts rows [begin, end) of the chunk's order, which are staged, for experts [first, last) of one owner;
// the chunk that completes an expert puts the rank's rows for it.  One warp, after a fence.
template <bool kTraced>
__device__ inline void put_staged(const Shared<kTraced>& sh, const Place& place,
                                  const FaultArgs& fault, uint32_t owner, uint32_t first,
                                  uint32_t last, uint32_t begin, uint32_t end) {
  const Shape& shape = sh.shape;
  const PlanTables& tables = sh.tables;
  const uint64_t row_bytes = 2ull * shape.hidden;
  for (uint32_t base = first; base < last; base += 32) {
    const uint32_t e = base + threadIdx.x % 32;
    bool complete = false;
    if (e < last) {
      const uint32_t from = max_u32(begin, tables.chunk_order[e]);
      const uint32_t to = min_u32(end, tables.chunk_order[e + 1]);
      if (from < to) {
        const uint64_t before = ptx::fetch_add_relaxed_gpu(
            staged_counter(place.heap, sh.layout, shape, place.epoch, e), to - from);
        complete = before + (to - from) == source_rows(tables, shape, place.rank, e) &&
                   !(fault.lost_signal_rank == place.rank && fault.lost_signal_expert == e);
      }
    }
    uint32_t mask = __ballot_sync(0xffffffffu, complete);
    // The other chunks' rows, fenced before they were counted.
    if (mask != 0) ptx::fence_acq_rel_sys();
    for (; mask != 0; mask &= mask - 1) {
      const uint32_t expert = base + __ffs(mask) - 1;
      const uint32_t rows = source_rows(tables, shape, place.rank, expert);
      const uint64_t from = return_row(tables, shape, place.rank, expert, 0);
      const uint64_t to = pool_row(tables, shape, expert, source_start(tables, place.rank, expert));
      transport::put_by_warp(
          place.heap.at<char>(sh.layout.pool) + to * row_bytes,
          place.heap.at<char>(sh.layout.ret) + from * row_bytes, rows * row_bytes,
          place.heap.at<uint64_t>(arrived_at(sh.layout, shape, place.rank, expert)),
          tagged(place.epoch, rows), owner);
    }
  }
}

// Until the rows of a GEMM1 tile that come by put are here.  `ring` is the scheduler's TaskRing; adds to
// `wait` as await_operands() does.
template <class Ring>
__device__ inline Status await_arrivals(Ring& ring, const Tile& tile, PairMessage& wait) {
  const Shape& shape = ring.sh.shape;
  const Place& place = ring.place;
  for (uint32_t source = 0; source < shape.world; ++source) {
    if (ring.sh.heaps[source].base != nullptr) continue;
    const SourceShare share = share_of(ring.sh.tables, shape, tile, source);
    if (share.rows == 0) continue;
    uint64_t* word =
        place.heap.at<uint64_t>(arrived_at(ring.sh.layout, shape, source, tile.expert));
    const Status status = await_word(ring,
                                     {EventKind::k_wait_rows, static_cast<uint16_t>(source),
                                      static_cast<uint16_t>(tile.expert), tile.row_tile},
                                     word, Until::kPrefix, tagged(place.epoch, share.prefix), wait);
    if (status != Status::kOk) return status;
    transport::arrived(word, tagged(place.epoch, share.prefix));
  }
  return Status::kOk;
}

// The results of row tiles that are complete, to their sources beyond pointers, from the pool's rows over
// which they lie.  One thread, which has fenced.
template <bool kTraced>
__device__ __forceinline__ void put_results(Shared<kTraced>& sh, const Place& place) {
  const Shape& shape = sh.shape;
  const uint64_t row_bytes = 2ull * shape.hidden;
  for (; sh.pending_tiles != 0; --sh.pending_tiles) {
    const Tile tile = tile_at(sh.tables, shape, sh.order, sh.pending[sh.pending_tiles - 1]);
    for (uint32_t source = 0; source < shape.world; ++source) {
      if (sh.heaps[source].base != nullptr) continue;
      const SourceShare share = share_of(sh.tables, shape, tile, source);
      if (share.rows == 0) continue;
      const uint32_t first = share.prefix - share.rows;  // of the source's rows for the expert
      const uint64_t from =
          tile.pool_row0 + (source_start(sh.tables, source, tile.expert) + first - tile.row0);
      const uint64_t to = return_row(sh.tables, shape, source, tile.expert, first);
      transport::put(place.heap.at<char>(sh.layout.ret) + to * row_bytes,
                     place.heap.at<char>(sh.layout.pool) + from * row_bytes, share.rows * row_bytes,
                     place.heap.at<uint64_t>(sh.layout.returned) + tile.row_tile_global,
                     place.epoch, source);
    }
  }
}

// After a warp has found that the results of `expert`'s row tile are here, a lane a result: what put
// them is ended too.
template <bool kTraced>
__device__ inline void results_arrived(const Shared<kTraced>& sh, const Place& place,
                                       uint64_t* word, uint32_t expert, bool mine) {
  const bool by_put = mine && sh.heaps[owner_of(sh.shape, expert)].base == nullptr;
  const uint32_t mask = __ballot_sync(0xffffffffu, by_put);
  if (mask != 0 && threadIdx.x % 32 == __ffs(mask) - 1) transport::arrived(word, place.epoch);
}

}  // namespace flashmoe
