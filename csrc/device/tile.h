// One tile: 256 weight rows times up to 192 rows of tokens, loaded by one warp and multiplied by two
// warp groups.
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

// The loads of every tile the scheduler hands over; one lane.  It runs ahead into the next tile as
// far as the stages go.  A stage is free once both CTAs of a pair have read theirs, since either may be
// about to fill the other's: where both run tiles of the same weights, each fetches one half for both.
template <bool kGated, bool kTraced>
__device__ inline void load_tiles(Shared<kTraced>& sh, const Place& place, char* stages) {
  GpuActor<kTraced>& actor = sh.actors[static_cast<int>(Lane::k_load)];
  const RankArgs& args = *place.args;
  const uint32_t expert0 = first_expert(sh.shape, place.rank);
  constexpr uint32_t kHalfBytes = kStageBytesWeights / 2;
  StageCursor cursor;
  for (uint32_t n = 0;; ++n) {
    const uint32_t slot = n % kTasks;
    ptx::mbarrier_wait(&sh.task_full[slot], n / kTasks & 1);
    const Task& task = sh.tasks[slot];
    if (task.tile.gemm == 0) return;
    if (task.tile.rows != 0) take_up(actor, task, EventKind::k_load);
    const uint32_t begin_cycles = kTraced ? ptx::clock32() : 0;
    uint32_t stall = 0;
    // The rows were written by ordinary or bulk stores of other CTAs; the scheduler acquired them, this
    // lane makes that hold for its tensor copies too.
    ptx::fence_proxy_async();
    const bool up = task.tile.gemm == 1, shared = task.shared != 0;
    const int32_t row = static_cast<int32_t>(task.tile.pool_row0);
    const WeightBox box = WeightBox::of<kGated>(args, task.tile, expert0);
    const uint32_t boxes = ceil_div(task.tile.rows, kBoxRows);  // a bit a box of 16 << bit rows
    const uint32_t bytes = kStageBytesWeights + boxes * kBoxRows * kRowBytes;
    const uint32_t blocks = task.blocks, turns = task.turns;
    for (uint32_t i = 0; i < turns; ++i, cursor.next()) {
      uint64_t* full = &sh.full[cursor.stage];
      if (!ptx::mbarrier_test(&sh.empty[cursor.stage], cursor.turn ^ 1)) {
        const uint32_t from = kTraced ? ptx::clock32() : 0;
        ptx::mbarrier_wait(&sh.empty[cursor.stage], cursor.turn ^ 1);
        if constexpr (kTraced) stall += ptx::clock32() - from;
      }
      if (i >= blocks) {  // the other CTA's tile is deeper
        ptx::mbarrier_arrive(full);
        continue;
      }
      char* weights = stages + cursor.stage * kStageBytes;
      char* rows = weights + kStageBytesWeights;
      const int32_t k = static_cast<int32_t>(i * kTileK);
      ptx::mbarrier_expect(full, bytes);
      if (shared) {
        const int32_t half = static_cast<int32_t>(place.pair_rank);
        ptx::tma_load_5d_both(weights + half * kHalfBytes, box.map, full, k,
                              box.c1 + half * box.step1, box.c2 + half * box.step2, box.c3, 0);
      } else {
        ptx::tma_load_5d(weights, box.map, full, k, box.c1, box.c2, box.c3, 0);
        ptx::tma_load_5d(weights + kHalfBytes, box.map, full, k, box.c1 + box.step1,
                         box.c2 + box.step2, box.c3, 0);
      }
      int32_t from = row;
#pragma unroll
      for (uint32_t bit = 0; bit < kRowBoxes; ++bit) {
        if (boxes >> bit & 1) {
          ptx::tma_load_2d(rows, up ? args.map_pool[bit] : args.map_h[bit], full, k, from);
          rows += (kBoxRows << bit) * kRowBytes;
          from += kBoxRows << bit;
        }
      }
    }
    if constexpr (kTraced) {
      if (task.tile.rows != 0) {
        actor.span(EventKind::k_load, kNoPeer, task.tile.expert, task.tile.index,
                   ptx::clock32() - begin_cycles, stall);
      }
    }
    ptx::mbarrier_arrive(&sh.task_empty[slot]);
  }
}

// v sigmoid(v (a + b v^2)), with both factors times -log2(e).  SiLU has a = 1, b = 0.  GELU by tanh is
// 0.5 v (1 + tanh u) = v sigmoid(2 u), u = sqrt(2 / pi) (v + 0.044715 v^3).  The choice lies in two
// numbers, since code for each of a tile's sums does not fit the instruction cache twice.
struct SigmoidGate {
  float a;
  float b;
  __device__ __forceinline__ explicit SigmoidGate(Activation kind) {
    constexpr float kLog2e = 1.4426950408889634f, kTwice = 1.5957691216057308f;
    a = kind == Activation::kGeglu ? -kTwice * kLog2e : -kLog2e;
    b = kind == Activation::kGeglu ? -kTwice * 0.044715f * kLog2e : 0.0f;
  }
  __device__ __forceinline__ float operator()(float v) const {
    const float e = ptx::exp2_approximate(v * fmaf(b, v * v, a));
    return v * ptx::reciprocal_approximate(1.0f + e);
  }
};

// GELU by erf, with erf of Abramowitz and Stegun 7.1.26, whose error is below 1.5e-7.
__device__ __forceinline__ float gelu(float v) {
  const float x = fabsf(v) * 0.7071067811865476f;
  const float t = ptx::reciprocal_approximate(fmaf(0.3275911f, x, 1.0f));
  float p = fmaf(1.061405429f, t, -1.453152027f);
  p = fmaf(p, t, 1.421413741f);
  p = fmaf(p, t, -0.284496736f);
  p = fmaf(p, t, 0.254829592f) * t;
  const float erfc = p * ptx::exp2_approximate(-1.4426950408889634f * x * x);
  return 0.5f * v * (v < 0.0f ? erfc : 2.0f - erfc);
}

template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  T pair[2] = {static_cast<T>(low), static_cast<T>(high)};
  return *reinterpret_cast<uint32_t*>(pair);
}

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

// A stage that a math warp has read, given back to the loads of both CTAs of a pair.
struct StageRelease {
  uint32_t to_other;  // from an address here to the same in the other CTA; 0 where there is none
  __device__ __forceinline__ void operator()(uint64_t* empty) const {
    if (threadIdx.x % 32 != 0) return;
    ptx::mbarrier_arrive(empty);
    if (to_other != 0) ptx::mbarrier_arrive_other(ptx::shared_address(empty) + to_other);
  }
};

// sums[b][N / 2]: the two products of 64 weight rows over the whole depth.
template <class T, uint32_t kN, bool kTraced>
__device__ __forceinline__ uint32_t multiply(Shared<kTraced>& sh, uint32_t stages,
                                             StageCursor& cursor, uint32_t blocks,
                                             const GroupWeights& weights,
                                             const StageRelease& release,
                                             float (&sums)[2][kN / 2]) {
  uint32_t stall = 0;
  // Issues the products of the cursor's stage; `first` is a compile-time constant.
  auto issue = [&](auto first) {
    if (!ptx::mbarrier_test(&sh.full[cursor.stage], cursor.turn)) {
      [[maybe_unused]] const uint32_t from = kTraced ? ptx::clock32() : 0;
      ptx::mbarrier_wait(&sh.full[cursor.stage], cursor.turn);
      if constexpr (kTraced) stall += ptx::clock32() - from;
    }
    const uint32_t stage = stages + cursor.stage * kStageBytes;
    const uint64_t a = ptx::wgmma_descriptor(stage + weights.of_group, weights.atom_stride);
    const uint64_t b = ptx::wgmma_descriptor(stage + kStageBytesWeights, 1024);
    ptx::wgmma_fence();
#pragma unroll
    for (uint32_t k = 0; k < kTileK / 16; ++k) {
      // 16 columns are 32 bytes, two units of a descriptor's address.
      if (decltype(first)::value && k == 0) {
        ptx::wgmma_first<T, kN>(sums[0], a, b);
        ptx::wgmma_first<T, kN>(sums[1], a + weights.other, b);
      } else {
        ptx::wgmma<T, kN>(sums[0], a + 2 * k, b + 2 * k);
        ptx::wgmma<T, kN>(sums[1], a + weights.other + 2 * k, b + 2 * k);
      }
    }
    ptx::wgmma_commit();
  };
  issue(std::true_type{});
  uint32_t previous = cursor.stage;
  cursor.next();
  for (uint32_t i = 1; i < blocks; ++i) {
    issue(std::false_type{});
    // One stage's products stay in flight; the stage before it is read.
    ptx::wgmma_wait<1>();
    release(&sh.empty[previous]);
    previous = cursor.stage;
    cursor.next();
  }
  ptx::wgmma_wait<0>();
  release(&sh.empty[previous]);
  return stall;
}

// Turns of the stages that hold nothing for this CTA, while the other one's tile goes on.
template <bool kTraced>
__device__ __forceinline__ void pass_turns(Shared<kTraced>& sh, StageCursor& cursor, uint32_t turns,
                                           const StageRelease& release) {
  for (uint32_t i = 0; i < turns; ++i) {
    ptx::mbarrier_wait(&sh.full[cursor.stage], cursor.turn);
    __syncwarp();
    release(&sh.empty[cursor.stage]);
    cursor.next();
  }
}

// Where the rows of `h` go: a lane's tokens are `step` apart.
template <class T>
struct HiddenRows {
  T* at;
  uint64_t step;  // elements
  __device__ __forceinline__ T* next() {
    T* now = at;
    at += step;
    return now;
  }
};

// Where result rows go: a tile's rows of one source are consecutive rows of its return buffer.  A
// lane's tokens are kStep apart.
template <class T, uint32_t kStep, bool kTraced>
struct ReturnRows {
  const Shared<kTraced>& sh;
  const Tile& tile;
  uint32_t column;
  uint32_t row;      // within the expert, of the next token
  uint32_t end = 0;  // first row within the expert that is not of `source`
  uint32_t source = 0xffffffffu;
  T* at = nullptr;

  __device__ __forceinline__ T* next() {
    if (row >= end) find();
    T* now = at;
    at += kStep * sh.shape.hidden;
    row += kStep;
    return now;
  }
  __device__ __forceinline__ void find() {
    uint32_t begin = 0;
    while (row >= end && source + 1 < sh.shape.world) {
      ++source;
      begin = source_start(sh.tables, sh.shape, source, tile.expert);
      end = begin + source_rows(sh.tables, sh.shape, source, tile.expert);
    }
    const uint64_t to = return_row(sh.tables, sh.shape, source, tile.expert, row - begin);
    at = sh.heaps[source].template at<T>(sh.layout.ret) + to * sh.shape.hidden + column;
  }
};

// Moves a warp's sums from registers to coalesced stores through the warp's own 2 KB, transposed: 16
// bytes are 8 columns of one token.  kUnits of them make a token's row; value(j, m) is the pair of sums
// of tokens 8 j + 2 (lane % 4) and the next, column lane / 4 of 8-column block m of this warp.
// goal.next() says where the lane's unit goes, lane % kUnits of tokens lane / kUnits, and so on in steps
// of 32 / kUnits; `stores` is false where that unit lies beyond the matrix.
template <uint32_t kN, uint32_t kUnits, class Value, class Goal>
__device__ __forceinline__ void store_transposed(char* buffer, uint32_t rows, bool stores,
                                                 const Value& value, Goal& goal) {
  constexpr uint32_t kPass = kEpilogueBytesWarp / 16 / kUnits;  // tokens
  constexpr uint32_t kBlocks = kUnits == 4 || kN == 8 ? 1 : 2;  // of 8 tokens a store
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t shared = ptx::shared_address(buffer);
  // Units of a token are permuted by the token, so that neither side meets bank conflicts.
  auto place = [](uint32_t token, uint32_t unit) {
    return (token * kUnits + (unit ^ (token / (8 / kUnits) % kUnits))) * 16;
  };
#pragma unroll
  for (uint32_t token0 = 0; token0 < kN; token0 += kPass) {
    if (token0 >= rows) break;
#pragma unroll
    for (uint32_t t = 0; t < kPass; t += 8 * kBlocks) {
      if (token0 + t >= kN) break;
      const uint32_t j = (token0 + t) / 8;
      if constexpr (kUnits == 4) {
        ptx::store_matrix_x4_transposed(shared + place(t + lane % 8, lane / 8), value(j, 0),
                                        value(j, 1), value(j, 2), value(j, 3));
      } else if constexpr (kN == 8) {
        ptx::store_matrix_x2_transposed(shared + place(t + lane % 8, lane / 8 % 2), value(j, 0),
                                        value(j, 1));
      } else {
        ptx::store_matrix_x4_transposed(shared + place(t + lane / 16 * 8 + lane % 8, lane / 8 % 2),
                                        value(j, 0), value(j, 1), value(j + 1, 0), value(j + 1, 1));
      }
    }
    __syncwarp();
#pragma unroll
    for (uint32_t q = 0; q < kPass * kUnits / 32; ++q) {
      const uint32_t t = q * (32 / kUnits) + lane / kUnits, unit = lane % kUnits;
      if (token0 + t < rows) {
        auto* to = goal.next();
        if (stores) {
          *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(buffer + place(t, unit));
        }
      }
    }
    __syncwarp();
  }
}

// GEMM1: activation, rounding, `h`.  `warp` is the warp's place among all math warps of the CTA.
template <class T, bool kGated, uint32_t kN, bool kTraced>
__device__ __forceinline__ void store_hidden(const Shared<kTraced>& sh, const Place& place,
                                             const Tile& tile, uint32_t warp, char* buffer,
                                             const float (&sums)[2][kN / 2]) {
  constexpr uint32_t kColumns = kGated ? 16 : 32;  // of a warp
  const Activation kind = sh.shape.activation;
  const uint32_t inter = sh.shape.inter;
  const uint32_t col0 = tile.col_tile * (8 * kColumns) + warp * kColumns;
  constexpr uint32_t kUnits = kColumns / 8;
  const uint32_t lane = threadIdx.x % 32, column = col0 + lane % kUnits * 8;
  HiddenRows<T> goal{place.heap.at<T>(sh.layout.h) +
                         static_cast<uint64_t>(tile.pool_row0 + lane / kUnits) * inter + column,
                     static_cast<uint64_t>(32 / kUnits) * inter};
  const bool stores = column < inter;
  const SigmoidGate gate(kind);
  if constexpr (kGated) {
    store_transposed<kN, kUnits>(
        buffer, tile.rows, stores,
        [&](uint32_t j, uint32_t m) {
          const uint32_t at = 4 * j + 2 * m;
          return pack<T>(gate(sums[0][at]) * sums[1][at], gate(sums[0][at + 1]) * sums[1][at + 1]);
        },
        goal);
  } else {
    auto pair = [&](const auto& f) {
      store_transposed<kN, kUnits>(
          buffer, tile.rows, stores,
          [&](uint32_t j, uint32_t m) {
            const uint32_t at = 4 * j + m / 2 * 2;
            return pack<T>(f(sums[m % 2][at]), f(sums[m % 2][at + 1]));
          },
          goal);
    };
    if (kind == Activation::kRelu) {
      pair([](float v) { return fmaxf(v, 0.0f); });
    } else {
      const bool erf = kind == Activation::kGelu;
      pair([&](float v) { return erf ? gelu(v) : gate(v); });
    }
  }
}

// GEMM2: rounding, and each row into the return buffer of the rank it came from.
template <class T, uint32_t kN, bool kTraced>
__device__ __forceinline__ void store_returns(const Shared<kTraced>& sh, const Tile& tile,
                                              uint32_t warp, char* buffer,
                                              const float (&sums)[2][kN / 2]) {
  constexpr uint32_t kUnits = 4;
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t column = tile.col_tile * kTileWeights + warp * 32 + lane % kUnits * 8;
  ReturnRows<T, 32 / kUnits, kTraced> goal{sh, tile, column, tile.row0 + lane / kUnits};
  store_transposed<kN, kUnits>(
      buffer, tile.rows, column < sh.shape.hidden,
      [&](uint32_t j, uint32_t m) {
        const uint32_t at = 4 * j + m / 2 * 2;
        return pack<T>(sums[m % 2][at], sums[m % 2][at + 1]);
      },
      goal);
}

// One tile whose rows are at most kN: its products, its stores, its stamps.
template <class T, bool kGated, uint32_t kN, bool kTraced>
__device__ __forceinline__ void run_tile(Shared<kTraced>& sh, const Place& place, char* stages,
                                         StageCursor& cursor, const Task& task, uint32_t group,
                                         const StageRelease& release) {
  const Tile& tile = task.tile;
  const bool leads = threadIdx.x % kGroupThreads == 0;
  const uint32_t warp = threadIdx.x / 32 - kMathWarp;
  char* buffer = stages + kStages * kStageBytes + warp * kEpilogueBytesWarp;
  float sums[2][kN / 2];
  const uint32_t stall =
      multiply<T, kN>(sh, ptx::shared_address(stages), cursor, task.blocks,
                      GroupWeights(kGated && tile.gemm == 1, group), release, sums);
  pass_turns(sh, cursor, task.turns - task.blocks, release);
  auto stamp_products = [&] {
    if constexpr (kTraced) {
      if (leads) {
        TileStamps& stamps = sh.stamps[&task - sh.tasks][group];
        stamps.products_ns = ptx::globaltimer();
        stamps.cycles = ptx::clock32() - stamps.cycles;
        stamps.stall_cycles = stall;
      }
    }
  };
  // A GEMM1 tile's span holds its activation; what GEMM2 gives back is a span of its own.
  if (tile.gemm == 1) {
    store_hidden<T, kGated, kN>(sh, place, tile, warp, buffer, sums);
    stamp_products();
  } else {
    stamp_products();
    store_returns<T, kN>(sh, tile, warp, buffer, sums);
  }
}

// One tile, by the least N that its rows fit.  bf16 has an N for each step of 16 rows; fp16, which is to
// be right rather than fast, has a few, since each takes its time to compile.  Shape::tile_step says so
// to all who count computed rows.
template <class T, bool kGated, bool kTraced>
__device__ __forceinline__ void multiply_tile(Shared<kTraced>& sh, const Place& place, char* stages,
                                              StageCursor& cursor, const Task& task, uint32_t group,
                                              const StageRelease& release) {
#define FLASHMOE_TILE(n)                                                   \
  run_tile<T, kGated, n>(sh, place, stages, cursor, task, group, release); \
  break;
  const uint32_t rows = task.tile.rows;
  if (rows == 0) {  // no tile, but the other CTA has one
    pass_turns(sh, cursor, task.turns, release);
  } else if constexpr (std::is_same_v<T, __half>) {
    switch (ceil_div(rows, 32)) {
      case 1:
        FLASHMOE_TILE(32)
      case 2:
        FLASHMOE_TILE(64)
      case 3:
      case 4:
        FLASHMOE_TILE(128)
      default:
        FLASHMOE_TILE(192)
    }
  } else {
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
      case 11:
        FLASHMOE_TILE(176)
      default:
        FLASHMOE_TILE(192)
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
    const Task& task = sh.tasks[slot];
    const Tile& tile = task.tile;  // read when needed: the sums leave few registers
    if (tile.gemm == 0) return;
    if (leads) {
      sh.actors[static_cast<int>(Lane::k_math0) + group].doing(
          tile.gemm == 1 ? EventKind::k_gemm1 : EventKind::k_gemm2, kNoPeer, tile.expert,
          tile.index);
      if constexpr (kTraced) {
        TileStamps& stamps = sh.stamps[slot][group];
        stamps.begin_ns = ptx::globaltimer();
        stamps.cycles = ptx::clock32();
      }
    }
    multiply_tile<T, kGated>(sh, place, stages, cursor, task, group, release);
    if constexpr (kTraced) {
      if (leads) sh.stamps[slot][group].end_ns = ptx::globaltimer();
    }
    // Every thread has read the task and stored its part, which the scheduler publishes.
    ptx::mbarrier_arrive(&sh.task_empty[slot]);
  }
}

}  // namespace flashmoe
