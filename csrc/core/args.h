// What a launch is given: one LaunchArgs by value, filled by the host before the launch.
#pragma once

#include <cstdint>

#include "core/course.h"
#include "core/flight.h"
#include "core/heap.h"
#include "core/shape.h"
#include "core/sizes.h"

namespace flashmoe {

struct Record;
struct RingHeader;
struct TileImage;
struct LogCursor;
struct StepImage;

// Withholds one rank's signal for one expert, to test the diagnosis on a GPU.
struct FaultArgs {
  uint32_t lost_signal_rank;  // 0xffffffff: none
  uint32_t lost_signal_expert;
};

// One rank of this launch.
struct alignas(64) RankArgs {
  // CUtensorMaps, of boxes that are 64 columns wide (core/sizes.h).
  uint8_t map_pool[kRowBoxes][128];  // pool [pool_rows][H]
  uint8_t map_h[kRowBoxes][128];     // h [pool_rows][I]
  uint8_t map_up[128];    // gated: [experts owned][2][I][H]; plain: [experts owned][I][H]
  uint8_t map_down[128];  // [experts owned][H][I]
  // Boxes of kUnitBoxRows.
  uint8_t map_up_unit[128];
  uint8_t map_down_unit[128];
  uint8_t map_x[128];     // x [tokens][H], box 64 x gate_box_tokens
  uint8_t map_gate[128];  // gate [E][H], box 64 x gate_columns(E) / 2
  // The same by blocks of 64 columns, [H / 64][rows][64], box min(H / 64, kSliceBlocks) x 8 x 64: a gate in slices.
  uint8_t map_x_slice[128];
  uint8_t map_gate_slice[128];
  const void* x;         // [tokens][H] dtype
  const float* bias;     // [E], or null
  void* y;               // [tokens][H] dtype
  const int32_t* ids;    // external routing: [tokens][k], or null
  const float* weights;  // external routing: [tokens][k], or null
  uint32_t rank;
  uint32_t tokens;
  uint32_t gate_box_tokens;  // 8 or 32
  Course course;
};

// Rows of an expert, on average, from which on and up to which a rank alone has pairs.  Both ends were measured, in bf16
// with tiles of up to 176 rows (docs/performance.md, "What was tried").
inline constexpr uint32_t kPairedFrom = 145, kPairedTo = 511;

// CTAs of a cluster.  Those of a pair fetch weights that both need once; but neither goes on without the other, so where
// an expert has one row tile, or so many that others have brought its weights into L2, a CTA alone is faster
// (docs/performance.md).  A rank with an odd number of CTAs goes without pairs.
inline uint32_t pair_size(const Shape& s, const RankArgs& rank) {
  if (s.chunks % 2 != 0) return 1;
  if (rank.course.gathers == 0) return 2;
  const uint64_t rows = uint64_t{rank.tokens} * s.top_k, experts = s.experts;
  return kPairedFrom * experts <= rows && rows <= kPairedTo * experts ? 2 : 1;
}

struct LaunchArgs {
  const char* code;     // of the entry point launched, where the host knows it: else null
  uint64_t code_bytes;  // a multiple of 128
  Shape shape;
  HeapLayout layout;
  Heap heaps[kMaxRanks];      // as this process reaches them
  RankArgs ranks[kMaxRanks];  // of this launch: CTA b belongs to rank b / shape.chunks of these
  uint32_t pair_size;         // pair_size() of the ranks, also the launch's cluster dimension
  uint32_t ring_capacity;
  uint32_t keep_last;
  uint32_t iteration_base;  // epoch at which iteration 0 starts, less one
  uint64_t deadline_ns;
  uint64_t first_deadline_ns;
  FlightSlot* slots;  // [ranks of the launch][chunks][lanes], pinned host memory
  RingHeader* rings;  // the same, or null
  Record* records;    // the same, [ring_capacity] each
  FaultArgs fault;
  TileImage* images;          // [ranks of the launch][chunks][image_capacity], or null
  LogCursor* images_written;  // [ranks of the launch][chunks]
  StepImage* steps;           // [ranks of the launch][chunks][step_capacity + 1][lanes], or null
  uint32_t image_capacity;
  uint32_t step_capacity;  // launches; where the last ones are kept a power of two
};
static_assert(sizeof(LaunchArgs) <= 32764, "a kernel's parameters hold at most 32,764 bytes");

}  // namespace flashmoe
