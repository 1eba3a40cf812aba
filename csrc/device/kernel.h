// The whole launch, step by step, as one CTA goes through it (docs/design.md).
#pragma once

#include <cstdint>

#include "device/combine.h"
#include "device/cta.h"
#include "device/dispatch.h"
#include "device/few.h"
#include "device/gate.h"
#include "device/load.h"
#include "device/schedule.h"
#include "device/tile.h"
#include "device/wait.h"

namespace flashmoe {

// Of `from` into shared memory, by one warp.
template <class V>
__device__ __forceinline__ void copy_by_warp(V* to, const V* from, uint32_t count = 1) {
  static_assert(sizeof(V) % 4 == 0, "copied by words");
#pragma unroll 1
  for (uint32_t i = threadIdx.x % 32; i < count * (sizeof(V) / 4); i += 32) {
    reinterpret_cast<uint32_t*>(to)[i] = reinterpret_cast<const uint32_t*>(from)[i];
  }
}

// Where this CTA stands, as far as the arguments say.
__device__ __forceinline__ Place place_of(const LaunchArgs& args) {
  Place place;
  place.args = args.ranks;
  place.chunk = blockIdx.x;
  for (; place.chunk >= args.shape.chunks; place.chunk -= args.shape.chunks) ++place.args;
  place.rank = place.args->rank;
  place.tokens = place.args->tokens;
  place.heap = args.heaps[place.rank];
  place.pair_size = args.pair_size;
  place.pair_rank = place.chunk & (args.pair_size - 1);  // a rank's CTAs begin with a cluster
  return place;
}

// The traces of all lanes begin, by a warp that leads none of them: a lane of it an actor, the next one the log of tiles.
template <bool kTraced>
__device__ __forceinline__ void begin_traces(Shared<kTraced>& sh, const LaunchArgs& args,
                                             const Place& place) {
  const uint32_t lane = threadIdx.x % 32;
  if (lane > kLanes) return;
  const bool logs = lane == kLanes;
  const uint64_t actor = static_cast<uint64_t>(blockIdx.x) * kLanes + lane;
  const LogCursor written =
      logs ? args.images_written[blockIdx.x] : GpuActor<kTraced>::written_into(args.rings + actor);
  const uint64_t epoch = ptx::load_relaxed_sys(place.heap.at<uint64_t>(args.layout.epoch_word));
  const uint32_t iteration = static_cast<uint32_t>(epoch) - args.iteration_base;
  if (logs) {
    sh.log.begin(args.images + static_cast<uint64_t>(blockIdx.x) * args.image_capacity,
                 args.images_written + blockIdx.x, written, args.image_capacity,
                 args.keep_last != 0);
    for (Task& task : sh.tasks) {
      task.iter = iter_of(iteration);
      task.iter_flags = iter_flags_of(iteration);
    }
  } else {
    GpuActor<kTraced>& a = sh.actors[lane];
    a.record_into(args.rings, args.records, actor, args.ring_capacity, args.keep_last != 0,
                  written);
    a.begin_launch(iteration);
  }
}

// Copies what every role needs from the arguments and makes the barriers and the actors.  The warps share
// that: no launch, however short, can do anything before it is done.
template <bool kTraced>
__device__ __forceinline__ void enter(Shared<kTraced>& sh, const LaunchArgs& args, Place& place,
                                      char* stages) {
  const uint32_t thread = ptx::thread_id(), warp = thread / 32;
  const uint32_t here = ptx::shared_address(&sh);
  place.to_other = args.pair_size == 1 ? 0 : ptx::cluster_address(here, place.pair_rank ^ 1) - here;
  const Course& course = place.args->course;
  const bool few = !kPuts && course.few != 0;
  if (thread < kBarriers) {
    ptx::mbarrier_init(sh.gate_full + thread,
                       barrier_arrivals<kTraced>(thread, few, course.gathers != 0, args.pair_size));
    ptx::fence_mbarrier_init();
  }
  // What the gate reads is the same whatever the CTA has yet to learn, and this warp has made its barriers.
  static_assert(2 * kGateStages <= 32);
  if (warp == 0 && course.sliced != 0) {
    __syncwarp();
    if (thread == 0) {
      begin_slice(sh, *place.args, args.shape,
                  GateSlice::of(course.slices, place.chunk, place.tokens), stages);
    }
  }
  const int lane = led_lane();
  const uint64_t actor = static_cast<uint64_t>(blockIdx.x) * kLanes + lane;  // if it leads one
  if constexpr (kTraced) {
    if (warp == 11) begin_traces(sh, args, place);
  }
  if (warp == 4) copy_by_warp(&sh.shape, &args.shape);
  if (warp == 5) copy_by_warp(&sh.layout, &args.layout);
  if (warp == 6) copy_by_warp(sh.heaps, args.heaps, args.shape.world);
  if (warp == 7) copy_by_warp(static_cast<Course*>(&sh), &course);
  if (thread == 8 * 32) {
    if (!few) {
      sh.tables = plan_tables(table_words(args.shape) <= kTableWords
                                  ? sh.table_words
                                  : table_place(place.heap, args.layout, args.shape, place.chunk),
                              args.shape, place.rank);
    }
    sh.bad_ids = 0;
    sh.other_left = 0;
    sh.next_token = 0;
    sh.math_combines = 0;
    for (uint32_t g = 0; g < kMathGroups; ++g) sh.teams[g] = {};
    sh.steps = {};
    if constexpr (kPuts) sh.pending_tiles = 0;
  }
  if (thread == 9 * 32) {
    const uint32_t begin = min_u32(place.chunk * course.chunk_tokens, place.tokens);
    sh.own = {begin, min_u32(course.chunk_tokens, place.tokens - begin)};
  }
  // Whoever needs the epoch in here asks for it by itself: of a value that all threads share the compiler makes a
  // uniform register, for which all of them would wait before they do anything else.
  const uint64_t* epoch_word = place.heap.at<uint64_t>(args.layout.epoch_word);
  if (thread == 10 * 32) {
    const uint64_t epoch = ptx::load_relaxed_sys(epoch_word);
    // Abort is sticky: nothing runs until reset().
    sh.status = static_cast<uint32_t>(
        ptx::load_relaxed_sys(place.heap.at<uint64_t>(args.layout.abort_word)));
    sh.epoch = static_cast<uint32_t>(epoch) + 1;
  }
  if (lane >= 0) {
    const uint32_t epoch = static_cast<uint32_t>(ptx::load_relaxed_sys(epoch_word)) + 1;
    GpuActor<kTraced>& a = sh.actors[lane];
    a.slot = args.slots + actor;
    a.abort_word = place.heap.at<uint64_t>(args.layout.abort_word);
    a.deadline_ns = epoch == 1 ? args.first_deadline_ns : args.deadline_ns;
    a.lane = static_cast<uint8_t>(lane);
    a.rank = static_cast<uint16_t>(place.rank);
    a.sm = static_cast<uint16_t>(ptx::smid());
    a.cta = static_cast<uint16_t>(place.chunk);
    a.begin(epoch, epoch - 1 - args.iteration_base);
  }
  // The barriers are there before the other CTA can arrive at them.
  if (place.pair_size == 1) {
    __syncthreads();
  } else {
    ptx::cluster_barrier();
    // The gate of a pair is run by both CTAs or by neither, but they may not have read the same.  Whoever may run
    // writes only if the other may not, and then the other does not look.
    constexpr uint32_t kMay = static_cast<uint32_t>(Status::kOk);
    if (ptx::thread_id() == 0 && sh.status == kMay) {
      const uint32_t other = ptx::load_cluster(ptx::shared_address(&sh.status) + place.to_other);
      if (other != kMay) sh.status = other;
    }
    __syncthreads();
  }
  place.epoch = sh.epoch;
}

// Clears the sets of counters that the next launch adds to.  No peer can touch them before this rank
// sends its counts of the next launch.
template <bool kTraced>
__device__ inline void clear_idle_sets(const Shared<kTraced>& sh, const Place& place) {
  const uint32_t next = place.epoch + 1;
  const uint32_t tiles = sh.pool_tiles, columns = result_columns(sh.shape);
  for (uint32_t i = place.chunk * kThreads + threadIdx.x; i < max_u32(tiles, columns);
       i += sh.shape.chunks * kThreads) {
    if (i < columns) *columns_word(place.heap, sh.layout, sh.shape, next, i) = 0;
    if (i >= tiles) continue;
    *tile_counter(place.heap, sh.layout.rows_ready, sh.pool_tiles, next, i) = 0;
    *tile_counter(place.heap, sh.layout.h_ready, sh.pool_tiles, next, i) = 0;
    *tile_counter(place.heap, sh.layout.y_ready, sh.pool_tiles, next, i) = 0;
  }
  if (place.chunk == 0 && threadIdx.x == 0) *next_tile_word(place.heap, sh.layout, next) = 0;
  if constexpr (kPuts) clear_staged(sh, place);
}

// All histograms of the rank are visible to all its CTAs.  The only such barrier of a launch.
template <bool kTraced>
__device__ inline bool rank_barrier(Shared<kTraced>& sh, const Place& place) {
  uint64_t* word = place.heap.at<uint64_t>(sh.layout.barrier);
  __syncthreads();
  if (threadIdx.x == kSchedWarp * 32) {
    ptx::fence_acq_rel_gpu();
    ptx::add_relaxed_gpu(word, 1);
  }
  return wait_together(sh, {EventKind::k_wait_barrier, kNoPeer, kNoExpert, kNoTile}, word,
                       Until::kAtLeast, static_cast<uint64_t>(sh.shape.chunks) * place.epoch);
}

// This rank's rows for expert e, once own_counts() has summed them.
template <bool kTraced>
__device__ __forceinline__ uint32_t* own_rows(const Shared<kTraced>& sh, const Place& place) {
  return sh.tables.prefix + 2 * (sh.shape.experts + 1);
}

template <bool kTraced>
__device__ __forceinline__ void clear_own_counts(const Shared<kTraced>& sh, const Place& place) {
  uint32_t* own = own_rows(sh, place);
  for (uint32_t e = threadIdx.x; e < sh.shape.experts; e += kThreads) {
    own[e] = sh.tables.chunk_prefix[e] = 0;
  }
}

// Sums the rank's histograms: its rows for each expert, and those of the chunks before this one.  Every
// CTA does so for itself, which costs less than to wait once more for what others have summed.
template <bool kTraced>
__device__ inline void own_counts(const Shared<kTraced>& sh, const Place& place) {
  const Shape& shape = sh.shape;
  const uint32_t* histogram = place.heap.at<uint32_t>(sh.layout.histogram);
  uint32_t* own = own_rows(sh, place);
  uint32_t* earlier = sh.tables.chunk_prefix;
  // A warp a histogram, a lane an expert.  A warp asks for so many histograms before it adds the first; 12 warps' are 144,
  // more than a GPU's 132 chunks.
  constexpr uint32_t kOnTheirWay = 12;
  const uint32_t chunks = ceil_div(place.tokens, chunk_size(shape, place.tokens));  // not empty
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (uint32_t e0 = 0; e0 < shape.experts; e0 += 128) {
    uint32_t all[4] = {}, before[4] = {};
    for (uint32_t c0 = warp; c0 < chunks; c0 += kOnTheirWay * kWarps) {
      uint32_t rows[kOnTheirWay][4];
#pragma unroll
      for (uint32_t u = 0; u < kOnTheirWay; ++u) {
        const uint32_t c = c0 + u * kWarps;
#pragma unroll
        for (uint32_t i = 0; i < 4; ++i) {
          const uint32_t e = e0 + lane + 32 * i;
          rows[u][i] = c < chunks && e < shape.experts ? histogram[c * shape.experts + e] : 0;
        }
      }
#pragma unroll
      for (uint32_t u = 0; u < kOnTheirWay; ++u) {
#pragma unroll
        for (uint32_t i = 0; i < 4; ++i) {
          all[i] += rows[u][i];
          before[i] += c0 + u * kWarps < place.chunk ? rows[u][i] : 0;
        }
      }
    }
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      const uint32_t e = e0 + lane + 32 * i;
      if (all[i] != 0) atomicAdd(own + e, all[i]);
      if (before[i] != 0) atomicAdd(earlier + e, before[i]);
    }
  }
  __syncthreads();
}

// Sends this rank's rows per expert to every rank, the experts spread over the CTAs.  By one warp; a rank
// alone leaves them for the diagnosis, by all.
template <bool kTraced>
__device__ inline void send_counts(Shared<kTraced>& sh, const Place& place) {
  const Shape& shape = sh.shape;
  const uint32_t* own = own_rows(sh, place);
  if (shape.world == 1) {  // for the diagnosis alone: the rank has summed them itself
    uint64_t* words = counts_words(place.heap, sh.layout, shape, place.epoch, place.rank);
    for (uint32_t e = place.chunk + threadIdx.x * shape.chunks; e < shape.experts;
         e += kThreads * shape.chunks) {
      ptx::store_relaxed_sys(words + e, static_cast<uint64_t>(place.epoch) << 32 | own[e]);
    }
  } else if (threadIdx.x < 32) {
    const uint32_t share = place.chunk < shape.experts
                               ? ceil_div(shape.experts - place.chunk, shape.chunks) * shape.world
                               : 0;
    for (uint32_t i = threadIdx.x; i < share; i += 32) {
      const uint32_t to = i % shape.world, e = place.chunk + i / shape.world * shape.chunks;
      uint64_t* word = counts_words(sh.heaps[to], sh.layout, shape, place.epoch, place.rank) + e;
      const uint64_t value = static_cast<uint64_t>(place.epoch) << 32 | own[e];
      if constexpr (kPuts) {
        if (sh.heaps[to].base == nullptr) {
          transport::signal(counts_words(place.heap, sh.layout, shape, place.epoch, place.rank) + e,
                            value, to);
          continue;
        }
      }
      if (to == place.rank) {
        ptx::store_relaxed_sys(word, value);  // for the diagnosis: the rank itself has summed them
      } else {
        ptx::store_release_sys(word, value);
      }
    }
  }
  mark_all(sh, Step::kCounts);
}

// Until the counts of all other ranks are here.  Nothing is written to a peer's rows before.
template <bool kTraced>
__device__ inline bool await_counts(Shared<kTraced>& sh, const Place& place) {
  const Shape& shape = sh.shape;
  if (shape.world == 1) return true;
  const uint64_t* words = counts_words(place.heap, sh.layout, shape, place.epoch, 0);
  return await_tags(
      sh, place, words, shape.world * shape.experts,
      [&](uint32_t i) {
        return i / shape.experts == place.rank ||
               reached(ptx::load_acquire_sys(words + i), Until::kTag, place.epoch);
      },
      [&](uint32_t i) {
        return Awaited{EventKind::k_wait_counts, static_cast<uint16_t>(i / shape.experts),
                       static_cast<uint16_t>(i % shape.experts), kNoTile};
      });
}

// The plan, this chunk's tables, the chunk's rows in the order of their experts, and of those for the
// rank's own experts where they come to lie.
template <bool kTraced>
__device__ inline void make_plan(Shared<kTraced>& sh, const Place& place) {
  const Shape& shape = sh.shape;
  CtaTeam team;
  const uint64_t* words = counts_words(place.heap, sh.layout, shape, place.epoch, 0);
  const uint32_t* own = own_rows(sh, place);
  const uint32_t begin = sh.own.begin, rows = sh.own.tokens * shape.top_k;
  const uint64_t first = static_cast<uint64_t>(begin) * shape.top_k;
  const uint32_t* ids = place.heap.at<uint32_t>(sh.layout.ids) + first;
  const uint32_t* slots = place.heap.at<uint32_t>(sh.layout.slots) + first;
  // The first ones are on their way while the tables are built.
  uint32_t e = 0, slot = 0;
  auto fetch = [&](uint32_t i) {
    if (i >= rows) return;
    e = ids[i];
    slot = slots[i];
  };
  fetch(threadIdx.x);
  build_plan(team, sh.tables, shape, sh.order, [&](uint32_t source, uint32_t e) {
    return source == place.rank
               ? own[e]
               : static_cast<uint32_t>(ptx::load_relaxed_sys(words + source * shape.experts + e));
  });
  uint32_t* sorted = place.heap.at<uint32_t>(sh.layout.sorted) + first;
  uint32_t* origin = place.heap.at<uint32_t>(sh.layout.origin);
  for (uint32_t i = threadIdx.x; i < rows; i += kThreads, fetch(i)) {
    sorted[sh.tables.chunk_order[e] + slot] = begin * shape.top_k + i;
    if (!sh.gathers) continue;
    const uint32_t row = sh.tables.prefix[e] + sh.tables.chunk_prefix[e] + slot;
    if (row < shape.pool_rows) origin[row] = begin + i / shape.top_k;  // else it overflows
  }
  mark_all(sh, Step::kPlan);
  __syncthreads();
}

// Steps 1 to 3: gate, barrier, counts, plan.  kOk if rows may move.
template <class T, bool kTraced>
__device__ inline Status prepare(Shared<kTraced>& sh, const LaunchArgs& args, const Place& place,
                                 char* stages) {
  clear_idle_sets(sh, place);
  if (!by_units(sh)) clear_own_counts(sh, place);
  const Status routed = run_gate<T>(sh, place, stages);
  if (sh.sliced == 0) prefetch_code_by_all(args);  // many tokens' x has gone through L2 since
  mark_all(sh, Step::kGate);
  if (routed != Status::kOk) {
    if (threadIdx.x == 0 && routed == Status::kBadIds) raise_abort(sh, routed);
    return routed;
  }
  // The gate wrote its scratch by ordinary stores where bulk and tensor copies will write.  (What earlier launches
  // stored into pools that peers' bulk copies fill is behind the end of a launch.)
  ptx::fence_proxy_async_shared();
  if (by_units(sh)) return Status::kOk;  // every CTA reads the choices themselves
  if (!rank_barrier(sh, place)) return static_cast<Status>(sh.status);
  own_counts(sh, place);
  send_counts(sh, place);
  if (!await_counts(sh, place)) return static_cast<Status>(sh.status);
  make_plan(sh, place);
  return pool_rows_needed(sh.tables, sh.shape) > sh.shape.pool_rows ? Status::kOverflow
                                                                    : Status::kOk;
}

// What the host makes records of all lanes' first steps of, before the barrier of all that leave: by the load lane's warp,
// which in most launches has been through for long.
template <bool kTraced>
__device__ __forceinline__ void keep_steps(Shared<kTraced>& sh, const LaunchArgs& args,
                                           const Place& place) {
  if constexpr (kTraced) {
    if (threadIdx.x / 32 != kLoadWarp) return;
    __syncwarp();  // what its first lane has stamped last
    const uint32_t lane = threadIdx.x % 32;
    if (lane >= kLanes) return;
    GpuActor<kTraced>& actor = sh.actors[lane];
    actor.keep_steps(
        args.steps + static_cast<uint64_t>(blockIdx.x) * (args.step_capacity + 1) * kLanes + lane,
        kLanes, args.step_capacity, place.epoch - 1 - args.iteration_base, sh.steps, sh.own.tokens,
        actor.sm);
  }
}

// The last CTA of the rank to leave says how the launch ended and moves the epoch on.
template <bool kTraced>
__device__ inline void leave(Shared<kTraced>& sh, const LaunchArgs& args, const Place& place,
                             Status status) {
  keep_steps(sh, args, place);
  // Neither CTA of a pair goes while the other may still arrive at its barriers.
  if (place.pair_size == 1) {
    __syncthreads();
  } else {
    ptx::cluster_barrier();
  }
  const uint64_t aborted = ptx::load_relaxed_sys(place.heap.at<uint64_t>(sh.layout.abort_word));
  if (status == Status::kOk && aborted != 0) status = static_cast<Status>(aborted);
  const int lane = led_lane();
  if (lane >= 0) {
    sh.actors[lane].end(aborted != 0 ? ActorState::kAborted : ActorState::kDone);
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  // Nobody looks at these words before the launch is over, which publishes all: so nothing is ordered here.
  uint64_t* exits = place.heap.at<uint64_t>(sh.layout.exits);
  const uint64_t due = static_cast<uint64_t>(sh.shape.chunks) * place.epoch;
  if (ptx::fetch_add_relaxed_gpu(exits, 1) + 1 != due) return;
  const uint64_t needed = status == Status::kOverflow ? pool_rows_needed(sh.tables, sh.shape) : 0;
  *place.heap.at<uint64_t>(sh.layout.status_word) = static_cast<uint64_t>(status) | needed << 32;
  *place.heap.at<uint64_t>(sh.layout.epoch_word) = place.epoch;
}

template <class T, bool kGated, bool kTraced>
__device__ __forceinline__ void moe_forward(const LaunchArgs& args) {
  prefetch_code_by_all(args);
  extern __shared__ char dynamic[];
  // Swizzled stages start at multiples of 1,024 bytes.  So does what is asked for here where nothing lies before it but the
  // 1,024 bytes that the driver keeps; there is no room for anything else, and the last bytes would then be out of reach.
  // Declared so, and not worked out, the address makes immediates, and 4,096 tokens take 0.4 % longer.
  char* stages = dynamic + (1024 - (ptx::shared_address(dynamic) & 1023) & 1023);
  Shared<kTraced>& sh = *reinterpret_cast<Shared<kTraced>*>(stages + kWorkBytes);
  Place place = place_of(args);
  if (place.args->course.absent != 0) return;
  enter(sh, args, place, stages);
  Status status = static_cast<Status>(sh.status);
  __syncthreads();
  if (status == Status::kOk) {
    status = prepare<T>(sh, args, place, stages);
  } else {
    abandon_slice(sh, place);
  }
  if (status != Status::kOk) {
    // By units nobody waits for the other of a pair, and its barriers are others.
    if (threadIdx.x == 0 && !by_units(sh)) tell_left(sh, place);
    leave(sh, args, place, status);
    return;
  }
  if constexpr (!kPuts) {
    if (by_units(sh)) {
      leave(sh, args, place, run_units<T, kGated>(sh, place, stages));
      return;
    }
  }
  dispatch_first(sh, place, args.fault, stages);
  const uint32_t warp = ptx::thread_id() / 32;
  if (warp < kMathWarp) {
    ptx::registers_decrease<72>();
    if (warp == kLoadWarp) {
      if (threadIdx.x % 32 == 0) load_tiles<kGated>(sh, place, stages);
    } else if (warp == kSchedWarp) {
      if (threadIdx.x % 32 == 0) {
        if (place.pair_rank == 0) {
          schedule_tiles(sh, args, place);
        } else {
          follow_schedule(sh, args, place);
        }
        if constexpr (kPuts) put_results(sh, place);
      }
    } else {
      if (sh.gathers) {
        gather_tiles(sh, place, warp - kCommWarp, stages);
      } else {
        dispatch(sh, place, args.fault, warp - kCommWarp, stages + kStages * kStageBytes);
      }
      if (warp == kCommWarp) order_tokens(sh, place);
      combine_beside_tiles<T>(sh, place, warp - kCommWarp);
    }
    __syncwarp();
  } else {
    ptx::registers_increase<216>();
    const uint32_t group = (warp - kMathWarp) / 4;
    multiply_tiles<T, kGated>(sh, place, stages, group);
    combine<T>(sh, place, group, stages);
  }
  leave(sh, args, place, Status::kOk);
}

}  // namespace flashmoe

// An entry point of a cubin.
#define FLASHMOE_KERNEL(name, type, gated, traced)                    \
  extern "C" __global__ void __launch_bounds__(flashmoe::kThreads, 1) \
      name(const __grid_constant__ flashmoe::LaunchArgs args) {       \
    flashmoe::moe_forward<type, gated, traced>(args);                 \
  }
