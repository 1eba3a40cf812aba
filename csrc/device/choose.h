// Top-k of a token, by one warp: from its row of logits to ids and weights.
#pragma once

#include <cstdint>

#include "core/shape.h"

namespace flashmoe {

// Descending by value, NaN last: a larger key is chosen first.  0 is no key, 1 is NaN's.
__device__ __forceinline__ uint32_t choice_key(float value) {
  const uint32_t bits = __float_as_uint(value == 0.0f ? 0.0f : value);
  return isnan(value) ? 1 : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The lane that has the warp's largest key; ties go to the lowest `id`, which is returned.
__device__ __forceinline__ uint32_t warp_choice(uint32_t key, uint32_t id) {
  const uint32_t best = __reduce_max_sync(0xffffffffu, key);
  return __reduce_min_sync(0xffffffffu, key == best ? id : 0xffffffffu);
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(0xffffffffu, v, d);
  return v;
}

// The groups a token may choose from, a bit a group: those with the largest sum of their two best.
__device__ inline uint32_t chosen_groups(const Shape& shape, const float* choice) {
  if (shape.groups <= 1) return 1;
  const uint32_t lane = threadIdx.x % 32, size = shape.experts / shape.groups;
  uint32_t key = 0;
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
    key = choice_key(size > 1 ? best + second : best);
  }
  uint32_t mask = 0;
  for (uint32_t i = 0; i < shape.top_groups; ++i) {
    const uint32_t group = warp_choice(key, lane);
    mask |= 1u << group;
    if (lane == group) key = 0;
  }
  return mask;
}

// The expert with the largest key and the lowest id, and no key for it any more: `keys` are of experts lane,
// lane + 32, ...  Of few keys a ballot each finds it sooner than a second reduction.
template <uint32_t kKeys>
__device__ __forceinline__ uint32_t take_best(uint32_t (&keys)[kKeys]) {
  const uint32_t lane = threadIdx.x % 32;
  uint32_t key = keys[0];
#pragma unroll
  for (uint32_t i = 1; i < kKeys; ++i) key = max_u32(key, keys[i]);
  const uint32_t best = __reduce_max_sync(0xffffffffu, key);
  uint32_t expert = 0;
  if constexpr (kKeys <= 8) {
#pragma unroll
    for (uint32_t i = kKeys; i-- > 0;) {
      const uint32_t lanes = __ballot_sync(0xffffffffu, keys[i] == best);
      if (lanes != 0) expert = 32 * i + __ffs(lanes) - 1;
    }
  } else {
    uint32_t at = 0;
#pragma unroll
    for (uint32_t i = kKeys; i-- > 0;) at = keys[i] == best ? i : at;
    expert = __reduce_min_sync(0xffffffffu, key == best ? lane + 32 * at : 0xffffffffu);
  }
#pragma unroll
  for (uint32_t i = 0; i < kKeys; ++i) {
    if (expert == lane + 32 * i) keys[i] = 0;
  }
  return expert;
}

// What a lane chose for its token: the lane-th, if k is at most 32.
struct Choice {
  uint32_t id;
  float weight;
};

// Top-k of one token by one warp, from a row of logits to ids and weights [k].  kKeys times 32 experts
// at most.
template <uint32_t kKeys>
__device__ __forceinline__ Choice choose(const Shape& shape, float* logits, float* choice,
                                         const float* bias, uint32_t* ids, float* weights) {
  const uint32_t lane = threadIdx.x % 32, experts = shape.experts, top_k = shape.top_k;
  const bool sigmoid = shape.routing == RoutingKind::kSigmoid;
  const bool renormalize = shape.renormalize != 0, grouped = sigmoid && shape.groups > 1;
  const float scale = shape.scale;
  const float* by = logits;
  if (sigmoid) {
    for (uint32_t e = lane; e < experts; e += 32) {
      const float score = 1.0f / (1.0f + expf(-logits[e]));
      logits[e] = score;
      choice[e] = score + (bias != nullptr ? bias[e] : 0.0f);
    }
    __syncwarp();
    by = choice;
  }
  const uint32_t groups = grouped ? chosen_groups(shape, choice) : 1;
  const uint32_t group_size = grouped ? experts / shape.groups : 1;
  uint32_t keys[kKeys];  // of experts lane, lane + 32, ...
#pragma unroll
  for (uint32_t i = 0; i < kKeys; ++i) {
    const uint32_t e = lane + 32 * i;
    const bool may = e < experts && (!grouped || (groups >> (e / group_size) & 1));
    keys[i] = may ? choice_key(by[e]) : 0;
  }
  // 32 at a time: first whose they are, then the weights of all, a lane each.  The first one's logit is the
  // largest there is.
  float sum = 0.0f, top = 0.0f, weight = 0.0f;
  Choice chosen{};
  for (uint32_t j0 = 0; j0 < top_k; j0 += 32) {
    const uint32_t count = min_u32(32, top_k - j0);
    uint32_t mine = 0;
    for (uint32_t j = 0; j < count; ++j) {
      const uint32_t expert = take_best(keys);
      if (lane == j) mine = expert;
    }
    const float logit = logits[mine];
    if (j0 == 0) top = __shfl_sync(0xffffffffu, logit, 0);
    weight = lane >= count ? 0.0f : sigmoid ? logit : expf(logit - top);
    if (lane < count) {
      ids[j0 + lane] = mine;
      if (top_k > 32) weights[j0 + lane] = weight;
    }
    chosen.id = mine;
    sum += warp_sum(weight);
  }
  // 1e-20 keeps a token whose scores are all zero finite, as DeepSeek-V3 does.
  float divisor = sigmoid ? (renormalize ? sum + 1e-20f : 1.0f) : sum;
  if (!sigmoid && !renormalize) {
    float all = 0.0f;
    for (uint32_t e = lane; e < experts; e += 32) all += expf(logits[e] - top);
    divisor = warp_sum(all);
  }
  for (uint32_t j = lane; j < top_k; j += 32) {
    weights[j] = chosen.weight = (top_k > 32 ? weights[j] : weight) / divisor * scale;
  }
  return chosen;
}

// The same for any number of experts.  One copy of the code, which rehearse_choice() runs first; it is the only
// function that is called, which may be as long as no warp has given registers away.
__device__ __noinline__ Choice choose_any(const Shape& shape, float* logits, float* choice,
                                          const float* bias, uint32_t* ids, float* weights) {
  if (shape.experts <= 128) return choose<4>(shape, logits, choice, bias, ids, weights);
  if (shape.experts <= 256) return choose<8>(shape, logits, choice, bias, ids, weights);
  return choose<32>(shape, logits, choice, bias, ids, weights);
}

}  // namespace flashmoe
