// The gate of few tokens, in slices: each CTA works out the logits of 8 experts for 8 tokens, and tells them to
// the CTA whose chunk has the token.
//
// A CTA that routed its own tokens alone would read all of the gate's weights for a token or two; so it reads
// a sixteenth of 128 experts'.  The logits are the same bits: of a token and an expert the even blocks of 64
// columns are summed by one group and the odd ones by the other, as in gate.h.
#pragma once

#include <cstdint>

#include "device/choose.h"
#include "device/cta.h"
#include "device/wait.h"

namespace flashmoe {

// What is fetched at once, of tokens and of experts: kSliceBlocks blocks of 64 columns of 8 rows each.
inline constexpr uint32_t kSliceBlockBytes = kSliceTokens * kRowBytes;
inline constexpr uint32_t kSliceHalfBytes = kSliceBlocks * kSliceBlockBytes;
inline constexpr uint32_t kSliceParts = 2;  // fetched ahead
static_assert(kSliceExperts == kSliceTokens && kSliceDepth == kTileK, "both have the same boxes");

// The slice of a CTA; `tokens` 0: none.
struct GateSlice {
  uint32_t token;  // the first
  uint32_t tokens;
  uint32_t expert;  // the first
  static __device__ __forceinline__ GateSlice of(uint32_t slices, uint32_t chunk, uint32_t tokens) {
    uint32_t token = 0;
    for (; chunk >= slices && token < tokens; chunk -= slices) token += kSliceTokens;
    return {token, token < tokens ? min_u32(tokens - token, kSliceTokens) : 0,
            chunk * kSliceExperts};
  }
};

__device__ __forceinline__ uint32_t slice_parts(const Shape& shape) {
  return ceil_div(shape.hidden, kSliceBlocks * kSliceDepth);
}

// Fetches a part of the slice's rows.  One thread.
template <bool kTraced>
__device__ __forceinline__ void load_slice(Shared<kTraced>& sh, const RankArgs& args,
                                           const Shape& shape, const GateSlice& slice,
                                           uint32_t part, char* stages) {
  const uint32_t stage = part % kSliceParts;
  char* x = stages + stage * 2 * kSliceHalfBytes;
  uint64_t* full = &sh.gate_full[stage];
  const uint32_t blocks = min_u32(shape.hidden / kSliceDepth, kSliceBlocks);  // of a box
  ptx::mbarrier_expect(full, 2 * blocks * kSliceBlockBytes);
  const int32_t block = static_cast<int32_t>(part * kSliceBlocks);
  ptx::tma_load_3d(x, args.map_x_slice, full, 0, static_cast<int32_t>(slice.token), block);
  ptx::tma_load_3d(x + kSliceHalfBytes, args.map_gate_slice, full, 0,
                   static_cast<int32_t>(slice.expert), block);
}

// The first parts.
template <bool kTraced>
__device__ __forceinline__ void begin_slice(Shared<kTraced>& sh, const RankArgs& args,
                                            const Shape& shape, const GateSlice& slice,
                                            char* stages) {
  if (slice.tokens == 0) return;
  const uint32_t parts = min_u32(slice_parts(shape), kSliceParts);
  for (uint32_t part = 0; part < parts; ++part) {
    load_slice(sh, args, shape, slice, part, stages);
  }
}

// Until nothing that begin_slice() fetches is under way: no CTA may leave before.
template <bool kTraced>
__device__ inline void abandon_slice(Shared<kTraced>& sh, const Place& place) {
  if (!sh.sliced || GateSlice::of(sh.slices, place.chunk, place.tokens).tokens == 0) return;
  const uint32_t parts = min_u32(slice_parts(sh.shape), kSliceParts);
  for (uint32_t part = 0; part < parts; ++part) ptx::mbarrier_wait(&sh.gate_full[part], 0);
}

__device__ __forceinline__ uint64_t* logit_words(const Heap& heap, const HeapLayout& layout,
                                                 const Shape& shape, uint32_t token) {
  return heap.at<uint64_t>(layout.logits) + static_cast<uint64_t>(token) * shape.experts;
}

// The logits of the CTA's slice, to whoever routes its tokens.  `handed` is scratch of 32 pairs beside the parts.
template <class T, bool kTraced>
__device__ __forceinline__ void multiply_slice(Shared<kTraced>& sh, const Place& place,
                                               char* stages, float2* handed) {
  const Shape& shape = sh.shape;
  const GateSlice slice = GateSlice::of(sh.slices, place.chunk, place.tokens);
  if (slice.tokens == 0) return;
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, parts = slice_parts(shape);
  // From one lane, since it is the warp's.  (ptxas moves descriptors to uniform registers before each product all the
  // same; a product takes some 70 cycles.)
  const uint32_t group = __shfl_sync(0xffffffffu, (warp - kMathWarp) / 4, 0);
  const uint32_t depth = shape.hidden / kSliceDepth;
  float sums[kSliceExperts / 2] = {};
  for (uint32_t part = 0; part < parts; ++part) {
    const uint32_t stage = part % kSliceParts;
    if (warp >= kMathWarp) {
      ptx::mbarrier_wait(&sh.gate_full[stage], part / kSliceParts & 1);
      // The product's rows from the ninth on are whatever follows the tokens, and nobody's.
      const uint32_t x = ptx::shared_address(stages) + stage * 2 * kSliceHalfBytes;
      const uint64_t a = ptx::wgmma_descriptor(x, 1024);
      const uint64_t b = ptx::wgmma_descriptor(x + kSliceHalfBytes, 1024);
      const uint32_t blocks = min_u32(depth - part * kSliceBlocks, kSliceBlocks);
#pragma unroll 1
      for (uint32_t i = group; i < blocks; i += kMathGroups) {
        ptx::wgmma_fence();
#pragma unroll
        for (uint32_t k = 0; k < kTileK / 16; ++k) {
          const uint32_t at = i * (kSliceBlockBytes / 16) + 2 * k;
          ptx::wgmma<T, kSliceExperts>(sums, ptx::wgmma_onwards(a, at), ptx::wgmma_onwards(b, at));
        }
        ptx::wgmma_commit();
      }
      ptx::wgmma_wait<0>();
    }
    if (part + kSliceParts < parts) {
      __syncthreads();  // the part has been read
      if (threadIdx.x == 0) {
        load_slice(sh, *place.args, shape, slice, part + kSliceParts, stages);
      }
    }
  }
  // A group's first warp has all of the tokens, and both add what the groups have.
  constexpr uint32_t kSecond = kMathWarp + kGroupThreads / 32;
  if (warp != kMathWarp && warp != kSecond) return;
  if (warp == kSecond) handed[lane] = make_float2(sums[0], sums[1]);
  ptx::named_barrier(1, 64);
  if (warp != kMathWarp) return;
  const float2 other = handed[lane];
  const uint32_t token = lane / 4, expert = slice.expert + lane % 4 * 2;
  if (token >= slice.tokens) return;
  uint64_t* words = logit_words(place.heap, sh.layout, shape, slice.token + token);
  const uint64_t tag = static_cast<uint64_t>(place.epoch) << 32;
  if (expert < shape.experts) {
    ptx::store_relaxed_gpu(words + expert, tag | __float_as_uint(sums[0] + other.x));
  }
  if (expert + 1 < shape.experts) {
    ptx::store_relaxed_gpu(words + expert + 1, tag | __float_as_uint(sums[1] + other.y));
  }
}

// Whether a word carries this launch's epoch: then what else it holds is left at `to`.
template <class V>
__device__ __forceinline__ bool poll_tag(const Place& place, const uint64_t* word, V* to) {
  constexpr uint32_t kTries = 256;  // some 100 us; then the one who waits with a deadline does
  static_assert(sizeof(V) == 4, "half of a word");
#pragma unroll 1
  for (uint32_t tries = 0; tries < kTries; ++tries) {
    const uint64_t seen = ptx::load_relaxed_gpu(word);
    if (!reached(seen, Until::kTag, place.epoch)) continue;
    *reinterpret_cast<uint32_t*>(to) = static_cast<uint32_t>(seen);
    return true;
  }
  return false;
}

// Until the logits of the chunk's tokens are here, as rows of `logits`, `stride` floats apart.  Each comes with
// the epoch in one word, so nothing else is to be ordered.
template <bool kTraced>
__device__ __forceinline__ bool await_logits(Shared<kTraced>& sh, const Place& place,
                                             uint32_t begin, uint32_t tokens, float* logits,
                                             uint32_t stride) {
  const Shape& shape = sh.shape;
  const uint64_t* words = logit_words(place.heap, sh.layout, shape, begin);
  return await_tags(
      sh, place, words, tokens * shape.experts,
      [&](uint32_t i) {
        const uint32_t token = i / shape.experts;
        return poll_tag(place, words + i, logits + token * stride + i - token * shape.experts);
      },
      [&](uint32_t i) {
        return Awaited{EventKind::k_wait_logits, kNoPeer, static_cast<uint16_t>(i % shape.experts),
                       kNoTile};
      });
}

// Word `i` of the choices: of the token * k + j-th first the expert, and kFewRows further the weight.
__device__ __forceinline__ uint64_t* choice_words(const Heap& heap, const HeapLayout& layout) {
  return heap.at<uint64_t>(layout.choices);
}

// Tells every CTA what a token chose, a lane each.
template <bool kTraced>
__device__ __forceinline__ void tell_choice(const Shared<kTraced>& sh, const Place& place,
                                            uint32_t token, const Choice& choice) {
  const uint32_t lane = threadIdx.x % 32, k = sh.shape.top_k;
  if (lane >= k) return;
  uint64_t* word = choice_words(place.heap, sh.layout) + token * k + lane;
  const uint64_t tag = static_cast<uint64_t>(place.epoch) << 32;
  ptx::store_relaxed_gpu(word, tag | choice.id);
  ptx::store_relaxed_gpu(word + kFewRows, tag | __float_as_uint(choice.weight));
}

// Until all tokens' choices are here, as words of `choices` without their tags.
template <bool kTraced>
__device__ __forceinline__ bool await_choices(Shared<kTraced>& sh, const Place& place,
                                              uint32_t* choices) {
  const uint64_t* words = choice_words(place.heap, sh.layout);
  const uint32_t k = sh.shape.top_k, rows = place.tokens * k;
  return await_tags(
      sh, place, words, kFewRows + rows,
      [&](uint32_t i) { return i % kFewRows >= rows || poll_tag(place, words + i, choices + i); },
      [&](uint32_t i) {
        return Awaited{EventKind::k_wait_logits, kNoPeer, kNoExpert, i % kFewRows / k};
      });
}

}  // namespace flashmoe
