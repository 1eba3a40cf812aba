// Rows to the owners of their experts.
#pragma once

#include <cstdint>

#include "device/cta.h"
#include "device/put.h"

namespace flashmoe {

// The pieces of shared memory that a comm warp's rows bounce through: there is no bulk copy from global
// to global memory.  Loads run five pieces ahead of stores.  One lane holds it.
struct PieceRing {
  static constexpr uint32_t kAhead = 5;
  static_assert(kAhead < kPieces, "a piece is loaded again only after its store has read it");
  uint64_t* full;    // [kPieces]
  PieceGoal* goals;  // [kPieces]
  char* pieces;      // [kPieces][kPieceBytes]
  uint32_t loaded = 0;
  uint32_t stored = 0;

  // Sends on the oldest piece.
  __device__ __forceinline__ void store_one() {
    const uint32_t slot = stored % kPieces;
    ptx::mbarrier_wait(full + slot, stored / kPieces & 1);
    ptx::bulk_store(goals[slot].to, pieces + slot * kPieceBytes, goals[slot].bytes);
    ptx::bulk_commit();
    ++stored;
  }
  __device__ __forceinline__ void copy(char* to, const char* from, uint32_t bytes) {
    if (loaded - stored == kAhead) store_one();
    const uint32_t slot = loaded % kPieces;
    // The piece's last store is the oldest of kPieces - kAhead + 1 groups.
    ptx::bulk_wait_read<kPieces - kAhead>();
    ptx::mbarrier_expect(full + slot, bytes);
    ptx::bulk_load(pieces + slot * kPieceBytes, from, bytes, full + slot);
    goals[slot] = {to, bytes};
    ++loaded;
  }
  // All copies so far have been written, visibly to this lane.
  __device__ __forceinline__ void drain() {
    while (stored != loaded) store_one();
    ptx::bulk_wait_all();
  }
};

// The chunk's rows for one owner's experts of some groups: rows [begin, end) of the chunk's order.
struct DispatchUnit {
  uint32_t owner;
  uint32_t expert_begin;
  uint32_t expert_end;
  uint32_t begin;
  uint32_t end;
};

// Rows are dispatched by groups of experts, smaller than the waves of the tiles' order, so that the first
// tiles need not wait for a whole wave: so many groups a wave, over all owners.
__device__ __forceinline__ uint32_t group_experts(const Shape& shape) {
  constexpr uint32_t kGroups = 8;
  return ceil_div(shape.wave_experts * min_u32(shape.world, kGroups), kGroups);
}
__device__ __forceinline__ uint32_t groups_of(const Shape& shape) {
  return ceil_div(max_owned_experts(shape), group_experts(shape));
}
// How many of them all warps dispatch before the roles part: those without which some CTA has no first
// tile, or all of them where the chunk has few rows, each of which would cost a comm warp a round trip.
template <bool kTraced>
__device__ __forceinline__ uint32_t first_groups(const Shared<kTraced>& sh, const Place& place) {
  constexpr uint32_t kFewRows = 8 * kWarps;
  const Shape& shape = sh.shape;
  const uint32_t all = groups_of(shape), group = group_experts(shape);
  if (sh.tables.chunk_order[shape.experts] <= kFewRows) return all;
  uint32_t groups = 1;
  // As long as they are of the first wave, segments are GEMM1's of one expert each.
  while (groups < all && groups * group < shape.wave_experts &&
         sh.tables.segments[min_u32(groups * group, owned_experts(shape, place.rank))] <
             shape.chunks) {
    ++groups;
  }
  return groups;
}

// The unit of groups [from, to) that comes `turn`-th: the rank itself first and then its neighbours in
// rotated order.
template <bool kTraced>
__device__ __forceinline__ DispatchUnit dispatch_unit(const Shared<kTraced>& sh, const Place& place,
                                                      uint32_t from, uint32_t to, uint32_t turn) {
  const Shape& shape = sh.shape;
  DispatchUnit u;
  u.owner = place.rank + turn;
  if (u.owner >= shape.world) u.owner -= shape.world;
  const uint32_t owner_end = first_expert(shape, u.owner + 1);
  const uint32_t owner_begin = first_expert(shape, u.owner);
  const uint32_t group = group_experts(shape);
  u.expert_begin = min_u32(owner_begin + from * group, owner_end);
  u.expert_end = min_u32(owner_begin + to * group, owner_end);
  u.begin = sh.tables.chunk_order[u.expert_begin];
  u.end = sh.tables.chunk_order[u.expert_end];
  return u;
}

// Where rows for an owner go: its pool, or where they are staged for it.
template <bool kTraced>
__device__ __forceinline__ char* rows_for(const Shared<kTraced>& sh, const Place& place,
                                          uint32_t owner) {
  if constexpr (kPuts) {
    if (sh.heaps[owner].base == nullptr) return place.heap.at<char>(sh.layout.ret);
  }
  return sh.heaps[owner].template at<char>(sh.layout.pool);
}

// Where row p of the chunk's order comes from and goes to, in bytes from x and from rows_for() its owner.
struct RowPath {
  uint64_t from;
  uint64_t to;
};
template <bool kTraced>
__device__ __forceinline__ RowPath row_path(const Shared<kTraced>& sh, const Place& place,
                                            const uint32_t* sorted, uint32_t owner, uint32_t expert,
                                            uint32_t p) {
  const Shape& shape = sh.shape;
  const PlanTables& tables = sh.tables;
  const uint64_t row_bytes = shape.hidden * 2;
  if constexpr (kPuts) {
    if (sh.heaps[owner].base == nullptr) {
      const uint32_t i = tables.chunk_prefix[expert] + p - tables.chunk_order[expert];
      return {sorted[p] / shape.top_k * row_bytes,
              return_row(tables, shape, place.rank, expert, i) * row_bytes};
    }
  }
  const uint32_t i = source_start(tables, shape, place.rank, expert) + tables.chunk_prefix[expert] +
                     p - tables.chunk_order[expert];
  return {sorted[p] / shape.top_k * row_bytes, pool_row(tables, shape, expert, i) * row_bytes};
}

// The chunk's rows by expert, as token * k + j.
template <bool kTraced>
__device__ __forceinline__ const uint32_t* chunk_rows_sorted(const Shared<kTraced>& sh,
                                                             const Place& place) {
  return place.heap.at<uint32_t>(sh.layout.sorted) +
         static_cast<uint64_t>(sh.own.begin) * sh.shape.top_k;
}

// Adds rows [begin, end) of a unit to their row tiles' counters, or, where the unit was staged, puts what
// is complete.  One warp, after a fence.
template <bool kTraced>
__device__ __forceinline__ void publish_rows(const Shared<kTraced>& sh, const Place& place,
                                             const FaultArgs& fault, const DispatchUnit& u,
                                             uint32_t begin, uint32_t end) {
  const Shape& shape = sh.shape;
  const PlanTables& tables = sh.tables;
  if constexpr (kPuts) {
    if (sh.heaps[u.owner].base == nullptr) {
      put_staged(sh, place, fault, u.owner, u.expert_begin, u.expert_end, begin, end);
      return;
    }
  }
  for (uint32_t e = u.expert_begin + threadIdx.x % 32; e < u.expert_end; e += 32) {
    const uint32_t from = max_u32(begin, tables.chunk_order[e]);
    const uint32_t to = min_u32(end, tables.chunk_order[e + 1]);
    if (from >= to) continue;
    if (fault.lost_signal_rank == place.rank && fault.lost_signal_expert == e) continue;
    const uint32_t row0 = source_start(tables, shape, place.rank, e) + tables.chunk_prefix[e];
    uint32_t i = row0 + from - tables.chunk_order[e];
    const uint32_t last = row0 + to - tables.chunk_order[e];
    while (i < last) {
      const uint32_t tile = i / tables.height[e];
      const uint32_t next = min_u32(last, (tile + 1) * tables.height[e]);
      ptx::add_relaxed_sys(tile_counter(sh.heaps[u.owner], sh.layout.rows_ready, sh.pool_tiles,
                                        place.epoch, pool_tile(tables, shape, e, tile)),
                           next - i);
      i = next;
    }
  }
}

// Says in each actor's trace what its warps moved of a unit before the roles part: warp w has moved rows
// w, w + kWarps, ...
template <bool kTraced>
__device__ __forceinline__ void record_first(Shared<kTraced>& sh, const Place& place,
                                             const DispatchUnit& u) {
  const int lane = led_lane();
  const uint32_t rows = u.end - u.begin, warp = threadIdx.x / 32;
  if (lane < 0 || rows == 0) return;
  const uint32_t warps = warp >= kMathWarp ? 4 : 1;
  uint32_t moved = 0;
  for (uint32_t w = warp; w < warp + warps; ++w) {
    moved += rows > w ? (rows - w - 1) / kWarps + 1 : 0;
  }
  sh.actors[lane].span(EventKind::k_dispatch, u.owner, u.expert_begin, place.chunk,
                       static_cast<uint64_t>(moved) * sh.shape.hidden * 2);
}

// The chunk's rows for the experts due first, by all warps of the CTA before the roles part: no tile
// can begin without them, so there is nothing else to do.  Where rows are gathered they stay where they
// are, which make_plan() has written, and are all announced.
template <bool kTraced>
__device__ inline void dispatch_first(Shared<kTraced>& sh, const Place& place,
                                      const FaultArgs& fault, char* stages) {
  const Shape& shape = sh.shape;
  const uint32_t warp = threadIdx.x / 32, thread = threadIdx.x % 32;
  if (sh.gathers) {
    const DispatchUnit own{place.rank, 0, shape.experts, 0, sh.tables.chunk_order[shape.experts]};
    if (warp == 0) {
      ptx::fence_acq_rel_gpu();
      publish_rows(sh, place, fault, own, own.begin, own.end);
    }
    record_first(sh, place, own);
    return;
  }
  const uint32_t row_bytes = shape.hidden * 2;
  const char* x = static_cast<const char*>(place.args->x);
  const uint32_t* sorted = chunk_rows_sorted(sh, place);
  // Rows bounce through the warp's part of the stages, a lane a row, as many at once as it holds.
  constexpr uint32_t kPart = kStages * kStageBytes / kWarps;
  static_assert(kPart % 16 == 0, "bulk copies move multiples of 16 bytes");
  char* part = stages + warp * kPart;
  uint64_t* full = &sh.first_full[warp];
  const uint32_t at_once = max_u32(1, min_u32(kPart / row_bytes, 32));
  const uint32_t piece_bytes = min_u32(row_bytes, kPart);
  uint32_t turn_of_full = 0;
  const uint32_t groups = first_groups(sh, place);
  for (uint32_t turn = 0; turn < shape.world; ++turn) {
    const DispatchUnit u = dispatch_unit(sh, place, 0, groups, turn);
    char* pool = rows_for(sh, place, u.owner);
    uint32_t expert = u.expert_begin;
    for (uint32_t base = u.begin + warp; base < u.end; base += kWarps * at_once) {
      const uint32_t rows = min_u32(ceil_div(u.end - base, kWarps), at_once);
      const bool mine = thread < rows;
      RowPath path{};
      if (mine) {
        const uint32_t p = base + kWarps * thread;
        while (p >= sh.tables.chunk_order[expert + 1]) ++expert;
        path = row_path(sh, place, sorted, u.owner, expert, p);
      }
      for (uint32_t at = 0; at < row_bytes; at += piece_bytes) {
        const uint32_t bytes = min_u32(piece_bytes, row_bytes - at);
        if (thread == 0) ptx::mbarrier_expect(full, rows * bytes);
        __syncwarp();
        if (mine) ptx::bulk_load(part + thread * row_bytes, x + path.from + at, bytes, full);
        ptx::mbarrier_wait(full, turn_of_full);
        turn_of_full ^= 1;
        if (mine) {
          ptx::bulk_store(pool + path.to + at, part + thread * row_bytes, bytes);
          ptx::bulk_commit();
          ptx::bulk_wait_read<0>();
        }
        __syncwarp();
      }
    }
    ptx::bulk_wait_all();
    __syncthreads();
    record_first(sh, place, u);
    if (warp == turn % kWarps) {
      ptx::fence_acq_rel_sys();
      publish_rows(sh, place, fault, u, u.begin, u.end);
    }
  }
}

// One comm warp's share of the chunk's other rows, group by group, the two warps halving each unit.
// Never waits, so no rank can hold another up here.  Returns the pieces it has used.
template <bool kTraced>
__device__ inline uint32_t dispatch(Shared<kTraced>& sh, const Place& place, const FaultArgs& fault,
                                    uint32_t half, char* pieces) {
  const Shape& shape = sh.shape;
  const PlanTables& tables = sh.tables;
  const uint32_t lane = threadIdx.x % 32;
  GpuActor<kTraced>& actor = sh.actors[static_cast<int>(Lane::k_comm0) + half];
  const uint32_t row_bytes = shape.hidden * 2;
  const char* x = static_cast<const char*>(place.args->x);
  PieceRing ring{sh.piece_full[half], sh.piece_goals[half], pieces + half * kPieces * kPieceBytes};
  const uint32_t* sorted = chunk_rows_sorted(sh, place);
  const uint32_t groups = groups_of(shape);
  for (uint32_t group = first_groups(sh, place); group < groups; ++group) {
    for (uint32_t turn = 0; turn < shape.world; ++turn) {
      const DispatchUnit u = dispatch_unit(sh, place, group, group + 1, turn);
      const uint32_t begin = u.begin + (u.end - u.begin) * half / 2;
      const uint32_t end = u.begin + (u.end - u.begin) * (half + 1) / 2;
      if (begin == end) continue;
      if (lane == 0) actor.doing(EventKind::k_dispatch, u.owner, u.expert_begin, place.chunk);
      char* pool = rows_for(sh, place, u.owner);
      uint32_t expert = u.expert_begin;
      for (uint32_t base = begin; base < end; base += 32) {
        // A lane a row for the addresses; then one lane moves them.
        const uint32_t p = min_u32(base + lane, end - 1);
        while (p >= tables.chunk_order[expert + 1]) ++expert;
        const RowPath path = row_path(sh, place, sorted, u.owner, expert, p);
        const uint32_t here = min_u32(32, end - base);
        for (uint32_t r = 0; r < here; ++r) {
          char* to = pool + __shfl_sync(0xffffffffu, path.to, r);
          const char* from = x + __shfl_sync(0xffffffffu, path.from, r);
          if (lane == 0) {
            for (uint32_t at = 0; at < row_bytes; at += kPieceBytes) {
              ring.copy(to + at, from + at, min_u32(row_bytes - at, kPieceBytes));
            }
          }
        }
      }
      if (lane == 0) ring.drain();
      __syncwarp();
      ptx::fence_acq_rel_sys();
      publish_rows(sh, place, fault, u, begin, end);
      if (lane == 0) {
        actor.span(EventKind::k_dispatch, u.owner, u.expert_begin, place.chunk,
                   static_cast<uint64_t>(end - begin) * row_bytes);
      }
    }
  }
  return __shfl_sync(0xffffffffu, ring.loaded, 0);
}

}  // namespace flashmoe
