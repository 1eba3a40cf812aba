// One tile: 256 weight rows times up to 176 rows of tokens, multiplied by two warp
// groups.
//
// The weights are the product's M and the tokens its N: a tile's rows then cost what they are, in steps
// of 16, and an expert with few rows streams its weights at the speed of memory.  Each group takes 128
// weight rows as two products of 64.  In a gated GEMM1 the one is of gate rows and the other of the
// same columns' up rows, so that a thread has both.  Otherwise the 8-row atoms of the two alternate, so
// that a warp's sums are of 32 neighbouring weight rows.
#pragma once

#include <cstdint>
#include <type_traits>

#include "device/cta.h"
#include "device/load.h"
#include "device/store.h"

namespace flashmoe {

// Where in a stage the weight rows of a group's two products lie.
struct GroupWeights {
  uint32_t of_group;     // bytes from the stage to the first product's rows
  uint32_t atom_stride;  // bytes
  uint32_t other;        // from the first product's rows to the second's, in units of a descriptor
  __device__ __forceinline__ GroupWeights(bool paired, uint32_t group) {
    constexpr uint32_t kOne = kStageBytesWeights / 4;  // 64 rows
    of_group = group * (paired ? kOne : 2 * kOne);
    atom_stride = paired ? 1024 : 2048;
    other = (paired ? 2 * kOne : 1024) / 16;
  }
};

// sums[b][N / 2]: the two products of 64 weight rows over the whole depth.  The last stage that was read, `last`,
// is not given back: the sums pass through it.
template <class T, uint32_t kN, bool kTraced>
__device__ __forceinline__ uint32_t multiply(Shared<kTraced>& sh, uint32_t stages,
                                             StageCursor& cursor, uint32_t blocks,
                                             const GroupWeights& weights, bool gathered,
                                             const StageRelease& release, uint32_t& last,
                                             float (&sums)[2][kN / 2]) {
  Stall<kTraced> stall;
  uint32_t previous = kMostStages;  // read, once its products are done, and not yet given back
  auto give_back = [&] {
    ptx::wgmma_wait<0>();
    release(&sh.empty[previous]);
    previous = kMostStages;
  };
  // Issues the products of the cursor's stage; `first` is a compile-time constant.
  auto issue = [&](auto first) {
    // What follows the answer holds an `.aligned` wait, so it must be the whole warp's: one test_wait, executed by a
    // converged warp, answers all its lanes alike.
    if (!ptx::mbarrier_test(&sh.full[cursor.stage], cursor.turn())) {
      // A stage that is late is no reason to keep the one before from being filled.
      if constexpr (!decltype(first)::value) give_back();
      stall.await(&sh.full[cursor.stage], cursor.turn());
    }
    // Rows that threads have copied are not the tensor cores' to see without it.
    if (gathered) ptx::fence_proxy_async_shared();
    const uint32_t stage = stages + cursor.offset();
    const uint64_t a = ptx::wgmma_descriptor(stage + weights.of_group, weights.atom_stride);
    const uint64_t b = ptx::wgmma_descriptor(stage + kStageBytesWeights, 1024);
    ptx::wgmma_fence();
#pragma unroll
    for (uint32_t k = 0; k < kTileK / 16; ++k) {
      // 16 columns are 32 bytes, two units of a descriptor's address.
      if (decltype(first)::value && k == 0) {
        ptx::wgmma_first<T, kN>(sums[0], a, b);
        ptx::wgmma_first<T, kN>(sums[1], ptx::wgmma_onwards(a, weights.other), b);
      } else {
        const uint64_t rows = ptx::wgmma_onwards(b, 2 * k);
        ptx::wgmma<T, kN>(sums[0], ptx::wgmma_onwards(a, 2 * k), rows);
        ptx::wgmma<T, kN>(sums[1], ptx::wgmma_onwards(a, weights.other + 2 * k), rows);
      }
    }
    ptx::wgmma_commit();
  };
  issue(std::true_type{});
  previous = cursor.stage;
  cursor.next();
  for (uint32_t i = 1; i < blocks; ++i) {
    issue(std::false_type{});
    // One stage's products stay in flight; the stage before it is read.
    if (previous != kMostStages) {
      ptx::wgmma_wait<1>();
      release(&sh.empty[previous]);
    }
    previous = cursor.stage;
    cursor.next();
  }
  ptx::wgmma_wait<0>();
  last = previous;
  return stall.cycles;
}

// Turns of the stages that hold nothing for this CTA, while the other one's tile goes on.
template <bool kTraced>
__device__ __forceinline__ void pass_turns(Shared<kTraced>& sh, StageCursor& cursor, uint32_t turns,
                                           const StageRelease& release) {
  for (uint32_t i = 0; i < turns; ++i) {
    ptx::mbarrier_wait(&sh.full[cursor.stage], cursor.turn());
    __syncwarp();
    release(&sh.empty[cursor.stage]);
    cursor.next();
  }
}

// The stamps of the math group that this thread leads, else null.  Asked anew each time: the sums leave few registers.
__device__ __forceinline__ TileStamps* led_stamps(Task& task) {
  const uint32_t thread = ptx::thread_id() - kMathWarp * 32;
  return thread % kGroupThreads == 0 ? &task.stamps[thread / kGroupThreads] : nullptr;
}

// One tile whose rows are at most kN: its products, its stores, its stamps.
template <class T, bool kGated, uint32_t kN, bool kTraced>
__device__ __forceinline__ void run_tile(Shared<kTraced>& sh, const Place& place, char* stages,
                                         StageCursor& cursor, Task& task, uint32_t group,
                                         const StageRelease& release) {
  const Tile& tile = task.tile;
  float sums[2][kN / 2];
  const GroupWeights weights(kGated && tile.gemm == 1, group);
  uint32_t last = 0;
  const uint32_t stall =
      multiply<T, kN>(sh, ptx::shared_address(stages), cursor, task.blocks, weights,
                      sh.gathers && tile.gemm == 1, release, last, sums);
  if constexpr (kTraced) {
    // At once: it would need a register beside the sums.
    if (TileStamps* stamps = led_stamps(task)) stamps->stall_cycles = stall;
  }
  // Over weight rows that only this group's products have read.
  char* buffer = stages + cursor.offset(last) + weights.of_group;
  // The clock is read by all threads, since a branch takes longer.
  auto stamp_products = [&] {
    if constexpr (kTraced) {
      const uint32_t now = ptx::clock32();
      if (TileStamps* stamps = led_stamps(task)) stamps->products_cycles = stamps->end_cycles = now;
    }
  };
  auto stamp_end = [&] {
    if constexpr (kTraced) {
      const uint32_t now = ptx::clock32();
      if (TileStamps* stamps = led_stamps(task)) stamps->end_cycles = now;
    }
  };
  // A GEMM1 tile's span holds its activation; what GEMM2 gives back is a span of its own.
  if (tile.gemm == 1) {
    store_hidden<T, kGated, kN>(sh, place, tile, buffer, sums);
    stamp_products();
  } else {
    stamp_products();
    store_returns<T, kN>(sh, task, buffer, sums);
    stamp_end();
  }
  ptx::fence_proxy_async_shared();  // copies will follow these ordinary stores
  __syncwarp();
  release(&sh.empty[last]);
  pass_turns(sh, cursor, task.turns - task.blocks, release);
}

// One tile, by the least N that its rows fit.  bf16 has an N for each step of 16 rows; fp16, which is to
// be right rather than fast, has a few, since each takes its time to compile.  Shape::tile_step says so
// to all who count computed rows.
template <class T, bool kGated, bool kTraced>
__device__ __forceinline__ void multiply_tile(Shared<kTraced>& sh, const Place& place, char* stages,
                                              StageCursor& cursor, Task& task, uint32_t group,
                                              const StageRelease& release) {
#define FLASHMOE_TILE(n)                                                   \
  run_tile<T, kGated, n>(sh, place, stages, cursor, task, group, release); \
  break;
  const uint32_t rows = task.tile.rows;
  if (rows == 0) {  // no tile, but the other CTA has one
    pass_turns(sh, cursor, task.turns, release);
  } else if constexpr (std::is_same_v<T, __half>) {
    static_assert(kHalfTileRowsStep == 2 * 32 && kHalfTileRows == 2 * kHalfTileRowsStep);
    switch (ceil_div(rows, 32)) {
      case 1:
        FLASHMOE_TILE(32)
      case 2:
        FLASHMOE_TILE(64)
      default:
        FLASHMOE_TILE(kHalfTileRows)
    }
  } else {
    static_assert(kTileRowsStep == 16 && kTileRows == 11 * kTileRowsStep);
    switch (rows <= 8 ? 0 : ceil_div(rows, 16)) {
      case 0:
        FLASHMOE_TILE(8)
      case 1:
        FLASHMOE_TILE(16)
      case 2:
        FLASHMOE_TILE(32)
      case 3:
        FLASHMOE_TILE(48)
      case 4:
        FLASHMOE_TILE(64)
      case 5:
        FLASHMOE_TILE(80)
      case 6:
        FLASHMOE_TILE(96)
      case 7:
        FLASHMOE_TILE(112)
      case 8:
        FLASHMOE_TILE(128)
      case 9:
        FLASHMOE_TILE(144)
      case 10:
        FLASHMOE_TILE(160)
      default:
        FLASHMOE_TILE(kTileRows)
    }
  }
#undef FLASHMOE_TILE
}

// The products of every tile the scheduler hands over; one math group.
template <class T, bool kGated, bool kTraced>
__device__ __forceinline__ void multiply_tiles(Shared<kTraced>& sh, const Place& place,
                                               char* stages, uint32_t group) {
  const bool leads = threadIdx.x % kGroupThreads == 0;
  const StageRelease release{place.to_other};
  StageCursor cursor;
  for (uint32_t n = 0;; ++n) {
    const uint32_t slot = n % kTasks;
    ptx::mbarrier_wait(&sh.task_full[slot], n / kTasks & 1);
    Task& task = sh.tasks[slot];
    const Tile& tile = task.tile;  // read when needed: the sums leave few registers
    if (tile.gemm == 0) return;
    cursor.stages = task.stages;
    if (leads) {
      GpuActor<kTraced>& actor = sh.actors[static_cast<int>(Lane::k_math0) + group];
      const EventKind kind = tile.gemm == 1 ? EventKind::k_gemm1 : EventKind::k_gemm2;
      const uint64_t now = ptx::globaltimer();
      if constexpr (kTraced) {
        task.stamps[group].begin_ns = now;
        task.stamps[group].begin_cycles = ptx::clock32();
      }
      actor.doing_since(now, kind, kNoPeer, tile.expert, tile.index);
    }
    multiply_tile<T, kGated>(sh, place, stages, cursor, task, group, release);
    // Every thread has read the task and stored its part, which the scheduler publishes.
    ptx::mbarrier_arrive(&sh.task_empty[slot]);
  }
}

}  // namespace flashmoe
