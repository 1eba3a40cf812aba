// What a chunk's tokens wait for and fetch: where each one's results lie, in the order they come back.
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
  const uint32_t i = source_start(tables, place.rank, expert) + sent;
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
  const uint32_t begin = sh.own.begin, end = begin + sh.own.tokens;
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
    // Those that have come while one was awaited are seen all at once.
    for (uint32_t mask; (mask = __ballot_sync(0xffffffffu, lacking)) != 0;
         lacking = lacking && ptx::load_acquire_sys(returned + tile) < place.epoch) {
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

}  // namespace flashmoe
