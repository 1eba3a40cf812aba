// The sizes that the kernel is compiled for and that its host goes by: the launch, the cut of tiles, the boxes of tensor
// maps.  Python reads them from the extension (bind/launch.cpp).
#pragma once

#include <cstdint>

#include "core/shape.h"

namespace flashmoe {

inline constexpr uint32_t kThreads = 384;         // of a CTA
inline constexpr uint32_t kSharedBytes = 232448;  // of a launch's block: all that sm_90 gives one
inline constexpr uint32_t kMaxRanks = 8;

// Warps of a CTA that multiply in two groups, and that move rows.
inline constexpr uint32_t kMathGroups = 2;
inline constexpr uint32_t kCommWarps = 2;

// The most that choose<32>() takes: 32 keys in each of 32 lanes.  Besides, it stands for no expert where ids are sorted
// (count_rows() in gate.h, FewWork, which goes through its bits): a power of two, and above every id.
inline constexpr uint32_t kMaxExperts = 1024;
static_assert(kMaxExperts == 32 * 32, "choose<32>() has 32 keys a lane");
inline constexpr uint32_t kMaxGroups =
    32;  // of experts: chosen_groups() has a lane and a bit for each

// The tile family: 256 weight rows (M of the product) times up to 176 rows of tokens (its N, in steps
// of 16, or 8), 64 of K a stage.  Of 192 rows the sums would leave the other warps too few registers.
inline constexpr uint32_t kTileWeights = 256;
inline constexpr uint32_t kTileRows = 176;
inline constexpr uint32_t kTileRowsStep = 16;
inline constexpr uint32_t kTileK = 64;
// In fp16 up to 128 rows, in steps of 64, or 32 (multiply_tile() in tile.h).
inline constexpr uint32_t kHalfTileRows = 128;
inline constexpr uint32_t kHalfTileRowsStep = 64;

// A tile's rows are fetched in boxes of 16, 32, 64 and 128 rows.
inline constexpr uint32_t kRowBoxes = 4;
inline constexpr uint32_t kBoxRows = 16;  // the least
FLASHMOE_HD constexpr uint32_t box_rows(uint32_t box) { return kBoxRows << box; }

// Weight rows of a product by units (few.h), and of the box that brings them; in a gated GEMM1 so many of gate and the
// same columns' of up in turn.
inline constexpr uint32_t kUnitBoxRows = 64;
inline constexpr uint32_t kUnitBoxAtom = 8;

// What a gate in slices fetches at once: so many blocks of kSliceDepth columns at most.
inline constexpr uint32_t kSliceBlocks = 32;

// Columns of the gate's product for E experts; the box of the gate's tensor map has half as many rows.
inline constexpr uint32_t kGateExperts = 128;  // the most
FLASHMOE_HD constexpr uint32_t gate_columns(uint32_t experts) {
  return experts <= 16 ? 16 : experts <= 64 ? 64 : kGateExperts;
}

}  // namespace flashmoe
