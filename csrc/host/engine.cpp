#include "host/engine.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <limits>
#include <mutex>
#include <new>
#include <stdexcept>
#include <thread>

#include "core/actor.h"
#include "host/cta_run.h"
#include "host/platform.h"

namespace flashmoe::host {
namespace {

constexpr size_t kHeapAlign = 4096;

// Large blocks come zeroed and untouched from the system: what is never used costs no memory.
template <class T>
Buffer<T> zeroed(uint64_t n, size_t alignment) {
  const uint64_t bytes = align_up(std::max<uint64_t>(n * sizeof(T), 1), alignment);
  // calloc keeps no alignment beyond 16; aligned_alloc clears nothing.
  void* p = std::aligned_alloc(alignment, bytes);
  if (p == nullptr) throw std::bad_alloc();
  std::memset(p, 0, bytes);
  return Buffer<T>(static_cast<T*>(p));
}

template <class T>
Buffer<T> untouched(uint64_t n) {
  static_assert(alignof(T) <= 16, "calloc aligns to 16 bytes");
  void* p = std::calloc(std::max<uint64_t>(n, 1), sizeof(T));
  if (p == nullptr) throw std::bad_alloc();
  return Buffer<T>(static_cast<T*>(p));
}

// Holds the threads of a launch until all of them exist, so that the first has no head start.
class StartGate {
 public:
  void open(bool go) {
    {
      std::lock_guard lock(mutex_);
      state_ = go ? 1 : 2;
    }
    opened_.notify_all();
  }
  bool wait() {
    std::unique_lock lock(mutex_);
    opened_.wait(lock, [&] { return state_ != 0; });
    return state_ == 1;
  }

 private:
  std::mutex mutex_;
  std::condition_variable opened_;
  int state_ = 0;
};

void check(const EngineConfig& config) {
  const Shape& s = config.shape;
  if (s.world == 0 || s.world > kMaxRanks) throw std::invalid_argument("1 to 8 ranks");
  if (config.tokens.size() != s.world) throw std::invalid_argument("one T a rank");
  for (const uint32_t t : config.tokens) {
    if (t > s.max_tokens) throw std::invalid_argument("a rank has more than max_tokens");
  }
  if (config.first_rank >= config.last_rank || config.last_rank > s.world) {
    throw std::invalid_argument("an engine runs one rank at least");
  }
  if (s.tile_m != kTileM || s.tile_step != kTileStep || s.tile_n1 != kTileN1 ||
      s.tile_n2 != kTileN2) {
    throw std::invalid_argument("the host engine has one tile family");
  }
  if (s.hidden % 8 != 0 || s.inter % 8 != 0) throw std::invalid_argument("H and I: multiples of 8");
}

}  // namespace

void Machine::raise_abort(Status status) const {
  const uint64_t value = static_cast<uint64_t>(status);
  for (uint32_t r = 0; r < shape.world; ++r) {
    if (heaps[r].base != nullptr) {
      HostPlatform::set_once(heaps[r].at<uint64_t>(layout.abort_word), value);
    } else {
      transport->put_signal(r, 0, nullptr, 0, layout.abort_word, value);
    }
  }
}

Engine::Engine(const EngineConfig& config, const Weights& weights, const SharedMemory* shared) {
  check(config);
  Machine& m = machine_;
  m.config = config;
  m.shape = config.shape;
  m.weights = weights;
  m.multiply_add = multiply_add();
  for (uint32_t r = config.first_rank; r < config.last_rank; ++r) {
    m.y[r].assign(static_cast<size_t>(config.tokens[r]) * m.shape.hidden, 0);
  }
  place_heaps(shared ? &shared->heaps : nullptr);
  m.gate_columns = static_cast<uint32_t>(align_up(m.shape.experts, kColumnStep));
  if (m.shape.routing != RoutingKind::kExternal) {
    m.gate_panel.assign(static_cast<size_t>(m.shape.hidden) * m.gate_columns, 0.0f);
    for (uint32_t e = 0; e < m.shape.experts; ++e) {
      widen_column(config.dtype, weights.gate + static_cast<uint64_t>(e) * m.shape.hidden,
                   m.gate_panel.data() + e, m.gate_columns, m.shape.hidden);
    }
  }
  if (shared) {
    m.slots = shared->slots;
  } else {
    slot_memory_ = zeroed<FlightSlot>(m.actors(), alignof(FlightSlot));
    m.slots = slot_memory_.get();
  }
  if (config.traced) {
    m.rings = zeroed<RingHeader>(m.actors(), alignof(RingHeader));
    m.records = untouched<Record>(static_cast<uint64_t>(m.actors()) * config.ring_capacity);
  }
  reset();
}

void Engine::place_heaps(const std::vector<char*>* shared) {
  Machine& m = machine_;
  heap_memory_.clear();
  m.layout = heap_layout(m.shape);
  if (shared && shared->size() != m.shape.world) throw std::invalid_argument("a heap a rank");
  std::vector<char*> all(m.shape.world);
  for (uint32_t r = 0; r < m.shape.world; ++r) {
    if (shared) {
      all[r] = (*shared)[r];
    } else {
      void* p = std::aligned_alloc(kHeapAlign, align_up(m.layout.bytes, kHeapAlign));
      if (p == nullptr) throw std::bad_alloc();
      all[r] = heap_memory_.emplace_back(static_cast<char*>(p)).get();
    }
    m.heaps[r].base = m.config.no_pointers && !m.is_own(r) ? nullptr : all[r];
    if (!m.is_own(r)) continue;
    // Read by chunk_counts() even of a rank that never started.
    std::memset(m.heaps[r].at<char>(m.layout.histogram), 0,
                4ull * m.shape.chunks * m.shape.experts);
  }
  m.transport = std::make_unique<MappedTransport>(std::move(all));
}

uint64_t Engine::bytes_needed(const EngineConfig& config) {
  const Shape& s = config.shape;
  const uint64_t own = config.last_rank - config.first_rank;
  const uint64_t actors = own * s.chunks * kLanes;
  uint64_t bytes = own * heap_layout(s).bytes;
  for (uint32_t r = config.first_rank; r < config.last_rank; ++r) {
    bytes += 2ull * config.tokens[r] * s.hidden;
  }
  bytes += 4ull * s.hidden * align_up(s.experts, kColumnStep);
  if (config.traced) bytes += actors * (config.ring_capacity * sizeof(Record) + sizeof(RingHeader));
  return bytes + actors * sizeof(FlightSlot);
}

void Engine::reset() {
  for (uint32_t r = machine_.config.first_rank; r < machine_.config.last_rank; ++r) {
    std::memset(machine_.heaps[r].base, 0, signal_bytes(machine_.layout));
  }
  last_epoch_ = 0;
}

void Engine::resize_pools(uint32_t pool_rows, const std::vector<char*>* heaps) {
  machine_.shape.pool_rows = machine_.config.shape.pool_rows = pool_rows;
  place_heaps(heaps);
  reset();
  if (machine_.iteration > 0) --machine_.iteration;
  for (size_t i = 0; i < ring_counts_before_.size(); ++i) {
    RingHeader& ring = machine_.rings[i];
    // Where the undone launch overwrote older records, none of the ring can be told from it.
    const bool wrapped = machine_.config.keep_last && ring.count > ring.capacity;
    ring.count = wrapped ? 0 : ring_counts_before_[i];
    ring.next = ring.capacity == 0 ? 0 : static_cast<uint32_t>(ring.count % ring.capacity);
  }
}

void Engine::reset_rings() {
  machine_.iteration = 0;
  if (!machine_.rings) return;
  std::memset(static_cast<void*>(machine_.rings.get()), 0, machine_.actors() * sizeof(RingHeader));
}

// What an actor that never starts leaves: a slot that says so.
void Engine::clear_flight() {
  const Shape& s = machine_.shape;
  for (uint32_t r = machine_.config.first_rank; r < machine_.config.last_rank; ++r) {
    for (uint32_t c = 0; c < s.chunks; ++c) {
      for (uint32_t lane = 0; lane < kLanes; ++lane) {
        FlightSlot slot{};
        slot.state = static_cast<uint8_t>(ActorState::kNeverStarted);
        slot.epoch = last_epoch_ + 1;
        slot.rank = static_cast<uint16_t>(r);
        slot.sm = static_cast<uint16_t>(r * s.chunks + c);
        slot.cta = static_cast<uint16_t>(c);
        slot.lane = static_cast<uint8_t>(lane);
        slot.peer = kNoPeer;
        slot.expert = kNoExpert;
        slot.tile = kNoTile;
        HostPlatform::put_slot(&machine_.slots[machine_.actor(r, c, lane)], slot);
      }
    }
  }
}

LaunchResult Engine::launch() {
  Machine& m = machine_;
  const Shape& s = m.shape;
  const uint32_t first = m.config.first_rank, last = m.config.last_rank;
  for (uint32_t r = first; r < last; ++r) {
    const uint64_t aborted = HostPlatform::load(m.heaps[r].at<uint64_t>(m.layout.abort_word));
    if (aborted != 0) return {static_cast<Status>(aborted), 0, 0};
  }
  clear_flight();
  ring_counts_before_.clear();
  for (uint32_t i = 0; m.rings && i < m.actors(); ++i) {
    ring_counts_before_.push_back(m.rings[i].count);
  }
  ++last_epoch_;

  std::vector<std::unique_ptr<CtaRun>> ctas;
  std::vector<std::thread> threads;
  StartGate gate;
  bool all_started = false;
  try {
    for (uint32_t r = first; r < last; ++r) {
      if (m.fault(FaultKind::kNeverStarts, r)) continue;
      for (uint32_t c = 0; c < s.chunks; ++c) {
        CtaRun* cta = ctas.emplace_back(make_cta(m, r, c)).get();
        for (uint32_t lane = 0; lane < kLanes; ++lane) {
          threads.emplace_back([cta, lane, &gate] {
            if (gate.wait()) cta->run(static_cast<Lane>(lane));
          });
        }
      }
    }
    all_started = true;
  } catch (const std::exception&) {
    // Too many threads for this system: let those that exist go, then say so.
  }
  const uint64_t from = HostPlatform::now_ns();
  gate.open(all_started);
  for (std::thread& t : threads) t.join();
  if (all_started && threads.empty()) await_abort();
  const uint64_t elapsed = HostPlatform::now_ns() - from;
  if (!all_started) {
    --last_epoch_;
    throw std::runtime_error("the system does not allow " + std::to_string(m.actors()) +
                             " threads");
  }
  ++m.iteration;

  LaunchResult result{Status::kOk, elapsed, 0};
  for (uint32_t r = first; r < last; ++r) {
    const uint64_t aborted = HostPlatform::load(m.heaps[r].at<uint64_t>(m.layout.abort_word));
    const uint64_t word = HostPlatform::load(m.heaps[r].at<uint64_t>(m.layout.status_word));
    if (aborted != 0) {
      result.status = static_cast<Status>(aborted);
    } else if (static_cast<uint32_t>(word) == static_cast<uint32_t>(Status::kOverflow)) {
      result.status = Status::kOverflow;
      result.rows_needed = std::max(result.rows_needed, static_cast<uint32_t>(word >> 32));
    }
  }
  if (result.status != Status::kOk) {
    for (uint32_t r = first; r < last; ++r) {
      std::fill(m.y[r].begin(), m.y[r].end(), nan_bits(m.config.dtype));
    }
  }
  return result;
}

// What a rank of which nothing starts does: it is there, and does not come.  Returns once another rank
// has given up, or could have twice over.
void Engine::await_abort() const {
  const Machine& m = machine_;
  const uint64_t* word = m.heaps[m.config.first_rank].at<uint64_t>(m.layout.abort_word);
  const uint64_t limit = 2 * std::max(m.config.deadline_ns, m.config.first_deadline_ns);
  const uint64_t from = HostPlatform::now_ns();
  while (HostPlatform::load(word) == 0 && HostPlatform::now_ns() - from < limit) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

std::vector<uint32_t> Engine::counts_seen() const {
  const Shape& s = machine_.shape;
  std::vector<uint32_t> seen;
  seen.reserve(static_cast<size_t>(machine_.own_ranks()) * s.world * s.experts);
  for (uint32_t holder = machine_.config.first_rank; holder < machine_.config.last_rank; ++holder) {
    for (uint32_t source = 0; source < s.world; ++source) {
      uint64_t* words =
          counts_words(machine_.heaps[holder], machine_.layout, s, last_epoch_, source);
      for (uint32_t e = 0; e < s.experts; ++e) {
        const uint64_t word = HostPlatform::load(words + e);
        const bool arrived = last_epoch_ != 0 && (word >> 32) == last_epoch_;
        seen.push_back(arrived ? static_cast<uint32_t>(word)
                               : std::numeric_limits<uint32_t>::max());
      }
    }
  }
  return seen;
}

std::vector<uint32_t> Engine::chunk_counts() const {
  const Shape& s = machine_.shape;
  std::vector<uint32_t> counts;
  const size_t per_rank = static_cast<size_t>(s.chunks) * s.experts;
  counts.reserve(machine_.own_ranks() * per_rank);
  for (uint32_t r = machine_.config.first_rank; r < machine_.config.last_rank; ++r) {
    const uint32_t* histogram = machine_.heaps[r].at<uint32_t>(machine_.layout.histogram);
    counts.insert(counts.end(), histogram, histogram + per_rank);
  }
  return counts;
}

std::vector<FlightSlot> Engine::flight() const {
  std::vector<FlightSlot> slots(machine_.actors());
  for (size_t i = 0; i < slots.size(); ++i) slots[i] = HostPlatform::read_slot(&machine_.slots[i]);
  return slots;
}

double Engine::record_cost_ns() {
  constexpr uint32_t kRecords = 4096;
  std::vector<Record> records(kRecords);
  FlightSlot slot{};
  RingHeader ring{};
  Actor<HostPlatform, true> a{};
  a.slot = &slot;
  a.record_into(&ring, records.data(), 0, kRecords, false, {});
  a.begin(1, 0);
  double best = std::numeric_limits<double>::max();
  for (int attempt = 0; attempt < 5; ++attempt) {
    a.count = 0;
    const uint64_t from = HostPlatform::now_ns();
    for (uint32_t i = 0; i < kRecords; ++i) {
      a.skip();
      a.span(EventKind::k_plan, kNoPeer, kNoExpert, i, 0);
    }
    best = std::min(best, static_cast<double>(HostPlatform::now_ns() - from) / kRecords);
  }
  return best;
}

double Engine::clock_step_ns() {
  uint64_t smallest = std::numeric_limits<uint64_t>::max();
  uint64_t before = HostPlatform::now_ns();
  for (int i = 0; i < 20000; ++i) {
    const uint64_t now = HostPlatform::now_ns();
    if (now != before) smallest = std::min(smallest, now - before);
    before = now;
  }
  return static_cast<double>(smallest);
}

}  // namespace flashmoe::host
