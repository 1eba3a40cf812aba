// Top-k of tokens, each by one warp: from rows of logits to ids and weights.
#pragma once

#include <cstdint>

#include "core/shape.h"
#include "device/sync.h"

namespace flashmoe {

// Descending by value, NaN last: a larger key is chosen first.  0 is no key, 1 is NaN's.
__device__ __forceinline__ uint32_t choice_key(float value) {
  const uint32_t bits = __float_as_uint(value + 0.0f);  // zeros are alike
  return isnan(value) ? 1 : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The lane that has the warp's largest key; ties go to the lowest `id`, which is returned.
__device__ __forceinline__ uint32_t warp_choice(uint32_t key, uint32_t id) {
  const uint32_t best = __reduce_max_sync(0xffffffffu, key);
  return __reduce_min_sync(0xffffffffu, key == best ? id : 0xffffffffu);
}

// The sum over each kWidth lanes, in all of them.
template <uint32_t kWidth>
__device__ __forceinline__ float lanes_sum(float v) {
#pragma unroll
  for (int d = kWidth / 2; d > 0; d /= 2) v += __shfl_xor_sync(0xffffffffu, v, d);
  return v;
}

__device__ __forceinline__ float score_of(float logit) { return 1.0f / (1.0f + expf(-logit)); }

// What a token's weights are divided by, `sum` being theirs and `top` the largest logit of its `row`; kWidth lanes a token.
template <uint32_t kWidth>
__device__ __forceinline__ float divisor_of(bool sigmoid, bool renormalize, const float* row,
                                            uint32_t experts, float top, float sum) {
  // 1e-20 keeps a token whose scores are all zero finite, as DeepSeek-V3 does.
  float divisor = sigmoid ? (renormalize ? sum + 1e-20f : 1.0f) : sum;
  if (!sigmoid && !renormalize) {
    float all = 0.0f;
    for (uint32_t e = threadIdx.x % kWidth; e < experts; e += kWidth) all += expf(row[e] - top);
    divisor = lanes_sum<kWidth>(all);
  }
  return divisor;
}

// The groups a token may choose from, a bit a group: those with the largest sum of their two best.  A lane scores one
// group, so there are at most 32, which the host makes sure of (check_experts() in flashmoe/world/kernel.py).
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

// What a lane chose for a token: the lane-th, if k is at most 32.  From lane k on it means nothing.
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
      const float score = score_of(logits[e]);
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
    sum += lanes_sum<32>(weight);
  }
  const float divisor = divisor_of<32>(sigmoid, renormalize, logits, experts, top, sum);
  for (uint32_t j = lane; j < top_k; j += 32) {
    weights[j] = chosen.weight = (top_k > 32 ? weights[j] : weight) / divisor * scale;
  }
  return chosen;
}

// Of at most 32 * kLaneKeys experts and kTeamLanes choices, without groups: a lane sorts the keys of kLaneKeys experts in a
// row, the warp takes the largest of the lanes' first keys k times, and then makes the weights of kTeams tokens at once,
// kTeamLanes lanes each.  Integer instructions come at half the rate of others, and a choice is made of little else, so
// what is done k times is as little as can be.
inline constexpr uint32_t kLaneKeys = 4;
inline constexpr uint32_t kTeamLanes = 8;
inline constexpr uint32_t kTeams = 32 / kTeamLanes;

__device__ __forceinline__ bool by_sorted_lanes(const Shape& shape) {
  return shape.experts <= 32 * kLaneKeys && shape.top_k <= kTeamLanes && shape.groups <= 1;
}

// A lane's keys in descending order, and which of its experts each is of; of equal keys the first expert's first.
struct SortedKeys {
  uint32_t key[kLaneKeys];
  uint32_t place[kLaneKeys];
  // Only neighbours change places, and only if they must: so equal keys stay in order.
  __device__ __forceinline__ void order(uint32_t i) {
    const bool swaps = key[i + 1] > key[i];
    const uint32_t k = key[i], p = place[i];
    key[i] = swaps ? key[i + 1] : k;
    key[i + 1] = swaps ? k : key[i + 1];
    place[i] = swaps ? place[i + 1] : p;
    place[i + 1] = swaps ? p : place[i + 1];
  }
  __device__ __forceinline__ void sort() {
#pragma unroll
    for (uint32_t i = 0; i < kLaneKeys; ++i) place[i] = i;
#pragma unroll
    for (uint32_t round = 0; round < kLaneKeys; ++round) {
#pragma unroll
      for (uint32_t i = round % 2; i + 1 < kLaneKeys; i += 2) order(i);
    }
  }
  __device__ __forceinline__ void drop_first(bool drops) {
#pragma unroll
    for (uint32_t i = 0; i + 1 < kLaneKeys; ++i) {
      key[i] = drops ? key[i + 1] : key[i];
      place[i] = drops ? place[i + 1] : place[i];
    }
    key[kLaneKeys - 1] = drops ? 0 : key[kLaneKeys - 1];
  }
};

// The lane's keys of a row of logits, which by sigmoid becomes the row of scores.
__device__ __forceinline__ SortedKeys sorted_keys(float* row, uint32_t experts, bool sigmoid,
                                                  const float* bias) {
  SortedKeys keys;
  const uint32_t e0 = threadIdx.x % 32 * kLaneKeys;
  float v[kLaneKeys] = {};
  if (e0 < experts) {
    const float4 four = *reinterpret_cast<const float4*>(row + e0);
    v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
  }
#pragma unroll
  for (uint32_t i = 0; i < kLaneKeys; ++i) {
    const uint32_t e = e0 + i;
    if (sigmoid && e < experts) {
      v[i] = score_of(v[i]);
      row[e] = v[i];
      if (bias != nullptr) v[i] += bias[e];
    }
    keys.key[i] = e < experts ? choice_key(v[i]) : 0;
  }
  keys.sort();
  return keys;
}

// choose_any() where by_sorted_lanes().
__device__ __forceinline__ Choice choose_sorted(const Shape& shape, uint32_t first, uint32_t tokens,
                                                float* logits, uint32_t stride, const float* bias,
                                                uint32_t* ids, float* weights) {
  constexpr uint32_t kAll = 0xffffffffu;
  const uint32_t lane = threadIdx.x % 32, of_team = lane % kTeamLanes;
  const uint32_t experts = shape.experts, top_k = shape.top_k;
  const bool sigmoid = shape.routing == RoutingKind::kSigmoid, renormalize = shape.renormalize != 0;
  const float scale = shape.scale;
  Choice chosen{};
  for (uint32_t t0 = first; t0 < tokens; t0 += kTeams * kWarps) {
    uint32_t id = 0;  // the of_team-th best of the team's token
    // `wanted` is of_team in the lanes of the token's team; in others it wraps, or is kTeamLanes and more.
#pragma unroll 1
    for (uint32_t t = t0, wanted = lane; t < min_u32(t0 + kTeams * kWarps, tokens);
         t += kWarps, wanted -= kTeamLanes) {
      SortedKeys keys = sorted_keys(logits + t * stride, experts, sigmoid, bias);
#pragma unroll 1
      for (uint32_t j = 0; j < top_k; ++j) {
        // Lanes have the experts in their order: of lanes with the same key the first has the lowest id.
        const uint32_t best = __reduce_max_sync(kAll, keys.key[0]);
        const uint32_t owner = __ffs(__ballot_sync(kAll, keys.key[0] == best)) - 1;
        const uint32_t expert = __shfl_sync(kAll, lane * kLaneKeys + keys.place[0], owner);
        if (wanted == j) id = expert;
        keys.drop_first(lane == owner);
      }
    }
    __syncwarp();  // scores are seen
    const uint32_t t = t0 + lane / kTeamLanes * kWarps;
    const bool has = t < tokens;
    const float* row = logits + (has ? t : t0) * stride;
    const float logit = row[id];
    const float top = __shfl_sync(kAll, logit, 0, kTeamLanes);
    float weight = of_team >= top_k ? 0.0f : sigmoid ? logit : expf(logit - top);
    const float sum = lanes_sum<kTeamLanes>(weight);
    const float divisor = divisor_of<kTeamLanes>(sigmoid, renormalize, row, experts, top, sum);
    weight = weight / divisor * scale;
    if (has && of_team < top_k) {
      ids[t * top_k + of_team] = id;
      weights[t * top_k + of_team] = weight;
    }
    if (t0 == first) chosen = {id, weight};
  }
  return chosen;
}

// Top-k of the tokens first, first + kWarps, ... of `tokens`, by one warp: ids and weights [tokens][k], and what it chose
// for the first of them.  `logits` and `choice` have rows of `stride` floats, a multiple of 4.  One copy of the code, which
// rehearse_choice() runs first; it is the only function that is called, which may be as long as no warp has given
// registers away.
__device__ __noinline__ Choice choose_any(const Shape& shape, uint32_t first, uint32_t tokens,
                                          float* logits, float* choice, uint32_t stride,
                                          const float* bias, uint32_t* ids, float* weights) {
  if (by_sorted_lanes(shape)) {
    return choose_sorted(shape, first, tokens, logits, stride, bias, ids, weights);
  }
  Choice chosen{};
  for (uint32_t t = first; t < tokens; t += kWarps) {
    float* row = logits + t * stride;
    float* by = choice + t * stride;
    uint32_t* to = ids + t * shape.top_k;
    float* weights_to = weights + t * shape.top_k;
    const Choice now = shape.experts <= 128   ? choose<4>(shape, row, by, bias, to, weights_to)
                       : shape.experts <= 256 ? choose<8>(shape, row, by, bias, to, weights_to)
                                              : choose<32>(shape, row, by, bias, to, weights_to);
    if (t == first) chosen = now;
  }
  return chosen;
}

}  // namespace flashmoe
