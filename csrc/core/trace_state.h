// What only a traced actor has: its ring, and how records get into it.
//
// Nothing of a record's bytes is known beyond this header: an untraced actor has no part of it, and a
// build with FLASHMOE_NO_TRACE compiles none of it and can make no traced actor.  A test holds the
// machine code of an untraced kernel to that of such a build (tests/device/test_zero_when_off.py).
#pragma once

#include <cstdint>

#include "core/events.h"
#include "core/shape.h"

namespace flashmoe {

template <class P, bool kTraced>
struct TraceState;

template <class P>
struct TraceState<P, false> {};

// Where a CTA's images of tiles go, and what its scheduler notes meanwhile.
template <bool kTraced>
struct TileLog;

template <>
struct TileLog<false> {};

// When a CTA's first steps of a launch ended.
template <bool kTraced>
struct StepEnds;

template <>
struct StepEnds<false> {};

}  // namespace flashmoe

#ifndef FLASHMOE_NO_TRACE

#include "core/images.h"
#include "core/records.h"

namespace flashmoe {

template <class P>
struct TraceState<P, true> {
  RingHeader* ring;
  Record* records;
  uint64_t count;    // records written, kept here between writes of the header
  uint64_t last_ns;  // end of the span before
  uint64_t begin_ns;
  uint64_t begin_cycles;
  uint32_t capacity;
  uint16_t iter;
  uint8_t iter_flags;
  uint8_t keep_last;
  uint32_t place;       // of the next record, where the last ones are kept
  StepImage* steps;     // of this launch, on a GPU, once keep_steps() has run
  uint64_t planned_ns;  // where a lane plans for itself: when it had, else 0
  uint64_t past_tiles_ns;
  uint32_t past_tiles_cycles;

  FLASHMOE_HD static LogCursor written_into(const RingHeader* ring) {
    return {ring->count, ring->next};
  }

  // Before begin_launch(): the actor's ring is the one at `index`, of `ring_capacity` records, which has come as far as
  // `written`.
  FLASHMOE_HD void record_into(RingHeader* rings, Record* all, uint64_t index,
                               uint32_t ring_capacity, bool keeps_last, const LogCursor& written) {
    ring = rings + index;
    records = all + index * ring_capacity;
    capacity = ring_capacity;
    keep_last = keeps_last ? 1 : 0;
    count = written.count;
    place = written.next;
  }

  FLASHMOE_HD void begin_launch(uint32_t iteration) {
    iter = iter_of(iteration);
    iter_flags = iter_flags_of(iteration);
    begin_ns = last_ns = P::now_ns();
    begin_cycles = P::cycles();
    planned_ns = past_tiles_ns = 0;
  }
  // Where the host does not make it of an image.
  FLASHMOE_HD void begin_header(uint16_t rank, uint16_t sm, uint16_t cta, uint8_t lane) {
    ring->begin_ns = begin_ns;
    ring->end_ns = 0;
    ring->begin_cycles = begin_cycles;
    ring->capacity = capacity;
    ring->rank = rank;
    ring->sm = sm;
    ring->cta = cta;
    ring->lane = lane;
    ring->mode = keep_last;
    ring->magic = kRingMagic;
  }

  FLASHMOE_HD void end_ring() {
    const uint64_t now = P::now_ns();
    const uint64_t cycles = P::cycles();
    if constexpr (P::kImages) {
      if (planned_ns != 0) steps->end_ns[static_cast<uint32_t>(Step::kPlan)] = planned_ns;
      steps->past_tiles_ns = past_tiles_ns;
      steps->past_tiles_cycles = past_tiles_cycles;
      steps->left_ns = now;
      steps->cycles = saturate_u32(cycles - begin_cycles);
    } else {
      write(EventKind::k_launch, 0, begin_ns, now - begin_ns, kNoPeer, kNoExpert, kNoTile,
            saturate_u32(cycles - begin_cycles), 0);
      ring->end_ns = now;
      ring->end_cycles = cycles;
    }
    publish();
  }

  // Lets a reader see what has been written, and the next launch go on from there.
  FLASHMOE_HD void publish() {
    ring->count = count;
    ring->next = place;
  }

  // Before end_ring(), by whoever has the time: all but what the lane itself knows.  The lane's images of all launches lie
  // `stride` apart, and behind the last one is one for launches that are not kept.  Where the last ones are, `most` is a
  // power of two.
  FLASHMOE_HD void keep_steps(StepImage* of_lane, uint32_t stride, uint32_t most,
                              uint32_t iteration, const StepEnds<true>& ends, uint32_t tokens,
                              uint32_t sm);

  // A math lane has no more tiles, whose spans are not its own.
  FLASHMOE_HD void past_tiles() {
    past_tiles_ns = last_ns = P::now_ns();
    past_tiles_cycles = static_cast<uint32_t>(P::cycles());
  }

  // The lane has planned for itself.
  FLASHMOE_HD void planned() { planned_ns = last_ns = P::now_ns(); }

  // A wait begins that may never end: its record, and the count that makes a reader see it.
  FLASHMOE_HD void open_wait(EventKind kind, uint64_t from, uint16_t peer, uint16_t expert,
                             uint32_t tile, uint32_t lacking) {
    write(kind, kFlagOpen, from, 0, peer, expert, tile, lacking, 0);
    publish();
  }

  // Where the next record goes; null where it is only counted.
  FLASHMOE_HD Record* next_place() {
    const uint64_t index = count++;
    if (keep_last == 0) return index < capacity ? records + index : nullptr;
    if (capacity == 0) return nullptr;
    Record* at = records + place;
    if (++place == capacity) place = 0;
    return at;
  }
  static FLASHMOE_HD void set_duration(Record& r, uint64_t duration) {
    r.dur_ns = saturate_u32(duration);
    r.flags = static_cast<uint8_t>((r.flags & ~kFlagSaturated) |
                                   (duration >= 0xffffffffull ? kFlagSaturated : 0));
  }

  FLASHMOE_HD void write(EventKind kind, uint8_t flags, uint64_t t0, uint64_t duration,
                         uint16_t peer, uint16_t expert, uint32_t tile, uint32_t aux,
                         uint32_t stall_cycles) {
    Record* place = next_place();
    if (place == nullptr) return;
    Record r;
    r.t0_ns = t0;
    r.kind = static_cast<uint8_t>(kind);
    r.flags = static_cast<uint8_t>(flags | iter_flags);
    set_duration(r, duration);
    r.peer = peer;
    r.expert = expert;
    r.iter = iter;
    r.tile = tile;
    r.aux = aux;
    r.stall_cycles = stall_cycles;
    P::put_record(place, r);
  }
};

template <>
struct StepEnds<true> {
  uint64_t ns[kSteps];  // 0: not reached
};

template <class P>
FLASHMOE_HD void TraceState<P, true>::keep_steps(StepImage* of_lane, uint32_t stride, uint32_t most,
                                                 uint32_t iteration, const StepEnds<true>& ends,
                                                 uint32_t tokens, uint32_t sm) {
  const uint32_t at = keep_last != 0 ? iteration & (most - 1) : iteration < most ? iteration : most;
  steps = of_lane + static_cast<uint64_t>(at) * stride;
  StepImage s{};
  s.begin_ns = begin_ns;
  for (uint32_t i = 0; i < kSteps; ++i) s.end_ns[i] = ends.ns[i];
  s.iter = iter;
  s.iter_flags = iter_flags;
  s.tokens = s.end_ns[static_cast<uint32_t>(Step::kGate)] != 0 ? tokens : 0;
  s.sm = sm;
  *steps = s;
}

template <>
struct TileLog<true> {
  TileImage* images;
  LogCursor* written;          // of all launches
  uint64_t count;              // the same, kept here meanwhile
  uint64_t scheduled_from_ns;  // of the tile that is handed over next
  uint32_t capacity;
  uint32_t place;  // of the next image; its capacity once it is full and keeps what came first
  uint32_t keep_last;

  FLASHMOE_HD void begin(TileImage* of_cta, LogCursor* cursor, const LogCursor& so_far,
                         uint32_t most, bool keeps_last) {
    images = of_cta;
    written = cursor;
    count = so_far.count;
    place = so_far.next;
    capacity = most;
    keep_last = keeps_last ? 1 : 0;
  }
  // For the host, and for the next launch to go on from.
  FLASHMOE_HD void publish() const { *written = {count, place, 0}; }

  // Where the next image goes; null where it is only counted.
  FLASHMOE_HD TileImage* next_place() {
    ++count;
    if (place == capacity) return nullptr;
    TileImage* at = images + place++;
    if (place == capacity && keep_last != 0) place = 0;
    return at;
  }
};

}  // namespace flashmoe

#else

namespace flashmoe {

template <class P>
struct TraceState<P, true> {
  static_assert(sizeof(P) == 0, "built with FLASHMOE_NO_TRACE: no actor can be traced");
};

}  // namespace flashmoe

#endif
