// How the six lanes of one CTA hand work to each other: a barrier, and rings with one producer.
//
// These are the host's mbarriers.  They have no deadline: a lane waits here only for lanes of its
// own CTA, each of which either finishes the work it began or passes EXIT on.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace flashmoe {

class CtaBarrier {
 public:
  explicit CtaBarrier(uint32_t threads) : threads_(threads) {}

  void wait() {
    std::unique_lock lock(mutex_);
    const uint64_t phase = phase_;
    if (++arrived_ == threads_) {
      arrived_ = 0;
      ++phase_;
      all_here_.notify_all();
      return;
    }
    all_here_.wait(lock, [&] { return phase_ != phase; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable all_here_;
  const uint32_t threads_;
  uint32_t arrived_ = 0;
  uint64_t phase_ = 0;
};

// A ring of `kSlots` entries: one producer, `kReaders` consumers that each see every entry.
template <class T, uint32_t kSlots, uint32_t kReaders>
class Ring {
 public:
  // Producer: the next free entry, once every reader has let go of what it held.
  T& acquire() {
    const uint32_t next = produced_.load(std::memory_order_relaxed);
    for (auto& reader : consumed_) {
      for (;;) {
        const uint32_t seen = reader.load(std::memory_order_acquire);
        if (next - seen < kSlots) break;
        reader.wait(seen, std::memory_order_acquire);
      }
    }
    return entries_[next % kSlots];
  }
  // Whether acquire() would return at once.
  bool has_room() const {
    const uint32_t next = produced_.load(std::memory_order_relaxed);
    for (const auto& reader : consumed_) {
      if (next - reader.load(std::memory_order_acquire) >= kSlots) return false;
    }
    return true;
  }
  void publish() {
    produced_.fetch_add(1, std::memory_order_release);
    produced_.notify_all();
  }

  // Consumer: the next entry, which stays valid until release().
  T& take(uint32_t reader) {
    const uint32_t next = consumed_[reader].load(std::memory_order_relaxed);
    for (;;) {
      const uint32_t seen = produced_.load(std::memory_order_acquire);
      if (seen != next) break;
      produced_.wait(seen, std::memory_order_acquire);
    }
    return entries_[next % kSlots];
  }
  bool has_entry(uint32_t reader) const {
    return produced_.load(std::memory_order_acquire) !=
           consumed_[reader].load(std::memory_order_relaxed);
  }
  void release(uint32_t reader) {
    consumed_[reader].fetch_add(1, std::memory_order_release);
    consumed_[reader].notify_one();
  }

 private:
  std::array<T, kSlots> entries_{};
  std::atomic<uint32_t> produced_{0};
  std::array<std::atomic<uint32_t>, kReaders> consumed_{};
};

}  // namespace flashmoe
