// Put-with-signal on the host: what NVSHMEM does for a GPU.  Unlike the engine's own table of heaps,
// a transport reaches the heap of every rank.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "host/platform.h"

namespace flashmoe::host {

class Transport {
 public:
  virtual ~Transport() = default;
  // Moves `bytes` from `from` to `offset` of the heap of `rank`, and then sets the word at `signal` of
  // that heap: who sees the value sees the bytes.  `bytes` 0: the signal alone.
  virtual void put_signal(uint32_t rank, uint64_t offset, const void* from, uint64_t bytes,
                          uint64_t signal, uint64_t value) = 0;
};

// Heaps that this process maps.
class MappedTransport final : public Transport {
 public:
  explicit MappedTransport(std::vector<char*> heaps) : heaps_(std::move(heaps)) {}

  void put_signal(uint32_t rank, uint64_t offset, const void* from, uint64_t bytes, uint64_t signal,
                  uint64_t value) override {
    char* heap = heaps_[rank];
    if (bytes != 0) std::memcpy(heap + offset, from, bytes);
    HostPlatform::store_release(reinterpret_cast<uint64_t*>(heap + signal), value);
  }

 private:
  std::vector<char*> heaps_;
};

}  // namespace flashmoe::host
