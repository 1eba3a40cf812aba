// What the threads of one CTA share: its place in the launch, its barriers, its tasks, its actors.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/actor.h"
#include "core/args.h"
#include "core/course.h"
#include "core/heap.h"
#include "core/images.h"
#include "core/plan.h"
#include "core/shape.h"
#include "core/sizes.h"
#include "device/sync.h"
#include "device/transport.h"

namespace flashmoe {

// Warp roles: warps 0 to 3 move, warps 4 to 7 and 8 to 11 are the two math groups.
inline constexpr uint32_t kLoadWarp = 0;
inline constexpr uint32_t kSchedWarp = 1;
inline constexpr uint32_t kCommWarp = 2;  // and the one after
inline constexpr uint32_t kMathWarp = 4;
inline constexpr uint32_t kGroupThreads = 128;
inline constexpr uint32_t kTeamWarps = kGroupThreads / 32;

// Stages of a tile (core/sizes.h), kTileK of its depth each.
inline constexpr uint32_t kRowBytes = kTileK * 2;  // of a stage
inline constexpr uint32_t kStageBytesWeights = kTileWeights * kRowBytes;
inline constexpr uint32_t kStages = 3;
inline constexpr uint32_t kStageBytes = kStageBytesWeights + kTileRows * kRowBytes;
// There is room for one more once no row bounces through shared memory on its way: from the beginning where rows are
// gathered (Course::gathers).
inline constexpr uint32_t kMostStages = kStages + 1;
// A traced kernel with NVSHMEM has few registers left: its groups store less at a time, and its comm warps load less.
template <bool kTraced>
inline constexpr bool kShortOfRegisters = kPuts && kTraced;
// What a math group's sums pass through on their way out, in the last stage that it has read of a tile; twice, in turn.
template <bool kTraced>
inline constexpr uint32_t kPassBytes = kShortOfRegisters<kTraced> ? 2048 : 4096;
static_assert(2 * kPassBytes<false> <= kStageBytesWeights / 4,
              "two passes fit a group's rows of gate weights");

// Rows that comm warps dispatch bounce through pieces of shared memory behind the stages, six in turn.
inline constexpr uint32_t kPieces = 6;
inline constexpr uint32_t kPieceBytes = 4096;
inline constexpr uint32_t kCommBytes = kCommWarps * kPieces * kPieceBytes;
// Results that a comm warp sums come to registers, so many times 16 bytes a lane at once.
template <bool kTraced>
inline constexpr uint32_t kCommUnits = kShortOfRegisters<kTraced> ? 7 : 8;

// Result rows on their way to the math warps that sum them, each warp's own ring, in the memory of the
// tiles' stages when there are no more tiles.
inline constexpr uint32_t kRingUnits = 4;  // of 16 bytes, a lane and row
inline constexpr uint32_t kRingPieces =
    kStages * kStageBytes / (kMathGroups * kTeamWarps * 2 * 512 * kRingUnits);

// The gate's ring of stages, in the same memory as the tiles' before there are any.
inline constexpr uint32_t kGateStages = 8;

// Plan tables of up to so many words lie in shared memory, larger ones in the heap.
inline constexpr uint32_t kTableWords = 1536;

// The ring of tasks has a place more than are at hand, so that a task that is done can be published after the next one
// is handed over.
inline constexpr uint32_t kTasks = kTasksAhead + 1;

// By units (few.h) each math group has a ring of its own in the stages: weights, then 8 rows.
inline constexpr uint32_t kFewWeightBytes = kUnitBoxRows * kRowBytes;  // of a product
inline constexpr uint32_t kFewStageBytes = kFewProducts * kFewWeightBytes + kFewTokens * kRowBytes;
inline constexpr uint32_t kFewRingBytes = 2 * kStageBytes;
inline constexpr uint32_t kFewStages = kFewRingBytes / kFewStageBytes;
static_assert(kFewProducts * kUnitBoxRows == kFewWidth, "a product has the rows of a box");
static_assert(kFewStreams == kMathGroups && kFewTokens == 8 && kFewStageBytes % 1024 == 0,
              "a stream is a math group, and swizzled rows lie in whole atoms");

struct Task : TileImage {
  uint32_t blocks;  // of kTileK columns, the tile's depth
  uint32_t turns;   // of the stages: the deeper tile's blocks, so that both CTAs stay in step
  uint32_t shared;  // both CTAs' tiles have the same weights
  uint32_t stages;  // in the ring from this task on
};

// What the first CTA of a pair tells the second: a pair of tiles and the wait for their rows.
struct alignas(16) PairMessage {
  uint32_t index;  // of the second CTA's tile, or of the first's where `has` is 0
  uint32_t has;    // the second CTA has a tile; kNoWork: no more
  uint32_t turns;  // Task
  uint32_t flags;  // kShared, kAllStages
  uint64_t wait_kind_lacking;
  uint64_t wait_from;
  uint64_t wait_to;
};
template <bool kTraced>
inline constexpr uint32_t kMessageBytes =
    kTraced ? sizeof(PairMessage) : offsetof(PairMessage, wait_kind_lacking);
inline constexpr uint32_t kNoWork = 2;
inline constexpr uint32_t kShared = 1;     // Task::shared
inline constexpr uint32_t kAllStages = 2;  // Task::stages is kMostStages

// Tokens of the rank.
struct TokenRange {
  uint32_t begin;
  uint32_t tokens;
};

// Where a loaded piece of a row goes.
struct PieceGoal {
  char* to;
  uint32_t bytes;
};

// Tokens of the chunk's order that are combined together; none: there are no more.
struct TokenBatch {
  uint32_t from;
  uint32_t tokens;
};

// What the warps of a math group, which combine each for itself, tell each other.
struct CombineTeam {
  uint64_t awaited[kTeamWarps];  // the batch whose results a warp lacks (from << 32 | tokens), or 0
  uint32_t summed;               // tokens, not yet in the trace
  uint32_t finished;             // warps but for the first that have no tokens left
  uint32_t failed;               // a wait did not end well
};

// The barriers of a CTA, made all at once, a thread each: see barrier_arrivals().  What a CTA shares is one line of
// bases: of a second one the compiler would ask each time whether there is any.
struct GateBarriers : Course {
  uint64_t gate_full[kGateStages];
  uint64_t gate_empty[kGateStages];
};
struct Barriers : GateBarriers {
  uint64_t full[kMostStages];
  uint64_t empty[kMostStages];
  uint64_t moved;  // first CTA: no comm warp of the pair needs pieces any more
  // The load lane and the math threads are done with a task.  Comm warps that gather count only if traced, since what they
  // stamp comes after all they bring.  Else math cannot finish a task before gather_end() without their part of each
  // stage, and at the first one behind that they return, having read what it is.
  uint64_t task_empty[kTasks];
  uint64_t task_full[kTasks];
  uint64_t pair_full[kTasks];   // second CTA: a message is here, of kMessageBytes
  uint64_t pair_empty[kTasks];  // first CTA: the second can take another task
  uint64_t order_full;          // the chunk's tokens in the order of combining are there
  uint64_t piece_full[kCommWarps][kPieces];
  uint64_t first_full[kWarps];  // of the rows that each warp dispatches before the roles part
  uint64_t ring_full[kMathGroups * kTeamWarps][kRingPieces];
};
// In their place, by units.
struct FewBarriers : GateBarriers {
  uint64_t unit_full[kMathGroups][kFewStages];
  uint64_t unit_empty[kMathGroups][kFewStages];
};
inline constexpr uint32_t kBarriers = (sizeof(Barriers) - sizeof(Course)) / 8;
static_assert(kBarriers <= kThreads && sizeof(Course) % 8 == 0 &&
              sizeof(FewBarriers) <= sizeof(Barriers));

// Arrivals that fill a stage: the load lane's and those of all threads that gather.
__device__ __forceinline__ uint32_t fills(bool gathers) {
  return gathers ? 1 + 32 * kCommWarps : 1;
}

// Arrivals at the end of a task by those who load for it.
template <bool kTraced>
__device__ __forceinline__ uint32_t load_ends(bool gathers) {
  return kTraced && gathers ? 1 + kCommWarps : 1;
}

// How many arrivals the barrier at place `i` of them waits for.
template <bool kTraced>
__device__ __forceinline__ uint32_t barrier_arrivals(uint32_t i, bool few, bool gathers,
                                                     uint32_t pair_size) {
  constexpr uint32_t kGate = 2 * kGateStages;
  if (i < kGate) return i < kGateStages ? 1 : 4 * pair_size;
  if (few) return i < kGate + kMathGroups * kFewStages ? 2 : kTeamWarps;
  constexpr uint32_t kEmpty = kGate + kMostStages, kMoved = kEmpty + kMostStages;
  constexpr uint32_t kTaskEmpty = kMoved + 1;
  if (i < kEmpty) return fills(gathers);
  if (i < kMoved) return kMathGroups * kTeamWarps * pair_size;
  if (i == kMoved) return kCommWarps * pair_size;
  return i < kTaskEmpty + kTasks ? load_ends<kTraced>(gathers) + kMathGroups * kGroupThreads : 1;
}

// The choices of few tokens, of their token * k + j-th.
struct FewChoices {
  uint32_t id[kFewRows];
  float weight[kFewRows];
};

// What a scheduler hands over next: a tile for each CTA of a pair, rows 0: none for that one; and what it tells the
// second CTA.
struct PairTurn {
  Tile one;
  Tile two;
  PairMessage message;
};

// What a scheduler that puts keeps besides.  Row tiles whose results it has yet to put are those that end in one turn of
// its loop, in which it hands over one task.
template <bool kPut>
struct PutState : Barriers {};
template <>
struct PutState<true> : Barriers {
  uint32_t pending[kTasks + 2];  // indices of tiles
  uint32_t pending_tiles;
  PairTurn turn;
};

template <bool kTraced>
struct Shared : PutState<kPuts> {
  PairMessage messages[kTasks];
  uint64_t other_left;  // first CTA: the second has left before the roles parted
  PieceGoal piece_goals[kCommWarps][kPieces];
  Task tasks[kTasks];
  GpuActor<kTraced> actors[kLanes];
  TileLog<kTraced> log;
  StepEnds<kTraced> steps;
  Shape shape;
  HeapLayout layout;
  Heap heaps[kMaxRanks];
  PlanTables tables;
  TokenRange own;         // the chunk's tokens
  uint32_t status;        // Status, as this CTA knows it
  uint32_t epoch;         // of this launch
  uint32_t lacking_word;  // first of the words awaited together that is not there yet
  uint32_t bad_ids;
  uint32_t next_token;  // of this chunk's order, not yet taken for combining
  uint32_t due[32];     // tokens of the chunk by when they are due, while the order is made
  TokenBatch batches[kMathGroups];  // being combined
  CombineTeam teams[kMathGroups];
  uint32_t math_combines;  // the math groups have no tiles left
  union {
    uint32_t table_words[kTableWords];
    FewChoices choices;
  };
};

template <bool kTraced>
__device__ __forceinline__ FewBarriers& few_barriers(Shared<kTraced>& sh) {
  return *reinterpret_cast<FewBarriers*>(&sh);
}

// Whether the launch goes by units; NVSHMEM's flavour has no code for that.
template <bool kTraced>
__device__ __forceinline__ bool by_units(const Shared<kTraced>& sh) {
  return !kPuts && sh.few != 0;
}

// Where this CTA stands.  In registers of every thread; everything else is in Shared.
struct Place {
  uint32_t rank;
  uint32_t chunk;   // index of this CTA within its rank
  uint32_t tokens;  // of the rank
  uint32_t epoch;
  uint32_t pair_size;  // CTAs of a cluster, 1 or 2
  uint32_t pair_rank;  // this one's place in it
  uint32_t to_other;  // from a shared address here to the same in the other CTA, 0 if there is none
  Heap heap;          // the rank's own
  const RankArgs* args;
};

// Whether the rows of a CTA's `task`-th tile, if it is a GEMM1 tile, are for those who gather them to await.
template <bool kTraced>
__device__ __forceinline__ bool gathers_unawaited(const Shared<kTraced>& sh, uint32_t task) {
  return sh.gathers && task == 0;
}

// Cycles for which barriers were awaited, where that was not over at once.
template <bool kTraced>
struct Stall {
  uint32_t cycles = 0;
  __device__ __forceinline__ void await(uint64_t* barrier, uint32_t parity) {
    [[maybe_unused]] const uint32_t from = kTraced ? ptx::clock32() : 0;
    ptx::mbarrier_wait(barrier, parity);
    if constexpr (kTraced) cycles += ptx::clock32() - from;
  }
  __device__ __forceinline__ void await_if_late(uint64_t* barrier, uint32_t parity) {
    if constexpr (kTraced) {
      if (ptx::mbarrier_test(barrier, parity)) return;
    }
    await(barrier, parity);
  }
};

// A stage that a math warp has read, given back to the loads of both CTAs of a pair.
struct StageRelease {
  uint32_t to_other;  // from an address here to the same in the other CTA; 0 where there is none
  __device__ __forceinline__ void operator()(uint64_t* empty) const {
    if (threadIdx.x % 32 != 0) return;
    ptx::mbarrier_arrive(empty);
    if (to_other != 0) ptx::mbarrier_arrive_other(ptx::shared_address(empty) + to_other);
  }
};

inline constexpr uint32_t kSharedState = 5120 + 4 * kTableWords;
#ifndef FLASHMOE_NO_TRACE
static_assert(sizeof(Shared<true>) <= kSharedState,
              "barriers, tasks, actors and tables must fit their part");
#endif
// Stages, or fewer and what moved rows pass through.
inline constexpr uint32_t kWorkBytes = kMostStages * kStageBytes;
static_assert(kCommBytes <= kStageBytes, "moved rows take the place of a stage");
static_assert(kMathGroups * kFewRingBytes <= kWorkBytes,
              "rings of units take the place of all stages");
static_assert(kWorkBytes + kSharedState <= kSharedBytes, "a block has no more");

// The actor whose leader this thread is, or -1.
__device__ __forceinline__ int led_lane() {
  constexpr uint32_t kMath0 = static_cast<uint32_t>(Lane::k_math0);
  static_assert(static_cast<uint32_t>(Lane::k_load) == kLoadWarp &&
                    static_cast<uint32_t>(Lane::k_sched) == kSchedWarp &&
                    static_cast<uint32_t>(Lane::k_comm0) == kCommWarp && kMath0 == kMathWarp &&
                    static_cast<uint32_t>(Lane::k_math1) == kMath0 + 1,
                "a lane is numbered as its first warp, but for the second math group");
  const uint32_t thread = ptx::thread_id(), warp = thread / 32;
  if (thread % 32 != 0) return -1;
  if (warp <= kMathWarp) return static_cast<int>(warp);
  return warp == kMathWarp + kTeamWarps ? static_cast<int>(Lane::k_math1) : -1;
}

// A step ends for all actors, which have gone through it together.  A barrier of the CTA follows, or the launch's end, so that
// none does anything else before.  One thread says so: code that runs once a launch takes as long as its instructions take
// to come.
template <bool kTraced>
__device__ __forceinline__ void mark_all(Shared<kTraced>& sh, Step step) {
  if constexpr (kTraced) {
    if (ptx::thread_id() == 0) sh.steps.ns[static_cast<uint32_t>(step)] = ptx::globaltimer();
  }
}

// Brings the launch's code into L2, of its lines each `step`-th from `first` on.  A launch may find none of it there, and
// what is run once and in line takes as long as its instructions take to come: from memory, at worst.
__device__ __forceinline__ void prefetch_code(const LaunchArgs& args, uint32_t first,
                                              uint32_t step) {
  constexpr uint32_t kLine = 128;
  for (uint32_t at = first * kLine; at < args.code_bytes; at += step * kLine) {
    ptx::prefetch_l2(args.code + at);
  }
}
// By all threads of all CTAs together, and by one thread of each.
__device__ __forceinline__ void prefetch_code_by_all(const LaunchArgs& args) {
  prefetch_code(args, ptx::thread_id() * gridDim.x + blockIdx.x, kThreads * gridDim.x);
}
__device__ __forceinline__ void prefetch_code_by_one(const LaunchArgs& args) {
  prefetch_code(args, blockIdx.x, gridDim.x);
}

// Ends the launch for every rank: whoever gives up calls it once.
template <bool kTraced>
__device__ inline void raise_abort(const Shared<kTraced>& sh, Status status) {
  for (uint32_t r = 0; r < sh.shape.world; ++r) {
    if (sh.heaps[r].base != nullptr) {
      ptx::store_relaxed_sys(sh.heaps[r].template at<uint64_t>(sh.layout.abort_word),
                             static_cast<uint64_t>(status));
    } else if constexpr (kPuts) {
      // An actor's is the word of its own rank.
      transport::signal(const_cast<uint64_t*>(sh.actors[0].abort_word),
                        static_cast<uint64_t>(status), r);
    }
  }
}

}  // namespace flashmoe
