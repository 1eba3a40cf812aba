// Runs the host engine over shapes, worlds and faults, and holds it to a serial reference, bit for
// bit.  A plain program, since a sanitizer under an unsanitized Python misleads: `make sanitize`.
//
//   driver [--quick]    exits 1 at the first thing that is wrong, and says what
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>

#include "host/driver_numbers.h"
#include "host/engine.h"
#include "host/serial.h"

namespace flashmoe::host {
namespace {

struct Case {
  const char* name;
  uint32_t experts, top_k, hidden, inter;
  Activation activation = Activation::kSwiglu;
  Dtype dtype = Dtype::kBf16;
  RoutingKind routing = RoutingKind::kSoftmax;
  bool renormalize = true;
  uint32_t groups = 1, top_groups = 1;
};

struct World {
  std::vector<uint32_t> tokens;  // of each rank
  uint32_t sms;
  bool no_pointers = false;
};

// A layer with random weights and the tokens of all ranks, one after the other.
struct Problem {
  SerialLayer layer;
  std::vector<uint16_t> x;
  std::vector<uint32_t> ids;
  std::vector<float> weights;
  std::vector<uint16_t> y;  // the serial result
};

Problem make_problem(const Case& c, uint32_t tokens) {
  Problem p;
  Shape& s = p.layer.shape;
  s = {};
  s.experts = c.experts;
  s.top_k = c.top_k;
  s.hidden = c.hidden;
  s.inter = c.inter;
  s.tile_m = kTileM;
  s.tile_step = kTileStep;
  s.tile_n1 = kTileN1;
  s.tile_n2 = kTileN2;
  s.wave_experts = 2;
  s.activation = c.activation;
  s.routing = c.routing;
  s.renormalize = c.renormalize;
  s.scale = 1.5f;
  s.groups = c.groups;
  s.top_groups = c.top_groups;
  p.layer.dtype = c.dtype;
  std::mt19937 random(7);
  auto fill = [&](std::vector<uint16_t>& to, size_t n, float scale) {
    std::normal_distribution<float> normal(0.0f, scale);
    to.resize(n);
    for (auto& v : to) v = p.layer.rounded(normal(random));
  };
  const uint32_t up_rows = is_gated(c.activation) ? 2 * c.inter : c.inter;
  const float root = 1.0f / std::sqrt(static_cast<float>(c.hidden));
  fill(p.layer.gate, size_t{c.experts} * c.hidden, root);
  fill(p.layer.up, size_t{c.experts} * up_rows * c.hidden, root);
  fill(p.layer.down, size_t{c.experts} * c.hidden * c.inter, root);
  fill(p.x, size_t{tokens} * c.hidden, 1.0f);
  std::uniform_real_distribution<float> uniform(-0.2f, 0.2f);
  for (uint32_t e = 0; e < c.experts; ++e) p.layer.bias.push_back(uniform(random));
  p.ids.resize(size_t{tokens} * c.top_k);
  p.weights.resize(p.ids.size());
  p.y.resize(p.x.size());
  for (uint32_t t = 0; t < tokens; ++t) {
    uint32_t* ids = p.ids.data() + size_t{t} * c.top_k;
    float* weights = p.weights.data() + size_t{t} * c.top_k;
    if (c.routing == RoutingKind::kExternal) {
      for (uint32_t j = 0; j < c.top_k; ++j) {
        ids[j] = (t * 5 + j * 3) % c.experts;
        for (uint32_t i = 0; i < j; ++i) {
          if (ids[i] == ids[j]) {
            ids[j] = (ids[j] + 1) % c.experts;
            i = UINT32_MAX;
          }
        }
        weights[j] = uniform(random);
      }
    } else {
      p.layer.route(p.x.data() + size_t{t} * c.hidden, ids, weights);
    }
    p.layer.token(p.x.data() + size_t{t} * c.hidden, ids, weights,
                  p.y.data() + size_t{t} * c.hidden);
  }
  return p;
}

EngineConfig make_config(const Problem& p, const World& w) {
  EngineConfig config{};
  config.shape = p.layer.shape;
  config.shape.world = static_cast<uint32_t>(w.tokens.size());
  config.shape.chunks = w.sms;
  for (const uint32_t t : w.tokens) {
    config.shape.max_tokens = max_u32(config.shape.max_tokens, t);
  }
  config.shape.pool_rows = max_u32(1, static_cast<uint32_t>(worst_pool_rows(config.shape)));
  config.dtype = p.layer.dtype;
  config.tokens = w.tokens;
  config.last_rank = config.shape.world;
  config.no_pointers = w.no_pointers;
  config.traced = true;
  config.ring_capacity = 4096;
  config.deadline_ns = config.first_deadline_ns = 120'000'000'000u;
  return config;
}

Weights weights_of(const Problem& p) {
  return {p.layer.gate.data(), p.layer.bias.data(), p.layer.up.data(), p.layer.down.data()};
}

void set_inputs(Engine& engine, const Problem& p, const World& w) {
  size_t token = 0;
  for (uint32_t r = 0; r < w.tokens.size(); ++r) {
    engine.set_input(r,
                     {p.x.data() + token * p.layer.shape.hidden,
                      reinterpret_cast<const int32_t*>(p.ids.data()) + token * p.layer.shape.top_k,
                      p.weights.data() + token * p.layer.shape.top_k});
    token += w.tokens[r];
  }
}

void check_output(const Engine& engine, const Problem& p, const World& w, const std::string& what) {
  const Machine& m = engine.machine();
  const Shape& s = m.shape;
  size_t token = 0;
  for (uint32_t r = 0; r < s.world; ++r) {
    const uint32_t* ids = m.heaps[r].at<uint32_t>(m.layout.ids);
    const float* weights = m.heaps[r].at<float>(m.layout.weights);
    for (size_t i = 0; i < size_t{w.tokens[r]} * s.top_k; ++i) {
      CHECK(ids[i] == p.ids[token * s.top_k + i], "%s: rank %u: expert of choice %zu", what.c_str(),
            r, i);
      CHECK(weights[i] == p.weights[token * s.top_k + i], "%s: rank %u: weight of choice %zu",
            what.c_str(), r, i);
    }
    for (size_t i = 0; i < size_t{w.tokens[r]} * s.hidden; ++i) {
      CHECK(m.y[r][i] == p.y[token * s.hidden + i], "%s: rank %u: y[%zu] is %04x, not %04x",
            what.c_str(), r, i, m.y[r][i], p.y[token * s.hidden + i]);
    }
    token += w.tokens[r];
  }
}

// Spans of an actor lie inside its launch and do not overlap; what was dispatched is what came
// back.
void check_rings(const Engine& engine, uint32_t launches, const std::string& what) {
  const Machine& m = engine.machine();
  uint64_t dispatched = 0, returned = 0;
  for (uint32_t a = 0; a < m.actors(); ++a) {
    const RingHeader& ring = m.rings[a];
    CHECK(ring.magic == kRingMagic && ring.count <= ring.capacity, "%s: ring %u", what.c_str(), a);
    const Record* records = &m.records[uint64_t{a} * m.config.ring_capacity];
    uint64_t last_end = 0;
    uint32_t ended = 0;
    for (uint64_t i = 0; i < ring.count; ++i) {
      const Record& r = records[i];
      const auto kind = static_cast<EventKind>(r.kind);
      if (kind == EventKind::k_dispatch) dispatched += r.aux;
      if (kind == EventKind::k_put) returned += r.aux;
      if (kind == EventKind::k_launch) {
        CHECK(r.t0_ns + r.dur_ns >= last_end, "%s: a span past its launch", what.c_str());
        last_end = r.t0_ns + r.dur_ns;
        ++ended;
      } else if (r.flags & kFlagOpen) {
        CHECK(
            i + 1 < ring.count && records[i + 1].t0_ns == r.t0_ns && records[i + 1].kind == r.kind,
            "%s: an open wait that nothing closes", what.c_str());
      } else {
        CHECK(r.t0_ns >= last_end,
              "%s: ring %u: record %" PRIu64 " (kind %u) overlaps the one before", what.c_str(), a,
              i, r.kind);
        last_end = r.t0_ns + r.dur_ns;
      }
    }
    CHECK(ended == launches, "%s: ring %u saw %u launches", what.c_str(), a, ended);
  }
  uint64_t rows = 0;
  for (const uint32_t n : engine.chunk_counts()) rows += n;
  const uint64_t bytes = rows * m.shape.hidden * 2 * launches;
  CHECK(dispatched == bytes, "%s: %" PRIu64 " bytes dispatched of %" PRIu64, what.c_str(),
        dispatched, bytes);
  CHECK(returned == bytes, "%s: %" PRIu64 " bytes returned of %" PRIu64, what.c_str(), returned,
        bytes);
}

void run_case(const Case& c, const std::vector<World>& worlds, uint32_t launches) {
  uint32_t tokens = 0;
  for (const uint32_t t : worlds.front().tokens) tokens += t;
  const Problem p = make_problem(c, tokens);
  std::vector<World> both = worlds;
  for (World w : worlds) {
    w.no_pointers = true;
    if (w.tokens.size() > 1) both.push_back(w);
  }
  for (const World& w : both) {
    const std::string what = std::string(c.name) + " W" + std::to_string(w.tokens.size()) + " S" +
                             std::to_string(w.sms) + (w.no_pointers ? " by puts" : "");
    EngineConfig config = make_config(p, w);
    Engine engine(config, weights_of(p));
    set_inputs(engine, p, w);
    for (uint32_t i = 0; i < launches; ++i) {
      const LaunchResult result = engine.launch();
      CHECK(result.status == Status::kOk, "%s: launch %u ended with status %u", what.c_str(), i,
            static_cast<uint32_t>(result.status));
      check_output(engine, p, w, what);
    }
    check_rings(engine, launches, what);
    std::printf("ok  %s\n", what.c_str());
    std::fflush(stdout);
  }
}

bool someone_waits(const Engine& engine, EventKind kind) {
  for (const FlightSlot& slot : engine.flight()) {
    const bool stuck = slot.state == static_cast<uint8_t>(ActorState::kGaveUp) ||
                       slot.state == static_cast<uint8_t>(ActorState::kAborted);
    if (stuck && slot.kind == static_cast<uint8_t>(kind)) return true;
  }
  return false;
}

// A fault ends the launch with kHang and names what was awaited; reset() makes the engine whole.
void run_hang(const char* name, const Problem& p, const World& w, const Fault& fault,
              EventKind kind) {
  EngineConfig config = make_config(p, w);
  config.deadline_ns = config.first_deadline_ns = 700'000'000;
  config.faults = {fault};
  Engine engine(config, weights_of(p));
  set_inputs(engine, p, w);
  const LaunchResult result = engine.launch();
  CHECK(result.status == Status::kHang, "%s: status %u", name,
        static_cast<uint32_t>(result.status));
  CHECK(result.elapsed_ns < 30'000'000'000u, "%s: took %" PRIu64 " ns", name, result.elapsed_ns);
  CHECK(someone_waits(engine, kind), "%s: nobody is seen waiting for kind %u", name,
        static_cast<uint32_t>(kind));
  CHECK(engine.launch().status == Status::kHang, "%s: an abort must be sticky", name);
  std::printf("ok  fault: %s\n", name);
  std::fflush(stdout);
}

// An expert that rank 1 of three sends rows to, and another rank owns.
uint32_t foreign_expert(const Problem& p) {
  const uint32_t owned = p.layer.shape.experts / 3;
  for (size_t i = size_t{12} * p.layer.shape.top_k;; ++i) {
    if (p.ids[i] / owned != 1) return p.ids[i];
  }
}

void run_faults(bool quick) {
  const Case c{"faults", 6, 2, 32, 40};
  const World w{{12, 9, 14}, 2};
  Problem p = make_problem(c, 35);
  run_hang("never-starts", p, w, {FaultKind::kNeverStarts, 1, ~0u, ~0u, 0},
           EventKind::k_wait_counts);
  run_hang("lost-signal", p, w, {FaultKind::kLostSignal, 1, ~0u, p.ids[12 * 2], 0},
           EventKind::k_wait_rows);
  World puts = w;
  puts.no_pointers = true;
  run_hang("lost-signal of a put", p, puts, {FaultKind::kLostSignal, 1, ~0u, foreign_expert(p), 0},
           EventKind::k_wait_rows);
  // The last expert, so that the wrong count shifts no other expert's rows.
  run_hang("wrong-count", p, w, {FaultKind::kWrongCount, 0, 2, 5, 0}, EventKind::k_wait_rows);

  EngineConfig slow = make_config(p, w);
  slow.faults = {{FaultKind::kSlow, 1, ~0u, ~0u, 2'000'000}};
  Engine engine(slow, weights_of(p));
  set_inputs(engine, p, w);
  CHECK(engine.launch().status == Status::kOk, "a slow rank is no hang");
  check_output(engine, p, w, "slow");
  std::printf("ok  fault: slow\n");

  EngineConfig small = make_config(p, w);
  small.shape.pool_rows = 8;
  Engine overflowing(small, weights_of(p));
  set_inputs(overflowing, p, w);
  for (int i = 0; i < (quick ? 1 : 3); ++i) {
    const LaunchResult result = overflowing.launch();
    CHECK(result.status == Status::kOverflow, "8 rows cannot hold 70");
    CHECK(result.rows_needed >= 70 / 3 && result.rows_needed <= 70, "%u rows", result.rows_needed);
  }
  std::printf("ok  overflow\n");
}

void run_bad_ids() {
  const Case c{"bad-ids", 5, 3, 16, 24, Activation::kRelu, Dtype::kFp16, RoutingKind::kExternal};
  const World w{{6, 7}, 2};
  Problem p = make_problem(c, 13);
  const uint32_t good = p.ids[9 * 3 + 1];
  EngineConfig config = make_config(p, w);
  Engine engine(config, weights_of(p));
  set_inputs(engine, p, w);
  for (const uint32_t bad : {5u, ~0u, p.ids[9 * 3]}) {
    p.ids[9 * 3 + 1] = bad;
    CHECK(engine.launch().status == Status::kBadIds, "id %d must be refused",
          static_cast<int>(bad));
    CHECK(engine.launch().status == Status::kBadIds, "and stay so until reset");
    engine.reset();
    p.ids[9 * 3 + 1] = good;
    CHECK(engine.launch().status == Status::kOk, "after reset");
    check_output(engine, p, w, "bad-ids, after reset");
  }
  std::printf("ok  bad ids\n");
}

int run(bool quick) {
  check_widening(Dtype::kBf16);
  check_widening(Dtype::kFp16);
  check_variants();
  check_rounding(Dtype::kBf16, 0x7f7f);
  check_rounding(Dtype::kFp16, 0x7bff);
  std::printf("ok  rounding\n");
  using A = Activation;
  using R = RoutingKind;
  run_case({"swiglu-bf16", 8, 2, 64, 96}, {{{37}, 1}, {{10, 27}, 2}, {{5, 0, 21, 11}, 1}}, 3);
  run_case({"sigmoid-groups", 12, 4, 40, 24, A::kSwiglu, Dtype::kBf16, R::kSigmoid, true, 4, 2},
           {{{30}, 2}, {{4, 5, 6, 0, 15}, 1}}, 2);
  run_case({"external-fp16", 5, 3, 16, 8, A::kGeglu, Dtype::kFp16, R::kExternal}, {{{9, 8, 1}, 2}},
           2);
  run_case({"no-tokens", 4, 2, 16, 8}, {{{0, 0}, 2}, {{0}, 1}}, 2);
  run_case({"few-experts", 3, 3, 24, 16, A::kGelu}, {{{2, 3, 1, 0, 4, 2, 1, 5}, 1}}, 2);
  if (!quick) {
    run_case({"deep", 4, 2, 600, 520}, {{{40}, 3}, {{20, 20}, 2}}, 2);
    run_case({"olmoe-like", 16, 8, 72, 40, A::kSwiglu, Dtype::kBf16, R::kSoftmax, false},
             {{{64}, 1}, {{32, 32}, 3}, {{8, 8, 8, 8, 8, 8, 8, 8}, 2}}, 3);
    run_case({"relu-fp16", 7, 1, 48, 200, A::kRelu, Dtype::kFp16}, {{{50}, 2}, {{1, 48, 1}, 3}}, 2);
    run_case({"silu", 9, 9, 8, 8, A::kSilu}, {{{33}, 2}, {{11, 11, 11}, 1}}, 2);
  }
  run_bad_ids();
  run_faults(quick);
  std::printf("all right on %s vectors\n", vector_unit());
  return 0;
}

}  // namespace
}  // namespace flashmoe::host

int main(int argc, char** argv) {
  bool quick = false;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--quick") != 0) {
      std::fprintf(stderr, "usage: %s [--quick]\n", argv[0]);
      return 2;
    }
    quick = true;
  }
  return flashmoe::host::run(quick);
}
