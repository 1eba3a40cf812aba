// One CTA of the host engine: what its six lanes share, and what each lane does in a launch.
//
// The order of a launch (gate, barrier, counts, dispatch, tiles, return, combine; docs/design.md) is in
// run(); the lanes' work is in cta_prepare.h, cta_move.h and cta_tiles.h.
#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <vector>

#include "core/actor.h"
#include "core/arrival.h"
#include "core/plan.h"
#include "host/cta_run.h"
#include "host/engine.h"
#include "host/gate.h"
#include "host/handover.h"
#include "host/platform.h"
#include "host/team.h"

namespace flashmoe::host {

inline constexpr uint32_t kStageDepth = 256;  // K of a stage
inline constexpr uint32_t kStages = 3;
inline constexpr uint32_t kTaskSlots = 2;
inline constexpr uint32_t kPanelColumns = 64;  // GEMM1: 32 gate and 32 up columns; GEMM2: 64
inline constexpr uint32_t kCombineBlock = 8;   // tokens that a lane takes at a time
static_assert(kPanelColumns >= 2 * kTileN1 && kPanelColumns >= kTileN2,
              "a stage must hold the weights of a whole tile");

// A wait that the sched lane went through for the lanes it hands over to.
struct SharedWait {
  Awaited what{EventKind::kNone, kNoPeer, kNoExpert, kNoTile};
  uint64_t from = 0;
  uint64_t to = 0;  // 0: there was none
  uint32_t lacking = 0;
  Status status = Status::kOk;
};

struct Task {
  bool exit = false;
  Tile tile{};
  SharedWait wait{};
};

// Operands of kStageDepth steps of K, as floats.
struct Stage {
  alignas(64) float rows[kTileM * kStageDepth];            // [row][k]
  alignas(64) float columns[kStageDepth * kPanelColumns];  // [k][column]
};

template <bool kTraced>
class Cta final : public CtaRun {
 public:
  using LaneActor = Actor<HostPlatform, kTraced>;

  Cta(Machine& machine, uint32_t rank, uint32_t cta);
  void run(Lane lane) override;

 private:
  // cta_prepare.h: everything before the roles split.
  void gate_share(LaneActor& a, Lane lane);
  void count_chunk(LaneActor& a);
  Status prepare(LaneActor& a);
  Status exchange_counts(LaneActor& a);
  void plan(LaneActor& a);
  void clear_idle_set();

  // cta_move.h: rows to their experts and back.
  Status comm_lane(LaneActor& a);
  void dispatch(LaneActor& a);
  uint64_t send_rows(uint32_t owner, uint32_t first, uint32_t last);
  void copy_rows(uint32_t e, uint16_t* to);
  void publish_rows(uint32_t owner, uint32_t e);
  void put_rows(uint32_t owner, uint32_t e);
  Status combine(LaneActor& a);
  void sum_token(uint32_t token, float* sum, float* widened);

  // cta_tiles.h: tiles.
  Status sched_lane(LaneActor& a);
  SharedWait await_operands(LaneActor& a, const Tile& tile);
  Status load_lane(LaneActor& a);
  void fill(const Tile& tile, uint32_t k0, uint32_t depth, Stage& stage) const;
  Status math_lane(LaneActor& a, uint32_t half);
  void store_hidden(const Tile& tile, uint32_t row0, uint32_t rows, const float* sums);
  void give_back(LaneActor& a, const Tile& tile, uint32_t row0, uint32_t rows, const float* sums);
  void tell_sources(const Tile& tile);

  uint32_t first_row(uint32_t e) const {  // of the own chunk within the expert
    return source_start(tables_, rank_, e) + tables_.chunk_prefix[e];
  }
  void send_signal(uint32_t to, uint64_t offset, uint64_t value);

  // The one wait, and with it the record that other lanes share.
  SharedWait await(LaneActor& a, const Awaited& what, uint64_t* word, Until until, uint64_t target,
                   bool counted);
  // Raises abort if this wait was the one that gave up.
  Status settle(Status status);
  void slow_down() const;
  void leave(LaneActor& a, Status status);

  uint32_t tile_columns(const Tile& tile) const;

  Machine& m_;
  const Shape& s_;
  const HeapLayout& l_;
  const Heap& heap_;       // of the own rank
  Heap peers_[kMaxRanks];  // as this rank reaches them: null beyond pointers
  const uint32_t rank_;
  const uint32_t cta_;
  uint32_t epoch_ = 0;
  uint32_t token_begin_ = 0;  // of the own chunk
  uint32_t token_end_ = 0;
  const Fault* lost_signal_;
  const Fault* wrong_count_;
  const Fault* slow_;

  CtaBarrier barrier_{kLanes};
  PlanTables tables_{};
  Status status_ = Status::kOk;  // written by sched between two barriers
  uint32_t rows_needed_ = 0;
  std::vector<SharedWait> shared_waits_;
  std::atomic<bool> bad_ids_{false};
  std::atomic<uint32_t> next_unit_{0};
  std::atomic<uint32_t> next_block_{0};
  std::atomic<uint32_t> lanes_left_{0};

  Ring<Task, kTaskSlots, 3> tasks_;                  // readers: load, math0, math1
  std::unique_ptr<Ring<Stage, kStages, 2>> stages_;  // readers: math0, math1
};

}  // namespace flashmoe::host
