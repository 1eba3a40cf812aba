// The flight recorder: one slot an actor, always written, traced or not.
//
// flashmoe/trace/schema.py mirrors FlightSlot field for field, as it does records.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/events.h"

namespace flashmoe {

// Where an actor is now, readable while the kernel runs.
struct alignas(64) FlightSlot {
  uint64_t since_ns;  // when this state began
  uint32_t epoch;     // launch the actor is in, from 1
  uint8_t state;      // ActorState
  uint8_t kind;       // EventKind: what it does, or waits for
  uint16_t peer;
  uint16_t expert;
  uint16_t rank;
  uint32_t tile;
  uint64_t expected;  // of a wait: the value awaited
  uint64_t seen;      // of a wait: the value last read
  uint16_t sm;
  uint16_t cta;
  uint8_t lane;
  uint8_t reserved[19];
};
static_assert(sizeof(FlightSlot) == 64, "FlightSlot is 64 bytes in the file format");

}  // namespace flashmoe
