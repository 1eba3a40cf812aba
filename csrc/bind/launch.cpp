// What a GPU world needs from core on the host's side: the heap's layout, the tile plan, and the
// bytes of LaunchArgs.  All of it is derived through csrc/core, so that it can't differ from what
// the kernel derives.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstddef>
#include <cstring>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "bind/shape_from_dict.h"
#include "core/args.h"
#include "core/course.h"
#include "core/flight.h"
#include "core/heap.h"
#include "core/plan.h"
#include "core/records.h"
#include "core/sizes.h"
#include "host/team.h"

namespace nb = nanobind;
using namespace flashmoe;

namespace {

nb::dict heap_layout_dict(const nb::dict& shape, bool in_place) {
  const Shape s = shape_from_dict(shape);
  const HeapLayout l = heap_layout(s, in_place);
  nb::dict d;
#define FLASHMOE_OFFSET(name) d[#name] = l.name
  FLASHMOE_OFFSET(abort_word);
  FLASHMOE_OFFSET(epoch_word);
  FLASHMOE_OFFSET(status_word);
  FLASHMOE_OFFSET(barrier);
  FLASHMOE_OFFSET(exits);
  FLASHMOE_OFFSET(next_tile);
  FLASHMOE_OFFSET(counts);
  FLASHMOE_OFFSET(rows_ready);
  FLASHMOE_OFFSET(h_ready);
  FLASHMOE_OFFSET(y_ready);
  FLASHMOE_OFFSET(returned);
  FLASHMOE_OFFSET(arrived);
  FLASHMOE_OFFSET(staged);
  FLASHMOE_OFFSET(logits);
  FLASHMOE_OFFSET(choices);
  FLASHMOE_OFFSET(columns_ready);
  FLASHMOE_OFFSET(pool);
  FLASHMOE_OFFSET(ret);
  FLASHMOE_OFFSET(h);
  FLASHMOE_OFFSET(ids);
  FLASHMOE_OFFSET(weights);
  FLASHMOE_OFFSET(slots);
  FLASHMOE_OFFSET(sorted);
  FLASHMOE_OFFSET(results);
  FLASHMOE_OFFSET(origin);
  FLASHMOE_OFFSET(histogram);
  FLASHMOE_OFFSET(chunk_rows);
  FLASHMOE_OFFSET(tables);
  FLASHMOE_OFFSET(bytes);
#undef FLASHMOE_OFFSET
  d["signal_bytes"] = signal_bytes(l);
  d["table_words"] = table_words(s);
  d["max_pool_tiles"] = max_pool_tiles(s);
  d["max_global_tiles"] = max_global_tiles(s);
  d["worst_pool_rows"] = worst_pool_rows(s);
  return d;
}

std::optional<nb::dict> units_of(const nb::dict& shape, uint32_t tokens) {
  const Shape s = shape_from_dict(shape);
  if (!may_go_by_units(s, tokens)) return std::nullopt;
  const Shape units = shape_by_units(s);
  nb::dict d;
  d["tile_step"] = units.tile_step;
  d["tile_n1"] = units.tile_n1;
  d["tile_n2"] = units.tile_n2;
  d["wave_experts"] = units.wave_experts;
  return d;
}

nb::object owned_array(std::vector<uint32_t> values) {
  auto* kept = new std::vector<uint32_t>(std::move(values));
  nb::capsule owner(kept, [](void* p) noexcept { delete static_cast<std::vector<uint32_t>*>(p); });
  return nb::cast(
      nb::ndarray<nb::numpy, uint32_t, nb::ndim<1>>(kept->data(), {kept->size()}, owner));
}

using ChunkCounts = nb::ndarray<const uint32_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

nb::dict plan_dict(const nb::dict& shape, const ChunkCounts& chunk_counts) {
  Shape s = shape_from_dict(shape);
  if (chunk_counts.shape(0) != s.world || chunk_counts.shape(2) != s.experts) {
    throw nb::value_error("chunk_counts must be [world, chunks, experts]");
  }
  // Once, since every rank's plan asks for them.
  std::vector<uint32_t> rows(s.world * s.experts);
  const uint32_t* next = chunk_counts.data();
  for (uint32_t source = 0; source < s.world; ++source) {
    for (size_t c = 0; c < chunk_counts.shape(1); ++c) {
      for (uint32_t e = 0; e < s.experts; ++e) rows[source * s.experts + e] += *next++;
    }
  }
  auto counts = [&](uint32_t source, uint32_t e) { return rows[source * s.experts + e]; };
  std::vector<uint32_t> storage(table_words(s));
  enum Column {
    kRank,
    kTile,
    kGemm,
    kExpert,
    kRowTile,
    kRowTileGlobal,
    kColTile,
    kRows,
    kHeight,
    kCols,
    kDepth,
    kColumns
  };
  static const char* const kNames[kColumns] = {
      "rank",     "tile", "gemm",   "expert", "row_tile", "row_tile_global",
      "col_tile", "rows", "height", "cols",   "depth"};
  std::vector<uint32_t> columns[kColumns];
  SerialTeam team;
  for (uint32_t rank = 0; rank < s.world; ++rank) {
    const PlanTables p = plan_tables(storage.data(), s, rank);
    const TileOrder order = tile_order(s, rank);
    build_plan(team, p, s, order, counts);
    const uint32_t tiles = tiles_of_rank(p, order);
    for (auto& column : columns) column.reserve(column.size() + tiles);
    for (uint32_t i = 0; i < tiles; ++i) {
      const Tile t = tile_at(p, s, order, i);
      const uint32_t width = t.gemm == 1 ? s.inter : s.hidden;
      const uint32_t step = t.gemm == 1 ? s.tile_n1 : s.tile_n2;
      columns[kRank].push_back(rank);
      columns[kTile].push_back(i);
      columns[kGemm].push_back(t.gemm);
      columns[kExpert].push_back(t.expert);
      columns[kRowTile].push_back(t.row_tile);
      columns[kRowTileGlobal].push_back(t.row_tile_global);
      columns[kColTile].push_back(t.col_tile);
      columns[kRows].push_back(t.rows);
      columns[kHeight].push_back(computed_rows(s, t.rows));
      columns[kCols].push_back(min_u32(step, width - t.col_tile * step));
      columns[kDepth].push_back(t.gemm == 1 ? s.hidden : s.inter);
    }
  }
  nb::dict d;
  for (int c = 0; c < kColumns; ++c) d[kNames[c]] = owned_array(std::move(columns[c]));
  return d;
}

template <class T>
T* pointer(const nb::handle& value) {
  return reinterpret_cast<T*>(nb::cast<uintptr_t>(value));
}

template <class Maps>
void copy_maps(Maps& to, const nb::handle& from) {
  const nb::bytes maps = nb::cast<nb::bytes>(from);
  if (maps.size() != sizeof(to)) throw nb::value_error("a tensor map is 128 bytes");
  std::memcpy(to, maps.c_str(), sizeof(to));
}

// The layout of a heap whose signals and rows lie apart, at these offsets from the base address.
HeapLayout apart(const HeapLayout& layout, uint64_t signals_at, uint64_t rows_at) {
  uint64_t offsets[sizeof(HeapLayout) / sizeof(uint64_t)];
  static_assert(sizeof(offsets) == sizeof(HeapLayout), "a heap's layout consists of offsets alone");
  std::memcpy(offsets, &layout, sizeof(offsets));
  for (uint64_t& at : offsets) {
    at = at < layout.pool ? at + signals_at : at - layout.pool + rows_at;
  }
  HeapLayout placed;
  std::memcpy(&placed, offsets, sizeof(offsets));
  return placed;
}

nb::bytes launch_args(const nb::dict& shape, const std::vector<uintptr_t>& heaps,
                      const nb::list& ranks, uint32_t local_ranks, uint32_t ring_capacity,
                      bool keep_last, uint32_t iteration_base, uint64_t deadline_ns,
                      uint64_t first_deadline_ns, uintptr_t slots, uintptr_t rings,
                      uintptr_t records, uintptr_t images, uintptr_t images_written,
                      uintptr_t steps, uint32_t image_capacity, uint32_t step_capacity,
                      std::tuple<uint32_t, uint32_t, uint32_t> fault, uint64_t signals_at,
                      std::optional<uint64_t> rows_at, bool by_units, bool in_place) {
  const auto [lost_rank, lost_expert, never_starts] = fault;
  const Shape s = shape_from_dict(shape);
  if (s.world > kMaxRanks || heaps.size() != s.world) {
    throw nb::value_error("heaps must name each rank's base address, at most 8");
  }
  if (local_ranks > s.world || ranks.size() != local_ranks) {
    throw nb::value_error("ranks must describe each of the local_ranks");
  }
  // LaunchArgs is copied to the GPU byte by byte, so its padding is zero too.
  auto args = std::make_unique<LaunchArgs>();
  std::memset(static_cast<void*>(args.get()), 0, sizeof(LaunchArgs));
  args->shape = s;
  const HeapLayout layout = heap_layout(s, in_place);
  args->layout = apart(layout, signals_at, rows_at.value_or(layout.pool));
  for (size_t r = 0; r < heaps.size(); ++r) args->heaps[r].base = reinterpret_cast<char*>(heaps[r]);
  for (size_t r = 0; r < ranks.size(); ++r) {
    const nb::dict d = nb::cast<nb::dict>(ranks[r]);
    RankArgs& rank = args->ranks[r];
    copy_maps(rank.map_pool, d["map_pool"]);
    copy_maps(rank.map_h, d["map_h"]);
    copy_maps(rank.map_up, d["map_up"]);
    copy_maps(rank.map_down, d["map_down"]);
    copy_maps(rank.map_up_unit, d["map_up_unit"]);
    copy_maps(rank.map_down_unit, d["map_down_unit"]);
    copy_maps(rank.map_x, d["map_x"]);
    copy_maps(rank.map_gate, d["map_gate"]);
    copy_maps(rank.map_x_slice, d["map_x_slice"]);
    copy_maps(rank.map_gate_slice, d["map_gate_slice"]);
    rank.x = pointer<const void>(d["x"]);
    rank.bias = pointer<const float>(d["bias"]);
    rank.y = pointer<void>(d["y"]);
    rank.ids = pointer<const int32_t>(d["ids"]);
    rank.weights = pointer<const float>(d["weights"]);
    rank.rank = nb::cast<uint32_t>(d["rank"]);
    rank.tokens = nb::cast<uint32_t>(d["tokens"]);
    rank.gate_box_tokens = nb::cast<uint32_t>(d["gate_box_tokens"]);
    rank.course = course_of(s, rank.rank, rank.tokens, by_units, in_place);
    rank.course.absent = never_starts == rank.rank;
    args->pair_size = pair_size(s, rank);  // of several ranks it is the same
  }
  args->ring_capacity = ring_capacity;
  args->keep_last = keep_last ? 1 : 0;
  args->iteration_base = iteration_base;
  args->deadline_ns = deadline_ns;
  args->first_deadline_ns = first_deadline_ns;
  args->slots = reinterpret_cast<FlightSlot*>(slots);
  args->rings = reinterpret_cast<RingHeader*>(rings);
  args->records = reinterpret_cast<Record*>(records);
  args->images = reinterpret_cast<TileImage*>(images);
  args->images_written = reinterpret_cast<LogCursor*>(images_written);
  args->steps = reinterpret_cast<StepImage*>(steps);
  args->image_capacity = image_capacity;
  args->step_capacity = step_capacity;
  args->fault = {lost_rank, lost_expert};
  return nb::bytes(reinterpret_cast<const char*>(args.get()), sizeof(LaunchArgs));
}

nb::dict record_layout() {
  nb::dict all;
#define FLASHMOE_FIELD(type, name) \
  fields[#name] = std::make_tuple(offsetof(type, name), sizeof(type::name))
  {
    nb::dict fields;
    FLASHMOE_FIELD(Record, t0_ns);
    FLASHMOE_FIELD(Record, dur_ns);
    FLASHMOE_FIELD(Record, kind);
    FLASHMOE_FIELD(Record, flags);
    FLASHMOE_FIELD(Record, peer);
    FLASHMOE_FIELD(Record, expert);
    FLASHMOE_FIELD(Record, iter);
    FLASHMOE_FIELD(Record, tile);
    FLASHMOE_FIELD(Record, aux);
    FLASHMOE_FIELD(Record, stall_cycles);
    all["Record"] = fields;
  }
  {
    nb::dict fields;
    FLASHMOE_FIELD(RingHeader, count);
    FLASHMOE_FIELD(RingHeader, begin_ns);
    FLASHMOE_FIELD(RingHeader, end_ns);
    FLASHMOE_FIELD(RingHeader, begin_cycles);
    FLASHMOE_FIELD(RingHeader, end_cycles);
    FLASHMOE_FIELD(RingHeader, magic);
    FLASHMOE_FIELD(RingHeader, capacity);
    FLASHMOE_FIELD(RingHeader, rank);
    FLASHMOE_FIELD(RingHeader, sm);
    FLASHMOE_FIELD(RingHeader, cta);
    FLASHMOE_FIELD(RingHeader, lane);
    FLASHMOE_FIELD(RingHeader, mode);
    FLASHMOE_FIELD(RingHeader, next);
    FLASHMOE_FIELD(RingHeader, reserved);
    all["RingHeader"] = fields;
  }
  {
    nb::dict fields;
    FLASHMOE_FIELD(FlightSlot, since_ns);
    FLASHMOE_FIELD(FlightSlot, epoch);
    FLASHMOE_FIELD(FlightSlot, state);
    FLASHMOE_FIELD(FlightSlot, kind);
    FLASHMOE_FIELD(FlightSlot, peer);
    FLASHMOE_FIELD(FlightSlot, expert);
    FLASHMOE_FIELD(FlightSlot, rank);
    FLASHMOE_FIELD(FlightSlot, tile);
    FLASHMOE_FIELD(FlightSlot, expected);
    FLASHMOE_FIELD(FlightSlot, seen);
    FLASHMOE_FIELD(FlightSlot, sm);
    FLASHMOE_FIELD(FlightSlot, cta);
    FLASHMOE_FIELD(FlightSlot, lane);
    FLASHMOE_FIELD(FlightSlot, reserved);
    all["FlightSlot"] = fields;
  }
#undef FLASHMOE_FIELD
  nb::dict sizes;
  sizes["Record"] = std::make_tuple(size_t{0}, sizeof(Record));
  sizes["RingHeader"] = std::make_tuple(size_t{0}, sizeof(RingHeader));
  sizes["FlightSlot"] = std::make_tuple(size_t{0}, sizeof(FlightSlot));
  all["structs"] = sizes;
  return all;
}

}  // namespace

void bind_launch(nb::module_& m) {
  m.def("heap_layout", &heap_layout_dict, nb::arg("shape"), nb::arg("in_place") = false,
        "Offsets in bytes of every section of a rank's heap, and what they are sized by.  "
        "`in_place`: as launch_args() says; a rank alone then has no pool.");
  m.def("plan", &plan_dict, nb::arg("shape"), nb::arg("chunk_counts"),
        "The tiles of all ranks in order, one uint32 array a column, from rows [W, chunks, E].");
  m.def("units", &units_of, nb::arg("shape"), nb::arg("tokens"),
        "Where so few tokens of a rank alone may go by units: the fields of the shape that these "
        "change.");
  m.def(
      "launch_args", &launch_args, nb::arg("shape"), nb::arg("heaps"), nb::arg("ranks"),
      nb::arg("local_ranks"), nb::arg("ring_capacity"), nb::arg("keep_last"),
      nb::arg("iteration_base"), nb::arg("deadline_ns"), nb::arg("first_deadline_ns"),
      nb::arg("slots"), nb::arg("rings"), nb::arg("records"), nb::arg("images"),
      nb::arg("images_written"), nb::arg("steps"), nb::arg("image_capacity"),
      nb::arg("step_capacity"), nb::arg("fault"), nb::arg("signals_at") = 0,
      nb::arg("rows_at") = nb::none(), nb::arg("by_units") = false, nb::arg("in_place") = true,
      "The bytes of LaunchArgs.  Addresses are ints, 0 for none; `fault` is "
      "(lost_signal_rank, lost_signal_expert, never_starts_rank), 0xffffffff for none.  A heap's "
      "signals (what lies before the pool) begin at `signals_at` from its address, its rows (the "
      "pool and the rest) at `rows_at`: behind the signals where that is None.  `by_units`: "
      "few tokens go by units where they may, as units() says.  `in_place`: a rank alone reads its "
      "rows where they are, where it may.");
  m.attr("THREADS") = kThreads;
  m.attr("SHARED_BYTES") = kSharedBytes;
  m.attr("MAX_EXPERTS") = kMaxExperts;
  m.attr("MAX_GROUPS") = kMaxGroups;
  m.attr("TILE_WEIGHT_ROWS") = kTileWeights;
  m.attr("TILE_DEPTH") = kTileK;
  nb::dict most, step;  // by dtype
  most["bf16"] = kTileRows;
  most["fp16"] = kHalfTileRows;
  step["bf16"] = kTileRowsStep;
  step["fp16"] = kHalfTileRowsStep;
  m.attr("TILE_ROWS") = most;
  m.attr("TILE_ROWS_STEP") = step;
  nb::list boxes;
  for (uint32_t box = 0; box < kRowBoxes; ++box) boxes.append(box_rows(box));
  m.attr("ROW_BOXES") = nb::tuple(boxes);
  m.attr("UNIT_WEIGHT_ROWS") = kFewWidth;
  m.attr("UNIT_ROWS") = kFewTokens;
  m.attr("UNIT_BOX_ROWS") = kUnitBoxRows;
  m.attr("UNIT_BOX_ATOM") = kUnitBoxAtom;
  m.attr("SLICE_ROWS") = kSliceTokens;
  m.attr("SLICE_BLOCKS") = kSliceBlocks;
  m.def("gate_columns", &gate_columns, nb::arg("experts"),
        "Columns of the gate's product; the box of the gate's tensor map has half as many rows.");
  m.attr("PAIR_SIZE_AT") = offsetof(LaunchArgs, pair_size);
  m.def("record_layout", &record_layout,
        "(offset, size) of each field of Record, RingHeader and FlightSlot; under 'structs' their "
        "sizes.");
}
