// The GPU as a platform for core: its clock, its words, its records; and CTA-wide helpers.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/actor.h"
#include "core/sizes.h"
#include "device/ptx.h"

namespace flashmoe {

inline constexpr uint32_t kWarps = kThreads / 32;

struct Record;

struct GpuPlatform {
  static constexpr bool kImages = true;  // the host makes records of what is left to it
  static __device__ __forceinline__ uint64_t load(const uint64_t* word) {
    return ptx::load_acquire_sys(word);
  }
  static __device__ __forceinline__ uint64_t peek(const uint64_t* word) {
    return ptx::load_relaxed_sys(word);
  }
  static __device__ __forceinline__ uint64_t now_ns() { return ptx::globaltimer(); }
  static __device__ __forceinline__ uint64_t cycles() { return clock64(); }
  static __device__ __forceinline__ void relax() { __nanosleep(20); }
  static __device__ __forceinline__ void put_record(Record* to, const Record& r) {
    const uint4* from = reinterpret_cast<const uint4*>(&r);
    reinterpret_cast<uint4*>(to)[0] = from[0];
    reinterpret_cast<uint4*>(to)[1] = from[1];
  }
  // Volatile: the host reads the slot while the kernel runs.
  static __device__ __forceinline__ void put_slot(FlightSlot* to, const FlightSlot& s) {
    const uint4* from = reinterpret_cast<const uint4*>(&s);
    uint4* words = reinterpret_cast<uint4*>(to);
#pragma unroll
    for (int i = 0; i < 3; ++i) {  // the fourth is reserved bytes
      asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(words + i),
                   "r"(from[i].x), "r"(from[i].y), "r"(from[i].z), "r"(from[i].w)
                   : "memory");
    }
  }
};

template <bool kTraced>
using GpuActor = Actor<GpuPlatform, kTraced>;

// A word of shared memory that another warp reads or writes meanwhile.
template <class U>
__device__ __forceinline__ U load_volatile(const U* word) {
  return *const_cast<const volatile U*>(word);
}
// Stores it as an atomic operation, which racecheck knows from a race.
template <class U>
__device__ __forceinline__ void store_atomic(U* word, U value) {
  using Word = std::conditional_t<sizeof(U) == 8, unsigned long long, unsigned int>;
  atomicExch(reinterpret_cast<Word*>(word), static_cast<Word>(value));
}

// The sum of `value` over this lane and the ones before it.
__device__ __forceinline__ uint32_t warp_running_sum(uint32_t value) {
  uint32_t sum = value;
#pragma unroll
  for (uint32_t d = 1; d < 32; d *= 2) {
    const uint32_t other = __shfl_up_sync(0xffffffffu, sum, d);
    if (threadIdx.x % 32 >= d) sum += other;
  }
  return sum;
}

// All threads of the CTA build the plan together.
struct CtaTeam {
  __device__ __forceinline__ uint32_t rank() const { return threadIdx.x; }
  __device__ __forceinline__ uint32_t size() const { return kThreads; }
  __device__ __forceinline__ void sync() const { __syncthreads(); }
  // A warp a sum.
  template <class Value, class To>
  __device__ __forceinline__ void sums(uint32_t n, uint32_t values, const Value& value,
                                       const To& to) const {
#pragma unroll 1
    for (uint32_t i = threadIdx.x / 32; i < n; i += kWarps) {
      uint32_t sum = 0;
      for (uint32_t j = threadIdx.x % 32; j < values; j += 32) sum += value(i, j);
      sum = __reduce_add_sync(0xffffffffu, sum);
      if (threadIdx.x % 32 == 0) *to(i) = sum;
    }
  }
  // A warp a row; a lane some neighbouring entries, so that few sums go from lane to lane.
  template <class Row>
  __device__ __forceinline__ void scan(uint32_t rows, const Row& row) const {
    constexpr uint32_t kMost = 8;  // of a lane
    const uint32_t lane = threadIdx.x % 32;
    for (uint32_t r = threadIdx.x / 32; r < rows; r += kWarps) {
      const auto [t, n] = row(r);
      uint32_t carry = 0;
      for (uint32_t base = 0; base < n; base += 32 * kMost) {
        const uint32_t each = min_u32(kMost, ceil_div(n - base, 32));
        const uint32_t first = base + lane * each, end = min_u32(first + each, n);
        uint32_t values[kMost], sum = 0;
#pragma unroll
        for (uint32_t i = 0; i < kMost; ++i) {
          values[i] = first + i < end ? t[first + i] : 0;
          sum += values[i];
        }
        const uint32_t running = warp_running_sum(sum);
        uint32_t before = carry + running - sum;
#pragma unroll
        for (uint32_t i = 0; i < kMost; ++i) {
          if (first + i < end) t[first + i] = before;
          before += values[i];
        }
        carry += __shfl_sync(0xffffffffu, running, 31);
      }
      if (lane == 0) t[n] = carry;
    }
    __syncthreads();
  }
};

}  // namespace flashmoe
