// Sums of result rows in float32, 16 bytes of a row at a time.
#pragma once

#include <cstdint>

namespace flashmoe {

// Adds a row's 8 columns times its weight.
template <class T>
__device__ __forceinline__ void add_weighted(float (&sum)[8], float weight, const uint4& piece) {
  const T* values = reinterpret_cast<const T*>(&piece);
#pragma unroll
  for (int v = 0; v < 8; ++v) sum[v] = fmaf(weight, static_cast<float>(values[v]), sum[v]);
}

// The sums as a row's 8 columns.
template <class T>
__device__ __forceinline__ uint4 rounded(const float (&sum)[8]) {
  uint4 piece;
  T* values = reinterpret_cast<T*>(&piece);
#pragma unroll
  for (int v = 0; v < 8; ++v) values[v] = static_cast<T>(sum[v]);
  return piece;
}

}  // namespace flashmoe
