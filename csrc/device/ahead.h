// Weights brought into L2 ahead of their loads.
//
// Where each expert has few rows, nearly every weight comes from memory, and the ring of stages is too
// short to hide that: a load is issued about two blocks of K before its products.  So the math threads
// ask L2 for the half of the tile's weights that this CTA loads, kAheadBlocks of K before the products;
// the scheduler says where it lies.
#pragma once

#include <cstdint>

#include "device/cta.h"

namespace flashmoe {

#ifndef FLASHMOE_AHEAD
#define FLASHMOE_AHEAD 6
#endif
inline constexpr uint32_t kAheadBlocks = FLASHMOE_AHEAD;
inline constexpr uint32_t kHalfWeights = kTileWeights / 2;

// The half of the weights that this CTA loads for both of a pair; nothing where the two do not share.
template <bool kGated>
__device__ __forceinline__ WeightsAhead weights_ahead(const Shape& shape, const Place& place,
                                                      const Tile& tile, uint32_t shared) {
  const bool up = tile.gemm == 1, split = kGated && up;
  const uint32_t depth = up ? shape.hidden : shape.inter;
  const uint32_t rows = up ? shape.inter : shape.hidden;  // of a matrix
  const uint32_t half = place.pair_rank;
  const uint32_t matrix = split ? tile.expert * 2 + half : tile.expert;
  const uint32_t row0 = (split ? tile.col_tile : tile.col_tile * 2 + half) * kHalfWeights;
  const char* base = static_cast<const char*>(up ? place.args->up : place.args->down);
  return {base + 2 * (static_cast<uint64_t>(matrix) * rows + row0) * depth, depth * 2,
          // Rows beyond the matrix are the next one's, or nobody's.
          shared != 0 && row0 + kHalfWeights <= rows ? depth / kTileK : 0};
}

// One thread's sectors of a block, of two rows.
struct SectorsAhead {
  const char* at;
  uint32_t second;  // bytes to the second row

  __device__ __forceinline__ explicit SectorsAhead(const WeightsAhead& w) {
    at = w.at + (threadIdx.x / 4) % (kHalfWeights / 2) * w.row_bytes + threadIdx.x % 4 * 32;
    second = kHalfWeights / 2 * w.row_bytes;
  }
  __device__ __forceinline__ void fetch(uint32_t block) const {
    const char* p = at + block * kRowBytes;
    ptx::prefetch_l2(p);
    ptx::prefetch_l2(p + second);
  }
};

}  // namespace flashmoe
