// Waits of a whole CTA.
#pragma once

#include <cstdint>

#include "device/cta.h"

namespace flashmoe {

// The scheduler's leader waits for all lanes; the host makes the same wait's record for each of the others.  Ends in
// step; true if the CTA goes on.
template <bool kTraced>
__device__ inline bool wait_together(Shared<kTraced>& sh, const Awaited& what, const uint64_t* word,
                                     Until until, uint64_t target) {
  constexpr int kWaiter = static_cast<int>(Lane::k_sched);
  if (led_lane() == kWaiter) {
    const Status status = sh.actors[kWaiter].wait(what, word, until, target);
    if (status == Status::kHang) raise_abort(sh, status);
    sh.status = static_cast<uint32_t>(status);
  }
  __syncthreads();
  const Status status = static_cast<Status>(sh.status);
  __syncthreads();
  return status == Status::kOk;
}

// Until all of words [0, n) carry this launch's epoch: here(i) says of one whether it does, what(i) what is
// then awaited.  Ends in step; true if the CTA goes on.
template <bool kTraced, class Here, class What>
__device__ __forceinline__ bool await_tags(Shared<kTraced>& sh, const Place& place,
                                           const uint64_t* words, uint32_t n, const Here& here,
                                           const What& what) {
  for (;;) {
    if (threadIdx.x == 0) sh.lacking_word = n;
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < n; i += kThreads) {
      if (!here(i)) {
        atomicMin(&sh.lacking_word, i);
        break;
      }
    }
    __syncthreads();
    const uint32_t lacking = sh.lacking_word;
    if (lacking == n) return true;
    if (!wait_together(sh, what(lacking), words + lacking, Until::kTag, place.epoch)) return false;
  }
}

}  // namespace flashmoe
