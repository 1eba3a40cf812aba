// Rows between ranks: dispatch to the owners of their experts, and the sum of what comes back.
#pragma once

#include <cstdint>

#include "device/cta.h"

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

// The chunk's rows for one owner's experts of one wave: rows [begin, end) of the chunk's order.
struct DispatchUnit {
  uint32_t owner;
  uint32_t expert_begin;
  uint32_t expert_end;
  uint32_t begin;
  uint32_t end;
};

// The unit that comes `turn`-th in a wave: itself first and then its neighbours in rotated order.
template <bool kTraced>
__device__ __forceinline__ DispatchUnit dispatch_unit(const Shared<kTraced>& sh, const Place& place,
                                                      uint32_t wave, uint32_t turn) {
  const Shape& shape = sh.shape;
  DispatchUnit u;
  u.owner = place.rank + turn;
  if (u.owner >= shape.world) u.owner -= shape.world;
  const uint32_t owner_end = first_expert(shape, u.owner + 1);
  u.expert_begin = min_u32(first_expert(shape, u.owner) + wave * shape.wave_experts, owner_end);
  u.expert_end = min_u32(u.expert_begin + shape.wave_experts, owner_end);
  u.begin = sh.tables.chunk_order[u.expert_begin];
  u.end = sh.tables.chunk_order[u.expert_end];
  return u;
}

// Where row p of the chunk's order comes from and goes to, in bytes from x and from the owner's pool.
struct RowPath {
  uint64_t from;
  uint64_t to;
};
template <bool kTraced>
__device__ __forceinline__ RowPath row_path(const Shared<kTraced>& sh, const Place& place,
                                            const uint32_t* sorted, uint32_t expert, uint32_t p) {
  const Shape& shape = sh.shape;
  const PlanTables& tables = sh.tables;
  const uint64_t row_bytes = shape.hidden * 2;
  const uint32_t i = source_start(tables, shape, place.rank, expert) + tables.chunk_prefix[expert] +
                     p - tables.chunk_order[expert];
  return {sorted[p] / shape.top_k * row_bytes, pool_row(tables, shape, expert, i) * row_bytes};
}

// The chunk's rows by expert, as token * k + j.
template <bool kTraced>
__device__ __forceinline__ const uint32_t* chunk_rows_sorted(const Shared<kTraced>& sh,
                                                             const Place& place) {
  return place.heap.at<uint32_t>(sh.layout.sorted) +
         static_cast<uint64_t>(chunk_begin(sh.shape, place.tokens, place.chunk)) * sh.shape.top_k;
}

// Adds rows [begin, end) of a unit to their row tiles' counters.  One warp, after a fence.
template <bool kTraced>
__device__ __forceinline__ void publish_rows(const Shared<kTraced>& sh, const Place& place,
                                             const FaultArgs& fault, const DispatchUnit& u,
                                             uint32_t begin, uint32_t end) {
  const Shape& shape = sh.shape;
  const PlanTables& tables = sh.tables;
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
      ptx::add_relaxed_sys(tile_counter(sh.heaps[u.owner], sh.layout.rows_ready, shape, place.epoch,
                                        pool_tile(tables, shape, e, tile)),
                           next - i);
      i = next;
    }
  }
}

// Copies one row of `units` 16-byte pieces, by one warp, eight pieces in flight a lane.
__device__ __forceinline__ void copy_row(uint4* to, const uint4* from, uint32_t units) {
  constexpr uint32_t kInFlight = 8;
  for (uint32_t base = threadIdx.x % 32; base < units; base += 32 * kInFlight) {
    uint4 piece[kInFlight];
#pragma unroll
    for (uint32_t i = 0; i < kInFlight; ++i) {
      if (base + i * 32 < units) piece[i] = __ldg(from + base + i * 32);
    }
#pragma unroll
    for (uint32_t i = 0; i < kInFlight; ++i) {
      if (base + i * 32 < units) to[base + i * 32] = piece[i];
    }
  }
}

// The chunk's rows for the experts due first, by all warps of the CTA before the roles part: no tile
// can begin without them, so there is nothing else to do.
template <bool kTraced>
__device__ inline void dispatch_first_wave(Shared<kTraced>& sh, const Place& place,
                                           const FaultArgs& fault) {
  const Shape& shape = sh.shape;
  const uint32_t warp = threadIdx.x / 32;
  const uint32_t units = shape.hidden / 8;
  const char* x = static_cast<const char*>(place.args->x);
  const uint32_t* sorted = chunk_rows_sorted(sh, place);
  for (uint32_t turn = 0; turn < shape.world; ++turn) {
    const DispatchUnit u = dispatch_unit(sh, place, 0, turn);
    char* pool = sh.heaps[u.owner].template at<char>(sh.layout.pool);
    uint32_t expert = u.expert_begin;
    for (uint32_t p = u.begin + warp; p < u.end; p += kWarps) {
      while (p >= sh.tables.chunk_order[expert + 1]) ++expert;
      const RowPath path = row_path(sh, place, sorted, expert, p);
      copy_row(reinterpret_cast<uint4*>(pool + path.to),
               reinterpret_cast<const uint4*>(x + path.from), units);
    }
    ptx::fence_proxy_async();  // the rows will be read by tensor copies
    __syncthreads();
    // Every actor says what its own warps moved; warp w has moved rows w, w + kWarps, ...
    const int lane = led_lane();
    const uint32_t rows = u.end - u.begin;
    if (lane >= 0 && rows != 0) {
      const uint32_t warps = warp >= kMathWarp ? 4 : 1;
      uint32_t moved = 0;
      for (uint32_t w = warp; w < warp + warps; ++w) {
        moved += rows > w ? (rows - w - 1) / kWarps + 1 : 0;
      }
      sh.actors[lane].span(EventKind::k_dispatch, u.owner, u.expert_begin, place.chunk,
                           static_cast<uint64_t>(moved) * shape.hidden * 2);
    }
    if (warp == turn % kWarps) {
      ptx::fence_acq_rel_sys();
      publish_rows(sh, place, fault, u, u.begin, u.end);
    }
  }
}

// One comm warp's share of the chunk's other rows, wave by wave, the two warps halving each unit.
// Never waits, so no rank can hold another up here.
template <bool kTraced>
__device__ inline void dispatch(Shared<kTraced>& sh, const Place& place, const FaultArgs& fault,
                                uint32_t half, char* pieces) {
  const Shape& shape = sh.shape;
  const PlanTables& tables = sh.tables;
  const uint32_t lane = threadIdx.x % 32;
  GpuActor<kTraced>& actor = sh.actors[static_cast<int>(Lane::k_comm0) + half];
  const uint32_t row_bytes = shape.hidden * 2;
  const char* x = static_cast<const char*>(place.args->x);
  PieceRing ring{sh.piece_full[half], sh.piece_goals[half], pieces + half * kPieces * kPieceBytes};
  const uint32_t* sorted = chunk_rows_sorted(sh, place);
  const uint32_t waves = ceil_div(max_owned_experts(shape), shape.wave_experts);
  for (uint32_t wave = 1; wave < waves; ++wave) {
    for (uint32_t turn = 0; turn < shape.world; ++turn) {
      const DispatchUnit u = dispatch_unit(sh, place, wave, turn);
      const uint32_t begin = u.begin + (u.end - u.begin) * half / 2;
      const uint32_t end = u.begin + (u.end - u.begin) * (half + 1) / 2;
      if (begin == end) continue;
      if (lane == 0) actor.doing(EventKind::k_dispatch, u.owner, u.expert_begin, place.chunk);
      char* pool = sh.heaps[u.owner].template at<char>(sh.layout.pool);
      uint32_t expert = u.expert_begin;
      for (uint32_t base = begin; base < end; base += 32) {
        // A lane a row for the addresses; then one lane moves them.
        const uint32_t p = min_u32(base + lane, end - 1);
        while (p >= tables.chunk_order[expert + 1]) ++expert;
        const RowPath path = row_path(sh, place, sorted, expert, p);
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
}

// Waits until all result rows of tokens [begin, end) of the chunk are here.  One warp; its lane 0
// speaks for the actor.
template <bool kTraced>
__device__ inline Status await_returns(Shared<kTraced>& sh, const Place& place,
                                       GpuActor<kTraced>& actor, uint32_t begin, uint32_t end) {
  const Shape& shape = sh.shape;
  const PlanTables& tables = sh.tables;
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t* ids = place.heap.at<uint32_t>(sh.layout.ids);
  const uint32_t* slots = place.heap.at<uint32_t>(sh.layout.slots);
  const uint64_t* returned = place.heap.at<uint64_t>(sh.layout.returned);
  const uint64_t last = static_cast<uint64_t>(end) * shape.top_k;
  for (uint64_t base = static_cast<uint64_t>(begin) * shape.top_k; base < last; base += 32) {
    uint32_t expert = 0, tile = 0;
    bool lacking = false;
    if (base + lane < last) {
      expert = ids[base + lane];
      const uint32_t i = source_start(tables, shape, place.rank, expert) +
                         tables.chunk_prefix[expert] + slots[base + lane];
      tile = global_tile(tables, shape, expert, i / tables.height[expert]);
      lacking = ptx::load_acquire_sys(returned + tile) < place.epoch;
    }
    for (uint32_t mask = __ballot_sync(0xffffffffu, lacking); mask != 0; mask &= mask - 1) {
      const uint32_t from = __ffs(mask) - 1;
      const uint32_t awaited_expert = __shfl_sync(0xffffffffu, expert, from);
      const uint32_t awaited_tile = __shfl_sync(0xffffffffu, tile, from);
      Status status = Status::kOk;
      if (lane == 0) {
        status = actor.wait(
            {EventKind::k_wait_return, static_cast<uint16_t>(owner_of(shape, awaited_expert)),
             static_cast<uint16_t>(awaited_expert), awaited_tile},
            returned + awaited_tile, Until::kAtLeast, place.epoch, 1);
      }
      status = static_cast<Status>(__shfl_sync(0xffffffffu, static_cast<uint32_t>(status), 0));
      if (status != Status::kOk) return status;
    }
  }
  __syncwarp();
  return Status::kOk;
}

// y of one token: its k result rows times their weights, summed in float32 in the order of k; a lane
// fetches kColumns pieces of kRows rows at once.
template <class T, uint32_t kRows, uint32_t kColumns, bool kTraced>
__device__ inline void combine_token(const Shared<kTraced>& sh, const Place& place,
                                     uint32_t token) {
  const Shape& shape = sh.shape;
  const PlanTables& tables = sh.tables;
  const uint32_t lane = threadIdx.x % 32, k = shape.top_k;
  const uint64_t first = static_cast<uint64_t>(token) * k;
  const uint32_t* ids = place.heap.at<uint32_t>(sh.layout.ids) + first;
  const uint32_t* slots = place.heap.at<uint32_t>(sh.layout.slots) + first;
  const float* weights = place.heap.at<float>(sh.layout.weights) + first;
  const uint4* ret = place.heap.at<uint4>(sh.layout.ret);
  const uint32_t units = shape.hidden / 8;
  uint4* y = static_cast<uint4*>(place.args->y) + static_cast<uint64_t>(token) * units;
  uint32_t row = 0;
  float weight = 0.0f;
  auto fetch = [&](uint32_t j) {  // each lane one of the token's rows, 32 at a time
    if (j < k) {
      row = return_row(tables, shape, place.rank, ids[j], tables.chunk_prefix[ids[j]] + slots[j]);
      weight = weights[j];
    }
  };
  fetch(lane);
  for (uint32_t base = 0; base < units; base += 32 * kColumns) {
    float sum[kColumns][8] = {};
    for (uint32_t j0 = 0; j0 < k; j0 += kRows) {
      if (k > 32 && j0 % 32 == 0) fetch(j0 + lane);
      uint4 piece[kRows][kColumns];
      float w[kRows];
#pragma unroll
      for (uint32_t i = 0; i < kRows; ++i) {
        const uint32_t r = __shfl_sync(0xffffffffu, row, (j0 + i) % 32);
        w[i] = __shfl_sync(0xffffffffu, weight, (j0 + i) % 32);
        const uint4* from = ret + static_cast<uint64_t>(r) * units + base + lane;
#pragma unroll
        for (uint32_t c = 0; c < kColumns; ++c) {
          if (j0 + i < k && base + c * 32 + lane < units) piece[i][c] = from[c * 32];
        }
      }
#pragma unroll
      for (uint32_t i = 0; i < kRows; ++i) {
        if (j0 + i >= k) break;
#pragma unroll
        for (uint32_t c = 0; c < kColumns; ++c) {
          const T* values = reinterpret_cast<const T*>(&piece[i][c]);
#pragma unroll
          for (int v = 0; v < 8; ++v) {
            sum[c][v] = fmaf(w[i], static_cast<float>(values[v]), sum[c][v]);
          }
        }
      }
    }
#pragma unroll
    for (uint32_t c = 0; c < kColumns; ++c) {
      const uint32_t unit = base + c * 32 + lane;
      if (unit >= units) break;
      uint4 out;
      T* values = reinterpret_cast<T*>(&out);
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] = static_cast<T>(sum[c][i]);
      y[unit] = out;
    }
  }
}

// Combines batches of the chunk's tokens until none is left.  A team is one comm warp, or the four
// warps of a math group, whose first warp waits for all of them.
template <class T, uint32_t kTeamWarps, bool kTraced>
__device__ inline Status combine(Shared<kTraced>& sh, const Place& place, Lane who) {
  const Shape& shape = sh.shape;
  GpuActor<kTraced>& actor = sh.actors[static_cast<int>(who)];
  const uint32_t team = static_cast<uint32_t>(who) - static_cast<uint32_t>(Lane::k_comm0);
  const uint32_t warp = threadIdx.x / 32 % kTeamWarps, lane = threadIdx.x % 32;
  const uint32_t begin = chunk_begin(shape, place.tokens, place.chunk);
  const uint32_t end = chunk_begin(shape, place.tokens, place.chunk + 1);
  // A token a warp while few are left for each, up to four.
  const uint32_t batch = kTeamWarps * min_u32(max_u32((end - begin) / 40, 1), 4);
  auto sync = [&] {
    if constexpr (kTeamWarps == 1)
      __syncwarp();
    else
      ptx::named_barrier(team, kTeamWarps * 32);
  };
  // What the first warp tells the team: the batch's first token, `end` for none left, or this.
  constexpr uint32_t kGiveUp = 0xffffffffu;
  Status status = Status::kOk;
  for (;;) {
    if (warp == 0) {
      uint32_t from = 0;
      if (lane == 0) from = min_u32(begin + atomicAdd(&sh.next_token, batch), end);
      from = __shfl_sync(0xffffffffu, from, 0);
      if (from < end) {
        status = await_returns(sh, place, actor, from, min_u32(from + batch, end));
        if (status != Status::kOk) {
          if (lane == 0 && status == Status::kHang) raise_abort(sh, status);
          from = kGiveUp;
        }
      }
      if (lane == 0) {
        sh.batch[team] = from;
        if (from < end) {
          actor.doing(EventKind::k_combine, kNoPeer, kNoExpert, place.chunk);
          actor.skip();
        }
      }
    }
    sync();
    const uint32_t from = sh.batch[team];
    if (from >= end) return from == kGiveUp ? Status::kHang : Status::kOk;
    const uint32_t to = min_u32(from + batch, end);
    for (uint32_t t = from + warp; t < to; t += kTeamWarps) {
      if constexpr (kTeamWarps == 1) {
        combine_token<T, 4, 1>(sh, place, t);
      } else if (shape.top_k <= 2) {
        combine_token<T, 2, 8>(sh, place, t);
      } else {
        combine_token<T, 8, 2>(sh, place, t);
      }
    }
    sync();
    if (warp == 0 && lane == 0) {
      actor.span(EventKind::k_combine, kNoPeer, kNoExpert, place.chunk, to - from);
    }
  }
}

}  // namespace flashmoe
