// The sum of the rows that come back.
#pragma once

#include <cstdint>

#include "device/cta.h"
#include "device/put.h"

namespace flashmoe {

// The row of the return buffer that slot `slot` of the chunk's rows for the expert comes back to, and the
// row tile, over all experts, it comes with.
template <bool kTraced>
__device__ __forceinline__ Result result_of(const Shared<kTraced>& sh, const Place& place,
                                            uint32_t token, uint32_t expert, uint32_t slot,
                                            float weight) {
  const PlanTables& tables = sh.tables;
  const uint32_t sent = tables.chunk_prefix[expert] + slot;  // of the rank's rows for the expert
  const uint32_t i = source_start(tables, sh.shape, place.rank, expert) + sent;
  return {token, return_row(tables, sh.shape, place.rank, expert, sent),
          global_tile(tables, sh.shape, expert, i / tables.height[expert]), weight};
}

// The chunk's tokens in the order in which their results can be expected: by the last of a token's
// experts in its owner's order of tiles.  Else whoever combines early would wait for a token that is due
// late, while others' results leave L2.  Of each its results, so that whoever combines finds with one load
// what it must wait for and fetch.  One warp; whoever combines waits for sh.order_full.
template <bool kTraced>
__device__ inline void order_tokens(Shared<kTraced>& sh, const Place& place) {
  constexpr uint32_t kClasses = 32;  // a lane each
  const Shape& shape = sh.shape;
  const uint32_t lane = threadIdx.x % 32, k = shape.top_k;
  const uint32_t begin = chunk_begin(shape, place.tokens, place.chunk);
  const uint32_t end = chunk_begin(shape, place.tokens, place.chunk + 1);
  const uint32_t* ids = place.heap.at<uint32_t>(sh.layout.ids);
  const uint32_t* slots = place.heap.at<uint32_t>(sh.layout.slots);
  const float* weights = place.heap.at<float>(sh.layout.weights);
  Result* results = place.heap.at<Result>(sh.layout.results);
  const uint32_t owned = max_owned_experts(shape);
  auto due = [&](uint32_t token) {
    uint32_t last = 0;
    for (uint32_t j = 0; j < k; ++j) {
      const uint32_t e = ids[static_cast<uint64_t>(token) * k + j];
      last = max_u32(last, e - first_expert(shape, owner_of(shape, e)));
    }
    return last * kClasses / owned;
  };
  sh.due[lane] = 0;
  __syncwarp();
  for (uint32_t t = begin + lane; t < end; t += 32) atomicAdd(&sh.due[due(t)], 1);
  __syncwarp();
  const uint32_t mine = sh.due[lane];
  sh.due[lane] = warp_running_sum(mine) - mine;
  __syncwarp();
  // Within a class the order does not matter.
  for (uint32_t t = begin + lane; t < end; t += 32) {
    Result* to = results + static_cast<uint64_t>(begin + atomicAdd(&sh.due[due(t)], 1)) * k;
    for (uint32_t j = 0; j < k; ++j) {
      const uint64_t at = static_cast<uint64_t>(t) * k + j;
      to[j] = result_of(sh, place, t, ids[at], slots[at], weights[at]);
    }
  }
  __syncwarp();
  if (lane == 0) ptx::mbarrier_arrive(&sh.order_full);
}

// The results of `tokens` tokens in combining order, the rank's from-th and on: a lane a result, token by
// token, 32 at most; the lanes beyond repeat results of the last token.
template <bool kTraced>
__device__ __forceinline__ Result find_results(const Shared<kTraced>& sh, const Place& place,
                                               uint32_t from, uint32_t tokens) {
  const uint32_t lane = threadIdx.x % 32, k = sh.shape.top_k, t = lane / k;
  const uint64_t token = from + min_u32(t, tokens - 1);
  return place.heap.at<Result>(sh.layout.results)[token * k + (lane - t * k)];
}

// How many tokens a warp takes at a time: fewer towards the end, so that all of the CTA's warps end
// together, and no more than its lanes know the rows of.
template <bool kTraced>
__device__ __forceinline__ uint32_t batch_of_warp(Shared<kTraced>& sh, uint32_t end) {
  constexpr uint32_t kShares = 2 * (kCommWarps + 4 * kMathGroups);
  const uint32_t taken = *const_cast<volatile uint32_t*>(&sh.next_token);
  const uint32_t left = end - min_u32(taken, end);
  return max_u32(1, min_u32(min_u32(left / kShares, 4), 32 / sh.shape.top_k));
}

// Waits until all result rows of `tokens` tokens in combining order, the rank's from-th and on, are here.
// One warp; its lane 0 speaks for the actor.
template <bool kTraced>
__device__ inline Status await_returns(Shared<kTraced>& sh, const Place& place,
                                       GpuActor<kTraced>& actor, uint32_t from, uint32_t tokens) {
  const Shape& shape = sh.shape;
  const uint32_t lane = threadIdx.x % 32, k = shape.top_k;
  const Result* results =
      place.heap.at<Result>(sh.layout.results) + static_cast<uint64_t>(from) * k;
  const uint64_t* returned = place.heap.at<uint64_t>(sh.layout.returned);
  const uint32_t rows = tokens * k;
  for (uint32_t base = 0; base < rows; base += 32) {
    const bool mine = base + lane < rows;
    uint32_t expert = 0, tile = 0;
    bool lacking = false;
    if (mine) {
      const Result result = results[base + lane];
      tile = result.tile;
      lacking = ptx::load_acquire_sys(returned + tile) < place.epoch;
      if (kPuts || lacking) {
        expert = place.heap.at<uint32_t>(
            sh.layout.ids)[static_cast<uint64_t>(result.token) * k + (base + lane) % k];
      }
    }
    for (uint32_t mask = __ballot_sync(0xffffffffu, lacking); mask != 0; mask &= mask - 1) {
      const uint32_t from_lane = __ffs(mask) - 1;
      const uint32_t awaited_expert = __shfl_sync(0xffffffffu, expert, from_lane);
      const uint32_t awaited_tile = __shfl_sync(0xffffffffu, tile, from_lane);
      Status status = Status::kOk;
      if (lane == 0) {
        status = actor.wait(
            {EventKind::k_wait_return, static_cast<uint16_t>(owner_of(shape, awaited_expert)),
             static_cast<uint16_t>(awaited_expert), awaited_tile},
            returned + awaited_tile, Until::kAtLeast, place.epoch, 1);
      }
      status = static_cast<Status>(__shfl_sync(0xffffffffu, static_cast<uint32_t>(status), 0));
      if (status != Status::kOk) return status;
    }
    if constexpr (kPuts) {
      results_arrived(sh, place, const_cast<uint64_t*>(returned) + tile, expert, mine);
    }
  }
  __syncwarp();
  return Status::kOk;
}

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

// Pieces of shared memory that one warp fills in turn, each with a slice of two rows: kUnits times 16 bytes
// a lane of each.
template <uint32_t kCount, uint32_t kUnitsLane>
struct RowRing {
  static constexpr uint32_t kPieces = kCount;
  static constexpr uint32_t kUnits = kUnitsLane;
  static constexpr uint32_t kSlice = kUnits * 512;
  char* pieces;
  uint64_t* full;  // a barrier a piece
  uint32_t used;   // pieces, before
};

// Combines batches of the chunk's tokens until none is left, one warp for itself: bulk copies bring rows
// into its ring, and what one piece holds is added while the others are under way.  While a batch is summed
// the next one is taken and looked up, and if its results are here its rows follow without a gap; else
// `waiter` waits for them.  Each value is summed in the order of k, so that its bits do not depend on who
// sums it.  At most 32 rows a token, which the lanes hold.
template <class T, class Ring, class Waiter, bool kTraced>
__device__ __forceinline__ Status combine_stream(Shared<kTraced>& sh, const Place& place, Ring ring,
                                                 Waiter& waiter) {
  constexpr uint32_t kPieces = Ring::kPieces, kUnits = Ring::kUnits, kSlice = Ring::kSlice;
  const Shape& shape = sh.shape;
  uint32_t used = ring.used;
  const uint32_t lane = threadIdx.x % 32, k = shape.top_k;
  const uint32_t row_bytes = shape.hidden * 2;

  // The batch that was taken last, from the rank's from-th token in order, and what is known of it: its
  // results are being looked up; it is asked whether they are here; they are.
  uint32_t from = 0, tokens = 0;
  Result next{};
  uint64_t seen = 0;
  enum : uint32_t { kTaken, kAsked, kHere };
  uint32_t known = kTaken;
  auto take = [&] {
    if (lane == 0) {
      const uint32_t begin = chunk_begin(shape, place.tokens, place.chunk);
      const uint32_t end = chunk_begin(shape, place.tokens, place.chunk + 1) - begin;
      const uint32_t batch = batch_of_warp(sh, end);
      from = waiter.leaves_rest() ? end : min_u32(atomicAdd(&sh.next_token, batch), end);
      tokens = min_u32(batch, end - from);
      from += begin;
    }
    from = __shfl_sync(0xffffffffu, from, 0);
    tokens = __shfl_sync(0xffffffffu, tokens, 0);
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
  uint32_t issued = used, issue_row = 0;
  uint32_t issue_base = 0, issue_j = 0, issue_at = 0, issue_end = 0;
  auto begin_issue = [&] {
    issue_row = next.row;
    issue_base = issue_j = issue_at = 0;
    issue_end = tokens * k;
  };
  auto issue = [&] {
    while (issued - used < kPieces && issue_base < issue_end) {
      const uint32_t j = issue_base + issue_j;
      const uint32_t row0 = __shfl_sync(0xffffffffu, issue_row, j);
      const uint32_t row1 = __shfl_sync(0xffffffffu, issue_row, j + 1);
      if (lane == 0) {
        const uint32_t slot = issued % kPieces;
        const uint32_t bytes = min_u32(row_bytes - issue_at, kSlice);
        const char* ret = place.heap.at<char>(sh.layout.ret) + issue_at;
        const bool two = issue_j + 1 < k;
        uint64_t* full = ring.full + slot;
        ptx::mbarrier_expect(full, two ? 2 * bytes : bytes);
        char* piece = ring.pieces + slot * (2 * kSlice);
        ptx::bulk_load(piece, ret + static_cast<uint64_t>(row0) * row_bytes, bytes, full);
        if (two) {
          ptx::bulk_load(piece + kSlice, ret + static_cast<uint64_t>(row1) * row_bytes, bytes,
                         full);
        }
      }
      ++issued;
      issue_j += 2;
      if (issue_j < k) continue;
      issue_j = 0;
      issue_at += kSlice;
      if (issue_at < row_bytes) continue;
      issue_at = 0;
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
    const uint32_t summed = tokens, token = next.token;
    const float weight = next.weight;
    take();
    begun = false;
    for (uint32_t base = 0; base < summed * k; base += k) {
      for (uint32_t at = 0; at < row_bytes; at += kSlice) {
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
              // Beyond the row's end lies what came before, which is not stored.
              const uint4 loaded = piece[i * (kSlice / 16) + c * 32];
              const T* values = reinterpret_cast<const T*>(&loaded);
#pragma unroll
              for (int v = 0; v < 8; ++v) {
                sum[c][v] = fmaf(w[i], static_cast<float>(values[v]), sum[c][v]);
              }
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
          if (at + unit * 16 >= row_bytes) break;
          uint4 out;
          T* values = reinterpret_cast<T*>(&out);
#pragma unroll
          for (int v = 0; v < 8; ++v) values[v] = static_cast<T>(sum[c][v]);
          reinterpret_cast<uint4*>(y)[unit] = out;
        }
      }
    }
    waiter.summed(summed);
  }
  return waiter.finish();
}

// A comm warp as it combines: it waits and records for itself.
template <bool kTraced>
struct CommCombiner {
  Shared<kTraced>& sh;
  const Place& place;
  GpuActor<kTraced>& actor;

  // Math warps have more rows under way, and should not have to wait for what a comm warp took last.
  __device__ __forceinline__ bool leaves_rest() const {
    return load_volatile(&sh.math_combines) != 0;
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
  Shared<kTraced>& sh;
  const Place& place;
  GpuActor<kTraced>& actor;
  CombineTeam& team;
  uint32_t warp;  // of the group

  __device__ __forceinline__ bool leaves_rest() const { return false; }
  __device__ __forceinline__ bool leads() const { return warp == 0 && threadIdx.x % 32 == 0; }
  __device__ __forceinline__ void record() {
    if constexpr (kTraced) {
      if (!leads()) return;
      const uint32_t tokens = atomicExch(&team.summed, 0);
      if (tokens != 0) actor.span(EventKind::k_combine, kNoPeer, kNoExpert, place.chunk, tokens);
    }
  }
  __device__ __forceinline__ void summed(uint32_t tokens) {
    if constexpr (kTraced) {
      if (threadIdx.x % 32 == 0) atomicAdd(&team.summed, tokens);
      record();
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
    record();
    return Status::kOk;
  }
};

// Combines what it can of the chunk's tokens beside the tiles, by a comm warp.  `used` is the pieces used
// before.  Of more than 32 rows a token it leaves all to the math groups.
template <class T, uint32_t kCount, uint32_t kBytes, bool kTraced>
__device__ inline void combine_beside_tiles(Shared<kTraced>& sh, const Place& place, uint32_t half,
                                            char* pieces, uint32_t used) {
  if (sh.shape.top_k > 32) return;
  ptx::mbarrier_wait(&sh.order_full, 0);
  using Ring = RowRing<kCount, kBytes / 2 / 512>;
  CommCombiner<kTraced> waiter{sh, place, sh.actors[static_cast<int>(Lane::k_comm0) + half]};
  combine_stream<T>(sh, place, Ring{pieces + half * kCount * kBytes, sh.piece_full[half], used},
                    waiter);
}

// Combines the chunk's tokens until none is left, by the four warps of a math group in step, a token each:
// those of more than 32 results, for which the first warp waits.
template <class T, bool kTraced>
__device__ inline Status combine_in_step(Shared<kTraced>& sh, const Place& place, uint32_t group) {
  const Shape& shape = sh.shape;
  GpuActor<kTraced>& actor = sh.actors[static_cast<int>(Lane::k_math0) + group];
  const uint32_t warp = threadIdx.x / 32 % kTeamWarps, lane = threadIdx.x % 32;
  const uint32_t begin = chunk_begin(shape, place.tokens, place.chunk);
  const uint32_t end = chunk_begin(shape, place.tokens, place.chunk + 1) - begin;
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
  return combine_stream<T>(
      sh, place, Ring{stages + ring * kRingPieces * 2 * Ring::kSlice, sh.ring_full[ring], 0},
      waiter);
}

}  // namespace flashmoe
