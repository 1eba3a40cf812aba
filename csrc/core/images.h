// What a kernel leaves for the host to make records of (flashmoe/world/images.py).  A record is some fifty instructions;
// a tile has a dozen, of which its task says most anyway, and what comes before the tiles is run once, while its code
// is fetched.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/events.h"
#include "core/plan.h"
#include "core/sizes.h"

namespace flashmoe {

// An iteration as an image, or a record, holds it.
FLASHMOE_HD uint16_t iter_of(uint32_t iteration) {
  return static_cast<uint16_t>(iteration < 0xffffu ? iteration : 0xffffu);
}
FLASHMOE_HD uint8_t iter_flags_of(uint32_t iteration) {
  return iteration < 0xffffu ? 0 : kFlagIterWrapped;
}

// Where a GEMM2 tile's rows of one source go: row i of the expert, i < end, to base + i * row_bytes.
struct alignas(16) ReturnPath {
  char* base;
  uint32_t end;  // first row of the expert that is of a later source
  uint32_t source;
};

// By the leader of a math group.  Both clocks are read as it begins; what follows by one of them, and the host knows how
// they go: from one tile's begin to the next one's, or to where the lane is past all of them.  The pace changes by some
// percent within a launch, so that no longer stretch will do.
struct TileStamps {
  uint64_t begin_ns;
  uint32_t begin_cycles;
  uint32_t products_cycles;  // GEMM2's products are done; of GEMM1 the same as the end
  uint32_t end_cycles;       // all is stored
  uint32_t stall_cycles;
};

// By the load lane and, where rows are gathered, by both comm warps.
struct LoadStamps {
  uint64_t begin_ns;  // 0: this warp brought nothing
  uint64_t end_ns;
  uint32_t cycles;
  uint32_t stall_cycles;
};

struct alignas(16) TileImage {
  Tile tile;  // gemm 0: no more tiles; rows 0: none for this CTA, but one for the other of the pair
  uint32_t wait_kind;  // EventKind the scheduler waited for, 0 if it did not
  uint32_t wait_lacking;
  uint16_t iter;  // as in a Record
  uint16_t iter_flags;
  uint64_t wait_from;
  uint64_t wait_to;
  TileStamps stamps[kMathGroups];
  uint64_t scheduled_from_ns;  // the scheduler has had something to do
  uint64_t scheduled_ns;       // and handed the tile over
  LoadStamps loads[1 + kCommWarps];
  ReturnPath returns[kMaxRanks];  // of a GEMM2 tile, the first one with rows in it first
};
// As much of it as a launch of so many ranks fills.
FLASHMOE_HD uint32_t image_bytes(uint32_t ranks) {
  return static_cast<uint32_t>(offsetof(TileImage, returns) + ranks * sizeof(ReturnPath));
}
static_assert(sizeof(ReturnPath) == 16, "a bulk copy moves multiples of 16 bytes");

// How far a log has come that all launches write into.
struct alignas(16) LogCursor {
  uint64_t count;  // ever written
  uint32_t next;   // where the next one goes
  uint32_t unused;
};

// Steps of a launch before the roles part, which every lane goes through.
enum class Step : uint32_t { kGate = 0, kCounts = 1, kPlan = 2, kDispatch = 3 };
inline constexpr uint32_t kSteps = 4;

// Of a launch and a lane.  The load lane's warp writes it as it leaves, the lane itself how it left, when it was past its
// tiles and, by units, the end of its plan.  The scheduler's own records say what all lanes awaited before the roles
// parted.
struct alignas(16) StepImage {
  uint64_t begin_ns;
  uint64_t end_ns[kSteps];     // 0: not reached, or a record of the lane's own
  uint64_t left_ns;            // 0: not yet
  uint64_t past_tiles_ns;      // 0: no math lane's, or it has not come to the end of its tiles
  uint32_t past_tiles_cycles;  // means nothing where that is 0
  uint16_t iter;               // as in a Record
  uint16_t iter_flags;
  uint32_t tokens;  // that the CTA has routed
  uint32_t sm;      // physical SM (%smid)
  uint32_t cycles;  // from begin to end
};

}  // namespace flashmoe
