// Before the roles split: gate, rank barrier, counts, plan.
#pragma once

#include <algorithm>

#include "host/cta.h"

namespace flashmoe::host {

// Routes this lane's share of the chunk's tokens.
template <bool kTraced>
void Cta<kTraced>::gate_share(LaneActor& a, Lane lane) {
  const uint32_t tokens = token_end_ - token_begin_;
  const uint32_t share = ceil_div(tokens, kLanes);
  const uint32_t begin = min_u32(token_begin_ + static_cast<uint32_t>(lane) * share, token_end_);
  const uint32_t end = min_u32(begin + share, token_end_);
  const RankInput& input = m_.inputs[rank_];
  uint32_t* ids = heap_.at<uint32_t>(l_.ids);
  float* weights = heap_.at<float>(l_.weights);
  a.doing(EventKind::k_gate, kNoPeer, kNoExpert, cta_);
  if (s_.routing == RoutingKind::kExternal) {
    for (uint32_t t = begin; t < end; ++t) {
      const uint64_t at = static_cast<uint64_t>(t) * s_.top_k;
      if (!ids_are_valid(s_, input.ids + at)) {
        bad_ids_.store(true, std::memory_order_relaxed);  // read behind the CTA's barrier
        break;
      }
      std::copy_n(input.ids + at, s_.top_k, ids + at);
      std::copy_n(input.weights + at, s_.top_k, weights + at);
    }
  } else {
    constexpr uint32_t kTokens = 4;
    const uint32_t columns = m_.gate_columns;
    std::vector<float> x(kTokens * s_.hidden), logits(kTokens * columns);
    GateScratch scratch;
    for (uint32_t t = begin; t < end; t += kTokens) {
      const uint32_t n = min_u32(kTokens, end - t);
      widen(m_.config.dtype, input.x + static_cast<uint64_t>(t) * s_.hidden, x.data(),
            n * s_.hidden);
      std::fill(logits.begin(), logits.end(), 0.0f);
      m_.multiply_add(x.data(), s_.hidden, m_.gate_panel.data(), columns, logits.data(), columns, n,
                      columns, s_.hidden);
      for (uint32_t i = 0; i < n; ++i) {
        const uint64_t at = static_cast<uint64_t>(t + i) * s_.top_k;
        choose_experts(s_, logits.data() + i * columns, m_.weights.bias, scratch, ids + at,
                       weights + at);
      }
    }
  }
  a.span(EventKind::k_gate, kNoPeer, kNoExpert, cta_, end - begin);
}

// The chunk's histogram, and each token's place among the chunk's rows of its experts, in token
// order.
template <bool kTraced>
void Cta<kTraced>::count_chunk(LaneActor& a) {
  uint32_t* histogram = heap_.at<uint32_t>(l_.histogram) + static_cast<uint64_t>(cta_) * s_.experts;
  const uint32_t* ids = heap_.at<uint32_t>(l_.ids);
  uint32_t* slots = heap_.at<uint32_t>(l_.slots);
  std::fill_n(histogram, s_.experts, 0u);
  const uint64_t end = static_cast<uint64_t>(token_end_) * s_.top_k;
  for (uint64_t i = static_cast<uint64_t>(token_begin_) * s_.top_k; i < end; ++i) {
    slots[i] = histogram[ids[i]]++;
  }
  a.span(EventKind::k_gate, kNoPeer, kNoExpert, cta_, 0);
}

// The sched lane's work while the others wait at the CTA's barrier.
template <bool kTraced>
Status Cta<kTraced>::prepare(LaneActor& a) {
  a.skip();
  if (bad_ids_.load(std::memory_order_relaxed)) {
    // Nobody gets this rank's counts, so nobody moves a row.
    m_.raise_abort(Status::kBadIds);
    return Status::kBadIds;
  }
  count_chunk(a);
  uint64_t* barrier = heap_.at<uint64_t>(l_.barrier);
  HostPlatform::add(barrier, 1);
  const Awaited what{EventKind::k_wait_barrier, static_cast<uint16_t>(rank_), kNoExpert, kNoTile};
  shared_waits_.push_back(
      await(a, what, barrier, Until::kAtLeast, static_cast<uint64_t>(epoch_) * s_.chunks, true));
  if (shared_waits_.back().status != Status::kOk) return shared_waits_.back().status;
  const Status status = exchange_counts(a);
  if (status != Status::kOk) return status;
  plan(a);
  rows_needed_ = pool_rows_needed(tables_, s_);
  return rows_needed_ > s_.pool_rows ? Status::kOverflow : Status::kOk;
}

// Tells all ranks this rank's rows for its share of the experts (each CTA of the rank has one),
// then waits for the counts of everyone.
template <bool kTraced>
Status Cta<kTraced>::exchange_counts(LaneActor& a) {
  const uint32_t* histogram = heap_.at<uint32_t>(l_.histogram);
  uint32_t* chunk_rows = heap_.at<uint32_t>(l_.chunk_rows);
  const uint32_t first = static_cast<uint32_t>(uint64_t{cta_} * s_.experts / s_.chunks);
  const uint32_t last = static_cast<uint32_t>(uint64_t{cta_ + 1} * s_.experts / s_.chunks);
  const uint64_t tag = static_cast<uint64_t>(epoch_) << 32;
  a.doing(EventKind::k_counts, kNoPeer, kNoExpert, kNoTile);
  for (uint32_t e = first; e < last; ++e) {
    uint32_t rows = 0;
    for (uint32_t c = 0; c < s_.chunks; ++c) {
      chunk_rows[uint64_t{c} * s_.experts + e] = rows;
      rows += histogram[uint64_t{c} * s_.experts + e];
    }
    for (uint32_t i = 0; i < s_.world; ++i) {
      const uint32_t to = (rank_ + i) % s_.world;
      const bool wrong = wrong_count_ && wrong_count_->peer == to && wrong_count_->expert == e;
      send_signal(to, counts_at(l_, s_, epoch_, rank_) + 8ull * e, tag | (rows + (wrong ? 1 : 0)));
    }
  }
  a.span(EventKind::k_counts, kNoPeer, kNoExpert, kNoTile, 8ull * s_.world * (last - first));
  for (uint32_t i = 0; i < s_.world; ++i) {
    const uint32_t source = (rank_ + i) % s_.world;
    uint64_t* words = counts_words(heap_, l_, s_, epoch_, source);
    for (uint32_t e = 0; e < s_.experts; ++e) {
      const Awaited what{EventKind::k_wait_counts, static_cast<uint16_t>(source),
                         static_cast<uint16_t>(e), kNoTile};
      const SharedWait wait = await(a, what, words + e, Until::kTag, epoch_, false);
      if (wait.to != 0) shared_waits_.push_back(wait);
      if (wait.status != Status::kOk) return wait.status;
    }
  }
  return Status::kOk;
}

template <bool kTraced>
void Cta<kTraced>::plan(LaneActor& a) {
  a.doing(EventKind::k_plan, kNoPeer, kNoExpert, kNoTile);
  SerialTeam team;
  build_chunk_tables(team, tables_, s_, heap_.at<uint32_t>(l_.histogram),
                     heap_.at<uint32_t>(l_.chunk_rows), cta_);
  build_plan(team, tables_, s_, tile_order(s_, rank_), [&](uint32_t source, uint32_t expert) {
    // Awaited above: the tag is this epoch's, and the word has one writer, who is not yet ahead.
    return static_cast<uint32_t>(
        HostPlatform::load(counts_words(heap_, l_, s_, epoch_, source) + expert));
  });
  const uint32_t* ids = heap_.at<uint32_t>(l_.ids);
  const uint32_t* slots = heap_.at<uint32_t>(l_.slots);
  uint32_t* sorted = heap_.at<uint32_t>(l_.sorted);
  const uint64_t begin = static_cast<uint64_t>(token_begin_) * s_.top_k;
  const uint64_t end = static_cast<uint64_t>(token_end_) * s_.top_k;
  for (uint64_t i = begin; i < end; ++i) {
    sorted[begin + tables_.chunk_order[ids[i]] + slots[i]] = static_cast<uint32_t>(i);
  }
  a.span(EventKind::k_plan, kNoPeer, kNoExpert, kNoTile, 0);
}

// This CTA's share of the counters that the next launch will use.
template <bool kTraced>
void Cta<kTraced>::clear_idle_set() {
  const uint32_t idle = epoch_ + 1;
  const uint32_t tiles = max_pool_tiles(s_);
  const uint32_t begin = static_cast<uint32_t>(uint64_t{cta_} * tiles / s_.chunks);
  const uint32_t end = static_cast<uint32_t>(uint64_t{cta_ + 1} * tiles / s_.chunks);
  for (const uint64_t section : {l_.rows_ready, l_.h_ready, l_.y_ready}) {
    for (uint32_t tile = begin; tile < end; ++tile) {
      HostPlatform::store_relaxed(tile_counter(heap_, section, s_, idle, tile), 0);
    }
  }
  if (cta_ != 0) return;
  HostPlatform::store_relaxed(next_tile_word(heap_, l_, idle), 0);
  for (uint32_t e = 0; e < s_.experts; ++e) {
    HostPlatform::store_relaxed(staged_counter(heap_, l_, s_, idle, e), 0);
  }
}

}  // namespace flashmoe::host
