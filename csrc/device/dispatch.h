// Rows to the owners of their experts.
#pragma once

#include <cstdint>

#include "device/cta.h"
#include "device/put.h"

namespace flashmoe {

// The pieces of shared memory that a comm warp's rows bounce through: there is no bulk copy from global
// to global memory.  Loads run four pieces ahead of stores.  One lane holds it.
struct PieceRing {
  static constexpr uint32_t kAhead = 4;
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
  // A lane's.
  __device__ __forceinline__ DispatchUnit of_lane(uint32_t lane) const {
    auto from = [&](uint32_t v) { return __shfl_sync(0xffffffffu, v, lane); };
    return {from(owner), from(expert_begin), from(expert_end), from(begin), from(end)};
  }
  // Rows of all lanes'.
  __device__ __forceinline__ uint32_t all_rows() const {
    return __reduce_add_sync(0xffffffffu, end - begin);
  }
};

// How many groups of experts (Course::group) all warps dispatch before the roles part: those without which some CTA has
// no first tile, or all of them where the chunk has few rows, each of which would cost a comm warp a round trip.
template <bool kTraced>
__device__ __forceinline__ uint32_t first_groups(const Shared<kTraced>& sh, const Place& place) {
  constexpr uint32_t kOneRound = 8 * kWarps;
  const Shape& shape = sh.shape;
  const uint32_t all = sh.groups, group = sh.group;
  if (sh.tables.chunk_order[shape.experts] <= kOneRound) return all;
  uint32_t groups = 1;
  // As long as they are of the first wave, segments are GEMM1's of one expert each.
  while (groups < all && groups * group < shape.wave_experts &&
         sh.tables.segments[min_u32(groups * group, owned_experts(shape, place.rank))] <
             shape.chunks) {
    ++groups;
  }
  return groups;
}

// Of groups [from, to) the unit of one owner: the rank itself is the first, then its neighbours in turn.
template <bool kTraced>
__device__ __forceinline__ DispatchUnit dispatch_unit(const Shared<kTraced>& sh, const Place& place,
                                                      uint32_t from, uint32_t to, uint32_t turn) {
  const Shape& shape = sh.shape;
  DispatchUnit u;
  u.owner = place.rank + turn;
  if (u.owner >= shape.world) u.owner -= shape.world;
  const uint32_t owner_end = first_expert(shape, u.owner + 1);
  const uint32_t owner_begin = first_expert(shape, u.owner);
  const uint32_t group = sh.group;
  u.expert_begin = min_u32(owner_begin + from * group, owner_end);
  u.expert_end = min_u32(owner_begin + to * group, owner_end);
  u.begin = sh.tables.chunk_order[u.expert_begin];
  u.end = sh.tables.chunk_order[u.expert_end];
  return u;
}
// Those of all owners, a lane each; the other lanes have none.
template <bool kTraced>
__device__ __forceinline__ DispatchUnit dispatch_units(const Shared<kTraced>& sh,
                                                       const Place& place, uint32_t from,
                                                       uint32_t to) {
  static_assert(kMaxRanks <= 32, "a lane an owner");
  const uint32_t turn = ptx::lane_id();
  return turn < sh.shape.world ? dispatch_unit(sh, place, from, to, turn) : DispatchUnit{};
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

// The chunk's rows by expert, as token * k + j.
template <bool kTraced>
__device__ __forceinline__ const uint32_t* chunk_rows_sorted(const Shared<kTraced>& sh,
                                                             const Place& place) {
  return place.heap.at<uint32_t>(sh.layout.sorted) +
         static_cast<uint64_t>(sh.own.begin) * sh.shape.top_k;
}

// Which token a row is of, and where it goes.
struct RowPath {
  uint32_t token;
  char* to;
};
// The i-th row of all lanes' units; a lane asks for its own.
template <bool kTraced>
__device__ __forceinline__ RowPath find_row(const Shared<kTraced>& sh, const Place& place,
                                            const uint32_t* sorted, const DispatchUnit& units,
                                            uint32_t i) {
  const Shape& shape = sh.shape;
  const PlanTables& tables = sh.tables;
  uint32_t p = 0, expert = 0, owner = 0;
  bool found = false;
#pragma unroll 1
  for (uint32_t turn = 0; turn < shape.world; ++turn) {
    const DispatchUnit u = units.of_lane(turn);
    if (found) continue;
    const uint32_t rows = u.end - u.begin;
    found = i < rows;
    if (found) {
      p = u.begin + i;
      expert = u.expert_begin;
      owner = u.owner;
    } else {
      i -= rows;
    }
  }
  if (!found) return {};
  while (p >= tables.chunk_order[expert + 1]) ++expert;
  const uint32_t of_expert = tables.chunk_prefix[expert] + p - tables.chunk_order[expert];
  uint64_t row = 0;
  bool staged = false;
  if constexpr (kPuts) staged = sh.heaps[owner].base == nullptr;
  if (staged) {
    row = return_row(tables, shape, place.rank, expert, of_expert);
  } else {
    row = pool_row(tables, shape, expert, source_start(tables, place.rank, expert) + of_expert);
  }
  return {sorted[p] / shape.top_k, rows_for(sh, place, owner) + row * (shape.hidden * 2)};
}

// Adds those of rows [begin, end) of the chunk's order that are for expert e to their row tiles' counters at its owner.
template <bool kTraced>
__device__ __forceinline__ void announce_expert(const Shared<kTraced>& sh, const Place& place,
                                                const FaultArgs& fault, uint32_t owner, uint32_t e,
                                                uint32_t begin, uint32_t end) {
  const Shape& shape = sh.shape;
  const PlanTables& tables = sh.tables;
  const uint32_t from = max_u32(begin, tables.chunk_order[e]);
  const uint32_t to = min_u32(end, tables.chunk_order[e + 1]);
  if (from >= to) return;
  if (fault.lost_signal_rank == place.rank && fault.lost_signal_expert == e) return;
  const uint32_t row0 = source_start(tables, place.rank, e) + tables.chunk_prefix[e];
  uint32_t i = row0 + from - tables.chunk_order[e];
  const uint32_t last = row0 + to - tables.chunk_order[e];
  while (i < last) {
    const uint32_t tile = i / tables.height[e];
    const uint32_t next = min_u32(last, (tile + 1) * tables.height[e]);
    ptx::add_relaxed_sys(tile_counter(sh.heaps[owner], sh.layout.rows_ready, sh.pool_tiles,
                                      place.epoch, pool_tile(tables, shape, e, tile)),
                         next - i);
    i = next;
  }
}
// The rows of all lanes' units; those that are staged for an owner are put once they are complete.  One warp, after a
// fence.
template <bool kTraced>
__device__ __forceinline__ void announce_rows(const Shared<kTraced>& sh, const Place& place,
                                              const FaultArgs& fault, const DispatchUnit& units) {
  const Shape& shape = sh.shape;
  // A lane an expert of an owner.
  const uint32_t most = __reduce_max_sync(0xffffffffu, units.expert_end - units.expert_begin);
#pragma unroll 1
  for (uint32_t base = 0; base < shape.world * most; base += 32) {
    const uint32_t turn = (base + ptx::lane_id()) / most;
    const DispatchUnit u = units.of_lane(min_u32(turn, 31));
    const uint32_t e = u.expert_begin + (base + ptx::lane_id()) - turn * most;
    if (turn >= shape.world || e >= u.expert_end) continue;
    if constexpr (kPuts) {
      if (sh.heaps[u.owner].base == nullptr) continue;
    }
    announce_expert(sh, place, fault, u.owner, e, u.begin, u.end);
  }
  if constexpr (kPuts) {
    for (uint32_t turn = 0; turn < shape.world; ++turn) {
      const DispatchUnit u = units.of_lane(turn);
      if (sh.heaps[u.owner].base != nullptr) continue;
      put_staged(sh, place, fault, u.owner, u.expert_begin, u.expert_end, u.begin, u.end);
    }
  }
}

// Says in the trace of an actor, whose leader is lane 0, what was moved of all lanes' units from its last span to `now`.
// Of an owner's unit that is moved(unit, before) rows, where those of the owners before it are `before` rows.  Rows for
// all of them were under way together, so the time is shared out by them.  A whole warp; without an actor nothing is
// written.
template <bool kTraced, class Moved>
__device__ __forceinline__ void record_moved(const Shared<kTraced>& sh, const Place& place,
                                             GpuActor<kTraced>* actor, uint64_t now,
                                             const DispatchUnit& units, const Moved& moved) {
  if constexpr (kTraced) {
    const uint64_t begin = actor == nullptr ? 0 : actor->last_ns;
    const float took = static_cast<float>(now - begin);
    uint32_t all = 0, so_far = 0, before = 0;
#pragma unroll 1
    for (uint32_t turn = 0; turn < 2 * sh.shape.world; ++turn) {
      if (turn == sh.shape.world) before = 0;
      const bool again = turn >= sh.shape.world;
      const DispatchUnit u = units.of_lane(again ? turn - sh.shape.world : turn);
      const uint32_t rows = moved(u, before);
      before += u.end - u.begin;
      if (!again) {
        all += rows;
        continue;
      }
      so_far += rows;
      if (actor == nullptr || rows == 0) continue;
      actor->span_at(EventKind::k_dispatch, actor->last_ns,
                     so_far == all ? now : begin + static_cast<uint32_t>(took * so_far / all),
                     u.owner, u.expert_begin, place.chunk,
                     static_cast<uint64_t>(rows) * sh.shape.hidden * 2);
    }
  }
}
// The same of what all warps move before the roles part: warp w rows w, w + kWarps, ... of all owners'.
template <bool kTraced>
__device__ __forceinline__ void record_first(Shared<kTraced>& sh, const Place& place, uint64_t now,
                                             const DispatchUnit& units) {
  if constexpr (kTraced) {
    const int lane = led_lane();
    if (lane >= 0) sh.actors[lane].last_ns = sh.steps.ns[static_cast<uint32_t>(Step::kPlan)];
    const uint32_t warp = ptx::thread_id() / 32, warps = warp >= kMathWarp ? kTeamWarps : 1;
    record_moved(sh, place, lane < 0 ? nullptr : &sh.actors[lane], now, units,
                 [&](const DispatchUnit& u, uint32_t before) {
                   uint32_t rows = 0;
                   for (uint32_t w = warp; w < warp + warps; ++w) {
                     auto up_to = [&](uint32_t end) {
                       return end > w ? (end - w - 1) / kWarps + 1 : 0;
                     };
                     rows += up_to(before + u.end - u.begin) - up_to(before);
                   }
                   return rows;
                 });
  }
}

// The chunk's rows for the experts due first, by all warps of the CTA before the roles part: no tile
// can begin without them, so there is nothing else to do.  Where rows are gathered they stay where they
// are, which make_plan() has written, and are all announced.
template <bool kTraced>
__device__ inline void dispatch_first(Shared<kTraced>& sh, const Place& place,
                                      const FaultArgs& fault, char* stages) {
  const Shape& shape = sh.shape;
  const uint32_t warp = ptx::thread_id() / 32, thread = ptx::lane_id();
  if (sh.gathers) {
    const uint32_t rows = sh.tables.chunk_order[shape.experts];
    if constexpr (kTraced) {  // they are there with the plan
      auto& ends = sh.steps.ns;
      if (ptx::thread_id() == 0) {
        ends[static_cast<uint32_t>(Step::kDispatch)] = ends[static_cast<uint32_t>(Step::kPlan)];
      }
    }
    if (warp == 0) {
      ptx::fence_acq_rel_gpu();
      for (uint32_t e = thread; e < shape.experts; e += 32) {
        announce_expert(sh, place, fault, place.rank, e, 0, rows);
      }
    }
    return;
  }
  const uint32_t row_bytes = shape.hidden * 2;
  const char* x = static_cast<const char*>(place.args->x);
  const uint32_t* sorted = chunk_rows_sorted(sh, place);
  // Rows bounce through the warp's part of the stages, a lane a row, as many at once as it holds.
  constexpr uint32_t kPart = kMostStages * kStageBytes / kWarps / 16 * 16;
  char* part = stages + warp * kPart;
  uint64_t* full = &sh.first_full[warp];
  const uint32_t at_once = max_u32(1, min_u32(kPart / row_bytes, 32));
  const uint32_t piece_bytes = min_u32(row_bytes, kPart);
  uint32_t turn_of_full = 0;
  const uint32_t groups = first_groups(sh, place);
  const DispatchUnit units = dispatch_units(sh, place, 0, groups);
  const uint32_t all = units.all_rows();
#pragma unroll 1
  for (uint32_t base = warp; base < all; base += kWarps * at_once) {
    const uint32_t rows = min_u32(ceil_div(all - base, kWarps), at_once);
    const bool mine = thread < rows;
    const RowPath path = find_row(sh, place, sorted, units, mine ? base + kWarps * thread : all);
    const char* from = x + static_cast<uint64_t>(path.token) * row_bytes;
    for (uint32_t at = 0; at < row_bytes; at += piece_bytes) {
      const uint32_t bytes = min_u32(piece_bytes, row_bytes - at);
      if (thread == 0) ptx::mbarrier_expect(full, rows * bytes);
      __syncwarp();
      if (mine) ptx::bulk_load(part + thread * row_bytes, from + at, bytes, full);
      ptx::mbarrier_wait(full, turn_of_full);
      turn_of_full ^= 1;
      if (mine) {
        ptx::bulk_store(path.to + at, part + thread * row_bytes, bytes);
        ptx::bulk_commit();
        ptx::bulk_wait_read<0>();
      }
      __syncwarp();
    }
  }
  ptx::bulk_wait_all();
  const uint64_t now = kTraced ? ptx::globaltimer() : 0;  // before any of it is announced
  __syncthreads();
  record_first(sh, place, now, units);
  if (warp == 0) {
    ptx::fence_acq_rel_sys();
    announce_rows(sh, place, fault, units);
  }
}

// One comm warp's share of the chunk's other rows, group by group, the two warps halving each unit; what it has copied
// of a group is announced to all owners behind one fence.  Never waits, so no rank can hold another up here.
template <bool kTraced>
__device__ inline void dispatch(Shared<kTraced>& sh, const Place& place, const FaultArgs& fault,
                                uint32_t half, char* pieces) {
  const Shape& shape = sh.shape;
  const uint32_t lane = ptx::lane_id();
  GpuActor<kTraced>& actor = sh.actors[static_cast<int>(Lane::k_comm0) + half];
  const uint32_t row_bytes = shape.hidden * 2;
  PieceRing ring{sh.piece_full[half], sh.piece_goals[half], pieces + half * kPieces * kPieceBytes};
  const uint32_t* sorted = chunk_rows_sorted(sh, place);
  const uint32_t groups = sh.groups;
  auto halve = [&](DispatchUnit u) {
    const uint32_t begin = u.begin, rows = u.end - u.begin;
    u.begin = begin + rows * half / 2;
    u.end = begin + rows * (half + 1) / 2;
    return u;
  };
#pragma unroll 1
  for (uint32_t group = first_groups(sh, place); group < groups; ++group) {
    const DispatchUnit units = halve(dispatch_units(sh, place, group, group + 1));
    const uint32_t all = units.all_rows();
    if (all == 0) continue;
    // It names the first owner that gets any.
    const uint32_t some = __ballot_sync(0xffffffffu, units.begin != units.end);
    if (lane == __ffs(some) - 1) {
      actor.doing(EventKind::k_dispatch, units.owner, units.expert_begin, place.chunk);
    }
#pragma unroll 1
    for (uint32_t base = 0; base < all; base += 32) {
      // A lane a row for the addresses; then one lane moves them.
      const RowPath path = find_row(sh, place, sorted, units, base + lane);
      const uint32_t here = min_u32(32, all - base);
#pragma unroll 1
      for (uint32_t r = 0; r < here; ++r) {
        const uint32_t token = __shfl_sync(0xffffffffu, path.token, r);
        char* to = reinterpret_cast<char*>(
            __shfl_sync(0xffffffffu, reinterpret_cast<uint64_t>(path.to), r));
        if (lane == 0) {
          const char* from =
              static_cast<const char*>(place.args->x) + static_cast<uint64_t>(token) * row_bytes;
          for (uint32_t at = 0; at < row_bytes; at += kPieceBytes) {
            ring.copy(to + at, from + at, min_u32(row_bytes - at, kPieceBytes));
          }
        }
      }
    }
    if (lane == 0) ring.drain();
    __syncwarp();
    ptx::fence_acq_rel_sys();
    // Before they are announced: nobody begins with rows that have not ended in the trace.
    const uint64_t now = kTraced ? ptx::globaltimer() : 0;
    announce_rows(sh, place, fault, units);
    record_moved(sh, place, lane == 0 ? &actor : nullptr, now, units,
                 [](const DispatchUnit& u, uint32_t) { return u.end - u.begin; });
  }
  // The pieces are free for the tiles of both CTAs of a pair, which the first one schedules.
  if (lane == 0) {
    ptx::mbarrier_arrive_cluster(ptx::shared_address(&sh.moved) +
                                 (place.pair_rank == 0 ? 0 : place.to_other));
  }
}

}  // namespace flashmoe
