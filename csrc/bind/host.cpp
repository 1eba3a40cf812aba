// The host engine for Python: flashmoe/world/host.py wraps it.  Arrays go in and out as they lie in
// memory: rows of bf16 or fp16 as uint16, rings and flight slots as bytes.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <cstring>
#include <exception>
#include <future>
#include <memory>
#include <optional>
#include <thread>

#include "bind/shape_from_dict.h"
#include "host/engine.h"
#include "host/platform.h"

namespace nb = nanobind;
using namespace flashmoe;
using namespace flashmoe::host;

namespace {

template <class T>
using In = nb::ndarray<const T, nb::c_contig, nb::device::cpu>;

// (kind, rank, peer, expert, seconds) of flashmoe.world.base.Fault.
using FaultTuple = std::tuple<std::string, int64_t, int64_t, int64_t, double>;

Fault fault_from(const FaultTuple& f) {
  const auto& [kind, rank, peer, expert, seconds] = f;
  Fault fault{};
  if (kind == "never-starts") {
    fault.kind = FaultKind::kNeverStarts;
  } else if (kind == "lost-signal") {
    fault.kind = FaultKind::kLostSignal;
  } else if (kind == "wrong-count") {
    fault.kind = FaultKind::kWrongCount;
  } else if (kind == "slow") {
    fault.kind = FaultKind::kSlow;
  } else {
    throw nb::value_error(("unknown fault '" + kind + "'").c_str());
  }
  fault.rank = static_cast<uint32_t>(rank);
  fault.peer = static_cast<uint32_t>(peer);
  fault.expert = static_cast<uint32_t>(expert);
  fault.sleep_ns = static_cast<uint64_t>(seconds * 1e9);
  return fault;
}

Dtype dtype_by_name(const std::string& name) {
  if (name == "bf16") return Dtype::kBf16;
  if (name == "fp16") return Dtype::kFp16;
  throw nb::value_error(("unknown dtype '" + name + "'").c_str());
}

EngineConfig config_from(const nb::dict& shape, const std::string& dtype,
                         const std::vector<uint32_t>& tokens, bool traced, uint32_t ring_capacity,
                         bool keep_last, uint64_t deadline_ns, uint64_t first_deadline_ns,
                         const std::vector<FaultTuple>& faults, std::pair<uint32_t, uint32_t> ranks,
                         bool no_pointers) {
  EngineConfig config{};
  config.shape = shape_from_dict(shape);
  config.dtype = dtype_by_name(dtype);
  config.tokens = tokens;
  config.traced = traced;
  config.ring_capacity = ring_capacity;
  config.keep_last = keep_last;
  config.deadline_ns = deadline_ns;
  config.first_deadline_ns = first_deadline_ns;
  for (const FaultTuple& f : faults) config.faults.push_back(fault_from(f));
  config.first_rank = ranks.first;
  config.last_rank = ranks.second;
  config.no_pointers = no_pointers;
  return config;
}

template <class T>
void expect(const In<T>& array, std::vector<size_t> shape, const char* what) {
  bool same = array.ndim() == shape.size();
  for (size_t i = 0; same && i < shape.size(); ++i) same = array.shape(i) == shape[i];
  if (!same) throw nb::value_error((std::string(what) + " has the wrong shape").c_str());
}

std::vector<char*> addresses(const std::vector<uintptr_t>& heaps) {
  std::vector<char*> bases;
  for (const uintptr_t heap : heaps) bases.push_back(reinterpret_cast<char*>(heap));
  return bases;
}

// Keeps alive what the engine points into, but for shared heaps, which are the caller's.
class BoundEngine {
 public:
  BoundEngine(const EngineConfig& config, In<uint16_t> gate, std::optional<In<float>> bias,
              In<uint16_t> up, In<uint16_t> down, const std::vector<uintptr_t>& heaps,
              uintptr_t slots)
      : gate_(std::move(gate)), bias_(std::move(bias)), up_(std::move(up)), down_(std::move(down)) {
    const Shape& s = config.shape;
    const size_t up_rows = is_gated(s.activation) ? 2 * size_t{s.inter} : s.inter;
    expect(gate_, {s.experts, s.hidden}, "gate");
    if (bias_) expect(*bias_, {s.experts}, "bias");
    expect(up_, {s.experts, up_rows, s.hidden}, "up");
    expect(down_, {s.experts, s.hidden, s.inter}, "down");
    const SharedMemory shared{addresses(heaps), reinterpret_cast<FlightSlot*>(slots)};
    engine_ = std::make_unique<Engine>(
        config, Weights{gate_.data(), bias_ ? bias_->data() : nullptr, up_.data(), down_.data()},
        heaps.empty() ? nullptr : &shared);
    x_.resize(s.world);
    ids_.resize(s.world);
    weights_.resize(s.world);
  }

  void load(uint32_t rank, In<uint16_t> x, std::optional<In<int32_t>> ids,
            std::optional<In<float>> weights) {
    const Machine& m = engine_->machine();
    const Shape& s = m.shape;
    if (!m.is_own(rank)) throw nb::index_error("no such rank here");
    const size_t tokens = m.config.tokens[rank];
    expect(x, {tokens, s.hidden}, "x");
    if (s.routing == RoutingKind::kExternal) {
      if (!ids || !weights) throw nb::value_error("external routing needs ids and weights");
      expect(*ids, {tokens, s.top_k}, "ids");
      expect(*weights, {tokens, s.top_k}, "weights");
    }
    x_[rank] = std::move(x);
    ids_[rank] = std::move(ids);
    weights_[rank] = std::move(weights);
    engine_->set_input(rank, {x_[rank]->data(), ids_[rank] ? ids_[rank]->data() : nullptr,
                              weights_[rank] ? weights_[rank]->data() : nullptr});
    loaded_ |= 1u << rank;
  }

  // (status, elapsed ns, rows needed).  Other Python threads run meanwhile; Ctrl-C ends the launch
  // by an abort, which stays until reset().
  std::tuple<uint32_t, uint64_t, uint32_t> launch() {
    const EngineConfig& c = engine_->machine().config;
    if (loaded_ != (1u << c.last_rank) - (1u << c.first_rank)) {
      throw nb::value_error("load() each rank's input before launch()");
    }
    std::future<LaunchResult> launched;
    {
      nb::gil_scoped_release release;
      launched = std::async(std::launch::async, [this] { return engine_->launch(); });
    }
    bool interrupted = false;
    for (bool done = false; !done && !interrupted;) {
      {
        nb::gil_scoped_release release;
        done = launched.wait_for(std::chrono::milliseconds(50)) == std::future_status::ready;
      }
      interrupted = PyErr_CheckSignals() != 0;
    }
    if (interrupted) {
      nb::python_error error;  // takes the pending KeyboardInterrupt
      {
        nb::gil_scoped_release release;
        engine_->abort();
        launched.wait();
      }
      throw error;
    }
    const LaunchResult result = launched.get();
    return {static_cast<uint32_t>(result.status), result.elapsed_ns, result.rows_needed};
  }

  Engine& engine() { return *engine_; }

 private:
  In<uint16_t> gate_;
  std::optional<In<float>> bias_;
  In<uint16_t> up_;
  In<uint16_t> down_;
  std::vector<std::optional<In<uint16_t>>> x_;
  std::vector<std::optional<In<int32_t>>> ids_;
  std::vector<std::optional<In<float>>> weights_;
  uint32_t loaded_ = 0;
  std::unique_ptr<Engine> engine_;
};

// A view into the engine's memory, which `self` keeps alive.
template <class T>
nb::object view(nb::handle self, const T* data, std::vector<size_t> shape) {
  return nb::cast(
      nb::ndarray<nb::numpy, T>(const_cast<T*>(data), shape.size(), shape.data(), self));
}

template <class T>
nb::object owned(std::vector<T> values, std::vector<size_t> shape) {
  auto* kept = new std::vector<T>(std::move(values));
  nb::capsule owner(kept, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
  return nb::cast(nb::ndarray<nb::numpy, T>(kept->data(), shape.size(), shape.data(), owner));
}

nb::object y_of(nb::handle self, uint32_t rank) {
  const Machine& m = nb::cast<BoundEngine&>(self).engine().machine();
  return view(self, m.y[rank].data(), {m.config.tokens[rank], m.shape.hidden});
}
nb::object ids_of(nb::handle self, uint32_t rank) {
  const Machine& m = nb::cast<BoundEngine&>(self).engine().machine();
  return view(self, m.heaps[rank].at<int32_t>(m.layout.ids),
              {m.config.tokens[rank], m.shape.top_k});
}
nb::object weights_of(nb::handle self, uint32_t rank) {
  const Machine& m = nb::cast<BoundEngine&>(self).engine().machine();
  return view(self, m.heaps[rank].at<float>(m.layout.weights),
              {m.config.tokens[rank], m.shape.top_k});
}
nb::object rings_of(nb::handle self) {
  const Machine& m = nb::cast<BoundEngine&>(self).engine().machine();
  const size_t n = m.rings ? m.actors() : 0;
  return view(self, reinterpret_cast<const uint8_t*>(m.rings.get()), {n, sizeof(RingHeader)});
}
nb::object records_of(nb::handle self) {
  const Machine& m = nb::cast<BoundEngine&>(self).engine().machine();
  const size_t n = m.rings ? m.actors() : 0;
  return view(self, reinterpret_cast<const uint8_t*>(m.records.get()),
              {n, m.config.ring_capacity, sizeof(Record)});
}
nb::object flight_of(BoundEngine& self) {
  const std::vector<FlightSlot> slots = self.engine().flight();
  std::vector<uint8_t> bytes(slots.size() * sizeof(FlightSlot));
  std::memcpy(bytes.data(), slots.data(), bytes.size());
  return owned(std::move(bytes), {slots.size(), sizeof(FlightSlot)});
}
nb::object counts_seen(BoundEngine& self) {
  const Machine& m = self.engine().machine();
  const Shape& s = m.shape;
  return owned(self.engine().counts_seen(), {m.own_ranks(), s.world, s.experts});
}
nb::object chunk_counts(BoundEngine& self) {
  const Machine& m = self.engine().machine();
  const Shape& s = m.shape;
  return owned(self.engine().chunk_counts(), {m.own_ranks(), s.chunks, s.experts});
}

}  // namespace

void bind_host(nb::module_& m) {
  m.attr("TILE_M") = kTileM;
  m.attr("TILE_STEP") = kTileStep;
  m.attr("TILE_N1") = kTileN1;
  m.attr("TILE_N2") = kTileN2;
  m.attr("WAVE_EXPERTS") = kWaveExperts;
  m.attr("FAMILY") = kFamily;
  m.attr("LANES") = kLanes;
  m.attr("MAX_RANKS") = kMaxRanks;
  m.def("vector_unit", &vector_unit, "The instruction set that the engine's products use.");
  m.def("cycles_mhz", &HostPlatform::cycles_mhz, "Measured rate of the cycle counter.");
  m.def("clock_step_ns", &Engine::clock_step_ns, "Smallest step of the clock seen just now.");
  m.def("now_ns", &HostPlatform::now_ns, "The engine's clock.");
  m.def(
      "skew_clock", &HostPlatform::skew_clock, nb::arg("offset_ns"), nb::arg("drift"),
      "Makes the engine's clock wrong, to test how clocks are aligned: `offset_ns` ahead, and from "
      "now on faster by the factor 1 + `drift`.");
  m.def("record_cost_ns", &Engine::record_cost_ns, "What one span costs, measured just now.");

  nb::class_<EngineConfig>(m, "EngineConfig")
      .def(
          "__init__",
          [](EngineConfig* self, const nb::dict& shape, const std::string& dtype,
             const std::vector<uint32_t>& tokens, bool traced, uint32_t ring_capacity,
             bool keep_last, uint64_t deadline_ns, uint64_t first_deadline_ns,
             const std::vector<FaultTuple>& faults, std::pair<uint32_t, uint32_t> ranks,
             bool no_pointers) {
            new (self) EngineConfig(config_from(shape, dtype, tokens, traced, ring_capacity,
                                                keep_last, deadline_ns, first_deadline_ns, faults,
                                                ranks, no_pointers));
          },
          nb::arg("shape"), nb::arg("dtype"), nb::arg("tokens"), nb::arg("traced"),
          nb::arg("ring_capacity"), nb::arg("keep_last"), nb::arg("deadline_ns"),
          nb::arg("first_deadline_ns"), nb::arg("faults"), nb::arg("ranks"), nb::arg("no_pointers"))
      .def_prop_ro("bytes_needed", &Engine::bytes_needed, "Bytes an engine of this allocates.");

  nb::class_<BoundEngine>(m, "Engine")
      .def(nb::init<const EngineConfig&, In<uint16_t>, std::optional<In<float>>, In<uint16_t>,
                    In<uint16_t>, const std::vector<uintptr_t>&, uintptr_t>(),
           nb::arg("config"), nb::arg("gate"), nb::arg("bias").none(), nb::arg("up"),
           nb::arg("down"), nb::arg("heaps"), nb::arg("slots"),
           "`heaps`: the address of every rank's, and `slots` of the own flight slots, where ranks "
           "are processes; else empty and 0.")
      .def("load", &BoundEngine::load, nb::arg("rank"), nb::arg("x"), nb::arg("ids").none(),
           nb::arg("weights").none())
      .def("launch", &BoundEngine::launch, "(status, elapsed ns, rows needed) of one forward.")
      .def("abort", [](BoundEngine& self) { self.engine().abort(); })
      .def("reset", [](BoundEngine& self) { self.engine().reset(); })
      .def(
          "resize_pools",
          [](BoundEngine& self, uint32_t rows, const std::vector<uintptr_t>& heaps) {
            const std::vector<char*> bases = addresses(heaps);
            self.engine().resize_pools(rows, heaps.empty() ? nullptr : &bases);
          },
          nb::arg("pool_rows"), nb::arg("heaps"),
          "Undoes the last launch and gives every pool this many rows; `heaps` as at the start.")
      .def("reset_rings", [](BoundEngine& self) { self.engine().reset_rings(); })
      .def_prop_ro("iteration", [](BoundEngine& self) { return self.engine().machine().iteration; })
      .def("y", [](nb::handle_t<BoundEngine> self, uint32_t rank) { return y_of(self, rank); })
      .def("ids", [](nb::handle_t<BoundEngine> self, uint32_t rank) { return ids_of(self, rank); })
      .def("weights",
           [](nb::handle_t<BoundEngine> self, uint32_t rank) { return weights_of(self, rank); })
      .def("rings", [](nb::handle_t<BoundEngine> self) { return rings_of(self); })
      .def("records", [](nb::handle_t<BoundEngine> self) { return records_of(self); })
      .def("flight", &flight_of)
      .def("counts_seen", &counts_seen)
      .def("chunk_counts", &chunk_counts);
}
