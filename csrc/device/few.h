// Few tokens of a rank alone, by units.  Such a launch is bound by reading the weights of the experts hit, and by
// what happens before the first of them is on its way and after the last one is here.
//
// A unit is 128 weight rows by all rows of an expert, 8 at most.  Each math group is a stream of its own: a ring of
// stages, a warp that brings weights, one that brings rows.  Who computes what follows from the choices alone, which
// every warp holds, a lane two: there is no plan, no scheduler, no pair of CTAs, and no barrier of the rank.  All of
// GEMM1 comes before all of GEMM2, expert by expert, dealt to the streams in turn; so no unit waits for one that its
// stream has yet to come to, and a GEMM2 unit's weights come while its `h` is computed.  A product's sums are those
// of any tile: K in order, in one accumulator.
#pragma once

#include <cstdint>
#include <type_traits>

#include "device/cta.h"
#include "device/few_work.h"
#include "device/gate_slices.h"
#include "device/store.h"
#include "device/sums.h"

namespace flashmoe {

// A stream's place in its ring, as StageCursor (load.h) in the tiles': which stage, and a bit a stage that says its
// barriers' turn.
struct FewCursor {
  uint32_t stage = 0;
  uint32_t parities = 0;
  __device__ __forceinline__ uint32_t turn() const { return parities >> stage & 1; }
  __device__ __forceinline__ uint32_t offset() const { return stage * kFewStageBytes; }
  __device__ __forceinline__ void next() {
    parities ^= 1u << stage;
    if (++stage == kFewStages) stage = 0;
  }
};

// A unit's weights, by one warp, whose first lane issues the copies.
template <bool kGated, bool kTraced>
__device__ __forceinline__ void bring_weights(Shared<kTraced>& sh, const Place& place,
                                              uint32_t group, const FewUnit& unit,
                                              FewCursor& cursor, char* ring) {
  const RankArgs& args = *place.args;
  FewBarriers& barriers = few_barriers(sh);
  const bool leads = threadIdx.x % 32 == 0;
  // The lanes that lead this stream's warps: kLoadWarp's and kSchedWarp's.
  GpuActor<kTraced>& actor = sh.actors[group];
  if (leads) {
    actor.doing(EventKind::k_load, kNoPeer, unit.expert, unit.tile);
    actor.skip();
  }
  const uint32_t begin_cycles = kTraced ? ptx::clock32() : 0;
  Stall<kTraced> stall;
  const uint64_t policy = ptx::policy_evict_first();  // nobody else reads them
  const bool up = unit.gemm == 1, paired = kGated && up;
  const void* map = up ? args.map_up_unit : args.map_down_unit;
  const int32_t expert = static_cast<int32_t>(unit.expert);
  const int32_t product = static_cast<int32_t>(unit.column * kFewProducts);
  constexpr int32_t kRows = kUnitBoxRows, kAtoms = kRows / (2 * kUnitBoxAtom);
#pragma unroll 1
  for (uint32_t i = 0; i < unit.blocks; ++i, cursor.next()) {
    if (!leads) continue;
    stall.await_if_late(&barriers.unit_empty[group][cursor.stage], cursor.turn() ^ 1);
    uint64_t* full = &barriers.unit_full[group][cursor.stage];
    ptx::mbarrier_expect(full, kFewProducts * kFewWeightBytes);
    const int32_t k = static_cast<int32_t>(i * kTileK);
#pragma unroll
    for (int32_t p = 0; p < static_cast<int32_t>(kFewProducts); ++p) {
      // Of a gated layer's two matrices kAtoms atoms of rows each.
      ptx::tma_load_5d(ring + cursor.offset() + p * kFewWeightBytes, map, full, k,
                       paired ? 0 : (product + p) * kRows, paired ? 0 : expert,
                       paired ? (product + p) * kAtoms : 0, paired ? expert : 0, policy);
    }
  }
  if constexpr (kTraced) {
    if (leads) {
      actor.span(EventKind::k_load, kNoPeer, unit.expert, unit.tile, ptx::clock32() - begin_cycles,
                 stall.cycles);
    }
  }
}

// What a math group is to know of the wait that its unit's rows went through: a place for each of two units, since
// whoever brings rows is never further ahead than that.
template <bool kTraced>
__device__ __forceinline__ Task& wait_of_unit(Shared<kTraced>& sh, uint32_t group, uint32_t n) {
  static_assert(kTasks >= 2 * kMathGroups && kFewLeastInter / kTileK * 2 > kFewStages);
  return sh.tasks[n % 2 * kMathGroups + group];
}

// Until the `h` of a GEMM2 unit is there; false if that is not to be: then the launch ends, and its results are
// nobody's.  One warp.
template <bool kTraced>
__device__ __forceinline__ bool await_hidden(Shared<kTraced>& sh, const Place& place,
                                             GpuActor<kTraced>& actor, const FewUnit& unit,
                                             Task& noted) {
  Status status = Status::kOk;
  if (threadIdx.x % 32 == 0) {
    const uint64_t* word =
        tile_counter(place.heap, sh.layout.h_ready, sh.pool_tiles, place.epoch, unit.hit);
    const uint32_t due = sh.by_unit.columns[0];
    const uint64_t seen = ptx::load_acquire_sys(word);
    if (seen < due) {
      if constexpr (kTraced) {
        noted.wait_kind = static_cast<uint32_t>(EventKind::k_wait_h);
        noted.wait_lacking = due - static_cast<uint32_t>(seen);
        noted.wait_from = ptx::globaltimer();
      }
      status =
          actor.wait({EventKind::k_wait_h, kNoPeer, static_cast<uint16_t>(unit.expert), unit.hit},
                     word, Until::kAtLeast, due);
      if constexpr (kTraced) noted.wait_to = ptx::globaltimer();
      if (status == Status::kHang) raise_abort(sh, status);
    }
  }
  __syncwarp();  // what lane 0 has acquired is the warp's
  return __all_sync(0xffffffffu, status == Status::kOk);
}

// A unit's rows, by one warp: a lane copies unit lane % 8 of 16 bytes of rows lane / 8 and lane / 8 + 4, to where the
// tensor copies' swizzle would have it.  GEMM1's are tokens of x, GEMM2's lie together in `h`.
template <bool kTraced>
__device__ __forceinline__ void bring_rows(Shared<kTraced>& sh, const Place& place, uint32_t group,
                                           uint32_t n, const FewUnit& unit, FewCursor& cursor,
                                           char* ring, bool& goes_on) {
  FewBarriers& barriers = few_barriers(sh);
  GpuActor<kTraced>& actor = sh.actors[static_cast<int>(Lane::k_comm0) + group];
  const uint32_t lane = threadIdx.x % 32, piece = lane % 8, row = lane / 8;
  const bool leads = lane == 0;
  const uint32_t rows = unit.rows(), row_bytes = unit.blocks * kRowBytes;
  const char* from = static_cast<const char*>(place.args->x);
  uint32_t at[2] = {row, row + 4};
  Task& noted = wait_of_unit(sh, group, n);
  if constexpr (kTraced) {
    if (leads) noted.wait_kind = 0;
  }
  if (unit.gemm == 1) {
    ChoiceMask choices = unit.peers;
#pragma unroll 1
    for (uint32_t r = 0; r < row; ++r) choices &= choices - 1;
    at[0] = (__ffsll(static_cast<long long>(choices)) - 1) / sh.shape.top_k;
#pragma unroll
    for (uint32_t r = 0; r < 4; ++r) choices &= choices - 1;
    at[1] = (__ffsll(static_cast<long long>(choices)) - 1) / sh.shape.top_k;
  } else {
    from = place.heap.at<char>(sh.layout.h) + static_cast<uint64_t>(unit.first) * row_bytes;
    goes_on = goes_on && await_hidden(sh, place, actor, unit, noted);
  }
  if (leads) {
    actor.doing(EventKind::k_load, kNoPeer, unit.expert, unit.tile);
    actor.skip();
  }
  const uint32_t begin_cycles = kTraced ? ptx::clock32() : 0;
  Stall<kTraced> stall;
  const char* low = from + static_cast<uint64_t>(at[0]) * row_bytes + piece * 16;
  const char* high = from + static_cast<uint64_t>(at[1]) * row_bytes + piece * 16;
  const uint32_t to = ptx::shared_address(ring) + kFewProducts * kFewWeightBytes + row * kRowBytes +
                      (piece ^ row) * 16;
  // Tensor cores see what threads have copied only behind a proxy fence.  This warp has the time to execute it: so it
  // waits for its copies, and announces a stage kUnderWay blocks later.
  constexpr uint32_t kUnderWay = 3;
  static_assert(kUnderWay + 2 <= kFewStages,
                "a stage is free once products of the block behind it are issued");
  FewCursor announced = cursor;
#pragma unroll 1
  for (uint32_t i = 0; i < unit.blocks + kUnderWay; ++i) {
    if (i < unit.blocks) {
      stall.await_if_late(&barriers.unit_empty[group][cursor.stage], cursor.turn() ^ 1);
      const uint32_t stage = to + cursor.offset();
      // Rows 4 to 7 have the swizzle of rows 0 to 3 but for one bit.
      if (row < rows) ptx::copy_async(stage, low + i * kRowBytes, 16);
      if (row + 4 < rows) ptx::copy_async((stage ^ 64) + 4 * kRowBytes, high + i * kRowBytes, 16);
      cursor.next();
    }
    ptx::copies_commit();
    if (i < kUnderWay) continue;
    ptx::copies_wait<kUnderWay>();
    ptx::fence_proxy_async_shared();
    __syncwarp();  // all lanes' copies are seen before the warp's only arrival
    if (leads) ptx::mbarrier_arrive(&barriers.unit_full[group][announced.stage]);
    announced.next();
  }
  if constexpr (kTraced) {
    if (leads) {
      actor.span(EventKind::k_load, kNoPeer, unit.expert, unit.tile, ptx::clock32() - begin_cycles,
                 stall.cycles);
    }
  }
}

// The products of a unit; its rows beyond the last one are whatever was there, and nobody's.
template <class T, bool kTraced>
__device__ __forceinline__ uint32_t multiply_unit(Shared<kTraced>& sh, uint32_t group,
                                                  uint32_t ring, FewCursor& cursor, uint32_t blocks,
                                                  float (&sums)[kFewProducts][4]) {
  const bool releases = threadIdx.x % 32 == 0;
  uint64_t* full = few_barriers(sh).unit_full[group];
  uint64_t* empty = few_barriers(sh).unit_empty[group];
  Stall<kTraced> stall;
  auto issue = [&](auto first) {
    stall.await_if_late(&full[cursor.stage], cursor.turn());
    const uint32_t stage = ring + cursor.offset();
    const uint64_t a = ptx::wgmma_descriptor(stage, 1024);
    const uint64_t b = ptx::wgmma_descriptor(stage + kFewProducts * kFewWeightBytes, 1024);
    ptx::wgmma_fence();
#pragma unroll
    for (uint32_t k = 0; k < kTileK / 16; ++k) {
#pragma unroll
      for (uint32_t p = 0; p < kFewProducts; ++p) {
        const uint64_t weights = ptx::wgmma_onwards(a, p * (kFewWeightBytes / 16) + 2 * k);
        const uint64_t rows = ptx::wgmma_onwards(b, 2 * k);
        if (decltype(first)::value && k == 0) {
          ptx::wgmma_first<T, kFewTokens>(sums[p], weights, rows);
        } else {
          ptx::wgmma<T, kFewTokens>(sums[p], weights, rows);
        }
      }
    }
    ptx::wgmma_commit();
  };
  issue(std::true_type{});
  uint32_t previous = cursor.stage;
  cursor.next();
#pragma unroll 1
  for (uint32_t i = 1; i < blocks; ++i) {
    issue(std::false_type{});
    ptx::wgmma_wait<1>();
    if (releases) ptx::mbarrier_arrive(&empty[previous]);
    previous = cursor.stage;
    cursor.next();
  }
  ptx::wgmma_wait<0>();
  if (releases) ptx::mbarrier_arrive(&empty[previous]);
  return stall.cycles;
}

// A unit's sums as `h` or as results, by a math group.  Sum v is of row q + v % 2 and of weight row g + v / 2 * 8 of
// the warp's 16: in a gated GEMM1 of gate and up of one column, else of two columns.
template <class T, bool kGated, bool kTraced>
__device__ __forceinline__ void store_unit(const Shared<kTraced>& sh, const Place& place,
                                           const FewUnit& unit,
                                           const float (&sums)[kFewProducts][4]) {
  const Shape& shape = sh.shape;
  const uint32_t lane = ptx::lane_id(), warp = ptx::thread_id() / 32 % kTeamWarps;
  const uint32_t g = lane / 4, q = lane % 4 * 2, rows = unit.rows();
  const bool up = unit.gemm == 1, paired = kGated && up;
  const uint32_t width = up ? shape.inter : shape.hidden;
  T* to = place.heap.at<T>(up ? sh.layout.h : sh.layout.ret) +
          static_cast<uint64_t>(unit.first) * width;
  const Activation kind = shape.activation;
#pragma unroll
  for (uint32_t p = 0; p < kFewProducts; ++p) {
    const uint32_t product = unit.column * kFewProducts + p;
    const uint32_t column = paired ? product * 32 + warp * 8 + g : product * 64 + warp * 16 + g;
#pragma unroll
    for (uint32_t v = 0; v < 4; ++v) {
      float value = sums[p][v];
      if (paired) {
        if (v >= 2) break;
        value = (kind == Activation::kGeglu ? TanhGeluGate{}(value) : SiluGate{}(value)) *
                sums[p][v + 2];
      } else if (up && !kGated) {
        value = kind == Activation::kRelu   ? ptx::relu(value)
                : kind == Activation::kGelu ? gelu(value)
                                            : SiluGate{}(value);
      }
      const uint32_t row = q + v % 2;
      if (row < rows && column < width) {
        to[static_cast<uint64_t>(row) * width + column + v / 2 * 8] = static_cast<T>(value);
      }
    }
  }
}

// y of all tokens in a GEMM2 unit's columns, by a math group, 16 bytes a thread: the k results times their weights,
// summed in float32 in the order of k, as combine_token() does.
template <class T, bool kTraced>
__device__ __forceinline__ void combine_columns(const Shared<kTraced>& sh, const Place& place,
                                                const FewWork& work, uint32_t column) {
  constexpr uint32_t kPieces16 = kFewWidth / 8, kAtOnce = 8;
  static_assert(kFewTokens * kPieces16 == kGroupThreads, "a thread has one piece");
  const uint32_t k = sh.shape.top_k, pieces = sh.shape.hidden / 8;
  const uint32_t thread = ptx::thread_id() % kGroupThreads;
  const uint32_t token = thread / kPieces16, piece = column * kPieces16 + thread % kPieces16;
  const bool some = token < place.tokens && piece < pieces;
  const uint4* results = place.heap.at<uint4>(sh.layout.ret) + piece;
  const uint32_t row[2] = {work.row(0), work.row(1)};
  float sum[8] = {};
#pragma unroll 1
  for (uint32_t j0 = 0; j0 < k; j0 += kAtOnce) {
    uint4 loaded[kAtOnce];
#pragma unroll
    for (uint32_t i = 0; i < kAtOnce; ++i) {
      const uint32_t choice = (token * k + min_u32(j0 + i, k - 1)) % kFewRows;
      const uint32_t early = __shfl_sync(0xffffffffu, row[0], choice % 32);
      const uint32_t late = __shfl_sync(0xffffffffu, row[1], choice % 32);
      const uint32_t from = choice < 32 ? early : late;
      // Past L1: other SMs have written them in this launch.
      if (some) loaded[i] = __ldcg(results + static_cast<uint64_t>(from) * pieces);
    }
#pragma unroll
    for (uint32_t i = 0; i < kAtOnce; ++i) {
      if (!some || j0 + i >= k) break;
      const float weight = sh.choices.weight[token * k + j0 + i];
      add_weighted<T>(sum, weight, loaded[i]);
    }
  }
  if (!some) return;
  static_cast<uint4*>(place.args->y)[static_cast<uint64_t>(token) * pieces + piece] =
      rounded<T>(sum);
}

// A unit's products and what becomes of them, by a math group.  Whoever stores the last expert's results of some
// columns sums those.
template <class T, bool kGated, bool kTraced>
__device__ __forceinline__ void run_unit(Shared<kTraced>& sh, const Place& place, uint32_t group,
                                         uint32_t n, const FewWork& work, const FewUnit& unit,
                                         FewCursor& cursor, uint32_t ring) {
  const Shape& shape = sh.shape;
  const bool leads = threadIdx.x % kGroupThreads == 0, up = unit.gemm == 1;
  GpuActor<kTraced>& actor = sh.actors[static_cast<int>(Lane::k_math0) + group];
  const EventKind kind = up ? EventKind::k_gemm1 : EventKind::k_gemm2;
  [[maybe_unused]] uint32_t begin_cycles = 0;
  if (leads) {
    actor.doing(kind, kNoPeer, unit.expert, unit.tile);
    if constexpr (kTraced) {
      // A unit's span begins with its first operands; what these waited for is known once they are here.
      ptx::mbarrier_wait(&few_barriers(sh).unit_full[group][cursor.stage], cursor.turn());
      const Task& noted = wait_of_unit(sh, group, n);
      if (noted.wait_kind != 0) {
        actor.waited({EventKind::k_wait_h, kNoPeer, static_cast<uint16_t>(unit.expert), unit.hit},
                     noted.wait_from, noted.wait_to, noted.wait_lacking, Status::kOk);
      }
      actor.skip();
      begin_cycles = ptx::clock32();
    }
  }
  float sums[kFewProducts][4];
  const uint32_t stall = multiply_unit<T>(sh, group, ring, cursor, unit.blocks, sums);
  auto record = [&] {
    if constexpr (kTraced) {
      if (leads) {
        actor.span(kind, kNoPeer, unit.expert, unit.tile, ptx::clock32() - begin_cycles, stall);
      }
    }
  };
  if (!up) record();  // GEMM1's span holds its activation, what GEMM2 gives back is one of its own
  store_unit<T, kGated>(sh, place, unit, sums);
  if (up) record();
  ptx::named_barrier(1 + group, kGroupThreads);
  bool completes = false;
  if (leads) {
    ptx::fence_acq_rel_gpu();
    if (up) {
      ptx::add_relaxed_gpu(
          tile_counter(place.heap, sh.layout.h_ready, sh.pool_tiles, place.epoch, unit.hit), 1);
    } else {
      const uint64_t before = ptx::fetch_add_relaxed_gpu(
          columns_word(place.heap, sh.layout, shape, place.epoch, unit.column), 1);
      completes = before + 1 == work.hits;
      if (completes) ptx::fence_acq_rel_gpu();
      if constexpr (kTraced) {
        const uint32_t columns = min_u32(kFewWidth, shape.hidden - unit.column * kFewWidth);
        const uint32_t bytes = unit.rows() * columns * 2;
        actor.span(EventKind::k_give_back, kNoPeer, unit.expert, unit.tile, bytes);
        actor.instant(EventKind::k_put, place.rank, unit.expert, unit.tile, bytes);
      }
    }
  }
  if (up || !ptx::named_barrier_any(1 + group, kGroupThreads, completes)) return;
  if (leads) actor.doing(EventKind::k_combine, kNoPeer, kNoExpert, place.chunk);
  combine_columns<T>(sh, place, work, unit.column);
  // Of tokens that are summed in parts, whoever sums the first counts them.
  if (leads) {
    actor.span(EventKind::k_combine, kNoPeer, kNoExpert, place.chunk,
               unit.column == 0 ? place.tokens : 0);
  }
}

// The counts that the host reads, by the math warps: the chunk's, and the first chunk's warps write the rank's, too.
template <bool kTraced>
__device__ __forceinline__ void tell_counts(Shared<kTraced>& sh, const Place& place) {
  const Shape& shape = sh.shape;
  const uint32_t begin = sh.own.begin * shape.top_k, end = begin + sh.own.tokens * shape.top_k;
  const bool all = place.chunk == 0;
  const uint32_t last = all ? place.tokens * shape.top_k : end;
  uint32_t* histogram = place.heap.at<uint32_t>(sh.layout.histogram) +
                        static_cast<uint64_t>(place.chunk) * shape.experts;
  uint64_t* words = counts_words(place.heap, sh.layout, shape, place.epoch, place.rank);
#pragma unroll 1
  for (uint32_t e = threadIdx.x - kMathWarp * 32; e < shape.experts;
       e += kMathGroups * kGroupThreads) {
    uint32_t own = 0, rows = 0;
#pragma unroll 1
    for (uint32_t i = all ? 0 : begin; i < last; ++i) {
      const uint32_t same = sh.choices.id[i] == e ? 1 : 0;
      rows += same;
      if (i >= begin && i < end) own += same;
    }
    histogram[e] = own;
    if (all) {
      ptx::store_relaxed_sys(words + e, static_cast<uint64_t>(place.epoch) << 32 | rows);
    }
  }
  if constexpr (kTraced) {
    if (threadIdx.x % kGroupThreads != 0) return;
    const int lane = led_lane();
    const bool first = lane == static_cast<int>(Lane::k_math0);
    GpuActor<kTraced>& actor = sh.actors[lane];
    actor.span(EventKind::k_counts, kNoPeer, kNoExpert, kNoTile,
               all && first ? 8 * shape.experts : 0);
    // Rows that stay in place were announced by the choices.
    if (first && end != begin) {
      actor.instant(EventKind::k_dispatch, place.rank, 0, place.chunk,
                    (end - begin) * shape.hidden * 2);
    }
  }
}

// All of the launch behind the gate.
template <class T, bool kGated, bool kTraced>
__device__ __forceinline__ Status run_units(Shared<kTraced>& sh, const Place& place, char* stages) {
  if (!await_choices(sh, place, reinterpret_cast<uint32_t*>(&sh.choices))) {
    return static_cast<Status>(sh.status);
  }
  // Launches by tiles go on counting from here.
  if (threadIdx.x == kSchedWarp * 32) {
    ptx::add_relaxed_gpu(place.heap.at<uint64_t>(sh.layout.barrier), 1);
  }
  const uint32_t warp = threadIdx.x / 32;
  const uint32_t group = warp < kMathWarp ? warp % 2 : (warp - kMathWarp) / kTeamWarps;
  const FewWork work(sh, place.tokens * sh.shape.top_k, group * sh.shape.chunks + place.chunk);
  if constexpr (kTraced) {
    if (const int lane = led_lane(); lane >= 0) sh.actors[lane].planned();
  }
  char* ring = stages + group * kFewRingBytes;
  FewCursor cursor;
  bool goes_on = true;
  // One loop of all roles: what finds a unit stands once in the code, which comes to an SM as slowly as it is long.
#pragma unroll 1
  for (uint32_t n = 0;; ++n) {
    FewUnit unit{};
    const bool some = find_unit(sh, work, n, unit);
    // When weights are awaited, or there are none to await.
    if (warp >= kMathWarp && (n == 1 || (n == 0 && !some))) tell_counts(sh, place);
    if (!some) return Status::kOk;
    if (warp < kCommWarp) {
      bring_weights<kGated>(sh, place, group, unit, cursor, ring);
    } else if (warp < kMathWarp) {
      bring_rows(sh, place, group, n, unit, cursor, ring, goes_on);
    } else {
      run_unit<T, kGated>(sh, place, group, n, work, unit, cursor, ptx::shared_address(ring));
    }
    __syncwarp();
  }
}

}  // namespace flashmoe
