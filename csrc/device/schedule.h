// The scheduler warp: takes tiles from the rank's counter, waits until their rows are there, and
// hands them over.  One lane.
#pragma once

#include <cstdint>

#include "device/cta.h"

namespace flashmoe {

template <bool kTraced>
__device__ inline void schedule_tiles(Shared<kTraced>& sh, const Place& place) {
  const Shape& shape = sh.shape;
  GpuActor<kTraced>& actor = sh.actors[static_cast<int>(Lane::k_sched)];
  const uint32_t tiles = tiles_of_rank(sh.tables, shape, place.rank);
  const uint64_t* abort_word = place.heap.at<uint64_t>(sh.layout.abort_word);
  uint64_t* counter = next_tile_word(place.heap, sh.layout, place.epoch);
  const uint64_t h_due = static_cast<uint64_t>(column_tiles(shape, 1)) * kMathGroups;
  for (uint32_t n = 0;; ++n) {
    const uint32_t slot = n % kTasks;
    if (n >= kTasks) ptx::mbarrier_wait(&sh.task_empty[slot], (n / kTasks - 1) & 1);
    Task& task = sh.tasks[slot];
    const uint64_t index = ptx::fetch_add_relaxed_gpu(counter, 1);
    actor.skip();  // it had nothing to do until a slot came free
    if (index >= tiles || ptx::load_relaxed_sys(abort_word) != 0) break;
    const Tile tile = tile_at(sh.tables, shape, place.rank, static_cast<uint32_t>(index));
    const bool up = tile.gemm == 1;
    const EventKind kind = up ? EventKind::k_wait_rows : EventKind::k_wait_h;
    const uint64_t* word = tile_counter(place.heap, up ? sh.layout.rows_ready : sh.layout.h_ready,
                                        shape, place.epoch, tile.row_tile);
    const uint64_t due = up ? tile.rows : h_due;
    actor.span(EventKind::k_schedule, kNoPeer, tile.expert, tile.index, 0);
    task.tile = tile;
    task.wait_kind = 0;
    if (ptx::load_acquire_sys(word) < due) {
      if constexpr (kTraced) {
        task.wait_kind = static_cast<uint32_t>(kind);
        task.wait_from = ptx::globaltimer();
        task.wait_lacking = static_cast<uint32_t>(due - ptx::load_acquire_sys(word));
      }
      const Status status =
          actor.wait({kind, kNoPeer, static_cast<uint16_t>(tile.expert), tile.row_tile}, word,
                     Until::kAtLeast, due);
      if (status != Status::kOk) {
        if (status == Status::kHang) raise_abort(sh, status);
        break;
      }
      if constexpr (kTraced) task.wait_to = ptx::globaltimer();
    }
    ptx::mbarrier_arrive(&sh.task_full[slot]);
    ++sh.handed_over;
  }
  // Every role leaves by the same way out, whatever ended the launch.
  sh.tasks[sh.handed_over % kTasks].tile.gemm = 0;
  ptx::mbarrier_arrive(&sh.task_full[sh.handed_over % kTasks]);
}

}  // namespace flashmoe
