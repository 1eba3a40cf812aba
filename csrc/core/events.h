// What an actor can be doing: the one list of event kinds, lanes and record flags.
//
// flashmoe/trace/schema.py mirrors this file; tests/trace/test_schema.py parses it and holds the
// mirror to it.
// Values are part of the file format (docs/trace-format.md): never renumber, only append.
#pragma once

#include <cstdint>

namespace flashmoe {

// What an actor's time divides into.
enum class TimeClass : uint8_t { kNone = 0, kBusy = 1, kComm = 2, kWait = 3 };

// X(name, value, class, meaning of `aux`)
#define FLASHMOE_EVENT_KINDS(X)                                                                 \
  X(launch, 1, kNone, "SM cycles between the actor's begin and end of one launch")              \
  X(gate, 2, kBusy, "tokens routed; tile = chunk")                                              \
  X(plan, 3, kBusy, "0")                                                                        \
  X(gemm1, 4, kBusy, "SM cycles of the span; tile = position in the rank's tile order")         \
  X(gemm2, 5, kBusy, "SM cycles of the span; tile = position in the rank's tile order")         \
  X(combine, 6, kBusy, "tokens summed; tile = chunk")                                           \
  X(schedule, 7, kBusy, "0; tile = position in the rank's tile order")                          \
  X(counts, 16, kComm, "bytes of counts sent to all ranks")                                     \
  X(dispatch, 17, kComm, "bytes of rows moved; tile = chunk, expert = first of the group")      \
  X(load, 18, kComm, "SM cycles of the span; tile = position in the rank's tile order")         \
  X(give_back, 19, kComm, "bytes of result rows stored to all sources; tile = tile order")      \
  X(put, 20, kComm, "bytes of result rows stored to `peer`, an instant; tile = tile order")     \
  X(wait_barrier, 32, kWait, "arrivals lacking when the wait began")                            \
  X(wait_counts, 33, kWait, "0; peer = the source awaited, expert = first count lacking")       \
  X(wait_rows, 34, kWait, "rows lacking when the wait began; tile = row tile in the pool")      \
  X(wait_h, 35, kWait, "column tiles lacking when the wait began; tile = row tile in the pool") \
  X(wait_return, 36, kWait, "0; peer = owner, expert, tile = row tile over all experts")        \
  X(wait_logits, 37, kWait, "0; expert = first logit lacking, or none: tile = token of no choice")

enum class EventKind : uint8_t {
  kNone = 0,
#define FLASHMOE_X(name, value, cls, aux) k_##name = value,
  FLASHMOE_EVENT_KINDS(FLASHMOE_X)
#undef FLASHMOE_X
};

// X(name, value): the lanes of an SM, one actor each.
#define FLASHMOE_LANES(X) X(load, 0) X(sched, 1) X(comm0, 2) X(comm1, 3) X(math0, 4) X(math1, 5)

enum class Lane : uint8_t {
#define FLASHMOE_X(name, value) k_##name = value,
  FLASHMOE_LANES(FLASHMOE_X)
#undef FLASHMOE_X
};
inline constexpr int kLanes = 6;

// Bits of Record::flags.
enum RecordFlags : uint8_t {
  kFlagOpen = 1,       // a wait that has begun; its closing record, if any, is the ring's next one
  kFlagSaturated = 2,  // the duration is 2^32 - 1 ns or longer
  kFlagIterWrapped = 4,  // the iteration is 2^16 - 1 or later
  kFlagGaveUp = 8,       // a wait that ended by its deadline or by an abort
};

inline constexpr uint16_t kNoPeer = 0xffff;
inline constexpr uint16_t kNoExpert = 0xffff;
inline constexpr uint32_t kNoTile = 0xffffffffu;

// What a flight-recorder slot says of its actor.
enum class ActorState : uint8_t {
  kNeverStarted = 0,
  kRunning = 1,
  kWaiting = 2,
  kGaveUp = 3,   // this actor's own wait passed the deadline
  kAborted = 4,  // it left because another actor raised abort
  kDone = 5,
};

// How a launch ended; the value in a rank's status word and, but for kOk, in its abort word.
enum class Status : uint32_t {
  kOk = 0,
  kHang = 1,       // a wait passed its deadline
  kOverflow = 2,   // the routed rows do not fit the pool
  kBadIds = 3,     // external expert ids out of range, or twice in one token
  kHostAbort = 4,  // the host asked the launch to stop
};

}  // namespace flashmoe
