// The bytes of a trace: one Record an event, one RingHeader an actor.
//
// flashmoe/trace/schema.py mirrors these structs field for field; a test holds it to them through
// the engine's `layout()`.  All fields are little-endian and whole: nothing is bit-packed.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/events.h"

namespace flashmoe {

// A finished span, an instant (dur_ns 0), or the beginning of a wait (kFlagOpen).
struct alignas(16) Record {
  uint64_t t0_ns;  // the world's clock: %globaltimer on a GPU, CLOCK_MONOTONIC on the host
  uint32_t dur_ns;
  uint8_t kind;           // EventKind
  uint8_t flags;          // RecordFlags
  uint16_t peer;          // rank, or kNoPeer
  uint16_t expert;        // global expert id, or kNoExpert
  uint16_t iter;          // launch number within the run, from 0
  uint32_t tile;          // by kind, or kNoTile
  uint32_t aux;           // by kind
  uint32_t stall_cycles;  // of a tile: cycles its main loop waited for operands (load: a stage)
};
static_assert(sizeof(Record) == 32, "Record is 32 bytes in the file format");

// Written by the one actor that owns the ring.  128 bytes, so that no two actors share a line.  On a GPU an actor writes how
// far it has come; the host knows the rest (flashmoe/world/images.py).
struct alignas(128) RingHeader {
  uint64_t count;     // records ever written; never saturates, so drops = max(0, count - capacity)
  uint64_t begin_ns;  // of the last launch
  uint64_t end_ns;    // of the last launch; 0 while it runs or if it never ended
  uint64_t begin_cycles;  // SM clock at begin_ns; from a GPU 0
  uint64_t end_cycles;    // SM clock at end_ns
  uint32_t magic;         // kRingMagic once the actor has begun
  uint32_t capacity;      // records
  uint16_t rank;
  uint16_t sm;    // physical SM (%smid) on a GPU, index of the thread group on the host
  uint16_t cta;   // index of the CTA within its rank
  uint8_t lane;   // Lane
  uint8_t mode;   // RingMode
  uint32_t next;  // for the writer alone: where the next record goes, if the last ones are kept
  uint8_t reserved[60];
};
static_assert(sizeof(RingHeader) == 128, "RingHeader is 128 bytes in the file format");

enum class RingMode : uint8_t { kKeepFirst = 0, kKeepLast = 1 };
inline constexpr uint32_t kRingMagic = 0x524d4f46u;  // "FOMR"

}  // namespace flashmoe
