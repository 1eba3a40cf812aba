// Rows between ranks: dispatch to the owners of their experts, and the sum of what comes back.
#pragma once

#include <cstdint>

#include "device/cta.h"

namespace flashmoe {

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

// One comm warp's share of the chunk's rows: wave by wave, itself first and then its neighbours in
// rotated order, the two warps halving each unit.  Never waits, so no rank can hold another up here.
template <bool kTraced>
__device__ inline void dispatch(Shared<kTraced>& sh, const Place& place, const FaultArgs& fault,
                                uint32_t half) {
  const Shape& shape = sh.shape;
  const PlanTables& tables = sh.tables;
  const uint32_t lane = threadIdx.x % 32;
  GpuActor<kTraced>& actor = sh.actors[static_cast<int>(Lane::k_comm0) + half];
  const uint32_t units = shape.hidden / 8;
  const uint4* x = static_cast<const uint4*>(place.args->x);
  const uint32_t* sorted =
      place.heap.at<uint32_t>(sh.layout.sorted) +
      static_cast<uint64_t>(chunk_begin(shape, place.tokens, place.chunk)) * shape.top_k;
  const uint32_t waves = ceil_div(max_owned_experts(shape), shape.wave_experts);
  for (uint32_t wave = 0; wave < waves; ++wave) {
    for (uint32_t turn = 0; turn < shape.world; ++turn) {
      uint32_t owner = place.rank + turn;
      if (owner >= shape.world) owner -= shape.world;
      const uint32_t owner_begin = first_expert(shape, owner),
                     owner_end = first_expert(shape, owner + 1);
      const uint32_t expert_begin = min_u32(owner_begin + wave * shape.wave_experts, owner_end);
      const uint32_t expert_end = min_u32(expert_begin + shape.wave_experts, owner_end);
      const uint32_t unit_begin = tables.chunk_order[expert_begin];
      const uint32_t unit_rows = tables.chunk_order[expert_end] - unit_begin;
      const uint32_t begin = unit_begin + unit_rows * half / 2;
      const uint32_t end = unit_begin + unit_rows * (half + 1) / 2;
      if (begin == end) continue;
      if (lane == 0) actor.doing(EventKind::k_dispatch, owner, expert_begin, place.chunk);
      uint4* pool = sh.heaps[owner].template at<uint4>(sh.layout.pool);
      uint32_t expert = expert_begin;
      for (uint32_t p = begin; p < end; ++p) {
        while (p >= tables.chunk_order[expert + 1]) ++expert;
        const uint32_t i = source_start(tables, shape, place.rank, expert) +
                           tables.chunk_prefix[expert] + p - tables.chunk_order[expert];
        const uint32_t token = sorted[p] / shape.top_k;
        copy_row(pool + static_cast<uint64_t>(pool_row(tables, shape, expert, i)) * units,
                 x + static_cast<uint64_t>(token) * units, units);
      }
      publish_fence_warp();
      for (uint32_t e = expert_begin + lane; e < expert_end; e += 32) {
        const uint32_t from = max_u32(begin, tables.chunk_order[e]);
        const uint32_t to = min_u32(end, tables.chunk_order[e + 1]);
        if (from >= to) continue;
        if (fault.lost_signal_rank == place.rank && fault.lost_signal_expert == e) continue;
        const uint32_t row0 = source_start(tables, shape, place.rank, e) + tables.chunk_prefix[e];
        uint32_t i = row0 + from - tables.chunk_order[e];
        const uint32_t last = row0 + to - tables.chunk_order[e];
        while (i < last) {
          const uint32_t tile = i / kTileRows;
          const uint32_t next = min_u32(last, (tile + 1) * kTileRows);
          ptx::add_relaxed_sys(tile_counter(sh.heaps[owner], sh.layout.rows_ready, shape,
                                            place.epoch, pool_tile(tables, shape, e, tile)),
                               next - i);
          i = next;
        }
      }
      if (lane == 0) {
        actor.span(EventKind::k_dispatch, owner, expert_begin, place.chunk,
                   static_cast<uint64_t>(end - begin) * shape.hidden * 2);
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
      tile = global_tile(tables, shape, expert, i / kTileRows);
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

// y of one token: its k result rows times their weights, summed in float32 in the order of k.
template <class T, bool kTraced>
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
  for (uint32_t base = 0; base < units; base += 32) {
    const uint32_t unit = base + lane;
    float sum[8] = {};
    for (uint32_t j = 0; j < k; ++j) {
      if (k > 32 && j % 32 == 0) fetch(j + lane);
      const uint32_t r = __shfl_sync(0xffffffffu, row, j % 32);
      const float w = __shfl_sync(0xffffffffu, weight, j % 32);
      if (unit >= units) continue;
      const uint4 piece = ret[static_cast<uint64_t>(r) * units + unit];
      const T* values = reinterpret_cast<const T*>(&piece);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[i] = fmaf(w, static_cast<float>(values[i]), sum[i]);
    }
    if (unit < units) {
      uint4 out;
      T* values = reinterpret_cast<T*>(&out);
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] = static_cast<T>(sum[i]);
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
  const uint32_t batch = min_u32(max_u32((end - begin) / 16, 1), 16);
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
    for (uint32_t t = from + warp; t < to; t += kTeamWarps) combine_token<T>(sh, place, t);
    sync();
    if (warp == 0 && lane == 0) {
      actor.span(EventKind::k_combine, kNoPeer, kNoExpert, place.chunk, to - from);
    }
  }
}

}  // namespace flashmoe
