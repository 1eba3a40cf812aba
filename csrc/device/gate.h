// The gate: logits on tensor cores, top-k (choose.h), and the chunk's histogram.  All warps of a CTA, before the
// roles split, on the CTA's own chunk of tokens.
//
// A token's logits are summed in an order that depends on H and E alone (the even blocks of 64 columns by
// one group and the odd ones by the other, then the two sums are added), so they are the same bits
// whichever CTA, chunk or rank computes them.
#pragma once

#include <cstdint>

#include "device/choose.h"
#include "device/cta.h"
#include "device/gate_slices.h"

namespace flashmoe {

inline constexpr uint32_t kGateRows = 64;     // of a product: tokens
inline constexpr uint32_t kGateTokens = 128;  // two products, the most that one pass takes
inline constexpr uint32_t kGateRingBytes = 144 * 1024;
inline constexpr uint32_t kGateLoaders = 2;  // warps, the first ones

// Floats from a token's row of logits to the next one's.  Eight more than a multiple of 32: the rows
// that a warp stores at once then lie in different banks.
__host__ __device__ constexpr uint32_t gate_stride(uint32_t experts) {
  return (experts + 31) / 32 * 32 + 8;
}
inline constexpr uint32_t kGateLogits = kGateTokens * gate_stride(kGateExperts);

// Scratch in the stages and what follows them, which hold nothing yet.  Where the ring has been drained,
// ordinary stores leave there the sums that one group hands the other, and later `choice`; the ring is
// filled again only after the proxy fence and a barrier.
struct GateScratch {
  union {
    char ring[kGateRingBytes];
    float4 sums[kGateTokens * kGateExperts / 4];
    float choice
        [kGateLogits];  // score plus bias by sigmoid, unless by_sorted_lanes(); rows as in `logits`
  };
  float logits[kGateLogits];  // [tokens][gate_stride(E)]
};
static_assert(sizeof(GateScratch) <= kWorkBytes,
              "the gate's scratch must fit the stages and what follows them");

// Tokens of a pass: as many as there is room for the logits of, and two products only where both are
// full.
__device__ __forceinline__ uint32_t gate_pass(uint32_t experts) {
  const uint32_t room = kGateLogits / gate_stride(experts);
  return room >= kGateTokens ? kGateTokens : min_u32(room, kGateRows);
}

// The tokens of a chunk from its `skip`-th, `most` at most.
__device__ __forceinline__ TokenRange chunk_part(const Shape& shape, const Place& place,
                                                 uint32_t chunk, uint32_t skip = 0,
                                                 uint32_t most = 0xffffffffu) {
  const uint32_t end = chunk_begin(shape, place.tokens, chunk + 1);
  const uint32_t begin = min_u32(chunk_begin(shape, place.tokens, chunk) + skip, end);
  return {begin, min_u32(end - begin, most)};
}

// Brings the code of choose_any() to the SM by running it on rows of logits that are not there yet, by a warp
// that would only wait.  A launch finds its code in neither cache, and what is run once, in line, costs what
// its instructions take to come, not to run.
__device__ __forceinline__ void rehearse_choice(const Shape& shape, GateScratch& scratch,
                                                const float* bias) {
  const uint32_t stride = gate_stride(shape.experts);
  float* row = scratch.logits;
  choose_any(shape, 0, 1, row, row + stride, stride, bias,
             reinterpret_cast<uint32_t*>(row + 2 * stride), row + 3 * stride);
}

// Logits of the tokens `here` into scratch.logits, by kProducts products that share the
// weights.  `block` counts the stages of all calls, which must have the same kN and kProducts, in both
// CTAs of a pair: each fetches half of the weights for both, so they go through the same stages, even
// one that has no tokens.
template <class T, uint32_t kN, uint32_t kProducts, bool kTraced>
__device__ __forceinline__ void gate_logits(Shared<kTraced>& sh, GateScratch& scratch,
                                            const Place& place, const TokenRange& here,
                                            uint32_t& block) {
  const RankArgs& args = *place.args;
  const StageRelease release{place.to_other};
  const Shape& shape = sh.shape;
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  constexpr uint32_t kBytesX = kProducts * kGateRows * kRowBytes;
  constexpr uint32_t kBytes = kBytesX + kN * kRowBytes;  // of a stage
  // The groups take blocks in turn.  An even number of stages gives each stage to one group for good,
  // which then sees every turn of its barrier: by parity alone it could take the turn before the one
  // that the other group still waits for.
  constexpr uint32_t kCount =
      (kGateRingBytes / kBytes < kGateStages ? kGateRingBytes / kBytes : kGateStages) / 2 * 2;
  const uint32_t depth = ceil_div(shape.hidden, kTileK);
  const bool multiplies = warp >= kMathWarp;
  const uint32_t group = (warp - kMathWarp) / 4;
  for (uint32_t e0 = 0; e0 < shape.experts; e0 += kN, block += depth) {
    // What ordinary accesses left in the rings of both CTAs is done with.
    if (block != 0) {
      ptx::fence_proxy_async();
      if (place.pair_size == 1) {
        __syncthreads();
      } else {
        __syncwarp();
        ptx::cluster_barrier();
      }
    }
    // A thread takes longer to issue a block's copies than the copies take, so two warps issue them in turn.
    // Of an even number of stages each is always filled by the same of them, who sees every turn of its barrier.
    static_assert(kCount % kGateLoaders == 0, "the wait's parity is enough");
    if (warp == kGateLoaders && block == 0) rehearse_choice(shape, scratch, args.bias);
    if (warp < kGateLoaders && lane == 0) {
      const uint32_t box = args.gate_box_tokens, boxes = ceil_div(here.tokens, box);
      for (uint32_t i = warp; i < depth; i += kGateLoaders) {
        const uint32_t stage = (block + i) % kCount;
        ptx::mbarrier_wait(&sh.gate_empty[stage], ((block + i) / kCount & 1) ^ 1);
        char* x = scratch.ring + stage * kBytes;
        const int32_t k = static_cast<int32_t>(i * kTileK);
        uint64_t* full = &sh.gate_full[stage];
        ptx::mbarrier_expect(full, (boxes * box + kN) * kRowBytes);
        constexpr uint32_t kHalf = kN / 2;  // of the weights
        for (uint32_t row = place.pair_rank * kHalf; row < kN; row += place.pair_size * kHalf) {
          char* to = x + kBytesX + row * kRowBytes;
          const int32_t expert = static_cast<int32_t>(e0 + row);
          if (place.pair_size == 1) {
            ptx::tma_load_2d(to, args.map_gate, full, k, expert);
          } else {
            ptx::tma_load_2d_both(to, args.map_gate, full, k, expert);
          }
        }
        for (uint32_t b = 0; b < boxes; ++b) {
          ptx::tma_load_2d(x + b * box * kRowBytes, args.map_x, full, k,
                           static_cast<int32_t>(here.begin + b * box));
        }
      }
    }
    float sums[kProducts][kN / 2] = {};
    if (multiplies) {
      for (uint32_t i = (group + block) % kMathGroups; i < depth; i += kMathGroups) {
        const uint32_t stage = (block + i) % kCount;
        ptx::mbarrier_wait(&sh.gate_full[stage], (block + i) / kCount & 1);
        const uint32_t x = ptx::shared_address(scratch.ring + stage * kBytes);
        const uint64_t a = ptx::wgmma_descriptor(x, 1024);
        const uint64_t b = ptx::wgmma_descriptor(x + kBytesX, 1024);
        ptx::wgmma_fence();
#pragma unroll
        for (uint32_t k = 0; k < kTileK / 16; ++k) {
#pragma unroll
          for (uint32_t p = 0; p < kProducts; ++p) {
            const uint32_t rows = p * (kGateRows * kRowBytes / 16) + 2 * k;
            ptx::wgmma<T, kN>(sums[p], ptx::wgmma_onwards(a, rows), ptx::wgmma_onwards(b, 2 * k));
          }
        }
        ptx::wgmma_commit();
        ptx::wgmma_wait<0>();
        release(&sh.gate_empty[stage]);
      }
    }
    // Group 0 completes the first product and, where there is one, group 1 the second.  What a thread
    // hands over is for the same thread of the other group.
    const uint32_t thread = threadIdx.x % kGroupThreads;
    auto hand_over = [&](const float (&own)[kN / 2], uint32_t product) {
      float4* to = scratch.sums + product * (kN / 8 * kGroupThreads) + thread;
#pragma unroll
      for (uint32_t n = 0; n < kN / 8; ++n) {
        const float* v = own + 4 * n;
        to[n * kGroupThreads] = make_float4(v[0], v[1], v[2], v[3]);
      }
    };
    auto complete = [&](const float (&own)[kN / 2], uint32_t product) {
      const float4* from = scratch.sums + product * (kN / 8 * kGroupThreads) + thread;
      const uint32_t row = product * kGateRows + warp % 4 * 16 + lane / 4, col = e0 + lane % 4 * 2;
      const uint32_t stride = gate_stride(shape.experts);
      float* to = scratch.logits + row * stride + col;
#pragma unroll
      for (uint32_t n = 0; n < kN / 8; ++n) {
        const float* v = own + 4 * n;
        const float4 other = from[n * kGroupThreads];
        if (col + n * 8 >= shape.experts) continue;  // of an odd E, one more goes into the gap
        if (row < here.tokens) {
          *reinterpret_cast<float2*>(to + n * 8) = make_float2(v[0] + other.x, v[1] + other.y);
        }
        if (row + 8 < here.tokens) {
          *reinterpret_cast<float2*>(to + n * 8 + 8 * stride) =
              make_float2(v[2] + other.z, v[3] + other.w);
        }
      }
    };
    constexpr uint32_t kLast = kProducts - 1;
    // Asked for anew, so that it is not kept beside the sums.
    auto is_group = [](uint32_t g) {
      return ptx::thread_id() / kGroupThreads == kMathWarp * 32 / kGroupThreads + g;
    };
    __syncthreads();  // the ring is drained
    if (is_group(1)) hand_over(sums[0], 0);
    if (kProducts > 1 && is_group(0)) hand_over(sums[kLast], kLast);
    __syncthreads();
    if (is_group(0)) complete(sums[0], 0);
    if (kProducts > 1 && is_group(1)) complete(sums[kLast], kLast);
  }
  __syncthreads();
}

// The same by two products, or by one.
template <class T, uint32_t kN, bool kTraced>
__device__ __forceinline__ void gate_logits(Shared<kTraced>& sh, GateScratch& scratch,
                                            const Place& place, const TokenRange& here, bool two,
                                            uint32_t& block) {
  if (two) {
    gate_logits<T, kN, 2>(sh, scratch, place, here, block);
  } else {
    gate_logits<T, kN, 1>(sh, scratch, place, here, block);
  }
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

// Index of each (token, j) among the chunk's rows for its expert, and the chunk's histogram, into `histogram` and
// into `order`, which is this CTA's.
//
// A warp a run of consecutive rows, counting for itself; then it begins where the warps before end.
__device__ inline void count_rows(uint32_t* counters, const Shape& shape, const uint32_t* ids,
                                  uint32_t* slots, uint32_t* histogram, uint32_t* order,
                                  uint32_t tokens) {
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (uint32_t i = threadIdx.x; i < kWarps * shape.experts; i += kThreads) counters[i] = 0;
  __syncthreads();
  const uint32_t rows = tokens * shape.top_k, run = ceil_div(rows, kWarps);
  const uint32_t begin = min_u32(warp * run, rows), end = min_u32(begin + run, rows);
  uint32_t* mine = counters + warp * shape.experts;
#pragma unroll 4
  for (uint32_t i = begin + lane; i < end; i += 32) atomicAdd(mine + ids[i], 1);
  __syncthreads();
  for (uint32_t e = threadIdx.x; e < shape.experts; e += kThreads) {
    uint32_t of_warp[kWarps];
#pragma unroll
    for (uint32_t w = 0; w < kWarps; ++w) of_warp[w] = counters[w * shape.experts + e];
    uint32_t sum = 0;
#pragma unroll
    for (uint32_t w = 0; w < kWarps; ++w) {
      counters[w * shape.experts + e] = sum;
      sum += of_warp[w];
    }
    histogram[e] = order[e] = sum;
  }
  __syncthreads();
  for (uint32_t base = begin; base < end; base += 32) {
    const uint32_t i = base + lane;
    const uint32_t id = i < end ? ids[i] : kMaxExperts;
    const uint32_t same = __match_any_sync(0xffffffffu, id);  // lanes with rows for one expert
    const uint32_t earlier = __popc(same & ((1u << lane) - 1));
    const uint32_t slot = i < end ? mine[id] + earlier : 0;
    __syncwarp();
    if (i < end) {
      slots[i] = slot;
      if (same >> lane == 1) mine[id] = slot + 1;
    }
    __syncwarp();
  }
  __syncthreads();
}

// Ids and weights of tokens `here` from their logits.
template <bool kTraced>
__device__ __forceinline__ void choose_all(Shared<kTraced>& sh, const Place& place,
                                           GateScratch& scratch, const TokenRange& here) {
  const Shape& shape = sh.shape;
  const float* bias = place.args->bias;
  uint32_t* ids = place.heap.at<uint32_t>(sh.layout.ids);
  float* weights = place.heap.at<float>(sh.layout.weights);
  const uint32_t warp = threadIdx.x / 32;
  if (warp >= here.tokens) return;
  const uint64_t at = static_cast<uint64_t>(here.begin) * shape.top_k;
  const Choice chosen = choose_any(shape, warp, here.tokens, scratch.logits, scratch.choice,
                                   gate_stride(shape.experts), bias, ids + at, weights + at);
  static_assert(kFewTokens <= kWarps, "by units a warp has one token at most");
  if (by_units(sh)) tell_choice(sh, place, here.begin + warp, chosen);
}

// Ids and weights of the chunk's tokens from their logits.  What a pass needs is worked out anew before
// and after its products, which leave few registers.
template <class T, bool kTraced>
__device__ __forceinline__ void route_chunk(Shared<kTraced>& sh, const Place& place,
                                            GateScratch& scratch) {
  const Shape& shape = sh.shape;
  // Of a pair the first chunk has the more tokens.
  const uint32_t leading = place.chunk - place.pair_rank;
  uint32_t block = 0;
  for (uint32_t t0 = 0; t0 < chunk_part(shape, place, leading).tokens;
       t0 += gate_pass(shape.experts)) {
    {
      const uint32_t pass = gate_pass(shape.experts);
      const bool two = chunk_part(shape, place, leading, 0, pass).tokens > kGateRows;
      const TokenRange here = chunk_part(shape, place, place.chunk, t0, pass);
      switch (gate_columns(shape.experts)) {
        case 16:
          gate_logits<T, 16>(sh, scratch, place, here, two, block);
          break;
        case 64:
          gate_logits<T, 64>(sh, scratch, place, here, two, block);
          break;
        default:
          gate_logits<T, kGateExperts>(sh, scratch, place, here, two, block);
      }
    }
    choose_all(sh, place, scratch,
               chunk_part(shape, place, place.chunk, t0, gate_pass(shape.experts)));
  }
}

// The same by slices.  False if the launch ended meanwhile.
template <class T, bool kTraced>
__device__ __forceinline__ bool route_by_slices(Shared<kTraced>& sh, const Place& place,
                                                GateScratch& scratch) {
  static_assert(kSliceParts * 2 * kSliceHalfBytes <= kGateRingBytes,
                "slices leave the logits' place");
  if (threadIdx.x / 32 == kGateLoaders) rehearse_choice(sh.shape, scratch, place.args->bias);
  float* handed = scratch.logits + kGateLogits - 64;  // beyond the logits of so few tokens
  multiply_slice<T>(sh, place, scratch.ring, reinterpret_cast<float2*>(handed));
  const TokenRange here = sh.own;
  if (!await_logits(sh, place, here.begin, here.tokens, scratch.logits,
                    gate_stride(sh.shape.experts))) {
    return false;
  }
  choose_all(sh, place, scratch, here);
  return true;
}

// Routes the CTA's chunk: ids, weights, slots and histogram in the rank's heap.  kBadIds if external
// ids are bad.  Ends with the CTA in step.
template <class T, bool kTraced>
__device__ inline Status run_gate(Shared<kTraced>& sh, const Place& place, char* stages) {
  const Shape& shape = sh.shape;
  const bool external = shape.routing == RoutingKind::kExternal;
  if (sh.sliced) {
    if (!route_by_slices<T>(sh, place, *reinterpret_cast<GateScratch*>(stages))) {
      return static_cast<Status>(sh.status);
    }
  } else if (!external) {
    route_chunk<T>(sh, place, *reinterpret_cast<GateScratch*>(stages));
  }
  const TokenRange chunk = sh.own;
  const uint64_t first = static_cast<uint64_t>(chunk.begin) * shape.top_k;
  uint32_t* ids = place.heap.at<uint32_t>(sh.layout.ids) + first;
  bool good = true;
  if (external) {
    const RankArgs& args = *place.args;
    float* weights = place.heap.at<float>(sh.layout.weights) + first;
    for (uint32_t t = threadIdx.x / 32; t < chunk.tokens; t += kWarps) {
      const uint64_t at = static_cast<uint64_t>(t) * shape.top_k;
      good = take_external(shape, args.ids + first + at, args.weights + first + at, ids + at,
                           weights + at) &&
             good;
    }
  }
  if (__syncthreads_or(!good)) return Status::kBadIds;
  if (by_units(sh)) return Status::kOk;  // whose rows need no counting
  count_rows(reinterpret_cast<uint32_t*>(stages), shape, ids,
             place.heap.at<uint32_t>(sh.layout.slots) + first,
             place.heap.at<uint32_t>(sh.layout.histogram) +
                 static_cast<uint64_t>(place.chunk) * shape.experts,
             sh.tables.chunk_order, chunk.tokens);
  return Status::kOk;
}

}  // namespace flashmoe
