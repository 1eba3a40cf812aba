// What becomes of a tile's sums: the activation and `h`, or rows for the ranks they came from.
#pragma once

#include <cstdint>

#include "device/cta.h"

namespace flashmoe {

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
// lane's tokens are kStep apart.  The way to the next source is short on purpose: it stands in the code
// once a store, and code that is skipped is fetched all the same.
template <class T, uint32_t kStep>
struct ReturnRows {
  const ReturnPath* path;
  uint32_t row_bytes;
  uint32_t column_bytes;
  uint32_t row;  // within the expert, of the next token
  uint32_t end = 0;
  char* at = nullptr;

  __device__ __forceinline__ T* next() {
    while (row >= end) {
      end = path->end;
      at = path->base + static_cast<uint64_t>(row) * row_bytes + column_bytes;
      ++path;
    }
    T* now = reinterpret_cast<T*>(at);
    at += kStep * row_bytes;
    row += kStep;
    return now;
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
__device__ __forceinline__ void store_returns(const Shared<kTraced>& sh, const Task& task,
                                              uint32_t warp, char* buffer,
                                              const float (&sums)[2][kN / 2]) {
  constexpr uint32_t kUnits = 4;
  const Tile& tile = task.tile;
  const uint32_t lane = threadIdx.x % 32, hidden = sh.shape.hidden;
  const uint32_t column = tile.col_tile * kTileWeights + warp * 32 + lane % kUnits * 8;
  ReturnRows<T, 32 / kUnits> goal{task.returns, hidden * 2, column * 2, tile.row0 + lane / kUnits};
  store_transposed<kN, kUnits>(
      buffer, tile.rows, column < hidden,
      [&](uint32_t j, uint32_t m) {
        const uint32_t at = 4 * j + m / 2 * 2;
        return pack<T>(sums[m % 2][at], sums[m % 2][at + 1]);
      },
      goal);
}

}  // namespace flashmoe
