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

// A row of results: where it lies in the return buffer, and the row tile, over all experts, it comes with.
struct ResultRow {
  uint32_t row;
  uint32_t tile;
};
template <bool kTraced>
__device__ __forceinline__ ResultRow result_row(const Shared<kTraced>& sh, const Place& place,
                                                uint32_t expert, uint32_t slot) {
  const PlanTables& tables = sh.tables;
  const uint32_t sent = tables.chunk_prefix[expert] + slot;  // of the rank's rows for the expert
  const uint32_t i = source_start(tables, sh.shape, place.rank, expert) + sent;
  return {return_row(tables, sh.shape, place.rank, expert, sent),
          global_tile(tables, sh.shape, expert, i / tables.height[expert])};
}

// What the lanes of a warp know of the rows of a few tokens: k of them each, a lane a row, token by token.
struct LaneRows {
  uint32_t token;
  uint32_t row;  // in the return buffer
  uint32_t tile;
  float weight;
};

// The rows of tokens order[0], order[stride] and so on, `tokens` of them, 32 rows at most; the lanes
// beyond repeat rows of the last one.
template <bool kTraced>
__device__ __forceinline__ LaneRows find_rows(const Shared<kTraced>& sh, const Place& place,
                                              const uint32_t* order, uint32_t stride,
                                              uint32_t tokens) {
  const uint32_t lane = threadIdx.x % 32, k = sh.shape.top_k, t = lane / k;
  LaneRows rows;
  rows.token = order[min_u32(t, tokens - 1) * stride];
  const uint64_t at = static_cast<uint64_t>(rows.token) * k + (lane - t * k);
  rows.weight = place.heap.at<float>(sh.layout.weights)[at];
  const ResultRow result = result_row(sh, place, place.heap.at<uint32_t>(sh.layout.ids)[at],
                                      place.heap.at<uint32_t>(sh.layout.slots)[at]);
  rows.row = result.row;
  rows.tile = result.tile;
  return rows;
}

// How many tokens a warp takes at a time: fewer towards the end, so that all of the CTA's warps end
// together, and no more than its lanes know the rows of.
template <bool kTraced>
__device__ __forceinline__ uint32_t batch_of_warp(Shared<kTraced>& sh, uint32_t end) {
  constexpr uint32_t kShares = 2 * (kCommWarps + 4 * kMathGroups);
  const uint32_t taken = *const_cast<volatile uint32_t*>(&sh.next_token);
  const uint32_t left = end - min_u32(taken, end);
  return max_u32(1, min_u32(min_u32(left / kShares, 4), 32 / sh.shape.top_k));
}

// Waits until all result rows of tokens order[0] to order[tokens - 1] are here.  One warp; its lane 0
// speaks for the actor.
template <bool kTraced>
__device__ inline Status await_returns(Shared<kTraced>& sh, const Place& place,
                                       GpuActor<kTraced>& actor, const uint32_t* order,
                                       uint32_t tokens) {
  const Shape& shape = sh.shape;
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
      tile = result_row(sh, place, expert, slots[row]).tile;
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
// fetches kColumns pieces of kRows rows at once.  Lanes `first` and up know the token's rows; of more than
// 32 they learn in turn.
template <class T, uint32_t kRows, uint32_t kColumns, bool kTraced>
__device__ inline void combine_token(const Shared<kTraced>& sh, const Place& place,
                                     const LaneRows& rows, uint32_t first) {
  static_assert(kRows == 2 || kRows == 8, "the rest is added by halves");
  const Shape& shape = sh.shape;
  const uint32_t lane = threadIdx.x % 32, k = shape.top_k;
  const uint32_t token = __shfl_sync(0xffffffffu, rows.token, first);
  const uint4* ret = place.heap.at<uint4>(sh.layout.ret);
  const uint32_t units = shape.hidden / 8;
  uint4* y = static_cast<uint4*>(place.args->y) + static_cast<uint64_t>(token) * units;
  uint32_t row = rows.row;
  float weight = rows.weight;
  auto fetch = [&](uint32_t j0) {
    if (k <= 32 || j0 % 32 != 0) return;
    const uint64_t at = static_cast<uint64_t>(token) * k + min_u32(j0 + lane, k - 1);
    row = result_row(sh, place, place.heap.at<uint32_t>(sh.layout.ids)[at],
                     place.heap.at<uint32_t>(sh.layout.slots)[at])
              .row;
    weight = place.heap.at<float>(sh.layout.weights)[at];
  };
  for (uint32_t base = 0; base < units; base += 32 * kColumns) {
    float sum[kColumns][8] = {};
    uint32_t j = 0;
    for (; j + kRows <= k; j += kRows) {
      fetch(j);
      add_rows<T, kRows>(ret, units, base, row, weight, first, j, sum);
    }
    fetch(j);
    if constexpr (kRows > 4) {
      if (k - j >= 4) {
        add_rows<T, 4>(ret, units, base, row, weight, first, j, sum);
        j += 4;
      }
    }
    if constexpr (kRows > 2) {
      if (k - j >= 2) {
        add_rows<T, 2>(ret, units, base, row, weight, first, j, sum);
        j += 2;
      }
    }
    if (j < k) add_rows<T, 1>(ret, units, base, row, weight, first, j, sum);
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

// Combines batches of the chunk's tokens until none is left, by a comm warp, whose registers hold few
// loads in flight: bulk copies bring rows into its pieces, a slice of two rows of a token in each, and what
// one piece held is added while the others are under way.  While a batch is summed the next one is looked
// up, and if its results are here its rows follow without a gap.  Bits are those of combine_token: each value
// is summed in the order of k.  `used` is the pieces used before.  Of more than 32 rows a token, which its
// lanes do not hold, it leaves all to the math groups.
template <class T, bool kTraced>
__device__ inline Status combine_stream(Shared<kTraced>& sh, const Place& place, uint32_t half,
                                        char* all_pieces, uint32_t used) {
  constexpr uint32_t kSlice = kPieceBytes / 2;
  const Shape& shape = sh.shape;
  GpuActor<kTraced>& actor = sh.actors[static_cast<int>(Lane::k_comm0) + half];
  uint64_t* full = sh.piece_full[half];
  char* pieces = all_pieces + half * kPieces * kPieceBytes;
  const uint32_t lane = threadIdx.x % 32, k = shape.top_k;
  const uint32_t row_bytes = shape.hidden * 2;
  if (k > 32) return Status::kOk;

  // The batch that was taken last, from the rank's from-th token in order, and what is known of it: which
  // tokens, then which experts and slots their rows have, then where those lie.
  uint32_t from = 0, tokens = 0;
  LaneRows next{};
  enum : uint32_t { kTaken, kTokens, kExperts, kRows, kHere };
  uint32_t known = kTaken;
  auto take = [&] {
    if (lane == 0) {
      const uint32_t begin = chunk_begin(shape, place.tokens, place.chunk);
      const uint32_t end = chunk_begin(shape, place.tokens, place.chunk + 1) - begin;
      const uint32_t batch = batch_of_warp(sh, end);
      from = min_u32(atomicAdd(&sh.next_token, batch), end);
      tokens = min_u32(batch, end - from);
      from += begin;
    }
    from = __shfl_sync(0xffffffffu, from, 0);
    tokens = __shfl_sync(0xffffffffu, tokens, 0);
    known = kTaken;
  };
  // One step on, each a load at most, whose value the next step finds.
  auto look = [&] {
    const uint32_t t = lane / k;
    if (known == kTaken) {
      next.token = place.heap.at<uint32_t>(sh.layout.order)[from + min_u32(t, tokens - 1)];
    } else if (known == kTokens) {
      const uint64_t at = static_cast<uint64_t>(next.token) * k + (lane - t * k);
      next.row = place.heap.at<uint32_t>(sh.layout.ids)[at];
      next.tile = place.heap.at<uint32_t>(sh.layout.slots)[at];
      next.weight = place.heap.at<float>(sh.layout.weights)[at];
    } else if (known == kExperts) {
      const ResultRow result = result_row(sh, place, next.row, next.tile);
      next.row = result.row;
      next.tile = result.tile;
    } else {
      const uint64_t* word = place.heap.at<uint64_t>(sh.layout.returned) + next.tile;
      if (!__all_sync(0xffffffffu, ptx::load_relaxed_sys(word) >= place.epoch)) return;
      ptx::load_acquire_sys(word);
      __syncwarp();
      if (lane == 0) ptx::fence_proxy_async();  // the rows were written by ordinary stores
    }
    ++known;
  };

  // Which piece is loaded next: two of rows `issue_row`, of the token whose first lane is issue_base.
  uint32_t issued = used, issue_row = 0;
  uint32_t issue_base = 0, issue_j = 0, issue_at = 0, issue_end = 0;
  auto begin_issue = [&] {
    issue_row = next.row;
    issue_base = issue_j = issue_at = 0;
    issue_end = tokens * k;
  };
  auto issue = [&] {
    while (issued - used < kPieces && issue_base < issue_end) {
      const uint32_t j = issue_base + issue_j;
      const uint32_t row0 = __shfl_sync(0xffffffffu, issue_row, j);
      const uint32_t row1 = __shfl_sync(0xffffffffu, issue_row, j + 1);
      if (lane == 0) {
        const uint32_t slot = issued % kPieces;
        const uint32_t bytes = min_u32(row_bytes - issue_at, kSlice);
        const char* ret = place.heap.at<char>(sh.layout.ret) + issue_at;
        const bool two = issue_j + 1 < k;
        ptx::mbarrier_expect(full + slot, two ? 2 * bytes : bytes);
        char* piece = pieces + slot * kPieceBytes;
        ptx::bulk_load(piece, ret + static_cast<uint64_t>(row0) * row_bytes, bytes, full + slot);
        if (two) {
          ptx::bulk_load(piece + kSlice, ret + static_cast<uint64_t>(row1) * row_bytes, bytes,
                         full + slot);
        }
      }
      ++issued;
      issue_j += 2;
      if (issue_j < k) continue;
      issue_j = 0;
      issue_at += kSlice;
      if (issue_at < row_bytes) continue;
      issue_at = 0;
      issue_base += k;
    }
  };

  ptx::mbarrier_wait(&sh.order_full, 0);
  take();
  bool begun = false;  // rows of the batch taken last are under way
  while (tokens != 0) {
    if (!begun) {
      const uint32_t* order = place.heap.at<uint32_t>(sh.layout.order) + from;
      next = find_rows(sh, place, order, 1, tokens);
      const Status status = await_returns(sh, place, actor, order, tokens);
      if (status != Status::kOk) {
        if (lane == 0 && status == Status::kHang) raise_abort(sh, status);
        return status;
      }
      if (lane == 0) ptx::fence_proxy_async();
      begin_issue();
      if (lane == 0) actor.skip();
    }
    if (lane == 0) actor.doing(EventKind::k_combine, kNoPeer, kNoExpert, place.chunk);
    const uint32_t summed = tokens, token = next.token;
    const float weight = next.weight;
    take();
    begun = false;
    for (uint32_t base = 0; base < summed * k; base += k) {
      for (uint32_t at = 0; at < row_bytes; at += kSlice) {
        float sum[2][8] = {};
        for (uint32_t j = 0; j < k; j += 2) {
          if (!kPuts && tokens != 0 && known != kHere && (j == 0 || known < kRows)) look();
          if (known == kHere && !begun && issue_base == issue_end) {
            begin_issue();
            begun = true;
          }
          issue();
          const uint32_t slot = used % kPieces;
          const float w[2] = {__shfl_sync(0xffffffffu, weight, base + j),
                              __shfl_sync(0xffffffffu, weight, base + j + 1)};
          ptx::mbarrier_wait(full + slot, used / kPieces & 1);
          const uint4* piece = reinterpret_cast<const uint4*>(pieces + slot * kPieceBytes) + lane;
#pragma unroll
          for (uint32_t i = 0; i < 2; ++i) {
            if (j + i >= k) break;
#pragma unroll
            for (uint32_t c = 0; c < 2; ++c) {
              // Beyond the row's end lies what came before, which is not stored.
              const uint4 loaded = piece[i * (kSlice / 16) + c * 32];
              const T* values = reinterpret_cast<const T*>(&loaded);
#pragma unroll
              for (int v = 0; v < 8; ++v) {
                sum[c][v] = fmaf(w[i], static_cast<float>(values[v]), sum[c][v]);
              }
            }
          }
          __syncwarp();  // the piece is read: it may be filled again
          ++used;
        }
        const uint32_t t = __shfl_sync(0xffffffffu, token, base);
        char* y = static_cast<char*>(place.args->y) + static_cast<uint64_t>(t) * row_bytes + at;
#pragma unroll
        for (uint32_t c = 0; c < 2; ++c) {
          const uint32_t unit = lane + c * 32;
          if (at + unit * 16 >= row_bytes) break;
          uint4 out;
          T* values = reinterpret_cast<T*>(&out);
#pragma unroll
          for (int v = 0; v < 8; ++v) values[v] = static_cast<T>(sum[c][v]);
          reinterpret_cast<uint4*>(y)[unit] = out;
        }
      }
    }
    if (lane == 0) actor.span(EventKind::k_combine, kNoPeer, kNoExpert, place.chunk, summed);
  }
  return Status::kOk;
}

// Combines batches of the chunk's tokens until none is left, by the four warps of a math group.  Each warp
// looks for its own tokens' rows; for what lacks the first one waits.
template <class T, bool kTraced>
__device__ inline Status combine(Shared<kTraced>& sh, const Place& place, uint32_t group) {
  const Shape& shape = sh.shape;
  GpuActor<kTraced>& actor = sh.actors[static_cast<int>(Lane::k_math0) + group];
  constexpr uint32_t kTeamWarps = kGroupThreads / 32;
  const uint32_t warp = threadIdx.x / 32 % kTeamWarps, lane = threadIdx.x % 32;
  const uint32_t begin = chunk_begin(shape, place.tokens, place.chunk);
  const uint32_t end = chunk_begin(shape, place.tokens, place.chunk + 1) - begin;
  const uint32_t* order = place.heap.at<uint32_t>(sh.layout.order) + begin;
  const uint64_t* returned = place.heap.at<uint64_t>(sh.layout.returned);
  uint32_t summed = 0;  // tokens of the batch before
  ptx::mbarrier_wait(&sh.order_full, 0);
  for (;;) {
    if (warp == 0 && lane == 0) {
      const uint32_t most = kTeamWarps * batch_of_warp(sh, end);
      const uint32_t from = min_u32(atomicAdd(&sh.next_token, most), end);
      sh.batches[group] = {from, min_u32(most, end - from)};
    }
    ptx::named_barrier(1 + group, kGroupThreads);
    if (warp == 0 && lane == 0 && summed != 0) {
      actor.span(EventKind::k_combine, kNoPeer, kNoExpert, place.chunk, summed);
    }
    const TokenBatch batch = sh.batches[group];
    if (batch.tokens == 0) return Status::kOk;
    summed = batch.tokens;
    const uint32_t mine = (batch.tokens + kTeamWarps - 1 - warp) / kTeamWarps;
    LaneRows rows{};
    bool lacking = kPuts || shape.top_k > 32;
    if (mine != 0) {
      rows = find_rows(sh, place, order + batch.from + warp, kTeamWarps, mine);
      if (!lacking) lacking = ptx::load_acquire_sys(returned + rows.tile) < place.epoch;
    }
    if (ptx::named_barrier_any(1 + group, kGroupThreads, lacking)) {
      Status status = Status::kOk;
      if (warp == 0) {
        status = await_returns(sh, place, actor, order + batch.from, batch.tokens);
        if (lane == 0 && status == Status::kHang) raise_abort(sh, status);
      }
      if (ptx::named_barrier_any(1 + group, kGroupThreads, status != Status::kOk))
        return Status::kHang;
    }
    if (warp == 0 && lane == 0) {
      actor.doing(EventKind::k_combine, kNoPeer, kNoExpert, place.chunk);
      actor.skip();
    }
    for (uint32_t i = 0; i < mine; ++i) {
      const uint32_t first = i * shape.top_k;
      if (shape.top_k <= 2) {
        combine_token<T, 2, 8>(sh, place, rows, first);
      } else {
        combine_token<T, 8, 4>(sh, place, rows, first);
      }
    }
  }
}

}  // namespace flashmoe
