// An actor: what one lane of one SM is, its flight-recorder slot, the one wait, and, where it is traced,
// its ring (trace_state.h).
//
// How to record (device and host alike):
//   1. begin(...) when the actor enters a launch; it starts the clock of the first span (on a GPU begin_launch() does);
//   2. span(kind, ...) at the end of each piece of work: it lasts from the end of the span before, so
//      spans never overlap and every nanosecond has an owner;  skip() instead leaves the time idle;
//   3. wait(...) for anything another CTA or rank must do first;
//   4. end() once, when the actor leaves the launch.
//
// `P` is the platform: static functions load(word) (acquire), peek(word) (relaxed), now_ns, cycles, relax,
// put_slot and put_record, and kImages, whether the host makes the records of launches.  `kTraced` false
// compiles every record away; the flight recorder, the deadline and the abort stay.  On the GPU one lane of
// the warp runs these.
#pragma once

#include <cstdint>

#include "core/events.h"
#include "core/flight.h"
#include "core/heap.h"
#include "core/trace_state.h"

namespace flashmoe {

// What is awaited: named in the trace, in the flight recorder and in the hang report.
struct Awaited {
  EventKind kind;
  uint16_t peer;
  uint16_t expert;
  uint32_t tile;
};

enum class Until : uint32_t {
  kAtLeast = 0,  // the word, as a counter, has reached the target
  kTag = 1,      // the word's upper half is the target
  kPrefix = 2,   // the upper half is the target's, the lower half has reached the target's
};

FLASHMOE_HD bool reached(uint64_t seen, Until until, uint64_t target) {
  // Of a prefix too, at least will do: the tag is an epoch, which only grows.
  return until == Until::kTag ? (seen >> 32) == target : seen >= target;
}

// A word as a number of its own launch: a prefix without its tag, 0 where that is of another launch.
FLASHMOE_HD uint64_t as_count(uint64_t word, Until until, uint64_t target) {
  if (until != Until::kPrefix) return word;
  return word >> 32 == target >> 32 ? word & 0xffffffffull : 0;
}

template <class P, bool kTraced>
struct Actor : TraceState<P, kTraced> {
  FlightSlot* slot;            // pinned host memory on a GPU
  const uint64_t* abort_word;  // of the actor's own rank
  uint64_t deadline_ns;        // length of the longest allowed wait
  uint32_t epoch;
  uint8_t lane;
  uint8_t cut_short;  // a wait did not end well: the slot says which until the next launch
  uint16_t rank;
  uint16_t sm;
  uint16_t cta;

  FLASHMOE_HD void begin(uint32_t launch_epoch, uint32_t iteration) {
    epoch = launch_epoch;
    cut_short = 0;
    note(ActorState::kRunning, {EventKind::k_launch, kNoPeer, kNoExpert, kNoTile}, 0, 0,
         P::now_ns());
    if constexpr (kTraced && !P::kImages) {
      this->begin_launch(iteration);
      this->begin_header(rank, sm, cta, lane);
    }
  }

  FLASHMOE_HD void end(ActorState state) {
    if constexpr (kTraced) this->end_ring();
    note(state, {EventKind::k_launch, kNoPeer, kNoExpert, kNoTile}, 0, 0, P::now_ns());
  }

  // A span of `kind` from the end of the one before until now.
  FLASHMOE_HD void span(EventKind kind, uint16_t peer, uint16_t expert, uint32_t tile, uint64_t aux,
                        uint32_t stall_cycles = 0) {
    if constexpr (kTraced) {
      const uint64_t now = P::now_ns();
      this->write(kind, 0, this->last_ns, now - this->last_ns, peer, expert, tile,
                  saturate_u32(aux), stall_cycles);
      this->last_ns = now;
    }
  }

  // A span whose ends were stamped elsewhere; it must begin at or after the end of the one before.
  FLASHMOE_HD void span_at(EventKind kind, uint64_t from, uint64_t to, uint16_t peer,
                           uint16_t expert, uint32_t tile, uint64_t aux,
                           uint32_t stall_cycles = 0) {
    if constexpr (kTraced) {
      this->write(kind, 0, from, to - from, peer, expert, tile, saturate_u32(aux), stall_cycles);
      this->last_ns = to;
    }
  }

  FLASHMOE_HD void instant(EventKind kind, uint16_t peer, uint16_t expert, uint32_t tile,
                           uint64_t aux) {
    if constexpr (kTraced) {
      this->write(kind, 0, this->last_ns, 0, peer, expert, tile, saturate_u32(aux), 0);
    }
  }

  // The time since the last span belongs to nothing: it is idle.
  FLASHMOE_HD void skip() {
    if constexpr (kTraced) this->last_ns = P::now_ns();
  }

  // Says in the flight recorder what the actor now does.
  FLASHMOE_HD void doing(EventKind kind, uint16_t peer, uint16_t expert, uint32_t tile) {
    doing_since(P::now_ns(), kind, peer, expert, tile);
  }
  FLASHMOE_HD void doing_since(uint64_t since, EventKind kind, uint16_t peer, uint16_t expert,
                               uint32_t tile) {
    note(ActorState::kRunning, {kind, peer, expert, tile}, 0, 0, since);
  }

  // The one wait on another CTA or rank.  Returns Status::kOk once the word has reached the target,
  // kHang when the deadline passed first (the caller raises abort), or the status found in the abort
  // word.  The clock is first read after the first try failed.  `meanwhile` is called between tries.
  // Polls are relaxed, and one acquire follows the last: on a GPU each acquire empties the SM's L1.
  FLASHMOE_HD Status wait(const Awaited& what, const uint64_t* word, Until until, uint64_t target,
                          uint32_t lacking_unit = 0) {
    return wait(what, word, until, target, lacking_unit, [] {});
  }
  template <class Meanwhile>
  FLASHMOE_HD Status wait(const Awaited& what, const uint64_t* word, Until until, uint64_t target,
                          uint32_t lacking_unit, const Meanwhile& meanwhile) {
    uint64_t seen = P::load(word);
    if (reached(seen, until, target)) return Status::kOk;
    const uint64_t from = P::now_ns();
    const uint64_t due = as_count(target, until, target);
    const uint32_t lacking = until != Until::kTag && lacking_unit == 0
                                 ? static_cast<uint32_t>(due - as_count(seen, until, target))
                                 : 0;
    if constexpr (kTraced) {
      this->open_wait(what.kind, from, what.peer, what.expert, what.tile, lacking);
    }
    note(ActorState::kWaiting, what, due, as_count(seen, until, target), from);
    Status status = Status::kOk;
    for (;;) {
      P::relax();
      meanwhile();
      seen = P::peek(word);
      const uint64_t aborted = P::peek(abort_word);  // both on their way at once
      if (reached(seen, until, target)) {
        P::load(word);  // counters only grow and tags stay until the next launch: it is there still
        break;
      }
      if (aborted != 0) {
        status = static_cast<Status>(aborted);
        note(ActorState::kAborted, what, due, as_count(seen, until, target), from);
        cut_short = 1;
        break;
      }
      if (P::now_ns() - from > deadline_ns) {
        status = Status::kHang;
        note(ActorState::kGaveUp, what, due, as_count(seen, until, target), from);
        cut_short = 1;
        break;
      }
    }
    if constexpr (kTraced) {
      const uint64_t now = P::now_ns();
      this->write(what.kind, status == Status::kOk ? 0 : kFlagGaveUp, from, now - from, what.peer,
                  what.expert, what.tile, lacking, 0);
      this->last_ns = now;
    }
    if (status == Status::kOk) {
      note(ActorState::kRunning, {EventKind::kNone, kNoPeer, kNoExpert, kNoTile}, 0, 0, from);
    }
    return status;
  }

  // A wait that another lane of this SM went through for all of them, recorded as `wait` would.
  FLASHMOE_HD void waited(const Awaited& what, uint64_t from, uint64_t to, uint32_t lacking,
                          Status status) {
    if constexpr (kTraced) {
      if (from < this->last_ns) from = this->last_ns;
      if (to <= from) return;
      this->write(what.kind, status == Status::kOk ? 0 : kFlagGaveUp, from, to - from, what.peer,
                  what.expert, what.tile, lacking, 0);
      this->last_ns = to;
    }
  }

 private:
  FLASHMOE_HD void note(ActorState state, const Awaited& what, uint64_t expected, uint64_t seen,
                        uint64_t since) {
    if (cut_short) return;
    FlightSlot s{};
    s.since_ns = since;
    s.epoch = epoch;
    s.state = static_cast<uint8_t>(state);
    s.kind = static_cast<uint8_t>(what.kind);
    s.peer = what.peer;
    s.expert = what.expert;
    s.rank = rank;
    s.tile = what.tile;
    s.expected = expected;
    s.seen = seen;
    s.sm = sm;
    s.cta = cta;
    s.lane = lane;
    P::put_slot(slot, s);
  }
};

}  // namespace flashmoe
