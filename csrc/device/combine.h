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
    for (uint32_t c = 0; c < kColumns; ++c) add_weighted<T>(sum[c], w[i], piece[i][c]);
  }
}

// y of one token, the rank's at-th in combining order: its k result rows times their weights, summed in
// float32 in the order of k; a lane fetches kColumns pieces of kRows rows at once, and knows one of 32
// results in turn.
template <class T, uint32_t kColumns, bool kTraced>
__device__ inline void combine_token(const Shared<kTraced>& sh, const Place& place, uint32_t at) {
  constexpr uint32_t kRows = 8;  // the rest is added by halves
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
    if (k - j >= 4) {
      add_rows<T, 4>(ret, units, base, row, weight, j, sum);
      j += 4;
    }
    if (k - j >= 2) {
      add_rows<T, 2>(ret, units, base, row, weight, j, sum);
      j += 2;
    }
    if (j < k) add_rows<T, 1>(ret, units, base, row, weight, j, sum);
#pragma unroll
    for (uint32_t c = 0; c < kColumns; ++c) {
      const uint32_t unit = base + c * 32 + lane;
      if (unit >= units) break;
      y[unit] = rounded<T>(sum[c]);
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
    const uint4 out = rounded<T>(sum[0]);
    if (base + lane < end) y[base + lane] = out;
  }
}

// y of one token, by one warp, a lane's `own` being that of its result j = lane % k: pieces of 16 bytes a lane, result
// by result and then column by column, so many under way at once as the warp has registers for, however few results.
template <class T, bool kTraced>
__device__ __forceinline__ void combine_whole(const Shared<kTraced>& sh, const Place& place,
                                              const Result& own) {
  const uint32_t lane = ptx::lane_id(), k = sh.shape.top_k, units = sh.shape.hidden / 8;
  const uint4* ret = place.heap.at<uint4>(sh.layout.ret);
  const uint32_t token = __shfl_sync(0xffffffffu, own.token, 0);
  uint4* y = static_cast<uint4*>(place.args->y) + static_cast<uint64_t>(token) * units;
  float sum[8] = {};
  uint32_t j = 0;
#pragma unroll 1
  for (uint32_t unit = lane; unit - lane < units;) {
    uint4 loaded[kCommUnits<kTraced>];
    uint32_t next = unit, of = j;
    // Without a condition, under which the compiler would move a load and its use: beyond the last column that one
    // comes again and is not used.
#pragma unroll
    for (uint32_t i = 0; i < kCommUnits<kTraced>; ++i) {
      const uint32_t row = __shfl_sync(0xffffffffu, own.row, of);
      loaded[i] = __ldcs(ret + static_cast<uint64_t>(row) * units + min_u32(next, units - 1));
      if (++of == k) {
        of = 0;
        next += 32;
      }
    }
#pragma unroll
    for (uint32_t i = 0; i < kCommUnits<kTraced>; ++i) {
      const float weight = __shfl_sync(0xffffffffu, own.weight, j);
      add_weighted<T>(sum, weight, loaded[i]);
      if (++j != k) continue;
      j = 0;
      const uint4 out = rounded<T>(sum);
#pragma unroll
      for (float& v : sum) v = 0;
      if (unit < units) __stcs(y + unit, out);
      unit += 32;
    }
  }
}

// A comm warp as it combines: it waits and records for itself.
template <bool kTraced>
struct CommCombiner {
  Shared<kTraced>& sh;
  const Place& place;
  GpuActor<kTraced>& actor;

  __device__ __forceinline__ bool here(uint32_t row_tile) const {
    const uint64_t* word = place.heap.at<uint64_t>(sh.layout.returned) + row_tile;
    return ptx::load_relaxed_sys(word) >= place.epoch;
  }
  // The token of the chunk's order that nobody has taken yet; none are left once math warps combine, which would have
  // to wait for a comm warp.
  __device__ __forceinline__ uint32_t next_token() const {
    const bool left = load_volatile(&sh.math_combines) == 0;
    const uint32_t next = left ? load_volatile(&sh.next_token) : sh.own.tokens;
    return __shfl_sync(0xffffffffu, next, 0);
  }
  // Takes a token once it can be summed, not before, since it takes long for one; false if there are no more.  In the
  // trace that is a wait for the first result that lacked, if that has come.
  __device__ __forceinline__ bool claim(Result& own) {
    const uint32_t end = sh.own.tokens, k = sh.shape.top_k;
    [[maybe_unused]] uint64_t wait_from = 0;
    [[maybe_unused]] uint32_t row = 0, tile = 0;  // what it awaits: token * k + j, and its row tile
    bool claimed = false;
    uint32_t known = end;  // whose results `own` are
#pragma unroll 1
    for (uint32_t next; (next = next_token()) < end;) {
      if (next != known) own = find_results(sh, place, sh.own.begin + next, 1);
      known = next;
      const uint32_t lacking = __ballot_sync(0xffffffffu, !here(own.tile));
      if (lacking == 0) {
        const bool mine =
            threadIdx.x % 32 == 0 && atomicCAS(&sh.next_token, next, next + 1) == next;
        claimed = __any_sync(0xffffffffu, mine);
        if (claimed) break;
        continue;
      }
      if constexpr (kTraced) {
        if (wait_from == 0) {
          const uint32_t first = __ffs(lacking) - 1;
          wait_from = ptx::globaltimer();
          row = __shfl_sync(0xffffffffu, own.token, 0) * k + first % k;
          tile = __shfl_sync(0xffffffffu, own.tile, first);
        }
      }
      __nanosleep(1000);
    }
    if (claimed) ptx::load_acquire_sys(place.heap.at<uint64_t>(sh.layout.returned) + own.tile);
    __syncwarp();
    if constexpr (kTraced) {
      if (threadIdx.x % 32 == 0) {
        if (wait_from != 0 && here(tile)) {
          const uint32_t expert = place.heap.at<uint32_t>(sh.layout.ids)[row];
          actor.waited({EventKind::k_wait_return, static_cast<uint16_t>(owner_of(sh.shape, expert)),
                        static_cast<uint16_t>(expert), tile},
                       wait_from, ptx::globaltimer(), 0, Status::kOk);
        }
        actor.skip();
      }
    }
    return claimed;
  }
  // Where results are put it takes the next token and then waits: it must see them arrive, which await_returns() does.
  __device__ __forceinline__ bool take(Result& own) {
    uint32_t next = sh.own.tokens;
    if (threadIdx.x % 32 == 0 && load_volatile(&sh.math_combines) == 0) {
      next = atomicAdd(&sh.next_token, 1);
    }
    next = __shfl_sync(0xffffffffu, next, 0);
    if (next >= sh.own.tokens) return false;
    own = find_results(sh, place, sh.own.begin + next, 1);
    const Status status = await_returns(sh, place, actor, sh.own.begin + next, 1);
    if (threadIdx.x % 32 == 0) {
      if (status == Status::kHang) raise_abort(sh, status);
      if (status == Status::kOk) {
        actor.doing(EventKind::k_combine, kNoPeer, kNoExpert, place.chunk);
        actor.skip();
      }
    }
    return status == Status::kOk;
  }
};

// A warp of a math group as it combines.  The group's actor is its first warp's, which records what all have
// summed, and waits: for its own results, and when it has no tokens left for those that the others lack.
// These look now and then, for as long as the first warp's waits end well.
template <bool kTraced>
struct TeamCombiner {
  Shared<kTraced>& sh;
  const Place& place;
  GpuActor<kTraced>& actor;
  CombineTeam& team;
  uint32_t warp;        // of the group
  bool worked = false;  // it has summed something that is not in the trace

  __device__ __forceinline__ bool leads() const { return warp == 0 && threadIdx.x % 32 == 0; }
  // What the group has summed since its actor last waited.
  __device__ __forceinline__ void record() {
    if constexpr (kTraced) {
      if (!leads()) return;
      const uint32_t tokens = atomicExch(&team.summed, 0);
      if (tokens != 0 || worked) {
        actor.span(EventKind::k_combine, kNoPeer, kNoExpert, place.chunk, tokens);
      }
      worked = false;
    }
  }
  // Of a token in parts, whoever sums the first counts it.
  __device__ __forceinline__ void summed(uint32_t tokens) {
    if constexpr (kTraced) {
      if (threadIdx.x % 32 == 0) atomicAdd(&team.summed, tokens);
      worked = true;
    }
  }
  // By the first warp, for whichever lacks them.
  __device__ __forceinline__ Status await_first(uint32_t from, uint32_t tokens) {
    record();
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
    const uint32_t lane = threadIdx.x % 32;
    uint64_t* word = place.heap.at<uint64_t>(sh.layout.returned) + next.tile;
    if (warp == 0) {
      if constexpr (kTraced && !kPuts) {
        // No wait: what is summed next goes into the same span.
        if (__all_sync(0xffffffffu, ptx::load_relaxed_sys(word) >= place.epoch)) {
          ptx::load_acquire_sys(word);
          __syncwarp();
          return Status::kOk;
        }
      }
      const Status status = await_first(from, tokens);
      if (leads()) actor.skip();
      return status;
    }
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
    record();
    return Status::kOk;
  }
};

// Combines what it can of the chunk's tokens beside the tiles, by a comm warp.  It leaves all to the math groups
// where a token has more than 32 rows, and where each math warp has one token at most: these wait for the last tiles
// anyway.
template <class T, bool kTraced>
__device__ inline void combine_beside_tiles(Shared<kTraced>& sh, const Place& place,
                                            uint32_t half) {
  if (sh.shape.top_k > 32 || sh.own.tokens <= kMathGroups * kTeamWarps) return;
  ptx::mbarrier_wait(&sh.order_full, 0);
  CommCombiner<kTraced> combiner{sh, place, sh.actors[static_cast<int>(Lane::k_comm0) + half]};
  if (threadIdx.x % 32 == 0) {
    combiner.actor.doing(EventKind::k_combine, kNoPeer, kNoExpert, place.chunk);
  }
  for (Result own{}; kPuts ? combiner.take(own) : combiner.claim(own);) {
    combine_whole<T>(sh, place, own);
    if (threadIdx.x % 32 == 0) {
      combiner.actor.span(EventKind::k_combine, kNoPeer, kNoExpert, place.chunk, 1);
    }
  }
}

// Combines the chunk's tokens until none is left, by the four warps of a math group in step, a token each:
// those of more than 32 results, for which the first warp waits.
template <class T, bool kTraced>
__device__ inline Status combine_in_step(Shared<kTraced>& sh, const Place& place, uint32_t group) {
  const Shape& shape = sh.shape;
  GpuActor<kTraced>& actor = sh.actors[static_cast<int>(Lane::k_math0) + group];
  const uint32_t warp = ptx::thread_id() / 32 % kTeamWarps, lane = threadIdx.x % 32;
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
    if (warp < batch.tokens) combine_token<T, 4>(sh, place, begin + batch.from + warp);
  }
}

// Parts of up to so many bytes are summed without a ring.
inline constexpr uint32_t kFewBytes = 2048;

// Combines what is left of the chunk's tokens, by a math group; both groups come here.
template <class T, bool kTraced>
__device__ inline Status combine(Shared<kTraced>& sh, const Place& place, uint32_t group,
                                 char* stages) {
  GpuActor<kTraced>& actor = sh.actors[static_cast<int>(Lane::k_math0) + group];
  if constexpr (kTraced) {
    if (ptx::thread_id() % kGroupThreads == 0) {
      actor.past_tiles();
      actor.doing(EventKind::k_combine, kNoPeer, kNoExpert, place.chunk);
    }
  }
  ptx::mbarrier_wait(&sh.order_full, 0);
  if (sh.shape.top_k > 32) return combine_in_step<T>(sh, place, group);
  // Neither group reads tiles from the stages any more.
  ptx::named_barrier(1 + kMathGroups, kMathGroups * kGroupThreads);
  if (threadIdx.x == kMathWarp * 32) store_atomic(&sh.math_combines, 1u);
  using Ring = RowRing<kRingPieces, kRingUnits>;
  const uint32_t warp = ptx::thread_id() / 32 % kTeamWarps, ring = group * kTeamWarps + warp;
  TeamCombiner<kTraced> waiter{sh, place, actor, sh.teams[group], warp};
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
  return combine_stream<T>(sh, place, parts,
                           Ring{stages + ring * kRingPieces * 2 * Ring::kSlice, sh.ring_full[ring]},
                           waiter);
}

}  // namespace flashmoe
