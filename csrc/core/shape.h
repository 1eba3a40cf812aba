// What a launch computes and how it is cut, as run-time values; and who owns which expert.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FLASHMOE_HD __host__ __device__ __forceinline__
#else
#define FLASHMOE_HD inline
#endif

namespace flashmoe {

enum class Activation : uint32_t { kSwiglu = 0, kGeglu = 1, kRelu = 2, kGelu = 3, kSilu = 4 };
enum class RoutingKind : uint32_t { kSoftmax = 0, kSigmoid = 1, kExternal = 2 };

FLASHMOE_HD bool is_gated(Activation a) {
  return a == Activation::kSwiglu || a == Activation::kGeglu;
}

// Equal on all ranks.  Nothing here but `chunks` may depend on the number of SMs, and `chunks` does
// not touch the arithmetic.
struct Shape {
  uint32_t world;         // W, ranks
  uint32_t experts;       // E, over all ranks
  uint32_t top_k;         // k
  uint32_t hidden;        // H, a multiple of 8
  uint32_t inter;         // I, a multiple of 8
  uint32_t max_tokens;    // the largest T of any rank
  uint32_t pool_rows;     // capacity of each rank's pool, rows
  uint32_t chunks;        // CTAs of a rank; each handles one chunk of consecutive tokens
  uint32_t tile_m;        // the most rows a tile may have, a multiple of tile_step
  uint32_t tile_step;     // heights of row tiles are multiples of it
  uint32_t tile_n1;       // columns of `h` of a GEMM1 tile
  uint32_t tile_n2;       // columns of a GEMM2 tile
  uint32_t wave_experts;  // experts of one owner whose tiles are due together
  Activation activation;
  RoutingKind routing;
  uint32_t renormalize;  // divide the chosen weights by their sum
  float scale;           // factor on the routing weights
  uint32_t groups;       // sigmoid: groups of experts, 1 for none
  uint32_t top_groups;   // sigmoid: groups a token may choose from
};

FLASHMOE_HD uint32_t ceil_div(uint32_t a, uint32_t b) { return (a + b - 1) / b; }
FLASHMOE_HD uint64_t align_up(uint64_t a, uint64_t b) { return (a + b - 1) / b * b; }
FLASHMOE_HD uint32_t min_u32(uint32_t a, uint32_t b) { return a < b ? a : b; }
FLASHMOE_HD uint32_t max_u32(uint32_t a, uint32_t b) { return a > b ? a : b; }
// The same in 32 bits, which a GPU divides by in a fraction of the time; a + b must not overflow.
FLASHMOE_HD uint32_t align_up_u32(uint32_t a, uint32_t b) { return ceil_div(a, b) * b; }
FLASHMOE_HD uint32_t saturate_u32(uint64_t a) {
  return a > 0xffffffffull ? 0xffffffffu : static_cast<uint32_t>(a);
}

// Rank r owns experts [floor(rE/W), floor((r+1)E/W)).  E and W are small enough for 32 bits.
FLASHMOE_HD uint32_t first_expert(const Shape& s, uint32_t rank) {
  return rank * s.experts / s.world;
}
FLASHMOE_HD uint32_t owned_experts(const Shape& s, uint32_t rank) {
  return first_expert(s, rank + 1) - first_expert(s, rank);
}
FLASHMOE_HD uint32_t owner_of(const Shape& s, uint32_t expert) {
  return ((expert + 1) * s.world - 1) / s.experts;
}
FLASHMOE_HD uint32_t max_owned_experts(const Shape& s) { return ceil_div(s.experts, s.world); }

// Chunk c of a rank with T tokens is [c * size, min((c + 1) * size, T)): the first chunks are full,
// the last ones may be empty.
FLASHMOE_HD uint32_t chunk_size(const Shape& s, uint32_t tokens) {
  return ceil_div(max_u32(tokens, 1), s.chunks);
}
FLASHMOE_HD uint32_t chunk_begin(const Shape& s, uint32_t tokens, uint32_t chunk) {
  return min_u32(chunk * chunk_size(s, tokens), tokens);
}

// A gate in slices: each CTA works out the logits of 8 experts for 8 tokens, so that few tokens' gate is
// shared by all CTAs, each of which reads little.  The most tokens of a rank that have it; H is to be a multiple
// of kSliceDepth.
inline constexpr uint32_t kSliceExperts = 8;
inline constexpr uint32_t kSliceTokens = 8;
inline constexpr uint32_t kSliceDepth = 64;
FLASHMOE_HD uint32_t gate_slices(const Shape& s) { return ceil_div(s.experts, kSliceExperts); }
FLASHMOE_HD uint32_t most_sliced_tokens(const Shape& s) {
  return s.chunks / gate_slices(s) * kSliceTokens;
}

// Rows of each row tile (the last may have fewer) of an expert with `rows` rows: as few tiles as
// tile_m allows, all of nearly one height.  A function of the rows alone, so the same for every W.
FLASHMOE_HD uint32_t tile_height(const Shape& s, uint32_t rows) {
  if (rows == 0) return s.tile_step;
  if (rows <= s.tile_m) return align_up_u32(rows, s.tile_step);  // as below
  const uint32_t tiles = ceil_div(rows, s.tile_m);
  return align_up_u32(ceil_div(rows, tiles), s.tile_step);
}

// Rows that the products of a tile with `rows` rows are computed for, the padding included: whole
// steps, or half a step where the rows are no more.
FLASHMOE_HD uint32_t computed_rows(const Shape& s, uint32_t rows) {
  const uint32_t half = s.tile_step / 2;
  return rows <= half ? half : align_up_u32(rows, s.tile_step);
}

FLASHMOE_HD uint32_t column_tiles(const Shape& s, uint32_t gemm) {
  return gemm == 1 ? ceil_div(s.inter, s.tile_n1) : ceil_div(s.hidden, s.tile_n2);
}

}  // namespace flashmoe
