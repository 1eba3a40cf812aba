// What the loading warp brings: a tile's weights and rows, block by block of K, through a ring of stages.
#pragma once

#include <cstdint>

#include "device/cta.h"

namespace flashmoe {

// Position in the ring of stages: which stage, and a bit a stage that says its barriers' turn.
struct StageCursor {
  uint32_t stages = kStages;  // Task::stages
  uint32_t stage = 0;
  uint32_t parities = 0;
  __device__ __forceinline__ uint32_t turn() const { return parities >> stage & 1; }
  // From the first stage to this one, in bytes.
  __device__ __forceinline__ uint32_t offset() const { return offset(stage); }
  __device__ __forceinline__ uint32_t offset(uint32_t of_stage) const {
    return of_stage * kStageBytes;
  }
  __device__ __forceinline__ void next() {
    parities ^= 1u << stage;
    if (++stage == stages) stage = 0;
  }
};

// This actor begins to bring what a tile needs.
template <bool kTraced>
__device__ __forceinline__ void take_up(GpuActor<kTraced>& actor, const Task& task,
                                        LoadStamps& stamps) {
  const uint64_t now = ptx::globaltimer();
  actor.doing_since(now, EventKind::k_load, kNoPeer, task.tile.expert, task.tile.index);
  if constexpr (kTraced) stamps.begin_ns = now;
}
// It has brought all of it.
template <bool kTraced>
__device__ __forceinline__ void stamp_end(LoadStamps& stamps, uint32_t begin_cycles,
                                          const Stall<kTraced>& stall) {
  if constexpr (kTraced) {
    stamps.end_ns = ptx::globaltimer();
    stamps.cycles = ptx::clock32() - begin_cycles;
    stamps.stall_cycles = stall.cycles;
  }
}

// The halves of a tile's weights, 128 rows each: their map and their coordinates but for K, the first.
// Where a GEMM1 is gated, the one is of gate rows and the other of the same columns' up rows.
struct WeightBox {
  const void* map;
  int32_t c1, c2, c3;
  int32_t step1, step2;  // to the second half
  template <bool kGated>
  static __device__ __forceinline__ WeightBox of(const RankArgs& args, const Tile& tile,
                                                 uint32_t expert0) {
    constexpr int32_t kHalf = kTileWeights / 2;
    const int32_t expert = static_cast<int32_t>(tile.expert - expert0);
    const int32_t col = static_cast<int32_t>(tile.col_tile);
    if (kGated && tile.gemm == 1) return {args.map_up, col * kHalf, 0, expert, 0, 1};
    return {tile.gemm == 1 ? args.map_up : args.map_down, col * 2 * kHalf, expert, 0, kHalf, 0};
  }
};

// The first tile after all GEMM1 tiles of the rank, where rows are gathered; else 0.
template <bool kTraced>
__device__ __forceinline__ uint32_t gather_end(const Shared<kTraced>& sh) {
  return sh.gathers ? sh.tables.segments[sh.order.after_gemm1] : 0;
}

// Until all rows of a GEMM1 tile have been announced; false if that is not to be.  One warp.
template <bool kTraced>
__device__ __forceinline__ bool await_rows(Shared<kTraced>& sh, const Place& place,
                                           GpuActor<kTraced>& actor, const Tile& tile) {
  Status status = Status::kOk;
  if (threadIdx.x % 32 == 0) {
    status = actor.wait(
        {EventKind::k_wait_rows, kNoPeer, static_cast<uint16_t>(tile.expert), tile.row_tile},
        tile_counter(place.heap, sh.layout.rows_ready, sh.pool_tiles, place.epoch, tile.row_tile),
        Until::kAtLeast, tile.rows);
    if (status == Status::kHang) raise_abort(sh, status);
  }
  __syncwarp();
  return __all_sync(0xffffffffu, status == Status::kOk);
}

// The rows of every GEMM1 tile, from x, by a comm warp that shares them with the other one: where there is
// one rank all rows are its own, and the comm warps have nothing to dispatch and, until the last GEMM1 tile,
// little to combine.  A lane copies unit lane % 8 of 16 bytes of rows lane / 8 and lane / 8 + 4 of every
// other group of 8 rows, to where the tensor copies' swizzle has it.
template <bool kTraced>
__device__ inline void gather_tiles(Shared<kTraced>& sh, const Place& place, uint32_t half,
                                    char* stages) {
  constexpr uint32_t kGroups = kTileRows / 8 / kCommWarps;
  static_assert(kTileRows % (8 * kCommWarps) == 0 && kGroups == 11,
                "each warp has the same share of the highest tile");
  GpuActor<kTraced>& actor = sh.actors[static_cast<int>(Lane::k_comm0) + half];
  const uint32_t end = gather_end(sh);
  StageCursor cursor;
  for (uint32_t n = 0;; ++n) {
    const uint32_t slot = n % kTasks;
    ptx::mbarrier_wait(&sh.task_full[slot], n / kTasks & 1);
    Task& task = sh.tasks[slot];
    if (task.tile.gemm == 0 || task.tile.index >= end) return;
    cursor.stages = task.stages;
    // Anew for each tile: registers are for the rows' places.
    const uint32_t lane = ptx::lane_id(), first = lane / 8, unit = lane % 8;
    const bool leads = lane == 0;
    const uint32_t row_bytes = sh.shape.hidden * 2;
    const uint32_t to = ptx::shared_address(stages) + kStageBytesWeights + half * 8 * kRowBytes +
                        first * kRowBytes + (unit ^ first) * 16;
    const uint32_t* origin = place.heap.at<uint32_t>(sh.layout.origin);
    uint32_t rows = task.tile.gemm == 1 ? task.tile.rows : 0;
    if (rows != 0 && gathers_unawaited(sh, n) && !await_rows(sh, place, actor, task.tile)) {
      rows = 0;
    }
    const uint32_t groups =
        (ceil_div(rows, 8) + kCommWarps - 1 - half) / kCommWarps;  // this warp's
    const uint32_t blocks = task.blocks, turns = task.turns;
    if (leads && groups != 0) take_up(actor, task, task.loads[1 + half]);
    const uint32_t begin_cycles = kTraced ? ptx::clock32() : 0;
    Stall<kTraced> stall;
    // The tokens of 32 rows a load, a lane each, past L1, where an older launch's may still lie.
    constexpr uint32_t kLoads = (kTileRows + 31) / 32;
    uint32_t tokens[kLoads];
#pragma unroll
    for (uint32_t j = 0; j < kLoads; ++j) {
      tokens[j] = j * 32 < rows
                      ? __ldcg(origin + task.tile.pool_row0 + min_u32(j * 32 + lane, rows - 1))
                      : 0;
    }
    // Bytes from x to the lane's unit of its rows' first block.
    uint32_t from[2 * kGroups];
#pragma unroll
    for (uint32_t i = 0; i < 2 * kGroups; ++i) {
      const uint32_t of_lane = i / 2 % 2 * 16 + half * 8 + i % 2 * 4 + first;
      from[i] = __shfl_sync(0xffffffffu, tokens[i / 4], of_lane) * row_bytes + unit * 16;
    }
    for (uint32_t i = 0; i < turns; ++i, cursor.next()) {
      uint64_t* full = &sh.full[cursor.stage];
      stall.await_if_late(&sh.empty[cursor.stage], cursor.turn() ^ 1);
      if (i < blocks) {
        const char* x = static_cast<const char*>(place.args->x) + i * kRowBytes;
        const uint32_t inside = i * kRowBytes + unit * 16 < row_bytes ? 16 : 0;  // beyond it, zeros
        // Rows 4 to 7 have the swizzle of rows 0 to 3 but for one bit.
        const uint32_t low = to + cursor.offset(), high = (low ^ 64) + 4 * kRowBytes;
        // One jump, and no condition between the copies, which would cost as much as they do.
        switch (groups) {
#define FLASHMOE_COPY(n)                                                                       \
  case n:                                                                                      \
    ptx::copy_async(low + (n - 1) * kCommWarps * 8 * kRowBytes, x + from[2 * n - 2], inside);  \
    ptx::copy_async(high + (n - 1) * kCommWarps * 8 * kRowBytes, x + from[2 * n - 1], inside); \
    [[fallthrough]];
          FLASHMOE_COPY(11)
          FLASHMOE_COPY(10)
          FLASHMOE_COPY(9)
          FLASHMOE_COPY(8)
          FLASHMOE_COPY(7)
          FLASHMOE_COPY(6)
          FLASHMOE_COPY(5)
          FLASHMOE_COPY(4)
          FLASHMOE_COPY(3)
          FLASHMOE_COPY(2)
          FLASHMOE_COPY(1)
#undef FLASHMOE_COPY
          default:
            break;
        }
      }
      ptx::arrive_with_copies(full);
    }
    if constexpr (kTraced) {
      if (leads) {
        stamp_end(task.loads[1 + half], begin_cycles, stall);
        ptx::mbarrier_arrive(&sh.task_empty[slot]);
      }
    }
  }
}

// The loads of every tile the scheduler hands over; one lane.  It runs ahead into the next tile as
// far as the stages go.  A stage is free once both CTAs of a pair have read theirs, since either may be
// about to fill the other's: where both run tiles of the same weights, each fetches one half for both.
template <bool kGated, bool kTraced>
__device__ inline void load_tiles(Shared<kTraced>& sh, const Place& place, char* stages) {
  GpuActor<kTraced>& actor = sh.actors[static_cast<int>(Lane::k_load)];
  const RankArgs& args = *place.args;
  const uint32_t expert0 = sh.order.first;
  const uint32_t gathered_until = gather_end(sh);
  constexpr uint32_t kHalfBytes = kStageBytesWeights / 2;
  StageCursor cursor;
  for (uint32_t n = 0;; ++n) {
    const uint32_t slot = n % kTasks;
    ptx::mbarrier_wait(&sh.task_full[slot], n / kTasks & 1);
    Task& task = sh.tasks[slot];
    if (task.tile.gemm == 0) return;
    cursor.stages = task.stages;
    if (task.tile.rows != 0) take_up(actor, task, task.loads[0]);
    const uint32_t begin_cycles = kTraced ? ptx::clock32() : 0;
    Stall<kTraced> stall;
    const bool up = task.tile.gemm == 1, shared = task.shared != 0, gathered = up && sh.gathers;
    // The rows were written by ordinary or bulk stores of other CTAs; the scheduler acquired them, this
    // lane makes that hold for its tensor copies too.  Gathered rows are not this lane's.
    if (!gathered) ptx::fence_proxy_async();
    const int32_t row = static_cast<int32_t>(task.tile.pool_row0);
    const WeightBox box = WeightBox::of<kGated>(args, task.tile, expert0);
    // A bit a box of box_rows(bit) rows.
    const uint32_t boxes = gathered ? 0 : ceil_div(task.tile.rows, kBoxRows);
    const uint32_t bytes = kStageBytesWeights + boxes * kBoxRows * kRowBytes;
    // Where gathering is over, this lane arrives for those who gathered too.
    const uint32_t arrivals = task.tile.index < gathered_until ? 1 : fills(sh.gathers);
    const uint32_t blocks = task.blocks, turns = task.turns;
    // Weights used once L2 need not keep.
    const uint32_t row_tiles = expert_row_tiles(sh.tables, sh.shape, task.tile.expert);
    const bool once = row_tiles == 1 || (shared && row_tiles == 2);
    const uint64_t policy = once ? ptx::policy_evict_first() : ptx::policy_normal();
    for (uint32_t i = 0; i < turns; ++i, cursor.next()) {
      uint64_t* full = &sh.full[cursor.stage];
      stall.await_if_late(&sh.empty[cursor.stage], cursor.turn() ^ 1);
      if (i >= blocks) {  // the other CTA's tile is deeper
        ptx::mbarrier_arrive_many(full, arrivals);
        continue;
      }
      char* weights = stages + cursor.offset();
      char* rows = weights + kStageBytesWeights;
      const int32_t k = static_cast<int32_t>(i * kTileK);
      ptx::mbarrier_expect_more(full, bytes);
      if (shared) {
        const int32_t half = static_cast<int32_t>(place.pair_rank);
        ptx::tma_load_5d_both(weights + half * kHalfBytes, box.map, full, k,
                              box.c1 + half * box.step1, box.c2 + half * box.step2, box.c3, 0,
                              policy);
      } else {
        ptx::tma_load_5d(weights, box.map, full, k, box.c1, box.c2, box.c3, 0, policy);
        ptx::tma_load_5d(weights + kHalfBytes, box.map, full, k, box.c1 + box.step1,
                         box.c2 + box.step2, box.c3, 0, policy);
      }
      int32_t from = row;
#pragma unroll
      for (uint32_t bit = 0; bit < kRowBoxes; ++bit) {
        if (boxes >> bit & 1) {
          ptx::tma_load_2d(rows, up ? args.map_pool[bit] : args.map_h[bit], full, k, from);
          rows += box_rows(bit) * kRowBytes;
          from += box_rows(bit);
        }
      }
      ptx::mbarrier_arrive_many(full, arrivals);
    }
    stamp_end(task.loads[0], begin_cycles, stall);
    if constexpr (kTraced) {
      const bool alone = task.tile.index >= gathered_until;  // comm warps have no part in it
      ptx::mbarrier_arrive_many(&sh.task_empty[slot], alone ? load_ends<kTraced>(sh.gathers) : 1);
    } else {
      ptx::mbarrier_arrive(&sh.task_empty[slot]);
    }
  }
}

}  // namespace flashmoe
