// The sum of the rows that come back.
#pragma once

#include <cstdint>

#include "device/combine_stream.h"

namespace flashmoe {

// Adds kRows of a token's rows, from its j0-th on, to sums of 8 values of kColumns columns of a lane;
// `row` and `weight` are of lane j % 32 for the token's j-th row.  Without a condition, which the
// compiler would move the loads under, so that a few were in flight, not all.
template <class T, uint32_t kRows, uint32_t kColumns>
__device__ __forceinline__ void add_rows(const uint4* ret, uint32_t units, uint32_t base,
                                         uint32_t row, float weight, uint32_t j0,
                                         float (&sum)[kColumns][8]) {
  const uint32_t lane = threadIdx.x % 32;
  uint4 piece[kRows][kColumns];
  float w[kRows];
#pragma unroll
  for (uint32_t i = 0; i < kRows; ++i) {
    const uint32_t r = __shfl_sync(0xffffffffu, row, (j0 + i) % 32);
    w[i] = __shfl_sync(0xffffffffu, weight, (j0 + i) % 32);
    const uint4* from = ret + static_cast<uint64_t>(r) * units;
#pragma unroll
    for (uint32_t c = 0; c < kColumns; ++c) {
      // Beyond the last column the last one is fetched again and not used.
      piece[i][c] = from[min_u32(base + c * 32 + lane, units - 1)];
    }
  }
#pragma unroll
  for (uint32_t i = 0; i < kRows; ++i) {
#pragma unroll
    for (uint32_t c = 0; c < kColumns; ++c) {
      const T* values = reinterpret_cast<const T*>(&piece[i][c]);
#pragma unroll
      for (int v = 0; v < 8; ++v) {
        sum[c][v] = fmaf(w[i], static_cast<float>(values[v]), sum[c][v]);
      }
    }
  }
}

// y of one token, the rank's at-th in combining order: its k result rows times their weights, summed in
// float32 in the order of k; a lane fetches kColumns pieces of kRows rows at once, and knows one of 32
// results in turn.
template <class T, uint32_t kRows, uint32_t kColumns, bool kTraced>
__device__ inline void combine_token(const Shared<kTraced>& sh, const Place& place, uint32_t at) {
  static_assert(kRows == 8, "the rest is added by halves");
  const Shape& shape = sh.shape;
  const uint32_t lane = threadIdx.x % 32, k = shape.top_k;
  const Result* results = place.heap.at<Result>(sh.layout.results) + static_cast<uint64_t>(at) * k;
  const uint4* ret = place.heap.at<uint4>(sh.layout.ret);
  const uint32_t units = shape.hidden / 8;
  uint4* y = static_cast<uint4*>(place.args->y) + static_cast<uint64_t>(results->token) * units;
  uint32_t row = 0;
  float weight = 0;
  auto fetch = [&](uint32_t j0) {
    if (j0 % 32 != 0) return;
    const Result result = results[min_u32(j0 + lane, k - 1)];
    row = result.row;
    weight = result.weight;
  };
  for (uint32_t base = 0; base < units; base += 32 * kColumns) {
    float sum[kColumns][8] = {};
    uint32_t j = 0;
    for (; j + kRows <= k; j += kRows) {
      fetch(j);
      add_rows<T, kRows>(ret, units, base, row, weight, j, sum);
    }
    fetch(j);
    if constexpr (kRows > 4) {
      if (k - j >= 4) {
        add_rows<T, 4>(ret, units, base, row, weight, j, sum);
        j += 4;
      }
    }
    if constexpr (kRows > 2) {
      if (k - j >= 2) {
        add_rows<T, 2>(ret, units, base, row, weight, j, sum);
        j += 2;
      }
    }
    if (j < k) add_rows<T, 1>(ret, units, base, row, weight, j, sum);
#pragma unroll
    for (uint32_t c = 0; c < kColumns; ++c) {
      const uint32_t unit = base + c * 32 + lane;
      if (unit >= units) break;
      uint4 out;
      T* values = reinterpret_cast<T*>(&out);
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] = static_cast<T>(sum[c][i]);
      y[unit] = out;
    }
  }
}

// y of one token in some of its columns, [begin, end) in units of 8: `own` is a lane's of the token's results, lane j
// that of row j.  For one that is summed alone: a column of a lane at a time, in little code.
template <class T, bool kTraced>
__device__ __forceinline__ void combine_part(const Shared<kTraced>& sh, const Place& place,
                                             const Result& own, uint32_t begin, uint32_t end) {
  const uint32_t lane = threadIdx.x % 32, k = sh.shape.top_k, units = sh.shape.hidden / 8;
  const uint4* ret = place.heap.at<uint4>(sh.layout.ret);
  const uint32_t token = __shfl_sync(0xffffffffu, own.token, 0);
  uint4* y = static_cast<uint4*>(place.args->y) + static_cast<uint64_t>(token) * units;
#pragma unroll 1
  for (uint32_t base = begin; base < end; base += 32) {
    float sum[1][8] = {};
    uint32_t j = 0;
#pragma unroll 1
    for (; j + 8 <= k; j += 8) add_rows<T, 8>(ret, units, base, own.row, own.weight, j, sum);
#pragma unroll 1
    for (; j < k; ++j) add_rows<T, 1>(ret, units, base, own.row, own.weight, j, sum);
    uint4 out;
    T* values = reinterpret_cast<T*>(&out);
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = static_cast<T>(sum[0][i]);
    if (base + lane < end) y[base + lane] = out;
  }
}

// A comm warp as it combines: it waits and records for itself.  It has few rows under way and takes long for
// a token, so it takes one only when that can be summed, and none once math warps combine: these would have
// to wait for it.  Results that are put it must see arrive, which the wait does.
template <bool kTraced>
struct CommCombiner {
  static constexpr bool kSplits = false;
  static constexpr bool kClaims = !kPuts;
  Shared<kTraced>& sh;
  const Place& place;
  GpuActor<kTraced>& actor;
  uint64_t wait_from = 0;  // traced, of the wait under way
  uint32_t row = 0;        // token * k + j of what it awaits
  uint32_t tile = 0;
  bool lacked = false;

  __device__ __forceinline__ bool leaves_rest() const {
    return load_volatile(&sh.math_combines) != 0;
  }
  // Between the two it asks for the results of tokens that it may take.  In the trace that is a wait for the
  // first result that lacked, of lane `next`'s, if that has come: it may end because math warps combine.
  __device__ __forceinline__ void begin_wait(const Result& next) {
    if constexpr (kTraced) {
      wait_from = ptx::globaltimer();
      const uint32_t k = sh.shape.top_k;
      const uint32_t mask = __ballot_sync(0xffffffffu, !here(next.tile));
      const uint32_t from = mask == 0 ? 0 : __ffs(mask) - 1;
      lacked = mask != 0;
      row = __shfl_sync(0xffffffffu, next.token, from) * k + from % k;
      tile = __shfl_sync(0xffffffffu, next.tile, from);
    }
  }
  __device__ __forceinline__ void end_wait() {
    if constexpr (kTraced) {
      if (threadIdx.x % 32 != 0) return;
      if (lacked && here(tile)) {
        const uint32_t expert = place.heap.at<uint32_t>(sh.layout.ids)[row];
        actor.waited({EventKind::k_wait_return, static_cast<uint16_t>(owner_of(sh.shape, expert)),
                      static_cast<uint16_t>(expert), tile},
                     wait_from, ptx::globaltimer(), 0, Status::kOk);
      }
      actor.skip();
    }
  }
  __device__ __forceinline__ bool here(uint32_t row_tile) const {
    const uint64_t* word = place.heap.at<uint64_t>(sh.layout.returned) + row_tile;
    return ptx::load_relaxed_sys(word) >= place.epoch;
  }
  __device__ __forceinline__ Status await(uint32_t from, uint32_t tokens, const Result&) {
    const Status status = await_returns(sh, place, actor, from, tokens);
    if (threadIdx.x % 32 != 0) return status;
    if (status == Status::kHang) raise_abort(sh, status);
    if (status == Status::kOk) {
      actor.doing(EventKind::k_combine, kNoPeer, kNoExpert, place.chunk);
      actor.skip();
    }
    return status;
  }
  __device__ __forceinline__ void summed(uint32_t tokens) {
    if (threadIdx.x % 32 != 0) return;
    actor.span(EventKind::k_combine, kNoPeer, kNoExpert, place.chunk, tokens);
  }
  __device__ __forceinline__ Status finish() { return Status::kOk; }
};

// A warp of a math group as it combines.  The group's actor is its first warp's, which records what all have
// summed, and waits: for its own results, and when it has no tokens left for those that the others lack.
// These look now and then, for as long as the first warp's waits end well.
template <bool kTraced>
struct TeamCombiner {
  static constexpr bool kSplits = true;
  static constexpr bool kClaims = false;
  Shared<kTraced>& sh;
  const Place& place;
  GpuActor<kTraced>& actor;
  CombineTeam& team;
  uint32_t warp;  // of the group

  __device__ __forceinline__ bool leaves_rest() const { return false; }
  __device__ __forceinline__ bool leads() const { return warp == 0 && threadIdx.x % 32 == 0; }
  __device__ __forceinline__ void record(bool even_none) {
    if constexpr (kTraced) {
      if (!leads()) return;
      const uint32_t tokens = atomicExch(&team.summed, 0);
      if (tokens != 0 || even_none) {
        actor.span(EventKind::k_combine, kNoPeer, kNoExpert, place.chunk, tokens);
      }
    }
  }
  // Of a token in parts, whoever sums the first counts it.
  __device__ __forceinline__ void summed(uint32_t tokens) {
    if constexpr (kTraced) {
      if (threadIdx.x % 32 == 0) atomicAdd(&team.summed, tokens);
      record(true);
    }
  }
  // By the first warp, for whichever lacks them.
  __device__ __forceinline__ Status await_first(uint32_t from, uint32_t tokens) {
    record(false);
    const Status status = await_returns(sh, place, actor, from, tokens);
    if (!leads()) return status;
    if (status == Status::kHang) raise_abort(sh, status);
    if (status == Status::kOk) {
      actor.doing(EventKind::k_combine, kNoPeer, kNoExpert, place.chunk);
    } else {
      store_atomic(&team.failed, 1u);
    }
    return status;
  }
  __device__ inline Status await(uint32_t from, uint32_t tokens, const Result& next) {
    if (warp == 0) {
      const Status status = await_first(from, tokens);
      if (leads()) actor.skip();
      return status;
    }
    const uint32_t lane = threadIdx.x % 32;
    uint64_t* word = place.heap.at<uint64_t>(sh.layout.returned) + next.tile;
    for (bool asked = false; !__all_sync(0xffffffffu, ptx::load_relaxed_sys(word) >= place.epoch);
         asked = true) {
      if (lane == 0 && !asked) {
        store_atomic(&team.awaited[warp], static_cast<uint64_t>(from) << 32 | tokens);
      }
      if (__any_sync(0xffffffffu, load_volatile(&team.failed) != 0)) return Status::kHang;
      __nanosleep(100);
    }
    if (lane == 0) store_atomic(&team.awaited[warp], uint64_t{0});
    ptx::load_acquire_sys(word);
    if constexpr (kPuts) {
      const uint32_t k = sh.shape.top_k;
      const uint64_t at = static_cast<uint64_t>(next.token) * k + lane % k;
      results_arrived(sh, place, word, place.heap.at<uint32_t>(sh.layout.ids)[at], true);
    }
    __syncwarp();
    return Status::kOk;
  }
  __device__ inline Status finish() {
    if (warp != 0) {
      if (threadIdx.x % 32 == 0) {
        __threadfence_block();  // what the warp has summed is counted
        atomicAdd(&team.finished, 1);
      }
      return Status::kOk;
    }
    while (__shfl_sync(0xffffffffu, load_volatile(&team.finished), 0) != kTeamWarps - 1) {
      for (uint32_t other = 1; other < kTeamWarps; ++other) {
        const uint64_t lacking = __shfl_sync(0xffffffffu, load_volatile(&team.awaited[other]), 0);
        if (lacking == 0) continue;
        const Status status =
            await_first(static_cast<uint32_t>(lacking >> 32), static_cast<uint32_t>(lacking));
        if (status != Status::kOk) return status;
      }
      __nanosleep(50);
    }
    __threadfence_block();
    record(false);
    return Status::kOk;
  }
};

// Combines what it can of the chunk's tokens beside the tiles, by a comm warp.  `used` is the pieces used
// before.  It leaves all to the math groups where a token has more than 32 rows, and where each math warp has
// one token at most: these wait for the last tiles anyway.
template <class T, bool kTraced>
__device__ inline void combine_beside_tiles(Shared<kTraced>& sh, const Place& place, uint32_t half,
                                            char* pieces, uint32_t used) {
  if (sh.shape.top_k > 32 || sh.own.tokens <= kMathGroups * kTeamWarps) return;
  ptx::mbarrier_wait(&sh.order_full, 0);
  using Ring = RowRing<kPieces, kPieceBytes / 2 / 512>;
  CommCombiner<kTraced> waiter{sh, place, sh.actors[static_cast<int>(Lane::k_comm0) + half]};
  if (threadIdx.x % 32 == 0) {
    waiter.actor.doing(EventKind::k_combine, kNoPeer, kNoExpert, place.chunk);
  }
  combine_stream<T>(sh, place,
                    Ring{pieces + half * kPieces * kPieceBytes, sh.piece_full[half], used}, waiter);
}

// Combines the chunk's tokens until none is left, by the four warps of a math group in step, a token each:
// those of more than 32 results, for which the first warp waits.
template <class T, bool kTraced>
__device__ inline Status combine_in_step(Shared<kTraced>& sh, const Place& place, uint32_t group) {
  const Shape& shape = sh.shape;
  GpuActor<kTraced>& actor = sh.actors[static_cast<int>(Lane::k_math0) + group];
  const uint32_t warp = threadIdx.x / 32 % kTeamWarps, lane = threadIdx.x % 32;
  const uint32_t begin = sh.own.begin, end = sh.own.tokens;
  uint32_t summed = 0;  // tokens of the batch before
  for (;;) {
    if (warp == 0 && lane == 0) {
      const uint32_t from = min_u32(atomicAdd(&sh.next_token, kTeamWarps), end);
      sh.batches[group] = {from, min_u32(kTeamWarps, end - from)};
    }
    ptx::named_barrier(1 + group, kGroupThreads);
    if (warp == 0 && lane == 0 && summed != 0) {
      actor.span(EventKind::k_combine, kNoPeer, kNoExpert, place.chunk, summed);
    }
    const TokenBatch batch = sh.batches[group];
    if (batch.tokens == 0) return Status::kOk;
    summed = batch.tokens;
    Status status = Status::kOk;
    if (warp == 0) {
      status = await_returns(sh, place, actor, begin + batch.from, batch.tokens);
      if (lane == 0 && status == Status::kHang) raise_abort(sh, status);
    }
    if (ptx::named_barrier_any(1 + group, kGroupThreads, status != Status::kOk)) {
      return Status::kHang;
    }
    if (warp == 0 && lane == 0) {
      actor.doing(EventKind::k_combine, kNoPeer, kNoExpert, place.chunk);
      actor.skip();
    }
    if (warp < batch.tokens) combine_token<T, 8, 4>(sh, place, begin + batch.from + warp);
  }
}

// Parts of up to so many bytes are summed without a ring.
inline constexpr uint32_t kFewBytes = 2048;

// Combines what is left of the chunk's tokens, by a math group; both groups come here.
template <class T, bool kTraced>
__device__ inline Status combine(Shared<kTraced>& sh, const Place& place, uint32_t group,
                                 char* stages) {
  ptx::mbarrier_wait(&sh.order_full, 0);
  if (sh.shape.top_k > 32) return combine_in_step<T>(sh, place, group);
  // Neither group reads tiles from the stages any more.
  ptx::named_barrier(1 + kMathGroups, kMathGroups * kGroupThreads);
  if (threadIdx.x == kMathWarp * 32) store_atomic(&sh.math_combines, 1u);
  using Ring = RowRing<kRingPieces, kRingUnits>;
  const uint32_t warp = threadIdx.x / 32 % kTeamWarps, ring = group * kTeamWarps + warp;
  TeamCombiner<kTraced> waiter{sh, place, sh.actors[static_cast<int>(Lane::k_math0) + group],
                               sh.teams[group], warp};
  // So few that each warp sums one part of one token.
  const TokenParts parts = token_parts(sh.shape, sh.own.tokens);
  if (parts.bytes <= kFewBytes && sh.own.tokens <= kMathGroups * kTeamWarps) {
    const uint32_t token = ring / parts.count, part = ring - token * parts.count;
    if (token < sh.own.tokens) {
      const uint32_t at = sh.own.begin + token, row_bytes = sh.shape.hidden * 2;
      const Result own = find_results(sh, place, at, 1);
      const Status status = waiter.await(at, 1, own);
      if (status != Status::kOk) return status;
      const uint32_t begin = part * parts.bytes, end = min_u32(begin + parts.bytes, row_bytes);
      combine_part<T>(sh, place, own, begin / 16, end / 16);
      waiter.summed(part == 0 ? 1 : 0);
    }
    return waiter.finish();
  }
  return combine_stream<T>(
      sh, place, Ring{stages + ring * kRingPieces * 2 * Ring::kSlice, sh.ring_full[ring], 0},
      waiter);
}

}  // namespace flashmoe
