// The comm lanes: rows to their experts, and results summed where the tokens came from.
#pragma once

#include <algorithm>
#include <cstring>

#include "host/cta.h"

namespace flashmoe::host {

template <bool kTraced>
Status Cta<kTraced>::comm_lane(LaneActor& a) {
  dispatch(a);
  return combine(a);
}

// Units (wave, owner) of the own chunk: experts due first go first, and each rank starts with
// itself.
template <bool kTraced>
void Cta<kTraced>::dispatch(LaneActor& a) {
  const uint32_t waves = ceil_div(max_owned_experts(s_), s_.wave_experts);
  for (;;) {
    const uint32_t unit = next_unit_.fetch_add(1, std::memory_order_relaxed);
    if (unit >= waves * s_.world) return;
    const uint32_t wave = unit / s_.world;
    const uint32_t owner = (rank_ + unit % s_.world) % s_.world;
    const uint32_t owned = owned_experts(s_, owner);
    const uint32_t base = first_expert(s_, owner);
    const uint32_t first = base + min_u32(wave * s_.wave_experts, owned);
    const uint32_t last = base + min_u32((wave + 1) * s_.wave_experts, owned);
    if (tables_.chunk_order[last] == tables_.chunk_order[first]) continue;
    a.doing(EventKind::k_dispatch, static_cast<uint16_t>(owner), static_cast<uint16_t>(first),
            cta_);
    slow_down();
    const uint64_t bytes = send_rows(owner, first, last);
    a.span(EventKind::k_dispatch, static_cast<uint16_t>(owner), static_cast<uint16_t>(first), cta_,
           bytes);
  }
}

// Moves the chunk's rows for experts [first, last) of one owner, and announces them; the bytes moved.
// Beyond pointers they are only staged here, and whoever completes an expert puts its rows.
template <bool kTraced>
uint64_t Cta<kTraced>::send_rows(uint32_t owner, uint32_t first, uint32_t last) {
  const Heap& there = peers_[owner];
  for (uint32_t e = first; e < last; ++e) {
    const uint64_t row = there.base != nullptr
                             ? pool_row(tables_, s_, e, first_row(e))
                             : return_row(tables_, s_, rank_, e, tables_.chunk_prefix[e]);
    const Heap& heap = there.base != nullptr ? there : heap_;
    const uint64_t section = there.base != nullptr ? l_.pool : l_.ret;
    copy_rows(e, heap.at<uint16_t>(section) + row * s_.hidden);
  }
  for (uint32_t e = first; e < last; ++e) {
    if (there.base != nullptr) {
      publish_rows(owner, e);
    } else {
      put_rows(owner, e);
    }
  }
  return 2ull * s_.hidden * (tables_.chunk_order[last] - tables_.chunk_order[first]);
}

// Copies the chunk's rows for an expert to `to`, one after the other.
template <bool kTraced>
void Cta<kTraced>::copy_rows(uint32_t e, uint16_t* to) {
  const uint32_t* sorted =
      heap_.at<uint32_t>(l_.sorted) + static_cast<uint64_t>(token_begin_) * s_.top_k;
  const uint16_t* x = m_.inputs[rank_].x;
  for (uint32_t i = tables_.chunk_order[e]; i < tables_.chunk_order[e + 1]; ++i, to += s_.hidden) {
    std::memcpy(to, x + static_cast<uint64_t>(sorted[i] / s_.top_k) * s_.hidden, 2ull * s_.hidden);
  }
}

// Adds the chunk's rows for an expert to the counters of the row tiles they lie in.
template <bool kTraced>
void Cta<kTraced>::publish_rows(uint32_t owner, uint32_t e) {
  if (lost_signal_ && lost_signal_->expert == e) return;
  uint32_t row = first_row(e);
  const uint32_t end = row + tables_.chunk_order[e + 1] - tables_.chunk_order[e];
  while (row < end) {
    const uint32_t tile = row / tables_.height[e];
    const uint32_t next = min_u32((tile + 1) * tables_.height[e], end);
    HostPlatform::add(
        tile_counter(peers_[owner], l_.rows_ready, s_, epoch_, pool_tile(tables_, s_, e, tile)),
        next - row);
    row = next;
  }
}

// Counts the chunk's staged rows for an expert; the last chunk puts those of all chunks.
template <bool kTraced>
void Cta<kTraced>::put_rows(uint32_t owner, uint32_t e) {
  const uint32_t staged = tables_.chunk_order[e + 1] - tables_.chunk_order[e];
  const uint32_t rows = source_rows(tables_, s_, rank_, e);
  if (staged == 0) return;
  if (HostPlatform::add(staged_counter(heap_, l_, s_, epoch_, e), staged) + staged < rows) return;
  if (lost_signal_ && lost_signal_->expert == e) return;
  const uint64_t row_bytes = 2ull * s_.hidden;
  const uint64_t from = return_row(tables_, s_, rank_, e, 0);
  const uint64_t to = pool_row(tables_, s_, e, source_start(tables_, rank_, e));
  m_.transport->put_signal(owner, l_.pool + to * row_bytes,
                           heap_.at<char>(l_.ret) + from * row_bytes, rows * row_bytes,
                           arrived_at(l_, s_, rank_, e), tagged(epoch_, rows));
}

// Sums the own chunk's tokens, a block at a time, whichever lane is free.  A span ends where a wait
// begins, so that the time spent summing is not part of the wait.
template <bool kTraced>
Status Cta<kTraced>::combine(LaneActor& a) {
  std::vector<float> sum(s_.hidden), widened(s_.hidden);
  uint32_t summed = 0;
  auto record = [&] {
    if (summed > 0) a.span(EventKind::k_combine, kNoPeer, kNoExpert, cta_, summed);
    summed = 0;
  };
  const uint32_t* ids = heap_.at<uint32_t>(l_.ids);
  const uint32_t* slots = heap_.at<uint32_t>(l_.slots);
  a.skip();
  for (;;) {
    const uint32_t block = next_block_.fetch_add(1, std::memory_order_relaxed);
    const uint64_t begin = token_begin_ + uint64_t{block} * kCombineBlock;
    if (begin >= token_end_) break;
    const uint32_t end = min_u32(static_cast<uint32_t>(begin) + kCombineBlock, token_end_);
    for (uint32_t t = static_cast<uint32_t>(begin); t < end; ++t) {
      for (uint32_t j = 0; j < s_.top_k; ++j) {
        const uint64_t at = static_cast<uint64_t>(t) * s_.top_k + j;
        const uint32_t e = ids[at];
        const uint32_t row = source_start(tables_, rank_, e) + tables_.chunk_prefix[e] + slots[at];
        const uint32_t tile = global_tile(tables_, s_, e, row / tables_.height[e]);
        uint64_t* word = heap_.at<uint64_t>(l_.returned) + tile;
        if (HostPlatform::load(word) >= epoch_) continue;
        record();
        const Awaited what{EventKind::k_wait_return, static_cast<uint16_t>(owner_of(s_, e)),
                           static_cast<uint16_t>(e), tile};
        const Status status = settle(a.wait(what, word, Until::kAtLeast, epoch_, 1));
        if (status != Status::kOk) return status;
        a.doing(EventKind::k_combine, kNoPeer, kNoExpert, cta_);
      }
      sum_token(t, sum.data(), widened.data());
      ++summed;
    }
  }
  record();
  return Status::kOk;
}

// y = sum over k, in order, of weight times the result row; rounded once.  `sum` and `widened` are
// scratch of H floats.
template <bool kTraced>
void Cta<kTraced>::sum_token(uint32_t token, float* sum, float* widened) {
  const uint32_t* ids = heap_.at<uint32_t>(l_.ids);
  const uint32_t* slots = heap_.at<uint32_t>(l_.slots);
  const float* weights = heap_.at<float>(l_.weights);
  std::fill_n(sum, s_.hidden, 0.0f);
  for (uint32_t j = 0; j < s_.top_k; ++j) {
    const uint64_t at = static_cast<uint64_t>(token) * s_.top_k + j;
    const uint32_t e = ids[at];
    const uint32_t place = return_row(tables_, s_, rank_, e, tables_.chunk_prefix[e] + slots[at]);
    widen(m_.config.dtype, heap_.at<uint16_t>(l_.ret) + static_cast<uint64_t>(place) * s_.hidden,
          widened, s_.hidden);
    const float weight = weights[at];
    for (uint32_t i = 0; i < s_.hidden; ++i) sum[i] += weight * widened[i];
  }
  narrow(m_.config.dtype, sum, m_.y[rank_].data() + static_cast<uint64_t>(token) * s_.hidden,
         s_.hidden);
}

}  // namespace flashmoe::host
