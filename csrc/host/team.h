// One thread as the Team that builds the plan's tables.
#pragma once

#include <cstdint>

namespace flashmoe {

struct SerialTeam {
  uint32_t rank() const { return 0; }
  uint32_t size() const { return 1; }
  void sync() const {}

  // Exclusive sums in place: each of `rows` rows holds n values and then a place for their sum.
  void scan(uint32_t* data, uint32_t rows, uint32_t n) const {
    for (uint32_t row = 0; row < rows; ++row) {
      uint32_t* values = data + static_cast<uint64_t>(row) * (n + 1);
      uint32_t sum = 0;
      for (uint32_t i = 0; i < n; ++i) {
        const uint32_t value = values[i];
        values[i] = sum;
        sum += value;
      }
      values[n] = sum;
    }
  }
};

}  // namespace flashmoe
