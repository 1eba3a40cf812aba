#include "host/arithmetic.h"

#include <cmath>
#include <cstring>

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
typedef uint16_t Eight __attribute__((vector_size(16)));
typedef uint16_t LooseEight __attribute__((vector_size(16), aligned(2), may_alias));

// Transposes 8 x 8 by interleaving rows i and i + 4 three times.
FLASHMOE_INLINE void transpose(Eight (&block)[8]) {
  for (int step = 0; step < 3; ++step) {
    Eight next[8];
    for (int i = 0; i < 4; ++i) {
      next[2 * i] = __builtin_shuffle(block[i], block[i + 4], Eight{0, 8, 1, 9, 2, 10, 3, 11});
      next[2 * i + 1] =
          __builtin_shuffle(block[i], block[i + 4], Eight{4, 12, 5, 13, 6, 14, 7, 15});
    }
    for (int i = 0; i < 8; ++i) block[i] = next[i];
  }
}

typedef uint32_t Words __attribute__((vector_size(16)));
typedef float Floats __attribute__((vector_size(16)));

// fp16_to_float of four values, each in the lower half of a word.
FLASHMOE_INLINE Words fp16_words_to_float(Words bits) {
  const Words magnitude = (bits & 0x7fffu) << 13;
  const Words finite = (Words)((Floats)magnitude * 0x1p112f);
  const Words special = (Words)((bits & 0x7c00u) == 0x7c00u);
  return (bits & 0x8000u) << 16 | (special & (magnitude | 0x7f800000u)) | (~special & finite);
}

template <Dtype kDtype>
FLASHMOE_INLINE void widen_eight(Eight values, float* to) {
  constexpr Eight kLow{0, 8, 1, 9, 2, 10, 3, 11}, kHigh{4, 12, 5, 13, 6, 14, 7, 15};
  Words low, high;
  if constexpr (kDtype == Dtype::kBf16) {
    // A float is a bf16 above 16 zero bits.
    low = (Words)__builtin_shuffle(Eight{}, values, kLow);
    high = (Words)__builtin_shuffle(Eight{}, values, kHigh);
  } else {
    low = fp16_words_to_float((Words)__builtin_shuffle(values, Eight{}, kLow));
    high = fp16_words_to_float((Words)__builtin_shuffle(values, Eight{}, kHigh));
  }
  std::memcpy(to, &low, sizeof(low));
  std::memcpy(to + 4, &high, sizeof(high));
}

template <Dtype kDtype>
void widen_columns_as(const uint16_t* from, uint64_t stride, float* to, uint32_t ld,
                      uint32_t columns, uint32_t n) {
  for (uint32_t k = 0; k < n; k += 8) {
    for (uint32_t c = 0; c < columns; c += 8) {
      Eight block[8];
      for (uint32_t i = 0; i < 8; ++i) {
        block[i] = *reinterpret_cast<const LooseEight*>(from + (c + i) * stride + k);
      }
      transpose(block);
      for (uint32_t i = 0; i < 8; ++i) {
        widen_eight<kDtype>(block[i], to + static_cast<uint64_t>(k + i) * ld + c);
      }
    }
  }
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

void widen_columns(Dtype dtype, const uint16_t* from, uint64_t stride, float* to, uint32_t ld,
                   uint32_t columns, uint32_t n) {
  dtype == Dtype::kBf16 ? widen_columns_as<Dtype::kBf16>(from, stride, to, ld, columns, n)
                        : widen_columns_as<Dtype::kFp16>(from, stride, to, ld, columns, n);
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
