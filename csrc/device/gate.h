// The gate: logits on tensor cores, top-k, and the chunk's histogram.  All warps of a CTA, before the
// roles split, on the CTA's own chunk of tokens.
//
// A token's logits are summed in an order that depends on H alone (each warp takes every twelfth
// block of 32 columns, then the twelve partial sums are added in order), so they are the same bits
// whichever CTA, chunk or rank computes them.
#pragma once

#include <cstdint>

#include "device/cta.h"

namespace flashmoe {

inline constexpr uint32_t kGateTokens = 16;   // rows of an mma
inline constexpr uint32_t kGateExperts = 64;  // columns a pass

// Scratch in the stages, which hold nothing yet.
struct GateScratch {
  float partial[kWarps][kGateTokens][kGateExperts];
  float logits[kGateTokens][kMaxExperts];
  float choice[kGateTokens][kMaxExperts];  // sigmoid: score plus bias
};
static_assert(sizeof(GateScratch) <= kStages * kStageBytes,
              "the gate's scratch must fit the stages");

// Descending by value, NaN last, ties to the lower id: a larger key is chosen first.  Never 0.
__device__ __forceinline__ uint64_t choice_key(float value, uint32_t expert) {
  uint32_t bits = __float_as_uint(value == 0.0f ? 0.0f : value);
  bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  if (isnan(value)) bits = 0;
  return (static_cast<uint64_t>(bits) << 32) | (0xffffffffu - expert);
}

__device__ __forceinline__ uint64_t warp_max(uint64_t v) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) {
    const uint64_t other = __shfl_xor_sync(0xffffffffu, v, d);
    v = other > v ? other : v;
  }
  return v;
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(0xffffffffu, v, d);
  return v;
}

__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, d));
  return v;
}

// Logits of up to 16 tokens from `token0` into scratch.logits.
//
// A thread reads 16 contiguous bytes of its row and feeds them to two mma: that permutes K, the same
// way for both operands, so the product is unchanged and every sector read is used whole.
template <class T>
__device__ inline void gate_logits(GateScratch& scratch, const Shape& shape, const T* x,
                                   const T* gate, uint32_t token0, uint32_t tokens) {
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t row = lane / 4, piece = (lane % 4) * 8;
  const uint64_t hidden = shape.hidden;
  const uint4 zero = make_uint4(0, 0, 0, 0);
  const T* x_low = x + (token0 + row) * hidden;
  const T* x_high = x + (token0 + row + 8) * hidden;
  for (uint32_t e0 = 0; e0 < shape.experts; e0 += kGateExperts) {
    float acc[kGateExperts / 8][4] = {};
    for (uint32_t block = warp; block * 32 < shape.hidden; block += kWarps) {
      const uint32_t col = block * 32 + piece;
      const bool inside = col < shape.hidden;
      const uint4 low =
          inside && row < tokens ? __ldg(reinterpret_cast<const uint4*>(x_low + col)) : zero;
      const uint4 high =
          inside && row + 8 < tokens ? __ldg(reinterpret_cast<const uint4*>(x_high + col)) : zero;
      const uint32_t a0[4] = {low.x, high.x, low.y, high.y};
      const uint32_t a1[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
      for (uint32_t n = 0; n < kGateExperts / 8; ++n) {
        if (e0 + n * 8 >= shape.experts) break;
        const uint32_t expert = e0 + n * 8 + row;
        const uint4 b = inside && expert < shape.experts
                            ? __ldg(reinterpret_cast<const uint4*>(gate + expert * hidden + col))
                            : zero;
        ptx::mma_m16n8k16<T>(acc[n], a0, b.x, b.y);
        ptx::mma_m16n8k16<T>(acc[n], a1, b.z, b.w);
      }
    }
#pragma unroll
    for (uint32_t n = 0; n < kGateExperts / 8; ++n) {
      const uint32_t col = n * 8 + (lane % 4) * 2;
      scratch.partial[warp][row][col] = acc[n][0];
      scratch.partial[warp][row][col + 1] = acc[n][1];
      scratch.partial[warp][row + 8][col] = acc[n][2];
      scratch.partial[warp][row + 8][col + 1] = acc[n][3];
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < kGateTokens * kGateExperts; i += kThreads) {
      const uint32_t t = i / kGateExperts, n = i % kGateExperts;
      float sum = 0.0f;
#pragma unroll
      for (uint32_t w = 0; w < kWarps; ++w) sum += scratch.partial[w][t][n];
      if (e0 + n < shape.experts) scratch.logits[t][e0 + n] = sum;
    }
    __syncthreads();
  }
}

// The groups a token may choose from, a bit a group: those with the largest sum of their two best.
__device__ inline uint32_t chosen_groups(const Shape& shape, const float* choice) {
  if (shape.groups <= 1) return 1;
  const uint32_t lane = threadIdx.x % 32, size = shape.experts / shape.groups;
  uint64_t key = 0;
  if (lane < shape.groups) {
    float best = -INFINITY, second = -INFINITY;
    for (uint32_t i = 0; i < size; ++i) {
      const float v = choice[lane * size + i];
      if (v > best) {
        second = best;
        best = v;
      } else if (v > second) {
        second = v;
      }
    }
    key = choice_key(size > 1 ? best + second : best, lane);
  }
  uint32_t mask = 0;
  for (uint32_t i = 0; i < shape.top_groups; ++i) {
    const uint32_t group = 0xffffffffu - static_cast<uint32_t>(warp_max(key));
    mask |= 1u << group;
    if (lane == group) key = 0;
  }
  return mask;
}

// Top-k of one token by one warp, from a row of logits to ids and weights [k].
__device__ inline void choose(const Shape& shape, float* logits, float* choice, const float* bias,
                              uint32_t* ids, float* weights) {
  const uint32_t lane = threadIdx.x % 32;
  const bool sigmoid = shape.routing == RoutingKind::kSigmoid;
  const float* by = logits;
  float all = 0.0f, top = 0.0f;
  if (sigmoid) {
    for (uint32_t e = lane; e < shape.experts; e += 32) {
      const float score = 1.0f / (1.0f + expf(-logits[e]));
      logits[e] = score;
      choice[e] = score + (bias != nullptr ? bias[e] : 0.0f);
    }
    __syncwarp();
    by = choice;
  } else {
    top = -INFINITY;
    for (uint32_t e = lane; e < shape.experts; e += 32) top = fmaxf(top, logits[e]);
    top = warp_max(top);
    if (!shape.renormalize) {
      for (uint32_t e = lane; e < shape.experts; e += 32) all += expf(logits[e] - top);
      all = warp_sum(all);
    }
  }
  const uint32_t groups = sigmoid ? chosen_groups(shape, choice) : 1;
  const uint32_t group_size = shape.experts / max_u32(shape.groups, 1);
  uint32_t taken = 0;  // bit i: expert lane + 32 * i
  float sum = 0.0f;
  for (uint32_t j = 0; j < shape.top_k; ++j) {
    uint64_t key = 0;
    for (uint32_t e = lane, i = 0; e < shape.experts; e += 32, ++i) {
      if (taken >> i & 1) continue;
      if (shape.groups > 1 && sigmoid && !(groups >> (e / group_size) & 1)) continue;
      const uint64_t candidate = choice_key(by[e], e);
      key = candidate > key ? candidate : key;
    }
    const uint32_t expert = 0xffffffffu - static_cast<uint32_t>(warp_max(key));
    if (expert % 32 == lane) taken |= 1u << (expert / 32);
    const float weight = sigmoid ? logits[expert] : expf(logits[expert] - top);
    sum += weight;
    if (lane == 0) {
      ids[j] = expert;
      weights[j] = weight;
    }
  }
  __syncwarp();
  // 1e-20 keeps a token whose scores are all zero finite, as DeepSeek-V3 does.
  const float divisor = shape.renormalize ? (sigmoid ? sum + 1e-20f : sum) : (sigmoid ? 1.0f : all);
  for (uint32_t j = lane; j < shape.top_k; j += 32) weights[j] = weights[j] / divisor * shape.scale;
}

// Takes external ids of one token; true if they are distinct and in range.
__device__ inline bool take_external(const Shape& shape, const int32_t* from,
                                     const float* weights_from, uint32_t* ids, float* weights) {
  const uint32_t lane = threadIdx.x % 32;
  bool good = true;
  for (uint32_t j = lane; j < shape.top_k; j += 32) {
    const int32_t id = from[j];
    good = good && id >= 0 && static_cast<uint32_t>(id) < shape.experts;
    for (uint32_t i = 0; i < j; ++i) good = good && from[i] != id;
    ids[j] = static_cast<uint32_t>(id);
    weights[j] = weights_from[j];
  }
  return __all_sync(0xffffffffu, good);
}

// Index of each (token, j) among the chunk's rows for its expert, and the chunk's histogram.
//
// A warp a run of consecutive tokens, counting for itself; then the counts of the warps before are
// added.  The ids of one token are distinct, so the lanes of a warp never meet in a counter.
__device__ inline void count_rows(uint32_t* counters, const Shape& shape, const uint32_t* ids,
                                  uint32_t* slots, uint32_t* histogram, uint32_t tokens) {
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (uint32_t i = threadIdx.x; i < kWarps * shape.experts; i += kThreads) counters[i] = 0;
  __syncthreads();
  const uint32_t run = ceil_div(tokens, kWarps);
  const uint32_t begin = min_u32(warp * run, tokens), end = min_u32(begin + run, tokens);
  uint32_t* mine = counters + warp * shape.experts;
  for (uint32_t t = begin; t < end; ++t) {
    for (uint32_t j = lane; j < shape.top_k; j += 32) {
      slots[t * shape.top_k + j] = mine[ids[t * shape.top_k + j]]++;
    }
    __syncwarp();
  }
  __syncthreads();
  for (uint32_t e = threadIdx.x; e < shape.experts; e += kThreads) {
    uint32_t sum = 0;
    for (uint32_t w = 0; w < kWarps; ++w) {
      const uint32_t rows = counters[w * shape.experts + e];
      counters[w * shape.experts + e] = sum;
      sum += rows;
    }
    histogram[e] = sum;
  }
  __syncthreads();
  for (uint32_t i = begin * shape.top_k + lane; i < end * shape.top_k; i += 32) {
    slots[i] += mine[ids[i]];
  }
  __syncthreads();
}

// Routes the CTA's chunk: ids, weights, slots and histogram in the rank's heap.  False if external
// ids are bad.  Ends with the CTA in step.
template <class T, bool kTraced>
__device__ inline bool run_gate(Shared<kTraced>& sh, const Place& place, char* stages) {
  GateScratch& scratch = *reinterpret_cast<GateScratch*>(stages);
  const Shape& shape = sh.shape;
  const RankArgs& args = *place.args;
  const uint32_t warp = threadIdx.x / 32;
  const uint32_t begin = chunk_begin(shape, place.tokens, place.chunk);
  const uint32_t tokens = chunk_begin(shape, place.tokens, place.chunk + 1) - begin;
  const uint64_t first = static_cast<uint64_t>(begin) * shape.top_k;
  uint32_t* ids = place.heap.at<uint32_t>(sh.layout.ids) + first;
  float* weights = place.heap.at<float>(sh.layout.weights) + first;
  bool good = true;
  if (shape.routing == RoutingKind::kExternal) {
    for (uint32_t t = warp; t < tokens; t += kWarps) {
      const uint64_t at = static_cast<uint64_t>(t) * shape.top_k;
      good = take_external(shape, args.ids + first + at, args.weights + first + at, ids + at,
                           weights + at) &&
             good;
    }
  } else {
    for (uint32_t t0 = 0; t0 < tokens; t0 += kGateTokens) {
      const uint32_t here = min_u32(kGateTokens, tokens - t0);
      gate_logits<T>(scratch, shape, static_cast<const T*>(args.x),
                     static_cast<const T*>(args.gate), begin + t0, here);
      for (uint32_t t = warp; t < here; t += kWarps) {
        const uint64_t at = static_cast<uint64_t>(t0 + t) * shape.top_k;
        choose(shape, scratch.logits[t], scratch.choice[t], args.bias, ids + at, weights + at);
      }
      __syncthreads();
    }
  }
  if (__syncthreads_or(!good)) return false;
  count_rows(reinterpret_cast<uint32_t*>(stages), shape, ids,
             place.heap.at<uint32_t>(sh.layout.slots) + first,
             place.heap.at<uint32_t>(sh.layout.histogram) +
                 static_cast<uint64_t>(place.chunk) * shape.experts,
             tokens);
  return true;
}

}  // namespace flashmoe
