#include "host/platform.h"

#include <time.h>

#include <array>
#include <bit>
#include <cstring>
#if defined(__x86_64__)
#include <x86intrin.h>
#endif

namespace flashmoe {
namespace {

constexpr uint32_t kSpins = 8;
constexpr long kShortestSleepNs = 20'000;
constexpr long kLongestSleepNs = 500'000;

thread_local uint32_t relaxed_since_wait_began = 0;

using SlotWords = std::array<uint64_t, sizeof(FlightSlot) / 8>;

uint64_t skewed_from = 0;  // 0: the clock is right
int64_t skew_offset = 0;
double skew_drift = 0.0;

uint64_t monotonic_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<uint64_t>(t.tv_sec) * 1'000'000'000u + static_cast<uint64_t>(t.tv_nsec);
}

double measure_cycles_mhz() {
  const uint64_t from_ns = HostPlatform::now_ns(), from = HostPlatform::cycles();
  uint64_t to_ns = from_ns;
  while (to_ns - from_ns < 20'000'000) to_ns = HostPlatform::now_ns();
  return static_cast<double>(HostPlatform::cycles() - from) * 1e3 /
         static_cast<double>(to_ns - from_ns);
}

}  // namespace

uint64_t HostPlatform::now_ns() {
  const uint64_t now = monotonic_ns();
  if (skewed_from == 0) return now;
  const auto gained = static_cast<int64_t>(static_cast<double>(now - skewed_from) * skew_drift);
  return now + static_cast<uint64_t>(skew_offset + gained);
}

void HostPlatform::skew_clock(int64_t offset_ns, double drift) {
  skewed_from = monotonic_ns();
  skew_offset = offset_ns;
  skew_drift = drift;
}

uint64_t HostPlatform::cycles() {
#if defined(__x86_64__)
  return __rdtsc();
#else
  return now_ns();
#endif
}

double HostPlatform::cycles_mhz() {
  static const double mhz = measure_cycles_mhz();
  return mhz;
}

void HostPlatform::relax() {
  const uint32_t n = relaxed_since_wait_began++;
  if (n < kSpins) {
    for (int i = 0; i < 32; ++i) {
#if defined(__x86_64__)
      _mm_pause();
#endif
    }
  } else {
    const uint32_t doublings = (n - kSpins) / 4;
    const long sleep = doublings >= 5 ? kLongestSleepNs : kShortestSleepNs << doublings;
    const timespec t{0, sleep};
    nanosleep(&t, nullptr);
  }
}

void HostPlatform::put_slot(FlightSlot* to, const FlightSlot& slot) {
  if (slot.state == static_cast<uint8_t>(ActorState::kWaiting)) relaxed_since_wait_began = 0;
  const SlotWords words = std::bit_cast<SlotWords>(slot);
  uint64_t* out = reinterpret_cast<uint64_t*>(to);
  for (size_t i = 0; i < words.size(); ++i) store_relaxed(out + i, words[i]);
}

FlightSlot HostPlatform::read_slot(const FlightSlot* from) {
  SlotWords words;
  const uint64_t* in = reinterpret_cast<const uint64_t*>(from);
  for (size_t i = 0; i < words.size(); ++i) words[i] = load(in + i);
  return std::bit_cast<FlightSlot>(words);
}

}  // namespace flashmoe
