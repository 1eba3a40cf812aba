// The host as the platform of core's Actor: words by std::atomic_ref, time by CLOCK_MONOTONIC.
//
// Acquire and release are on the words themselves: ThreadSanitizer does not see fences.
#pragma once

#include <atomic>
#include <cstdint>

#include "core/flight.h"
#include "core/records.h"

namespace flashmoe {

struct HostPlatform {
  static constexpr bool kImages = false;
  static uint64_t load(const uint64_t* word) {
    return std::atomic_ref<uint64_t>(*const_cast<uint64_t*>(word)).load(std::memory_order_acquire);
  }
  static uint64_t peek(const uint64_t* word) {
    return std::atomic_ref<uint64_t>(*const_cast<uint64_t*>(word)).load(std::memory_order_relaxed);
  }
  static void store_release(uint64_t* word, uint64_t value) {
    std::atomic_ref<uint64_t>(*word).store(value, std::memory_order_release);
  }
  static void store_relaxed(uint64_t* word, uint64_t value) {
    std::atomic_ref<uint64_t>(*word).store(value, std::memory_order_relaxed);
  }
  // Publishes what the caller wrote and sees what earlier adders published; the value before.
  static uint64_t add(uint64_t* word, uint64_t value) {
    return std::atomic_ref<uint64_t>(*word).fetch_add(value, std::memory_order_acq_rel);
  }
  // True where the word was 0 and is now `value`.
  static bool set_once(uint64_t* word, uint64_t value) {
    uint64_t none = 0;
    return std::atomic_ref<uint64_t>(*word).compare_exchange_strong(none, value,
                                                                    std::memory_order_acq_rel);
  }

  static uint64_t now_ns();
  // Makes now_ns() run ahead by `offset_ns` and, from now on, faster by the factor 1 + `drift`: for
  // tests, before there is a second thread.
  static void skew_clock(int64_t offset_ns, double drift);
  static uint64_t cycles();    // time-stamp counter, or ns where there is none
  static double cycles_mhz();  // its measured rate

  // Between two looks at a word: a few spins, then sleeps that grow to 0.5 ms, since dozens of threads
  // share a few cores.  It never yields: that gives a whole time slice to whoever else is busy there.
  static void relax();

  // Readable by another thread while the launch runs, word by word.  A wait begins by saying so
  // here: that is when relax() starts over.
  static void put_slot(FlightSlot* to, const FlightSlot& slot);
  static FlightSlot read_slot(const FlightSlot* from);

  static void put_record(Record* to, const Record& record) { *to = record; }
};

}  // namespace flashmoe
