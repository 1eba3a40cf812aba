// The sum of the rows that come back.
#pragma once

#include <cstdint>

#include "device/cta.h"
#include "device/put.h"

namespace flashmoe {

// The chunk's tokens in the order in which their results can be expected: by the last of a token's
// experts in its owner's order of tiles.  Else whoever combines early would wait for a token that is due
// late, while others' results leave L2.  One warp; whoever combines waits for sh.order_full.
template <bool kTraced>
__device__ inline void order_tokens(Shared<kTraced>& sh, const Place& place) {
  constexpr uint32_t kClasses = 32;  // a lane each
  const Shape& shape = sh.shape;
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t begin = chunk_begin(shape, place.tokens, place.chunk);
  const uint32_t end = chunk_begin(shape, place.tokens, place.chunk + 1);
  const uint32_t* ids = place.heap.at<uint32_t>(sh.layout.ids);
  uint32_t* order = place.heap.at<uint32_t>(sh.layout.order);
  const uint32_t owned = max_owned_experts(shape);
  auto due = [&](uint32_t token) {
    uint32_t last = 0;
    for (uint32_t j = 0; j < shape.top_k; ++j) {
      const uint32_t e = ids[static_cast<uint64_t>(token) * shape.top_k + j];
      last = max_u32(last, e - first_expert(shape, owner_of(shape, e)));
    }
    return last * kClasses / owned;
  };
  sh.due[lane] = 0;
  __syncwarp();
  for (uint32_t t = begin + lane; t < end; t += 32) atomicAdd(&sh.due[due(t)], 1);
  __syncwarp();
  const uint32_t mine = sh.due[lane];
  sh.due[lane] = warp_running_sum(mine) - mine;
  __syncwarp();
  // Within a class the order does not matter.
  for (uint32_t t = begin + lane; t < end; t += 32)
    order[begin + atomicAdd(&sh.due[due(t)], 1)] = t;
  __syncwarp();
  if (lane == 0) ptx::mbarrier_arrive(&sh.order_full);
}

// Waits until all result rows of tokens order[0] to order[tokens - 1] are here.  One warp; its lane 0
// speaks for the actor.
template <bool kTraced>
__device__ inline Status await_returns(Shared<kTraced>& sh, const Place& place,
                                       GpuActor<kTraced>& actor, const uint32_t* order,
                                       uint32_t tokens) {
  const Shape& shape = sh.shape;
  const PlanTables& tables = sh.tables;
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t* ids = place.heap.at<uint32_t>(sh.layout.ids);
  const uint32_t* slots = place.heap.at<uint32_t>(sh.layout.slots);
  const uint64_t* returned = place.heap.at<uint64_t>(sh.layout.returned);
  const uint32_t rows = tokens * shape.top_k;
  for (uint32_t base = 0; base < rows; base += 32) {
    uint32_t expert = 0, tile = 0;
    bool lacking = false;
    if (base + lane < rows) {
      const uint32_t t = (base + lane) / shape.top_k, j = base + lane - t * shape.top_k;
      const uint64_t row = static_cast<uint64_t>(order[t]) * shape.top_k + j;
      expert = ids[row];
      const uint32_t i = source_start(tables, shape, place.rank, expert) +
                         tables.chunk_prefix[expert] + slots[row];
      tile = global_tile(tables, shape, expert, i / tables.height[expert]);
      lacking = ptx::load_acquire_sys(returned + tile) < place.epoch;
    }
    for (uint32_t mask = __ballot_sync(0xffffffffu, lacking); mask != 0; mask &= mask - 1) {
      const uint32_t from = __ffs(mask) - 1;
      const uint32_t awaited_expert = __shfl_sync(0xffffffffu, expert, from);
      const uint32_t awaited_tile = __shfl_sync(0xffffffffu, tile, from);
      Status status = Status::kOk;
      if (lane == 0) {
        status = actor.wait(
            {EventKind::k_wait_return, static_cast<uint16_t>(owner_of(shape, awaited_expert)),
             static_cast<uint16_t>(awaited_expert), awaited_tile},
            returned + awaited_tile, Until::kAtLeast, place.epoch, 1);
      }
      status = static_cast<Status>(__shfl_sync(0xffffffffu, static_cast<uint32_t>(status), 0));
      if (status != Status::kOk) return status;
    }
    if constexpr (kPuts) {
      results_arrived(sh, place, const_cast<uint64_t*>(returned) + tile, expert,
                      base + lane < rows);
    }
  }
  __syncwarp();
  return Status::kOk;
}

// Adds kRows of a token's rows, from its j0-th on, to sums of 8 values of kColumns columns of a lane;
// `row` and `weight` are of lane `first` + j % 32 for the token's j-th row.  Without a condition, which the
// compiler would move the loads under, so that a few were in flight, not all.
template <class T, uint32_t kRows, uint32_t kColumns>
__device__ __forceinline__ void add_rows(const uint4* ret, uint32_t units, uint32_t base,
                                         uint32_t row, float weight, uint32_t first, uint32_t j0,
                                         float (&sum)[kColumns][8]) {
  const uint32_t lane = threadIdx.x % 32;
  uint4 piece[kRows][kColumns];
  float w[kRows];
#pragma unroll
  for (uint32_t i = 0; i < kRows; ++i) {
    const uint32_t r = __shfl_sync(0xffffffffu, row, first + (j0 + i) % 32);
    w[i] = __shfl_sync(0xffffffffu, weight, first + (j0 + i) % 32);
    const uint4* from = ret + static_cast<uint64_t>(r) * units;
#pragma unroll
    for (uint32_t c = 0; c < kColumns; ++c) {
      // Beyond the last column the last one is fetched again and not used.
      piece[i][c] = from[min_u32(base + c * 32 + lane, units - 1)];
    }
  }
#pragma unroll
  for (uint32_t i = 0; i < kRows; ++i) {
#pragma unroll
    for (uint32_t c = 0; c < kColumns; ++c) {
      const T* values = reinterpret_cast<const T*>(&piece[i][c]);
#pragma unroll
      for (int v = 0; v < 8; ++v) {
        sum[c][v] = fmaf(w[i], static_cast<float>(values[v]), sum[c][v]);
      }
    }
  }
}

// y of one token: its k result rows times their weights, summed in float32 in the order of k; a lane
// fetches kColumns pieces of kRows rows at once.
template <class T, uint32_t kRows, uint32_t kColumns, bool kTraced>
__device__ inline void combine_token(const Shared<kTraced>& sh, const Place& place,
                                     uint32_t token) {
  static_assert(kRows == 2 || kRows == 4 || kRows == 8, "the rest is added by halves");
  const Shape& shape = sh.shape;
  const PlanTables& tables = sh.tables;
  const uint32_t lane = threadIdx.x % 32, k = shape.top_k;
  const uint64_t first = static_cast<uint64_t>(token) * k;
  const uint32_t* ids = place.heap.at<uint32_t>(sh.layout.ids) + first;
  const uint32_t* slots = place.heap.at<uint32_t>(sh.layout.slots) + first;
  const float* weights = place.heap.at<float>(sh.layout.weights) + first;
  const uint4* ret = place.heap.at<uint4>(sh.layout.ret);
  const uint32_t units = shape.hidden / 8;
  uint4* y = static_cast<uint4*>(place.args->y) + static_cast<uint64_t>(token) * units;
  uint32_t row = 0;
  float weight = 0.0f;
  auto fetch = [&](uint32_t j) {  // each lane one of the token's rows, 32 at a time
    if (j < k) {
      row = return_row(tables, shape, place.rank, ids[j], tables.chunk_prefix[ids[j]] + slots[j]);
      weight = weights[j];
    }
  };
  fetch(lane);
  for (uint32_t base = 0; base < units; base += 32 * kColumns) {
    float sum[kColumns][8] = {};
    uint32_t j = 0;
    for (; j + kRows <= k; j += kRows) {
      if (k > 32 && j % 32 == 0) fetch(j + lane);
      add_rows<T, kRows>(ret, units, base, row, weight, 0, j, sum);
    }
    if (k > 32 && j % 32 == 0) fetch(j + lane);
    if constexpr (kRows > 4) {
      if (k - j >= 4) {
        add_rows<T, 4>(ret, units, base, row, weight, 0, j, sum);
        j += 4;
      }
    }
    if constexpr (kRows > 2) {
      if (k - j >= 2) {
        add_rows<T, 2>(ret, units, base, row, weight, 0, j, sum);
        j += 2;
      }
    }
    if (j < k) add_rows<T, 1>(ret, units, base, row, weight, 0, j, sum);
#pragma unroll
    for (uint32_t c = 0; c < kColumns; ++c) {
      const uint32_t unit = base + c * 32 + lane;
      if (unit >= units) break;
      uint4 out;
      T* values = reinterpret_cast<T*>(&out);
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] = static_cast<T>(sum[c][i]);
      y[unit] = out;
    }
  }
}

// The same by a comm warp, whose registers hold few loads in flight: bulk copies bring the token's rows
// into its pieces, a slice of each row at a time.  Bits are those of combine_token: each value is summed
// in the order of k.  `used` counts the pieces of all calls.  k is at most kPieces.
template <class T, bool kTraced>
__device__ inline void combine_token_bulk(const Shared<kTraced>& sh, const Place& place,
                                          uint32_t token, uint64_t* full, const char* pieces,
                                          uint32_t& used) {
  const Shape& shape = sh.shape;
  const PlanTables& tables = sh.tables;
  const uint32_t lane = threadIdx.x % 32, k = shape.top_k;
  const uint64_t first = static_cast<uint64_t>(token) * k;
  const uint32_t row_bytes = shape.hidden * 2, slices = ceil_div(row_bytes, kPieceBytes);
  const char* ret = place.heap.at<char>(sh.layout.ret);
  uint4* y = static_cast<uint4*>(place.args->y) + static_cast<uint64_t>(token) * (row_bytes / 16);
  uint64_t from = 0;  // of the lane's row
  float weight = 0.0f;
  if (lane < k) {
    const uint32_t e = place.heap.at<uint32_t>(sh.layout.ids)[first + lane];
    const uint32_t slot = place.heap.at<uint32_t>(sh.layout.slots)[first + lane];
    from = static_cast<uint64_t>(
               return_row(tables, shape, place.rank, e, tables.chunk_prefix[e] + slot)) *
           row_bytes;
    weight = place.heap.at<float>(sh.layout.weights)[first + lane];
  }
  // The rows were written by ordinary stores, which this warp has acquired.
  if (lane == 0) ptx::fence_proxy_async();
  uint32_t issued = 0;  // of slices * k pieces, slice by slice
  for (uint32_t slice = 0; slice < slices; ++slice) {
    for (; issued < slices * k && issued - slice * k < kPieces; ++issued) {
      const uint32_t j = issued % k, at = issued / k * kPieceBytes;
      const uint64_t row = __shfl_sync(0xffffffffu, from, j);
      if (lane == 0) {
        const uint32_t slot = (used + issued) % kPieces,
                       bytes = min_u32(row_bytes - at, kPieceBytes);
        ptx::mbarrier_expect(full + slot, bytes);
        ptx::bulk_load(const_cast<char*>(pieces) + slot * kPieceBytes, ret + row + at, bytes,
                       full + slot);
      }
    }
    const uint32_t begin = used + slice * k;
    for (uint32_t j = 0; j < k; ++j) {
      ptx::mbarrier_wait(full + (begin + j) % kPieces, (begin + j) / kPieces & 1);
    }
    const uint32_t units = min_u32(row_bytes - slice * kPieceBytes, kPieceBytes) / 16;
    for (uint32_t base = 0; base < units; base += 64) {
      const uint32_t unit = base + lane;
      float sum[2][8] = {};
      for (uint32_t j = 0; j < k; ++j) {
        // By all lanes: the one that has the weight may have no unit.
        const float w = __shfl_sync(0xffffffffu, weight, j);
        const uint4* piece =
            reinterpret_cast<const uint4*>(pieces + (begin + j) % kPieces * kPieceBytes);
#pragma unroll
        for (uint32_t c = 0; c < 2; ++c) {
          if (unit + c * 32 >= units) break;
          const uint4 loaded = piece[unit + c * 32];
          const T* values = reinterpret_cast<const T*>(&loaded);
#pragma unroll
          for (int v = 0; v < 8; ++v) sum[c][v] = fmaf(w, static_cast<float>(values[v]), sum[c][v]);
        }
      }
#pragma unroll
      for (uint32_t c = 0; c < 2; ++c) {
        if (unit + c * 32 >= units) break;
        uint4 out;
        T* values = reinterpret_cast<T*>(&out);
#pragma unroll
        for (int v = 0; v < 8; ++v) values[v] = static_cast<T>(sum[c][v]);
        y[slice * (kPieceBytes / 16) + unit + c * 32] = out;
      }
    }
    __syncwarp();  // the pieces are read: they may be filled again
  }
  used += slices * k;
}

// Combines batches of the chunk's tokens until none is left.  A team is one comm warp, which has pieces
// and has used some of them, or the four warps of a math group, whose first warp waits for all of them.
template <class T, uint32_t kTeamWarps, bool kTraced>
__device__ inline Status combine(Shared<kTraced>& sh, const Place& place, Lane who,
                                 [[maybe_unused]] const char* pieces = nullptr,
                                 [[maybe_unused]] uint32_t used = 0) {
  const Shape& shape = sh.shape;
  GpuActor<kTraced>& actor = sh.actors[static_cast<int>(who)];
  const uint32_t team = static_cast<uint32_t>(who) - static_cast<uint32_t>(Lane::k_comm0);
  const uint32_t warp = threadIdx.x / 32 % kTeamWarps, lane = threadIdx.x % 32;
  const uint32_t begin = chunk_begin(shape, place.tokens, place.chunk);
  const uint32_t end = chunk_begin(shape, place.tokens, place.chunk + 1) - begin;
  const uint32_t* order = place.heap.at<uint32_t>(sh.layout.order) + begin;
  // A token a warp while few are left for each, up to four.
  const uint32_t batch = kTeamWarps * min_u32(max_u32(end / 40, 1), 4);
  auto sync = [&] {
    if constexpr (kTeamWarps == 1)
      __syncwarp();
    else
      ptx::named_barrier(team, kTeamWarps * 32);
  };
  // What the first warp tells the team: the batch's first token, `end` for none left, or this.
  constexpr uint32_t kGiveUp = 0xffffffffu;
  Status status = Status::kOk;
  ptx::mbarrier_wait(&sh.order_full, 0);
  for (;;) {
    if (warp == 0) {
      uint32_t from = 0;
      if (lane == 0) from = min_u32(atomicAdd(&sh.next_token, batch), end);
      from = __shfl_sync(0xffffffffu, from, 0);
      if (from < end) {
        status = await_returns(sh, place, actor, order + from, min_u32(batch, end - from));
        if (status != Status::kOk) {
          if (lane == 0 && status == Status::kHang) raise_abort(sh, status);
          from = kGiveUp;
        }
      }
      if (lane == 0) {
        sh.batch[team] = from;
        if (from < end) {
          actor.doing(EventKind::k_combine, kNoPeer, kNoExpert, place.chunk);
          actor.skip();
        }
      }
    }
    sync();
    const uint32_t from = sh.batch[team];
    if (from >= end) return from == kGiveUp ? Status::kHang : Status::kOk;
    const uint32_t to = min_u32(from + batch, end);
    for (uint32_t i = from + warp; i < to; i += kTeamWarps) {
      const uint32_t t = order[i];
      if constexpr (kTeamWarps == 1) {
        if (shape.top_k <= kPieces) {
          combine_token_bulk<T>(sh, place, t, sh.piece_full[team],
                                pieces + team * kPieces * kPieceBytes, used);
        } else {
          combine_token<T, 4, 1>(sh, place, t);
        }
      } else if (shape.top_k <= 2) {
        combine_token<T, 2, 8>(sh, place, t);
      } else {
        combine_token<T, 8, 4>(sh, place, t);
      }
    }
    sync();
    if (warp == 0 && lane == 0) {
      actor.span(EventKind::k_combine, kNoPeer, kNoExpert, place.chunk, to - from);
    }
  }
}

}  // namespace flashmoe
