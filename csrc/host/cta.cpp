#include "host/cta.h"

#include <time.h>

#include "host/cta_move.h"
#include "host/cta_prepare.h"
#include "host/cta_tiles.h"

namespace flashmoe::host {

template <bool kTraced>
Cta<kTraced>::Cta(Machine& machine, uint32_t rank, uint32_t cta)
    : m_(machine),
      s_(machine.shape),
      l_(machine.layout),
      heap_(machine.heaps[rank]),
      rank_(rank),
      cta_(cta),
      lost_signal_(machine.fault(FaultKind::kLostSignal, rank)),
      wrong_count_(machine.fault(FaultKind::kWrongCount, rank)),
      slow_(machine.fault(FaultKind::kSlow, rank)),
      stages_(std::make_unique<Ring<Stage, kStages, 2>>()) {
  for (uint32_t r = 0; r < s_.world; ++r) {
    peers_[r] = m_.config.no_pointers && r != rank ? Heap{nullptr} : m_.heaps[r];
  }
  epoch_ = static_cast<uint32_t>(HostPlatform::load(heap_.at<uint64_t>(l_.epoch_word))) + 1;
  const uint32_t tokens = machine.config.tokens[rank];
  token_begin_ = chunk_begin(s_, tokens, cta);
  token_end_ = chunk_begin(s_, tokens, cta + 1);
  tables_ = plan_tables(table_place(heap_, l_, s_, cta), s_, rank);
}

template <bool kTraced>
void Cta<kTraced>::run(Lane lane) {
  const uint32_t actor = m_.actor(rank_, cta_, static_cast<uint32_t>(lane));
  LaneActor a{};
  a.slot = &m_.slots[actor];
  if constexpr (kTraced) {
    a.record_into(m_.rings.get(), m_.records.get(), actor, m_.config.ring_capacity,
                  m_.config.keep_last, LaneActor::written_into(&m_.rings[actor]));
  }
  a.abort_word = heap_.at<uint64_t>(l_.abort_word);
  a.deadline_ns = epoch_ == 1 ? m_.config.first_deadline_ns : m_.config.deadline_ns;
  a.lane = static_cast<uint8_t>(lane);
  a.rank = static_cast<uint16_t>(rank_);
  a.sm = static_cast<uint16_t>(rank_ * s_.chunks + cta_);
  a.cta = static_cast<uint16_t>(cta_);
  a.begin(epoch_, m_.iteration);

  gate_share(a, lane);
  barrier_.wait();
  if (lane == Lane::k_sched) status_ = prepare(a);
  // Also by a launch that will overflow: the next one counts on it.
  if (lane == Lane::k_math1) clear_idle_set();
  barrier_.wait();
  Status status = status_;
  if (lane != Lane::k_sched) {
    for (const SharedWait& w : shared_waits_) a.waited(w.what, w.from, w.to, w.lacking, w.status);
  }
  a.skip();
  if (status == Status::kOk) {
    switch (lane) {
      case Lane::k_load:
        status = load_lane(a);
        break;
      case Lane::k_sched:
        status = sched_lane(a);
        break;
      case Lane::k_comm0:
      case Lane::k_comm1:
        status = comm_lane(a);
        break;
      case Lane::k_math0:
        status = math_lane(a, 0);
        break;
      case Lane::k_math1:
        status = math_lane(a, 1);
        break;
    }
  }
  leave(a, status);
}

template <bool kTraced>
SharedWait Cta<kTraced>::await(LaneActor& a, const Awaited& what, uint64_t* word, Until until,
                               uint64_t target, bool counted) {
  SharedWait shared;
  shared.what = what;
  if constexpr (kTraced) {
    const uint64_t seen = HostPlatform::load(word);
    if (reached(seen, until, target)) return shared;
    shared.from = HostPlatform::now_ns();
    if (counted) {
      shared.lacking =
          static_cast<uint32_t>(as_count(target, until, target) - as_count(seen, until, target));
    }
    shared.status = settle(a.wait(what, word, until, target, counted ? 0 : 1));
    // Satisfied between the two looks, the wait left no record, and last_ns where it was.
    if (a.last_ns >= shared.from) shared.to = a.last_ns;
  } else {
    shared.status = settle(a.wait(what, word, until, target, counted ? 0 : 1));
  }
  return shared;
}

template <bool kTraced>
Status Cta<kTraced>::settle(Status status) {
  if (status == Status::kHang) m_.raise_abort(Status::kHang);
  return status;
}

// Sets one word of a rank's heap.
template <bool kTraced>
void Cta<kTraced>::send_signal(uint32_t to, uint64_t offset, uint64_t value) {
  if (peers_[to].base != nullptr) {
    HostPlatform::store_release(peers_[to].template at<uint64_t>(offset), value);
  } else {
    m_.transport->put_signal(to, 0, nullptr, 0, offset, value);
  }
}

template <bool kTraced>
void Cta<kTraced>::slow_down() const {
  if (!slow_) return;
  timespec t{static_cast<time_t>(slow_->sleep_ns / 1'000'000'000u),
             static_cast<long>(slow_->sleep_ns % 1'000'000'000u)};
  nanosleep(&t, nullptr);
}

// The last lane of the last CTA leaves the rank's status and then its epoch behind.
template <bool kTraced>
void Cta<kTraced>::leave(LaneActor& a, Status status) {
  a.end(status == Status::kOk || status == Status::kOverflow ? ActorState::kDone
                                                             : ActorState::kAborted);
  if (lanes_left_.fetch_add(1, std::memory_order_acq_rel) + 1 < kLanes) return;
  uint64_t* exits = heap_.at<uint64_t>(l_.exits);
  if (HostPlatform::add(exits, 1) + 1 < static_cast<uint64_t>(epoch_) * s_.chunks) return;
  const uint64_t aborted = HostPlatform::load(heap_.at<uint64_t>(l_.abort_word));
  uint64_t word = aborted;
  // All CTAs hold the same counts, so all found the same overflow.
  if (aborted == 0 && status_ == Status::kOverflow) {
    word = static_cast<uint64_t>(Status::kOverflow) | static_cast<uint64_t>(rows_needed_) << 32;
  }
  HostPlatform::store_release(heap_.at<uint64_t>(l_.status_word), word);
  HostPlatform::store_release(heap_.at<uint64_t>(l_.epoch_word), epoch_);
}

std::unique_ptr<CtaRun> make_cta(Machine& machine, uint32_t rank, uint32_t cta) {
  if (machine.config.traced) return std::make_unique<Cta<true>>(machine, rank, cta);
  return std::make_unique<Cta<false>>(machine, rank, cta);
}

}  // namespace flashmoe::host
