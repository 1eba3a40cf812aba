// The scheduler warp: takes tiles from the rank's counter, waits until their rows are there, hands them
// over, and publishes what the math groups have stored.  One lane.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "device/cta.h"
#include "device/put.h"

namespace flashmoe {

__device__ __forceinline__ uint32_t depth_of(const Shape& shape, uint32_t gemm) {
  return gemm == 1 ? shape.hidden : shape.inter;
}

// What is known of a tile that is done, for the trace.  Its task must not be written before the copy has read it.
template <bool kTraced>
__device__ __forceinline__ void keep_image(Shared<kTraced>& sh, const Task& task) {
  TileImage* to = sh.log.next_place();
  if (to == nullptr) return;
  ptx::fence_proxy_async_shared();
  ptx::bulk_store(to, &task, image_bytes(sh.shape.world));
  ptx::bulk_commit();
}

// Counts a stored tile where others wait for it: a GEMM1 tile towards its row tile's `h`; the GEMM2 tile
// that is its row tile's last tells each source with rows in it; what is put there waits for the next turn of
// the scheduler's loop, since nothing that it waits for depends on results.
template <bool kTraced>
__device__ __forceinline__ void publish_tile(Shared<kTraced>& sh, const Place& place,
                                             const Task& task) {
  const Tile& tile = task.tile;
  if (tile.gemm == 1) {
    ptx::fence_acq_rel_gpu();  // nobody but this rank's own CTAs reads `h` or its counter
    ptx::add_relaxed_gpu(
        tile_counter(place.heap, sh.layout.h_ready, sh.pool_tiles, place.epoch, tile.row_tile), 1);
    return;
  }
  // Up to the row tile's last tile all is among this rank's CTAs; what that one tells is for other ranks.
  ptx::fence_acq_rel_gpu();
  const uint64_t before = ptx::fetch_add_relaxed_gpu(
      tile_counter(place.heap, sh.layout.y_ready, sh.pool_tiles, place.epoch, tile.row_tile), 1);
  if (before + 1 != sh.order.columns[1]) return;
  if (sh.shape.world == 1) {
    ptx::fence_acq_rel_gpu();
  } else {
    ptx::fence_acq_rel_sys();
  }
  [[maybe_unused]] bool by_put = false;
  const ReturnPath* path = task.returns;
#pragma unroll 1
  for (uint32_t told = 0; told < tile.rows; ++path) {
    const uint32_t s = path->source;
    told = path->end - tile.row0;
    if constexpr (kPuts) {
      if (sh.heaps[s].base == nullptr) {
        by_put = true;
        continue;
      }
    }
    ptx::store_relaxed_sys(
        sh.heaps[s].template at<uint64_t>(sh.layout.returned) + tile.row_tile_global, place.epoch);
  }
  if constexpr (kPuts) {
    if (by_put) sh.pending[sh.pending_tiles++] = tile.index;
  }
}

// A message of the first CTA of a pair into the second one's `slot`.  Each store counts by itself, so that
// no fence waits for all else that this thread has stored.
template <bool kTraced>
__device__ __forceinline__ void send_message(Shared<kTraced>& sh, const Place& place, uint32_t slot,
                                             const PairMessage& message) {
  const uint32_t to = ptx::shared_address(&sh.messages[slot]) + place.to_other;
  const uint32_t full = ptx::shared_address(&sh.pair_full[slot]) + place.to_other;
  ptx::store_async(to, full, {message.index, message.has, message.turns, message.flags});
  if constexpr (kTraced) {
    auto low = [](uint64_t v) { return static_cast<uint32_t>(v); };
    auto high = [](uint64_t v) { return static_cast<uint32_t>(v >> 32); };
    ptx::store_async(to + 16, full,
                     {low(message.wait_kind_lacking), high(message.wait_kind_lacking),
                      low(message.wait_from), high(message.wait_from)});
    ptx::store_async(to + 32, full, {low(message.wait_to), high(message.wait_to), 0, 0});
  }
}

// A CTA that leaves before the roles part tells the other one of its pair, which may go on: rows and
// tiles of both are then never there, but an abort that only one has seen yet must not leave the other
// waiting for it.  One thread.
template <bool kTraced>
__device__ inline void tell_left(Shared<kTraced>& sh, const Place& place) {
  if (place.pair_size == 1) return;
  if (place.pair_rank == 0) {
    PairMessage none{};
    none.has = kNoWork;
    send_message(sh, place, 0, none);
  } else {
    ptx::mbarrier_expect(&sh.pair_full[0], kMessageBytes<kTraced>);
    ptx::store_cluster(ptx::shared_address(&sh.other_left) + place.to_other, 1);
    ptx::mbarrier_arrive_cluster(ptx::shared_address(&sh.pair_empty[0]) + place.to_other);
    // The other one says once that there is no work, from here or as a scheduler that finds this CTA gone.  Only the
    // message's own barrier tells that it has come, and it must not come to a CTA that has left.
    ptx::mbarrier_wait(&sh.pair_full[0], 0);
  }
}

// Fills in where the rows of a GEMM2 tile go.
template <bool kTraced>
__device__ __forceinline__ void find_returns(const Shared<kTraced>& sh, const Tile& tile,
                                             ReturnPath (&returns)[kMaxRanks]) {
  const Shape& shape = sh.shape;
  const uint64_t row_bytes = 2ull * shape.hidden;
  uint32_t n = 0;
  for (uint32_t s = 0; s < shape.world; ++s) {
    const uint32_t start = source_start(sh.tables, s, tile.expert);
    const uint32_t end = start + source_rows(sh.tables, shape, s, tile.expert);
    if (end <= tile.row0 || start >= tile.row0 + tile.rows) continue;
    if constexpr (kPuts) {
      if (sh.heaps[s].base == nullptr) {  // over the rows that they come from, and then put
        char* pool = sh.heaps[owner_of(shape, tile.expert)].template at<char>(sh.layout.pool);
        returns[n++] = {pool + pool_row(sh.tables, shape, tile.expert, 0) * row_bytes, end, s};
        continue;
      }
    }
    char* ret = sh.heaps[s].template at<char>(sh.layout.ret);
    const uint64_t first = return_row(sh.tables, shape, s, tile.expert, 0);
    returns[n++] = {ret + (first - start) * row_bytes, end, s};
  }
}

// What both schedulers of a pair do: tiles handed over, tiles published.  One lane.
template <bool kTraced>
struct TaskRing {
  Shared<kTraced>& sh;
  const Place& place;
  GpuActor<kTraced>& actor;
  uint32_t handed = 0;
  uint32_t finished = 0;

  __device__ __forceinline__ void finish() {
    const uint32_t slot = finished++ % kTasks;
    const Task& task = sh.tasks[slot];
    if (task.tile.rows == 0) return;
    publish_tile(sh, place, task);
    if constexpr (kTraced) keep_image(sh, task);
  }
  // Publishes a tile that is done, if there is one.  Called in every wait: what is awaited may depend on
  // this CTA's own tiles.
  __device__ __forceinline__ bool meanwhile() {
    if (finished == handed ||
        !ptx::mbarrier_test(&sh.task_empty[finished % kTasks], finished / kTasks & 1)) {
      return false;
    }
    finish();
    return true;
  }
  // Until another task may be handed over: all but sh.ahead - 1 are done.  What is done is not yet
  // published, since the math groups wait for their next tile first.
  __device__ __forceinline__ void make_room() {
    const uint32_t ahead = sh.ahead;
    if (handed >= ahead) {
      const uint32_t last = handed - ahead;
      ptx::mbarrier_wait(&sh.task_empty[last % kTasks], last / kTasks & 1);
    }
    has_work();  // it had nothing to do until then
  }
  // Publishes tiles as they become done, until `ready`, or, where the CTA leaves, until all are.  Once in the code
  // of a scheduler, which is one warp's and yet would fill the instruction cache that all share.
  template <class Ready>
  __device__ __forceinline__ void publish_until(const Ready& ready, bool leaves) {
    while (meanwhile() || !(leaves ? finished == handed : ready())) {
    }
  }
  // The time from here on until it is handed over goes into the next tile.
  __device__ __forceinline__ void has_work() {
    if constexpr (kTraced) sh.log.scheduled_from_ns = ptx::globaltimer();
  }
  // Hands over a tile, whose rows may be 0: then only the other CTA of the pair has one.
  __device__ __forceinline__ void hand_over(const Tile& tile, const PairMessage& message) {
    const uint32_t slot = handed % kTasks;
    Task& task = sh.tasks[slot];
    if constexpr (kTraced) ptx::bulk_wait_read<0>();  // images of tiles before
    task.tile = tile;
    task.blocks = tile.rows == 0 ? 0 : ceil_div(depth_of(sh.shape, tile.gemm), kTileK);
    task.turns = message.turns;
    task.shared = message.flags & kShared;
    task.stages = (message.flags & kAllStages) != 0 ? kMostStages : kStages;
    if (tile.gemm == 2 && tile.rows != 0) find_returns(sh, tile, task.returns);
    if constexpr (kTraced) {
      task.wait_kind = static_cast<uint32_t>(message.wait_kind_lacking);
      task.wait_lacking = static_cast<uint32_t>(message.wait_kind_lacking >> 32);
      task.wait_from = message.wait_from;
      task.wait_to = message.wait_to;
      for (LoadStamps& stamps : task.loads) stamps.begin_ns = 0;
    }
    ptx::mbarrier_arrive(&sh.task_full[slot]);
    ++handed;
    if constexpr (kTraced) {
      task.scheduled_from_ns = sh.log.scheduled_from_ns;
      task.scheduled_ns = ptx::globaltimer();
    }
  }
  // Every role leaves by the same way out, whatever ended the launch.  All tiles are published.
  __device__ __forceinline__ void hand_over_exit() {
    if constexpr (kTraced) ptx::bulk_wait_read<0>();
    sh.tasks[handed % kTasks].tile.gemm = 0;
    ptx::mbarrier_arrive(&sh.task_full[handed % kTasks]);
    if constexpr (kTraced) {
      ptx::bulk_wait_all();
      sh.log.publish();
    }
  }
};

// Until a word that a tile needs is there.  Adds to `wait` what was awaited, for the other lanes: of several
// waits from the first one's begin to the last one's end.
template <bool kTraced>
__device__ __forceinline__ Status await_word(TaskRing<kTraced>& ring, const Awaited& what,
                                             const uint64_t* word, Until until, uint64_t due,
                                             PairMessage& wait) {
  const uint64_t seen = ptx::load_acquire_sys(word);
  if (reached(seen, until, due)) return Status::kOk;
  if constexpr (kTraced) {
    if (wait.wait_kind_lacking == 0) wait.wait_from = ptx::globaltimer();
    const uint64_t lacking = as_count(due, until, due) - as_count(seen, until, due);
    wait.wait_kind_lacking = static_cast<uint64_t>(what.kind) | lacking << 32;
  }
  const Status status = ring.actor.wait(what, word, until, due, 0, [&] { ring.meanwhile(); });
  if constexpr (kTraced) wait.wait_to = ptx::globaltimer();
  if (status == Status::kHang) raise_abort(ring.sh, status);
  return status;
}

// Until the rows or the `h` of a tile are there.
template <bool kTraced>
__device__ inline Status await_operands(TaskRing<kTraced>& ring, const Tile& tile,
                                        PairMessage& wait) {
  const Shape& shape = ring.sh.shape;
  const Place& place = ring.place;
  const bool up = tile.gemm == 1;
  const uint64_t* word =
      tile_counter(place.heap, up ? ring.sh.layout.rows_ready : ring.sh.layout.h_ready,
                   ring.sh.pool_tiles, place.epoch, tile.row_tile);
  uint64_t due = up ? tile.rows : ring.sh.order.columns[0];
  if constexpr (kPuts) {
    if (up) {
      const Status status = await_arrivals(ring, tile, wait);
      if (status != Status::kOk) return status;
      due = rows_counted(ring.sh.tables, shape, tile, ring.sh.heaps);
    }
  }
  return await_word(ring,
                    {up ? EventKind::k_wait_rows : EventKind::k_wait_h, kNoPeer,
                     static_cast<uint16_t>(tile.expert), tile.row_tile},
                    word, Until::kAtLeast, due, wait);
}

// No comm warp of the pair needs pieces any more: from the next task on there is a stage in their place.
template <bool kTraced>
__device__ __forceinline__ bool all_moved(Shared<kTraced>& sh) {
  return sh.gathers != 0 || ptx::mbarrier_test_cluster(&sh.moved, 0);
}

// What the scheduler holds while it waits.  With NVSHMEM's puts in its code it has no registers for that.
template <bool kTraced>
__device__ __forceinline__ decltype(auto) turn_of(Shared<kTraced>& sh) {
  if constexpr (kPuts) {
    return (sh.turn);
  } else {
    return PairTurn{};
  }
}
using TileView = std::conditional_t<kPuts, const Tile&, const Tile>;

// The first CTA of a pair, or a CTA alone: takes pairs of tiles and waits for the rows of both, so that
// a pair once begun finishes in both; but for first tiles whose rows are gathered (load.h).  Everything stands
// once in the code, the way out too: what a launch's first tile waits for is mostly that code.
template <bool kTraced>
__device__ inline void schedule_tiles(Shared<kTraced>& sh, const LaunchArgs& args,
                                      const Place& place) {
  const Shape& shape = sh.shape;
  TaskRing<kTraced> ring{sh, place, sh.actors[static_cast<int>(Lane::k_sched)]};
  const uint32_t tiles = tiles_of_rank(sh.tables, sh.order);
  constexpr uint32_t kNone = 0xffffffffu;
  uint32_t held = kNone;  // index of the second tile of a pair whose first it waits for
  for (bool leaves = false;;) {
    if constexpr (kPuts) put_results(sh, place);
    // The second CTA says from its first task on that it can take one: before that its stages, which this
    // one's loads fill too, still hold what it dispatches.
    const uint32_t slot = ring.handed % kTasks;
    ring.publish_until(
        [&] {
          return place.pair_size == 1 ||
                 ptx::mbarrier_test_cluster(&sh.pair_empty[slot], ring.handed / kTasks & 1);
        },
        leaves);
    if (leaves) break;
    ring.make_room();
    // The first pairs are dealt, so that no CTA begins by a round trip to memory.  Later ones make both at once.
    uint64_t aborted = 0, pair = place.chunk / place.pair_size;
    if (held == kNone && ring.handed != 0) {
      aborted = ptx::load_relaxed_sys(place.heap.at<uint64_t>(sh.layout.abort_word));
      uint64_t* counter = next_tile_word(place.heap, sh.layout, place.epoch);
      pair = shape.chunks / place.pair_size + ptx::fetch_add_relaxed_gpu(counter, 1);
    }
    const uint32_t first = held == kNone ? static_cast<uint32_t>(pair) * place.pair_size : held;
    bool goes_on = first < tiles && aborted == 0 && sh.other_left == 0;
    const uint32_t count = !goes_on        ? 0
                           : held == kNone ? min_u32(place.pair_size, tiles - first)
                                           : 1;
    auto&& [one, two, message] = turn_of(sh);
    one = two = {};
#pragma unroll 1
    for (uint32_t i = 0; i < count; ++i) {
      const Tile tile = tile_at(sh.tables, shape, sh.order, first + i);
      if (i == 0) one = tile;
      two = tile;
    }
    if (held != kNone) {
      held = kNone;
      one.rows = 0;
    } else if (count == 1) {
      two.rows = 0;
    } else if (one.gemm != two.gemm && one.expert == two.expert) {
      // Where an expert has an odd number of tiles, a pair may hold its last GEMM1 tile and its first GEMM2
      // tile: the one waits for the other.
      held = two.index;
      two = one;
      two.rows = 0;
    }
    // Of the first tiles whoever gathers the rows awaits them, so that weights are on their way meanwhile.
    message = {};
#pragma unroll 1
    for (uint32_t i = 0; goes_on && i < 2; ++i) {
      TileView tile = i == 0 ? one : two;
      if (tile.rows == 0 || (tile.gemm == 1 && gathers_unawaited(sh, ring.handed))) continue;
      goes_on = await_operands(ring, tile, message) == Status::kOk;
    }
    const uint32_t depth = max_u32(one.rows == 0 ? 0 : depth_of(shape, one.gemm),
                                   two.rows == 0 ? 0 : depth_of(shape, two.gemm));
    message.index = two.index;
    message.has = !goes_on ? kNoWork : two.rows != 0 ? 1 : 0;
    message.turns = ceil_div(depth, kTileK);
    const bool shared = one.rows != 0 && two.rows != 0 && one.gemm == two.gemm &&
                        one.expert == two.expert && one.col_tile == two.col_tile;
    message.flags = (shared ? kShared : 0) | (all_moved(sh) ? kAllStages : 0);
    if (place.pair_size == 2) send_message(sh, place, slot, message);
    if (goes_on) ring.hand_over(one, message);
    leaves = !goes_on;
    if (leaves) prefetch_code_by_one(args);  // of what comes behind the tiles
  }
  ring.hand_over_exit();
}

// The second CTA of a pair: takes what the first one's scheduler tells it.
template <bool kTraced>
__device__ inline void follow_schedule(Shared<kTraced>& sh, const LaunchArgs& args,
                                       const Place& place) {
  TaskRing<kTraced> ring{sh, place, sh.actors[static_cast<int>(Lane::k_sched)]};
  for (bool leaves = false;;) {
    const uint32_t slot = ring.handed % kTasks;
    if constexpr (kPuts) put_results(sh, place);
    if (!leaves) {
      ring.make_room();
      ptx::mbarrier_expect(&sh.pair_full[slot], kMessageBytes<kTraced>);
      const uint32_t empty = ptx::shared_address(&sh.pair_empty[slot]) + place.to_other;
      // The first publishes that the stages are free, and waits for all that this thread has stored; then
      // there is nothing to publish.
      if (ring.handed == 0) {
        ptx::mbarrier_arrive_cluster(empty);
      } else {
        ptx::mbarrier_arrive_other(empty);
      }
    }
    ring.publish_until(
        [&] { return ptx::mbarrier_test_cluster(&sh.pair_full[slot], ring.handed / kTasks & 1); },
        leaves);
    if (leaves) break;
    ring.has_work();  // it had no task until then
    const PairMessage message = sh.messages[slot];
    leaves = message.has == kNoWork;
    if (leaves) {
      prefetch_code_by_one(args);
      continue;
    }
    Tile tile = tile_at(sh.tables, sh.shape, sh.order, message.index);
    if (message.has == 0) tile.rows = 0;
    ring.hand_over(tile, message);
  }
  ring.hand_over_exit();
}

}  // namespace flashmoe
