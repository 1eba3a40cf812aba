// What becomes of a tile's sums: the activation and `h`, or rows for the ranks they came from.
#pragma once

#include <cstdint>

#include "device/cta.h"

namespace flashmoe {

// sigmoid(2 u) = (1 + tanh u) / 2, since `tanh` is one instruction of the unit for functions where `ex2` and `rcp`
// are two.  Of PTX it is promised to err by 2^-11; an H200's errs by less than 2^-16 (docs/numbers.md).

// SiLU, v sigmoid(v).
struct SiluGate {
  __device__ __forceinline__ float operator()(float v) const {
    const float half = 0.5f * v;
    return fmaf(half, ptx::tanh_approximate(half), half);
  }
};

// GELU by tanh, 0.5 v (1 + tanh u) with u = sqrt(2 / pi) (v + 0.044715 v^3).
struct TanhGeluGate {
  __device__ __forceinline__ float operator()(float v) const {
    constexpr float kRoot = 0.7978845608028654f;  // sqrt(2 / pi)
    const float half = 0.5f * v;
    return fmaf(half, ptx::tanh_approximate(v * fmaf(kRoot * 0.044715f * v, v, kRoot)), half);
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

// Where a thread's unit of 16 bytes of each token goes, and for which of the tile's tokens, [first, end).
struct RowGoal {
  char* to;       // of the thread's first token: its number in the group / units of a row
  uint64_t step;  // bytes to its next one
  uint32_t first;
  uint32_t end;
  bool stores;  // the unit lies within the matrix
};

// Moves a group's sums from registers to coalesced stores through `buffer`, transposed: 16 bytes are 8 columns of one
// token, kUnits of them a warp's part of the token's row, of which each thread then stores a part, so that what is
// stored together is as long as the group's row.  value(j, m) is the pair of sums of tokens 8 j + 2 (lane % 4) and the
// next, column lane / 4 of 8-column block m of this warp.
// All of it stands in the code once a pass, and no launch has its code at hand: so nothing is asked
// twice, and no address is worked out that is another one plus a constant.
template <uint32_t kN, uint32_t kUnits, uint32_t kBytes, class Value>
__device__ __forceinline__ void store_transposed(char* buffer, const RowGoal& goal,
                                                 const Value& value) {
  constexpr uint32_t kRowUnits = kTeamWarps * kUnits;
  constexpr uint32_t kRow = kRowUnits * 16;                     // bytes of a token
  constexpr uint32_t kPass = kBytes / kRow;                     // tokens
  constexpr uint32_t kBlocks = kUnits == 4 || kN == 8 ? 1 : 2;  // of 8 tokens a store of matrices
  constexpr uint32_t kStep = kGroupThreads / kRowUnits;         // tokens a store of rows
  const uint32_t lane = ptx::lane_id(), thread = ptx::thread_id() % kGroupThreads;
  const uint32_t unit0 = thread / 32 * kUnits;
  const uint32_t barrier = ptx::thread_id() / kGroupThreads;  // 1 and 2, which are the sums' later
  // Units of a token are permuted by the token, so that neither side meets bank conflicts; eight tokens on
  // they are permuted alike.
  auto place = [](uint32_t token, uint32_t unit) { return token * kRow + (unit ^ token % 8) * 16; };
  const uint32_t shared = ptx::shared_address(buffer);
  const uint32_t in = shared + (kUnits == 4 ? place(lane % 8, unit0 + lane / 8)
                                : kN == 8 ? place(lane % 8, unit0 + lane / 8 % 2)
                                          : place(lane / 16 * 8 + lane % 8, unit0 + lane / 8 % 2));
  const uint32_t out = shared + place(thread / kRowUnits, thread % kRowUnits);
  const uint32_t before = thread / kRowUnits - goal.first;
  const uint32_t count = goal.stores ? goal.end - goal.first : 0;
  char* to = goal.to;
  // All warps' products of the stage are done, and so is what they have read of it.
  ptx::named_barrier(barrier, kGroupThreads);
#pragma unroll
  for (uint32_t token0 = 0; token0 < kN; token0 += kPass) {
    if (token0 >= goal.end) break;
    if (token0 + kPass <= goal.first) {
      to += kPass / kStep * goal.step;
      continue;
    }
    const uint32_t half = token0 / kPass % 2 * kBytes;  // nobody reads what the next pass fills
#pragma unroll
    for (uint32_t t = 0; t < kPass; t += 8 * kBlocks) {
      if (token0 + t >= kN) break;
      const uint32_t j = (token0 + t) / 8;
      const uint32_t at = in + half + t * kRow;
      if constexpr (kUnits == 4) {
        ptx::store_matrix_x4_transposed(at, value(j, 0), value(j, 1), value(j, 2), value(j, 3));
      } else if constexpr (kN == 8) {
        ptx::store_matrix_x2_transposed(at, value(j, 0), value(j, 1));
      } else {
        ptx::store_matrix_x4_transposed(at, value(j, 0), value(j, 1), value(j + 1, 0),
                                        value(j + 1, 1));
      }
    }
    ptx::named_barrier(barrier, kGroupThreads);
    uint4 rows[kPass / kStep];
#pragma unroll
    for (uint32_t q = 0; q < kPass / kStep; ++q) {
      if (token0 + q * kStep < kN) rows[q] = ptx::load_shared(out + half + q * kStep * kRow);
    }
#pragma unroll
    for (uint32_t q = 0; q < kPass / kStep; ++q) {
      const uint32_t token = token0 + q * kStep;  // the thread's, but for its place in the step
      if (token < kN) ptx::store_global_if(before + token < count, to, rows[q]);
      to = ptx::opaque(to + goal.step);
    }
  }
}

// The first column of a math thread's unit, kRowUnits of which are a row of its group's part of a tile.
template <uint32_t kRowUnits>
__device__ __forceinline__ uint32_t column_of_thread(const Tile& tile) {
  const uint32_t thread = threadIdx.x - kMathWarp * 32, of_group = thread % kGroupThreads;
  return (tile.col_tile * kMathGroups + thread / kGroupThreads) * (8 * kRowUnits) +
         of_group % kRowUnits * 8;
}

// GEMM1: activation, rounding, `h`.  `buffer` is the group's.
template <class T, bool kGated, uint32_t kN, bool kTraced>
__device__ __forceinline__ void store_hidden(const Shared<kTraced>& sh, const Place& place,
                                             const Tile& tile, char* buffer,
                                             const float (&sums)[2][kN / 2]) {
  constexpr uint32_t kColumns = kGated ? 16 : 32;  // of a warp
  const Activation kind = sh.shape.activation;
  const uint32_t inter = sh.shape.inter;
  constexpr uint32_t kUnits = kColumns / 8, kRowUnits = kTeamWarps * kUnits;
  const uint32_t of_group = (threadIdx.x - kMathWarp * 32) % kGroupThreads;
  const uint32_t column = column_of_thread<kRowUnits>(tile);
  const uint64_t row_bytes = inter * sizeof(T);
  const RowGoal goal{place.heap.at<char>(sh.layout.h) +
                         (tile.pool_row0 + of_group / kRowUnits) * row_bytes + column * sizeof(T),
                     kGroupThreads / kRowUnits * row_bytes, 0, tile.rows, column < inter};
  if constexpr (kGated) {
    auto gated = [&](const auto& f) {
      store_transposed<kN, kUnits, kPassBytes<kTraced>>(buffer, goal, [&](uint32_t j, uint32_t m) {
        const uint32_t at = 4 * j + 2 * m;
        return pack<T>(f(sums[0][at]) * sums[1][at], f(sums[0][at + 1]) * sums[1][at + 1]);
      });
    };
    if (kind == Activation::kSwiglu) {
      gated(SiluGate{});
    } else {
      gated(TanhGeluGate{});
    }
  } else {
    auto pair = [&](const auto& f) {
      store_transposed<kN, kUnits, kPassBytes<kTraced>>(buffer, goal, [&](uint32_t j, uint32_t m) {
        const uint32_t at = 4 * j + m / 2 * 2;
        return pack<T>(f(sums[m % 2][at]), f(sums[m % 2][at + 1]));
      });
    };
    if (kind == Activation::kRelu) {
      pair([](float v) { return ptx::relu(v); });
    } else {
      const bool erf = kind == Activation::kGelu;
      pair([&](float v) { return erf ? gelu(v) : SiluGate{}(v); });
    }
  }
}

// GEMM2: rounding, and each row into the return buffer of the rank it came from.  `buffer` is the group's.
template <class T, uint32_t kN, bool kTraced>
__device__ __forceinline__ void store_returns(const Shared<kTraced>& sh, const Task& task,
                                              char* buffer, const float (&sums)[2][kN / 2]) {
  constexpr uint32_t kUnits = 4, kRowUnits = kTeamWarps * kUnits;
  const Tile& tile = task.tile;
  const uint32_t hidden = sh.shape.hidden;
  const uint32_t of_group = (threadIdx.x - kMathWarp * 32) % kGroupThreads;
  const uint32_t column = column_of_thread<kRowUnits>(tile);
  const uint64_t row_bytes = hidden * sizeof(T);
  const ReturnPath* path = task.returns;
  // A tile's rows of one source are consecutive rows of its return buffer.
#pragma unroll 1
  for (uint32_t first = 0; first < tile.rows; ++path) {
    const uint32_t end = min_u32(path->end - tile.row0, tile.rows);
    const RowGoal goal{
        path->base + (tile.row0 + of_group / kRowUnits) * row_bytes + column * sizeof(T),
        kGroupThreads / kRowUnits * row_bytes, first, end, column < hidden};
    store_transposed<kN, kUnits, kPassBytes<kTraced>>(buffer, goal, [&](uint32_t j, uint32_t m) {
      const uint32_t at = 4 * j + m / 2 * 2;
      return pack<T>(sums[m % 2][at], sums[m % 2][at + 1]);
    });
    first = end;
  }
}

}  // namespace flashmoe
