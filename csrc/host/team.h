// One thread as the Team that builds the plan's tables.
#pragma once

#include <cstdint>

namespace flashmoe {

struct SerialTeam {
  uint32_t rank() const { return 0; }
  uint32_t size() const { return 1; }
  void sync() const {}

  template <class Value, class To>
  void sums(uint32_t n, uint32_t values, const Value& value, const To& to) const {
    for (uint32_t i = 0; i < n; ++i) {
      uint32_t sum = 0;
      for (uint32_t j = 0; j < values; ++j) sum += value(i, j);
      *to(i) = sum;
    }
  }

  template <class Row>
  void scan(uint32_t rows, const Row& row) const {
    for (uint32_t r = 0; r < rows; ++r) {
      const auto [values, n] = row(r);
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
