// One tile: 128 rows times 256 weight rows, loaded by one warp and multiplied by two warp groups.
#pragma once

#include <cstdint>

#include "device/cta.h"

namespace flashmoe {

// Position in the ring of stages: which stage, and which turn of its barriers.
struct StageCursor {
  uint32_t stage = 0;
  uint32_t turn = 0;
  __device__ __forceinline__ void next() {
    if (++stage == kStages) {
      stage = 0;
      turn ^= 1;
    }
  }
};

__device__ __forceinline__ uint32_t depth_of(const Shape& shape, uint32_t gemm) {
  return gemm == 1 ? shape.hidden : shape.inter;
}

// Says in this actor's trace what the scheduler waited for on behalf of the tile; the rest of the
// time since the actor's last span is idle.
template <bool kTraced>
__device__ __forceinline__ void take_up(GpuActor<kTraced>& actor, const Task& task,
                                        EventKind kind) {
  actor.doing(kind, kNoPeer, task.tile.expert, task.tile.index);
  if constexpr (kTraced) {
    if (task.wait_kind != 0) {
      actor.waited({static_cast<EventKind>(task.wait_kind), kNoPeer,
                    static_cast<uint16_t>(task.tile.expert), task.tile.row_tile},
                   task.wait_from, task.wait_to, task.wait_lacking, Status::kOk);
    }
    actor.skip();
  }
}

// The loads of every tile the scheduler hands over; one lane.  It runs ahead into the next tile as
// far as the stages go.
template <bool kGated, bool kTraced>
__device__ inline void load_tiles(Shared<kTraced>& sh, const Place& place, char* stages) {
  GpuActor<kTraced>& actor = sh.actors[static_cast<int>(Lane::k_load)];
  const RankArgs& args = *place.args;
  const uint32_t expert0 = first_expert(sh.shape, place.rank);
  StageCursor cursor;
  for (uint32_t n = 0;; ++n) {
    const uint32_t slot = n % kTasks;
    ptx::mbarrier_wait(&sh.task_full[slot], n / kTasks & 1);
    const Task& task = sh.tasks[slot];
    if (task.tile.gemm == 0) return;
    take_up(actor, task, EventKind::k_load);
    const uint64_t begin_cycles = kTraced ? clock64() : 0;
    uint64_t stall = 0;
    // The rows were written by ordinary stores of other CTAs; the scheduler acquired them, this lane
    // makes that hold for its tensor copies too.
    ptx::fence_proxy_async();
    const bool up = task.tile.gemm == 1;
    const uint32_t depth = depth_of(sh.shape, task.tile.gemm);
    const int32_t row = static_cast<int32_t>(task.tile.pool_row0);
    const int32_t expert = static_cast<int32_t>(task.tile.expert - expert0);
    const int32_t col_tile = static_cast<int32_t>(task.tile.col_tile);
    for (uint32_t k0 = 0; k0 < depth; k0 += kTileK) {
      uint64_t* full = &sh.full[cursor.stage];
      if (!ptx::mbarrier_try_wait(&sh.empty[cursor.stage], cursor.turn ^ 1)) {
        const uint64_t from = kTraced ? clock64() : 0;
        ptx::mbarrier_wait(&sh.empty[cursor.stage], cursor.turn ^ 1);
        if constexpr (kTraced) stall += clock64() - from;
      }
      char* a = stages + cursor.stage * kStageBytes;
      char* b = a + kStageBytesA;
      const int32_t k = static_cast<int32_t>(k0);
      ptx::mbarrier_expect(full, kStageBytes);
      ptx::tma_load_2d(a, up ? args.map_pool : args.map_h, full, k, row);
      if (!up) {
        ptx::tma_load_3d(b, args.map_down, full, k, col_tile * static_cast<int32_t>(kTileCols),
                         expert);
      } else if constexpr (kGated) {
        // Eight gate rows, then the eight up rows of the same columns, sixteen times.
        ptx::tma_load_5d(b, args.map_up, full, k, 0, 0,
                         col_tile * static_cast<int32_t>(kTileCols / 16), expert);
      } else {
        ptx::tma_load_3d(b, args.map_up, full, k, col_tile * static_cast<int32_t>(kTileCols),
                         expert);
      }
      cursor.next();
    }
    if constexpr (kTraced) {
      actor.span(EventKind::k_load, kNoPeer, task.tile.expert, task.tile.index,
                 clock64() - begin_cycles, GpuActor<kTraced>::saturate(stall));
    }
    ptx::mbarrier_arrive(&sh.task_empty[slot]);
  }
}

// acc[64 x 256] of one math group over the whole depth.  A group without rows in the tile only keeps
// the stages moving.
template <class T, bool kTraced>
__device__ __forceinline__ uint64_t multiply(Shared<kTraced>& sh, char* stages, StageCursor& cursor,
                                             uint32_t blocks, uint32_t group, bool active,
                                             float (&acc)[128]) {
  const bool signals = threadIdx.x % 32 == 0;
  uint64_t stall = 0;
  auto await = [&] {
    if (!ptx::mbarrier_try_wait(&sh.full[cursor.stage], cursor.turn)) {
      const uint64_t from = kTraced ? clock64() : 0;
      ptx::mbarrier_wait(&sh.full[cursor.stage], cursor.turn);
      if constexpr (kTraced) stall += clock64() - from;
    }
  };
  if (!active) {
    for (uint32_t i = 0; i < blocks; ++i) {
      await();
      if (signals) ptx::mbarrier_arrive(&sh.empty[cursor.stage]);
      cursor.next();
    }
    return stall;
  }
  uint32_t previous = 0;
  for (uint32_t i = 0; i < blocks; ++i) {
    await();
    const char* a = stages + cursor.stage * kStageBytes + group * (kStageBytesA / kMathGroups);
    const uint64_t descriptor_a = ptx::wgmma_descriptor(a);
    const uint64_t descriptor_b =
        ptx::wgmma_descriptor(stages + cursor.stage * kStageBytes + kStageBytesA);
    ptx::wgmma_fence();
#pragma unroll
    for (uint32_t k = 0; k < kTileK / 16; ++k) {
      // 16 columns are 32 bytes, two units of a descriptor's address.
      ptx::wgmma_m64n256k16<T>(acc, descriptor_a + 2 * k, descriptor_b + 2 * k, i != 0 || k != 0);
    }
    ptx::wgmma_commit();
    // One product stays in flight; the stage before it is read.
    ptx::wgmma_wait<1>();
    if (i != 0 && signals) ptx::mbarrier_arrive(&sh.empty[previous]);
    previous = cursor.stage;
    cursor.next();
  }
  ptx::wgmma_wait<0>();
  if (signals) ptx::mbarrier_arrive(&sh.empty[previous]);
  return stall;
}

__device__ __forceinline__ float activate(Activation kind, float v) {
  switch (kind) {
    case Activation::kSwiglu:
    case Activation::kSilu:
      return v / (1.0f + __expf(-v));
    case Activation::kGeglu: {  // GELU by tanh
      const float inner = 0.7978845608028654f * (v + 0.044715f * v * v * v);
      return 0.5f * v * (1.0f + tanhf(inner));
    }
    case Activation::kRelu:
      return fmaxf(v, 0.0f);
    default:  // GELU by erf
      return 0.5f * v * (1.0f + erff(v * 0.7071067811865476f));
  }
}

template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  T pair[2] = {static_cast<T>(low), static_cast<T>(high)};
  return *reinterpret_cast<uint32_t*>(pair);
}

// Moves 64 columns of a warp's 16 rows from registers to coalesced 16-byte stores, through the warp's
// own 2 KB.  pair(b, high) gives two neighbouring columns of 8-column block b of row lane / 4
// (+ 8 if high); store(row, unit, piece) gets 8 columns of one row.
template <class Pair, class Store>
__device__ __forceinline__ void store_columns(char* buffer, const Pair& pair, const Store& store) {
  const uint32_t lane = threadIdx.x % 32, row = lane / 4;
#pragma unroll
  for (uint32_t b = 0; b < 8; ++b) {
#pragma unroll
    for (uint32_t high = 0; high < 2; ++high) {
      const uint32_t r = row + high * 8;
      // Units of a row are permuted by the row, so that neither side meets bank conflicts.
      *reinterpret_cast<uint32_t*>(buffer + r * 128 + ((b ^ (r & 7)) * 16) + (lane % 4) * 4) =
          pair(b, high);
    }
  }
  __syncwarp();
#pragma unroll
  for (uint32_t q = 0; q < 4; ++q) {
    const uint32_t r = q * 4 + lane / 8, unit = lane % 8;
    store(q, r, unit, *reinterpret_cast<const uint4*>(buffer + r * 128 + ((unit ^ (r & 7)) * 16)));
  }
  __syncwarp();
}

// GEMM1: activation, rounding, `h`.
template <class T, bool kGated, bool kTraced>
__device__ __forceinline__ void store_hidden(const Shared<kTraced>& sh, const Place& place,
                                             const Tile& tile, uint32_t warp_row, char* buffer,
                                             const float (&acc)[128]) {
  constexpr uint32_t kColumns = kGated ? kTileCols / 2 : kTileCols;
  const Activation kind = sh.shape.activation;
  const uint32_t inter = sh.shape.inter;
  T* h = place.heap.at<T>(sh.layout.h) + static_cast<uint64_t>(tile.pool_row0 + warp_row) * inter;
#pragma unroll
  for (uint32_t pass = 0; pass < kColumns / 64; ++pass) {
    const uint32_t col0 = tile.col_tile * kColumns + pass * 64;
    store_columns(
        buffer,
        [&](uint32_t b, uint32_t high) {
          float v[2];
#pragma unroll
          for (uint32_t i = 0; i < 2; ++i) {
            if constexpr (kGated) {
              const uint32_t block = 2 * (pass * 8 + b);
              v[i] = activate(kind, acc[4 * block + 2 * high + i]) *
                     acc[4 * (block + 1) + 2 * high + i];
            } else {
              v[i] = activate(kind, acc[4 * (pass * 8 + b) + 2 * high + i]);
            }
          }
          return pack<T>(v[0], v[1]);
        },
        [&](uint32_t, uint32_t r, uint32_t unit, const uint4& piece) {
          const uint32_t col = col0 + unit * 8;
          if (warp_row + r < tile.rows && col < inter) {
            *reinterpret_cast<uint4*>(h + static_cast<uint64_t>(r) * inter + col) = piece;
          }
        });
  }
}

// GEMM2: rounding, and each row into the return buffer of the rank it came from.
template <class T, bool kTraced>
__device__ __forceinline__ void store_returns(const Shared<kTraced>& sh, const Tile& tile,
                                              uint32_t warp_row, char* buffer,
                                              const float (&acc)[128]) {
  const Shape& shape = sh.shape;
  const uint32_t hidden = shape.hidden;
  T* to[4];
#pragma unroll
  for (uint32_t q = 0; q < 4; ++q) {
    to[q] = nullptr;
    const uint32_t r = warp_row + q * 4 + threadIdx.x % 32 / 8;
    if (r >= tile.rows) continue;
    const uint32_t i = tile.row0 + r;
    uint32_t source = 0;
    while (source + 1 < shape.world && i >= source_start(sh.tables, shape, source + 1, tile.expert))
      ++source;
    const uint32_t row = return_row(sh.tables, shape, source, tile.expert,
                                    i - source_start(sh.tables, shape, source, tile.expert));
    to[q] = sh.heaps[source].template at<T>(sh.layout.ret) + static_cast<uint64_t>(row) * hidden;
  }
#pragma unroll
  for (uint32_t pass = 0; pass < kTileCols / 64; ++pass) {
    const uint32_t col0 = tile.col_tile * kTileCols + pass * 64;
    store_columns(
        buffer,
        [&](uint32_t b, uint32_t high) {
          const uint32_t at = 4 * (pass * 8 + b) + 2 * high;
          return pack<T>(acc[at], acc[at + 1]);
        },
        [&](uint32_t q, uint32_t, uint32_t unit, const uint4& piece) {
          const uint32_t col = col0 + unit * 8;
          if (to[q] != nullptr && col < hidden) *reinterpret_cast<uint4*>(to[q] + col) = piece;
        });
  }
}

// After a GEMM2 tile: count it, and if it was the row tile's last, tell each source with rows in it.
template <bool kTraced>
__device__ inline void publish_returns(const Shared<kTraced>& sh, const Place& place,
                                       const Tile& tile) {
  const Shape& shape = sh.shape;
  uint64_t* done = tile_counter(place.heap, sh.layout.y_ready, shape, place.epoch, tile.row_tile);
  const uint64_t due = static_cast<uint64_t>(column_tiles(shape, 2)) * kMathGroups;
  if (ptx::fetch_add_acq_rel_sys(done, 1) + 1 != due) return;
  for (uint32_t s = 0; s < shape.world; ++s) {
    const uint32_t from = source_start(sh.tables, shape, s, tile.expert);
    const uint32_t rows = source_rows(sh.tables, shape, s, tile.expert);
    if (rows == 0 || from >= tile.row0 + tile.rows || from + rows <= tile.row0) continue;
    ptx::store_release_sys(
        sh.heaps[s].template at<uint64_t>(sh.layout.returned) + tile.row_tile_global, place.epoch);
  }
}

// Bytes this group gave back, by source, into the trace.
template <bool kTraced>
__device__ inline void record_returns(const Shared<kTraced>& sh, GpuActor<kTraced>& actor,
                                      const Tile& tile, uint32_t group) {
  if constexpr (kTraced) {
    const Shape& shape = sh.shape;
    const uint32_t begin = tile.row0 + min_u32(tile.rows, group * 64);
    const uint32_t end = tile.row0 + min_u32(tile.rows, group * 64 + 64);
    const uint64_t row_bytes = 2ull * min_u32(kTileCols, shape.hidden - tile.col_tile * kTileCols);
    actor.span(EventKind::k_give_back, kNoPeer, tile.expert, tile.index, (end - begin) * row_bytes);
    for (uint32_t s = 0; s < shape.world; ++s) {
      const uint32_t from = source_start(sh.tables, shape, s, tile.expert);
      const uint32_t first = max_u32(begin, from);
      const uint32_t last = min_u32(end, from + source_rows(sh.tables, shape, s, tile.expert));
      if (first < last) {
        actor.instant(EventKind::k_put, s, tile.expert, tile.index, (last - first) * row_bytes);
      }
    }
  }
}

// The products of every tile the scheduler hands over; one math group.
template <class T, bool kGated, bool kTraced>
__device__ inline void multiply_tiles(Shared<kTraced>& sh, const Place& place, char* stages,
                                      uint32_t group) {
  GpuActor<kTraced>& actor = sh.actors[static_cast<int>(Lane::k_math0) + group];
  const uint32_t warp = threadIdx.x / 32 % 4;
  const bool leads = threadIdx.x % kGroupThreads == 0;
  const uint32_t barrier = 2 + group;
  const uint32_t warp_row = group * 64 + warp * 16;
  char* buffer = stages + kStages * kStageBytes + (group * 4 + warp) * (kEpilogueBytes / 8);
  StageCursor cursor;
  float acc[128];
  for (uint32_t n = 0;; ++n) {
    const uint32_t slot = n % kTasks;
    ptx::mbarrier_wait(&sh.task_full[slot], n / kTasks & 1);
    const Tile tile = sh.tasks[slot].tile;
    if (tile.gemm == 0) return;
    const bool up = tile.gemm == 1;
    if (leads) take_up(actor, sh.tasks[slot], up ? EventKind::k_gemm1 : EventKind::k_gemm2);
    const uint64_t begin_cycles = kTraced ? clock64() : 0;
    const bool active = tile.rows > group * 64;
    const uint64_t stall = multiply<T>(
        sh, stages, cursor, ceil_div(depth_of(sh.shape, tile.gemm), kTileK), group, active, acc);
    if (up) {
      if (active) store_hidden<T, kGated>(sh, place, tile, warp_row, buffer, acc);
      ptx::fence_proxy_async();  // `h` will be read by tensor copies
      ptx::named_barrier(barrier, kGroupThreads);
      if (leads) {
        ptx::fence_acq_rel_sys();
        ptx::add_relaxed_sys(
            tile_counter(place.heap, sh.layout.h_ready, sh.shape, place.epoch, tile.row_tile), 1);
        actor.span(EventKind::k_gemm1, kNoPeer, tile.expert, tile.index, clock64() - begin_cycles,
                   GpuActor<kTraced>::saturate(stall));
      }
    } else {
      if (leads) {
        actor.span(EventKind::k_gemm2, kNoPeer, tile.expert, tile.index, clock64() - begin_cycles,
                   GpuActor<kTraced>::saturate(stall));
      }
      if (active) store_returns<T>(sh, tile, warp_row, buffer, acc);
      ptx::named_barrier(barrier, kGroupThreads);
      if (leads) {
        publish_returns(sh, place, tile);
        record_returns(sh, actor, tile, group);
      }
    }
    // Every thread has read the task, so every thread gives its slot back.
    ptx::mbarrier_arrive(&sh.task_empty[slot]);
  }
}

}  // namespace flashmoe
