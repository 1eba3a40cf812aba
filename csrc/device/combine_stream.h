// Tokens combined by one warp for itself, rows on their way while others are added.
#pragma once

#include <cstdint>

#include "device/results.h"
#include "device/sums.h"

namespace flashmoe {

// How many tokens a math warp takes at a time: fewer towards the end, so that all of the CTA's warps end
// together (comm warps, which take one at a time, among them), and no more than its lanes know the rows of.
template <bool kTraced>
__device__ __forceinline__ uint32_t batch_of_warp(Shared<kTraced>& sh, uint32_t end) {
  constexpr uint32_t kShares = 2 * (kCommWarps + 4 * kMathGroups);
  const uint32_t taken = load_volatile(&sh.next_token);
  const uint32_t left = end - min_u32(taken, end);
  return max_u32(1, min_u32(min_u32(left / kShares, 4), 32 / sh.shape.top_k));
}

// Parts of a token's columns: one, or where the chunk has fewer tokens than there are math warps, so many
// that each of these sums one.
struct TokenParts {
  uint32_t count;
  uint32_t bytes;  // of each but the last
};
__device__ __forceinline__ TokenParts token_parts(const Shape& shape, uint32_t tokens) {
  constexpr uint32_t kLeast = 512;  // bytes: 16 a lane
  const uint32_t row_bytes = shape.hidden * 2;
  const uint32_t wanted = kMathGroups * kTeamWarps / max_u32(tokens, 1);
  if (wanted <= 1) return {1, row_bytes};
  const uint32_t bytes = align_up_u32(ceil_div(row_bytes, wanted), kLeast);
  return {ceil_div(row_bytes, bytes), bytes};
}

// Pieces of shared memory that one warp fills in turn, each with a slice of two rows: kUnits times 16 bytes
// a lane of each.
template <uint32_t kCount, uint32_t kUnitsLane>
struct RowRing {
  static constexpr uint32_t kPieces = kCount;
  static constexpr uint32_t kUnits = kUnitsLane;
  static constexpr uint32_t kSlice = kUnits * 512;
  char* pieces;
  uint64_t* full;  // a barrier a piece
};

// Combines batches of the chunk's tokens until none is left, one warp for itself: bulk copies bring rows
// into its ring, and what one piece holds is added while the others are under way.  While a batch is summed
// the next one is taken and looked up, and if its results are here its rows follow without a gap; else
// `waiter` waits for them.  Each value is summed in the order of k, so that its bits do not depend on who
// sums it.  At most 32 rows a token, which the lanes hold.
template <class T, class Ring, class Waiter, bool kTraced>
__device__ __forceinline__ Status combine_stream(Shared<kTraced>& sh, const Place& place,
                                                 const TokenParts& parts, Ring ring,
                                                 Waiter& waiter) {
  constexpr uint32_t kPieces = Ring::kPieces, kUnits = Ring::kUnits, kSlice = Ring::kSlice;
  const Shape& shape = sh.shape;
  uint32_t used = 0;
  const uint32_t lane = threadIdx.x % 32, k = shape.top_k;
  const uint32_t row_bytes = shape.hidden * 2;
  const uint32_t chunk_first = sh.own.begin, chunk_tokens = sh.own.tokens;

  // The batch that was taken last, from the rank's from-th token in order, and what is known of it: its
  // results are being looked up; it is asked whether they are here; it can be summed.
  uint32_t from = 0, tokens = 0;
  uint32_t part = 0;  // of its only token
  Result next{};
  uint64_t seen = 0;
  enum : uint32_t { kTaken, kAsked, kHere };
  uint32_t known = kTaken;
  auto take = [&] {
    if (lane == 0) {
      const uint32_t end = chunk_tokens * parts.count;
      const uint32_t batch = parts.count == 1 ? batch_of_warp(sh, end) : 1;
      from = min_u32(atomicAdd(&sh.next_token, batch), end);
      tokens = min_u32(batch, end - from);
    }
    from = __shfl_sync(0xffffffffu, from, 0);
    tokens = __shfl_sync(0xffffffffu, tokens, 0);
    part = from % parts.count;
    from /= parts.count;
    from += chunk_first;
    known = kTaken;
    if (tokens != 0) next = find_results(sh, place, from, tokens);
  };
  // One step on; what it loads the next step finds.
  auto look = [&] {
    const uint64_t* word = place.heap.at<uint64_t>(sh.layout.returned) + next.tile;
    if (known == kAsked && __all_sync(0xffffffffu, seen >= place.epoch)) {
      ptx::load_acquire_sys(word);
      __syncwarp();
      if (lane == 0) ptx::fence_proxy_async();  // the rows were written by ordinary stores
      known = kHere;
    } else {
      seen = ptx::load_relaxed_sys(word);
      known = kAsked;
    }
  };

  // Which piece is loaded next: two of rows `issue_row`, of the token whose first lane is issue_base.
  uint32_t issued = 0, issue_row = 0;
  uint32_t issue_base = 0, issue_j = 0, issue_at = 0, issue_end = 0;
  uint32_t part_begin = 0, part_end = row_bytes;  // of a row's bytes
  auto begin_issue = [&] {
    issue_row = next.row;
    issue_base = issue_j = 0;
    part_begin = part * parts.bytes;
    part_end = min_u32(part_begin + parts.bytes, row_bytes);
    issue_at = part_begin;
    issue_end = tokens * k;
  };
  auto issue = [&] {
    while (issued - used < kPieces && issue_base < issue_end) {
      const uint32_t j = issue_base + issue_j;
      const uint32_t row0 = __shfl_sync(0xffffffffu, issue_row, j);
      const uint32_t row1 = __shfl_sync(0xffffffffu, issue_row, j + 1);
      if (lane == 0) {
        const uint32_t slot = issued % kPieces;
        const uint32_t bytes = min_u32(part_end - issue_at, kSlice);
        const char* ret = place.heap.at<char>(sh.layout.ret) + issue_at;
        const bool two = issue_j + 1 < k;
        uint64_t* full = ring.full + slot;
        ptx::mbarrier_expect(full, two ? 2 * bytes : bytes);
        char* piece = ring.pieces + slot * (2 * kSlice);
        ptx::bulk_load_once(piece, ret + static_cast<uint64_t>(row0) * row_bytes, bytes, full);
        if (two) {
          ptx::bulk_load_once(piece + kSlice, ret + static_cast<uint64_t>(row1) * row_bytes, bytes,
                              full);
        }
      }
      ++issued;
      issue_j += 2;
      if (issue_j < k) continue;
      issue_j = 0;
      issue_at += kSlice;
      if (issue_at < part_end) continue;
      issue_at = part_begin;
      issue_base += k;
    }
  };

  take();
  bool begun = false;  // rows of the batch taken last are under way
  while (tokens != 0) {
    if (known != kHere) {
      const Status status = waiter.await(from, tokens, next);
      if (status != Status::kOk) return status;
      if (lane == 0) ptx::fence_proxy_async();
    }
    if (!begun) begin_issue();
    const uint32_t first_byte = part_begin, end_byte = part_end;
    const uint32_t summed = part == 0 ? tokens : 0, results = tokens * k, token = next.token;
    const float weight = next.weight;
    take();
    begun = false;
    for (uint32_t base = 0; base < results; base += k) {
      for (uint32_t at = first_byte; at < end_byte; at += kSlice) {
        float sum[kUnits][8] = {};
        for (uint32_t j = 0; j < k; j += 2) {
          if (known == kHere && !begun && issue_base == issue_end) {
            begin_issue();
            begun = true;
          }
          issue();
          if (!kPuts && tokens != 0 && known != kHere) look();
          const uint32_t slot = used % kPieces;
          const float w[2] = {__shfl_sync(0xffffffffu, weight, base + j),
                              __shfl_sync(0xffffffffu, weight, base + j + 1)};
          ptx::mbarrier_wait(ring.full + slot, used / kPieces & 1);
          const uint4* piece =
              reinterpret_cast<const uint4*>(ring.pieces + slot * (2 * kSlice)) + lane;
#pragma unroll
          for (uint32_t i = 0; i < 2; ++i) {
            if (j + i >= k) break;
#pragma unroll
            for (uint32_t c = 0; c < kUnits; ++c) {
              // Beyond the part's end lies what came before, which is not stored.
              const uint4 loaded = piece[i * (kSlice / 16) + c * 32];
              add_weighted<T>(sum[c], w[i], loaded);
            }
          }
          __syncwarp();  // the piece is read: it may be filled again
          ++used;
        }
        const uint32_t t = __shfl_sync(0xffffffffu, token, base);
        char* y = static_cast<char*>(place.args->y) + static_cast<uint64_t>(t) * row_bytes + at;
#pragma unroll
        for (uint32_t c = 0; c < kUnits; ++c) {
          const uint32_t unit = lane + c * 32;
          if (at + unit * 16 >= end_byte) break;
          __stcs(reinterpret_cast<uint4*>(y) + unit, rounded<T>(sum[c]));
        }
      }
    }
    waiter.summed(summed);
  }
  return waiter.finish();
}

}  // namespace flashmoe
