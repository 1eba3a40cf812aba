#include "host/arithmetic.h"

#include <cmath>

namespace flashmoe {
namespace {

typedef float Vector __attribute__((vector_size(4 * kColumnStep)));
typedef float LooseVector
    __attribute__((vector_size(4 * kColumnStep), aligned(4), may_alias));  // as it lies in memory

#define FLASHMOE_INLINE inline __attribute__((always_inline))

template <uint32_t kRows>
FLASHMOE_INLINE void block(const float* a, uint32_t lda, const float* b, uint32_t ldb, float* acc,
                           uint32_t ldc, uint32_t depth) {
  Vector sum[kRows];
  for (uint32_t r = 0; r < kRows; ++r) {
    sum[r] = *reinterpret_cast<const LooseVector*>(acc + r * ldc);
  }
  for (uint32_t k = 0; k < depth; ++k) {
    const Vector row = *reinterpret_cast<const LooseVector*>(b + static_cast<uint64_t>(k) * ldb);
    for (uint32_t r = 0; r < kRows; ++r) sum[r] += a[static_cast<uint64_t>(r) * lda + k] * row;
  }
  for (uint32_t r = 0; r < kRows; ++r) *reinterpret_cast<LooseVector*>(acc + r * ldc) = sum[r];
}

FLASHMOE_INLINE void all_blocks(const float* a, uint32_t lda, const float* b, uint32_t ldb,
                                float* acc, uint32_t ldc, uint32_t rows, uint32_t cols,
                                uint32_t depth) {
  for (uint32_t c = 0; c < cols; c += kColumnStep) {
    uint32_t r = 0;
    for (; r + 4 <= rows; r += 4) {
      block<4>(a + static_cast<uint64_t>(r) * lda, lda, b + c, ldb, acc + r * ldc + c, ldc, depth);
    }
    for (; r < rows; ++r) {
      block<1>(a + static_cast<uint64_t>(r) * lda, lda, b + c, ldb, acc + r * ldc + c, ldc, depth);
    }
  }
}

#define FLASHMOE_VARIANT(name, attribute)                                                     \
  attribute void name(const float* a, uint32_t lda, const float* b, uint32_t ldb, float* acc, \
                      uint32_t ldc, uint32_t rows, uint32_t cols, uint32_t depth) {           \
    all_blocks(a, lda, b, ldb, acc, ldc, rows, cols, depth);                                  \
  }
FLASHMOE_VARIANT(multiply_add_any, )
#if defined(__x86_64__)
FLASHMOE_VARIANT(multiply_add_avx2, __attribute__((target("avx2"))))
FLASHMOE_VARIANT(multiply_add_avx512, __attribute__((target("avx512f"))))
#endif
#undef FLASHMOE_VARIANT

float silu(float x) { return x / (1.0f + std::exp(-x)); }
float gelu_tanh(float x) {
  constexpr float kRootTwoOverPi = 0.797884560802865f;
  return 0.5f * x * (1.0f + std::tanh(kRootTwoOverPi * (x + 0.044715f * x * x * x)));
}
float gelu_erf(float x) {
  constexpr float kRootHalf = 0.707106781186548f;
  return 0.5f * x * (1.0f + std::erf(x * kRootHalf));
}

template <Dtype kDtype>
void widen_as(const uint16_t* from, float* to, uint32_t n) {
  for (uint32_t i = 0; i < n; ++i) to[i] = to_float<kDtype>(from[i]);
}
template <Dtype kDtype>
void widen_column_as(const uint16_t* from, float* to, uint32_t ld, uint32_t n) {
  for (uint32_t k = 0; k < n; ++k) to[static_cast<uint64_t>(k) * ld] = to_float<kDtype>(from[k]);
}
template <Dtype kDtype>
void narrow_as(const float* from, uint16_t* to, uint32_t n) {
  for (uint32_t i = 0; i < n; ++i) to[i] = from_float<kDtype>(from[i]);
}

}  // namespace

std::vector<Variant> variants() {
  std::vector<Variant> found;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) found.push_back({multiply_add_avx512, "avx512"});
  if (__builtin_cpu_supports("avx2")) found.push_back({multiply_add_avx2, "avx2"});
#endif
  found.push_back({multiply_add_any, "baseline"});
  return found;
}

MultiplyAdd multiply_add() { return variants().front().function; }

const char* vector_unit() { return variants().front().name; }

void widen(Dtype dtype, const uint16_t* from, float* to, uint32_t n) {
  dtype == Dtype::kBf16 ? widen_as<Dtype::kBf16>(from, to, n) : widen_as<Dtype::kFp16>(from, to, n);
}

void widen_column(Dtype dtype, const uint16_t* from, float* to, uint32_t ld, uint32_t n) {
  dtype == Dtype::kBf16 ? widen_column_as<Dtype::kBf16>(from, to, ld, n)
                        : widen_column_as<Dtype::kFp16>(from, to, ld, n);
}

void narrow(Dtype dtype, const float* from, uint16_t* to, uint32_t n) {
  dtype == Dtype::kBf16 ? narrow_as<Dtype::kBf16>(from, to, n)
                        : narrow_as<Dtype::kFp16>(from, to, n);
}

void activate(Activation activation, const float* gate, const float* up, float* out, uint32_t n) {
  switch (activation) {
    case Activation::kSwiglu:
      for (uint32_t i = 0; i < n; ++i) out[i] = silu(gate[i]) * up[i];
      break;
    case Activation::kGeglu:
      for (uint32_t i = 0; i < n; ++i) out[i] = gelu_tanh(gate[i]) * up[i];
      break;
    case Activation::kRelu:
      // Written so that NaN stays NaN.
      for (uint32_t i = 0; i < n; ++i) out[i] = gate[i] < 0.0f ? 0.0f : gate[i];
      break;
    case Activation::kGelu:
      for (uint32_t i = 0; i < n; ++i) out[i] = gelu_erf(gate[i]);
      break;
    case Activation::kSilu:
      for (uint32_t i = 0; i < n; ++i) out[i] = silu(gate[i]);
      break;
  }
}

}  // namespace flashmoe
