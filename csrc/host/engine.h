// The host engine: ranks of S "SMs" each, every lane of an SM a thread of this process.
//
// One Engine runs all W ranks, or one of them, the others being processes of their own whose heaps it
// is given.  It holds the rings and the flight recorder of its ranks; launch() runs one forward of
// them.  It is not thread-safe but for abort() and flight().
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "core/args.h"
#include "core/events.h"
#include "core/flight.h"
#include "core/heap.h"
#include "core/records.h"
#include "core/shape.h"
#include "host/arithmetic.h"
#include "host/dtype.h"
#include "host/transport.h"

namespace flashmoe::host {

// The one tile family of the host, named in plan.parquet: most rows of a tile, what its rows are
// rounded up to (nothing: the products are of the rows that there are), columns of h of a GEMM1
// tile, columns of a GEMM2 tile.
inline constexpr uint32_t kTileM = 16;
inline constexpr uint32_t kTileStep = 1;
inline constexpr uint32_t kTileN1 = 32;
inline constexpr uint32_t kTileN2 = 64;
inline constexpr uint32_t kWaveExperts = 4;
inline constexpr const char* kFamily = "host-16x32";

enum class FaultKind : uint32_t { kNeverStarts = 0, kLostSignal = 1, kWrongCount = 2, kSlow = 3 };

// Mirrors flashmoe.world.base.Fault; 0xffffffff where a field means nothing.
struct Fault {
  FaultKind kind;
  uint32_t rank;
  uint32_t peer;
  uint32_t expert;
  uint64_t sleep_ns;
};

struct EngineConfig {
  Shape shape;  // its tile sizes are those above
  Dtype dtype;
  std::vector<uint32_t> tokens;  // T of each rank
  bool traced;
  uint32_t ring_capacity;  // records an actor
  bool keep_last;
  uint64_t deadline_ns;
  uint64_t first_deadline_ns;  // of the launch with epoch 1
  std::vector<Fault> faults;
  uint32_t first_rank;  // ranks of this process: [first_rank, last_rank)
  uint32_t last_rank;
  bool no_pointers;  // every other rank is beyond pointers: rows and signals go by put-with-signal
};

// Memory that ranks of other processes reach too.  The caller keeps it alive.
struct SharedMemory {
  std::vector<char*> heaps;  // of all ranks, as this process maps them
  FlightSlot* slots;         // [own ranks][chunks][lanes]
};

// All experts' weights, row-major in the dtype; the caller keeps them alive.  Each rank reads only
// the experts it owns.
struct Weights {
  const uint16_t* gate;  // [E][H]
  const float* bias;     // [E], or null
  const uint16_t* up;    // [E][2I or I][H]: gate rows first, then up rows
  const uint16_t* down;  // [E][H][I]
};

struct RankInput {
  const uint16_t* x = nullptr;     // [T][H] dtype
  const int32_t* ids = nullptr;    // [T][k], external routing
  const float* weights = nullptr;  // [T][k], external routing
};

struct LaunchResult {
  Status status;
  uint64_t elapsed_ns;
  uint32_t rows_needed;  // of the fullest pool, where the status is kOverflow
};

template <class T>
struct FreeDeleter {
  void operator()(T* p) const { std::free(p); }
};
template <class T>
using Buffer = std::unique_ptr<T[], FreeDeleter<T>>;

// What all threads of one launch share.
struct Machine {
  EngineConfig config;
  Shape shape;
  HeapLayout layout;
  Weights weights;
  Heap heaps[kMaxRanks];                 // of other processes' ranks only where pointers reach them
  std::unique_ptr<Transport> transport;  // reaches every heap
  RankInput inputs[kMaxRanks];
  std::vector<uint16_t> y[kMaxRanks];  // [T][H] dtype
  std::vector<float> gate_panel;       // [H][gate_columns], the router transposed
  uint32_t gate_columns = 0;           // E, rounded up to kColumnStep
  MultiplyAdd multiply_add = nullptr;
  FlightSlot* slots = nullptr;  // [own ranks][chunks][lanes]
  Buffer<RingHeader> rings;
  Buffer<Record> records;  // [own ranks][chunks][lanes][ring_capacity]
  uint32_t iteration = 0;  // of the next launch, since reset_rings()

  uint32_t own_ranks() const { return config.last_rank - config.first_rank; }
  bool is_own(uint32_t rank) const { return config.first_rank <= rank && rank < config.last_rank; }
  uint32_t actors() const { return own_ranks() * shape.chunks * kLanes; }
  uint32_t actor(uint32_t rank, uint32_t cta, uint32_t lane) const {
    return ((rank - config.first_rank) * shape.chunks + cta) * kLanes + lane;
  }
  const Fault* fault(FaultKind kind, uint32_t rank) const {
    for (const Fault& f : config.faults) {
      if (f.kind == kind && f.rank == rank) return &f;
    }
    return nullptr;
  }
  void raise_abort(Status status) const;
};

class Engine {
 public:
  // `shared` null: all ranks are this process's, and so is their memory.
  Engine(const EngineConfig& config, const Weights& weights, const SharedMemory* shared = nullptr);

  // Bytes that an engine of this configuration allocates.
  static uint64_t bytes_needed(const EngineConfig& config);

  const Machine& machine() const { return machine_; }
  void set_input(uint32_t rank, const RankInput& input) { machine_.inputs[rank] = input; }

  LaunchResult launch();
  // Makes a launch in progress end with kHostAbort; from any thread.
  void abort() { machine_.raise_abort(Status::kHostAbort); }
  // Signals zero, epoch 0.
  void reset();
  // Larger (or smaller) pools after kOverflow: the last launch is undone, its records too, and the
  // signals are reset.  `heaps`: the larger heaps of all ranks, where they are shared.
  void resize_pools(uint32_t pool_rows, const std::vector<char*>* heaps = nullptr);
  void reset_rings();

  // The counts as each own rank holds them for the last launch begun: [holder][source][E];
  // 0xffffffff where none has arrived.
  std::vector<uint32_t> counts_seen() const;
  // Rows of each chunk of the last launch: [own rank][chunk][E].
  std::vector<uint32_t> chunk_counts() const;
  std::vector<FlightSlot> flight() const;

  // What one span costs its actor, measured here and now: two looks at the clock and a record.
  static double record_cost_ns();
  // The smallest step the clock was seen to take.
  static double clock_step_ns();

 private:
  void clear_flight();
  void place_heaps(const std::vector<char*>* shared);
  void await_abort() const;

  Machine machine_;
  std::vector<uint64_t> ring_counts_before_;  // of the last launch
  uint32_t last_epoch_ = 0;
  std::vector<Buffer<char>> heap_memory_;
  Buffer<FlightSlot> slot_memory_;
};

}  // namespace flashmoe::host
