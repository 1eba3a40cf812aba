// Who computes which of few tokens' units (few.h): what every warp works out from the choices.
#pragma once

#include <cstdint>

#include "device/cta.h"

namespace flashmoe {

// A bit a choice.
using ChoiceMask = uint64_t;
static_assert(kFewRows == 64, "a mask holds all choices, and a lane two of them");
__device__ __forceinline__ ChoiceMask choices_where(bool first, bool second) {
  return __ballot_sync(0xffffffffu, first) |
         static_cast<ChoiceMask>(__ballot_sync(0xffffffffu, second)) << 32;
}
__device__ __forceinline__ ChoiceMask choices_before(uint32_t choice) {
  return (ChoiceMask{1} << choice) - 1;
}

// What a warp knows of the launch: a lane has its choice and the 32nd after it.  Experts are in the order of their
// numbers, an expert's rows in that of tokens, as the plan (core/plan.h) would have them.
struct FewWork {
  uint32_t id[2];       // the choices' experts
  ChoiceMask peers[2];  // the choices of the same one
  uint32_t first[2];    // its first row, in the pool and among the results
  uint32_t hit[2];  // of an expert's first choice its place among the experts hit; else beyond them
  uint32_t hits;    // experts hit
  uint32_t stream;  // this one's number
  uint32_t units;   // of GEMM1
  uint32_t own;     // of them, this stream's
  uint32_t second;  // the stream's first unit of GEMM2: those with one of GEMM1 less come first

  template <bool kTraced>
  __device__ __forceinline__ FewWork(const Shared<kTraced>& sh, uint32_t choices, uint32_t which)
      : stream(which) {
    constexpr uint32_t kNobody = kMaxExperts;
    const uint32_t lane = threadIdx.x % 32;
    ChoiceMask less[2] = {};
#pragma unroll
    for (uint32_t c = 0; c < 2; ++c) {
      id[c] = lane + 32 * c < choices ? sh.choices.id[lane + 32 * c] : kNobody;
      peers[c] = ~ChoiceMask{0};
    }
    // Bit by bit, from the highest: choices whose number is the same so far, and those whose is less.
#pragma unroll 1
    for (uint32_t bit = kNobody; bit != 0; bit /= 2) {
      const ChoiceMask ones = choices_where((id[0] & bit) != 0, (id[1] & bit) != 0);
#pragma unroll
      for (uint32_t c = 0; c < 2; ++c) {
        const bool one = (id[c] & bit) != 0;
        if (one) less[c] |= peers[c] & ~ones;
        peers[c] &= one ? ones : ~ones;
      }
    }
    bool leads[2];
#pragma unroll
    for (uint32_t c = 0; c < 2; ++c) {
      leads[c] = id[c] != kNobody && (peers[c] & choices_before(lane + 32 * c)) == 0;
    }
    const ChoiceMask leaders = choices_where(leads[0], leads[1]);
    hits = __popcll(leaders);
#pragma unroll
    for (uint32_t c = 0; c < 2; ++c) {
      first[c] = __popcll(less[c]);
      hit[c] = leads[c] ? __popcll(less[c] & leaders) : hits;
    }
    units = hits * sh.by_unit.columns[0];
    const uint32_t streams = sh.by_unit.streams;
    uint32_t left = units;
    own = 0;
#pragma unroll 1
    for (; left >= streams; left -= streams) ++own;
    second = stream - left;
    if (stream < left) {
      ++own;
      second += streams;
    }
  }
  // The row of the lane's choice.
  __device__ __forceinline__ uint32_t row(uint32_t c) const {
    return first[c] + __popcll(peers[c] & choices_before(threadIdx.x % 32 + 32 * c));
  }
};

// One of a stream's units.
struct FewUnit {
  uint32_t tile;  // its place in the rank's order
  uint32_t gemm;
  uint32_t hit;
  uint32_t column;  // of 64 or 128 columns: shape_by_units()
  uint32_t blocks;  // of kTileK columns, its depth
  uint32_t expert;
  ChoiceMask peers;  // the choices that are its rows
  uint32_t first;    // its first row
  __device__ __forceinline__ uint32_t rows() const { return __popcll(peers); }
};

// The stream's n-th; false if there are no more.  A whole warp.
template <bool kTraced>
__device__ __forceinline__ bool find_unit(const Shared<kTraced>& sh, const FewWork& work,
                                          uint32_t n, FewUnit& unit) {
  const FewCourse& course = sh.by_unit;
  const bool up = n < work.own;
  const uint32_t g = up ? 0 : 1;
  const uint32_t at =
      up ? work.stream + n * course.streams : work.second + (n - work.own) * course.streams;
  if (!up && at >= work.hits * course.columns[1]) return false;
  unit.gemm = 1 + g;
  unit.tile = up ? at : work.units + at;
  unit.hit = __umulhi(at, course.inverse[g]);
  unit.column = at - unit.hit * course.columns[g];
  unit.blocks = (up ? sh.shape.hidden : sh.shape.inter) / kTileK;
  const ChoiceMask where = choices_where(work.hit[0] == unit.hit, work.hit[1] == unit.hit);
  const uint32_t choice = __ffsll(static_cast<long long>(where)) - 1, lane = choice % 32;
  const bool later = choice >= 32;
  unit.expert = __shfl_sync(0xffffffffu, later ? work.id[1] : work.id[0], lane);
  unit.peers = __shfl_sync(0xffffffffu, later ? work.peers[1] : work.peers[0], lane);
  unit.first = __shfl_sync(0xffffffffu, later ? work.first[1] : work.first[0], lane);
  return true;
}

}  // namespace flashmoe
