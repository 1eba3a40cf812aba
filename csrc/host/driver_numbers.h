// What the driver checks of the arithmetic: rounding, widening and products, exhaustively or bit for
// bit.  Only driver.cpp uses it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "host/arithmetic.h"
#include "host/dtype.h"

#define CHECK(condition, ...)                              \
  do {                                                     \
    if (!(condition)) {                                    \
      std::fprintf(stderr, "%s:%d: ", __FILE__, __LINE__); \
      std::fprintf(stderr, __VA_ARGS__);                   \
      std::fprintf(stderr, " (%s)\n", #condition);         \
      std::exit(1);                                        \
    }                                                      \
  } while (0)

namespace flashmoe::host {

// Every 16-bit value survives the way to float and back, and what lies between two neighbours
// rounds to the nearer one, the midpoint to the even one.
inline void check_rounding(Dtype dtype, uint16_t largest) {
  auto value = [&](uint32_t bits) {
    const auto b = static_cast<uint16_t>(bits);
    return dtype == Dtype::kBf16 ? bf16_to_float(b) : fp16_to_float(b);
  };
  auto rounded = [&](float v) {
    return dtype == Dtype::kBf16 ? float_to_bf16(v) : float_to_fp16(v);
  };
  for (const uint32_t sign : {0u, 0x8000u}) {
    for (uint32_t bits = 0; bits <= largest; ++bits) {
      const float below = value(sign | bits);
      CHECK(rounded(below) == (sign | bits), "%04x does not survive", sign | bits);
      if (bits == largest) continue;
      const float above = value(sign | (bits + 1));
      const float middle = below + (above - below) / 2;
      const uint32_t even = bits % 2 == 0 ? bits : bits + 1;
      CHECK(rounded(middle) == (sign | even), "the middle above %04x", sign | bits);
      CHECK(rounded(std::nextafter(middle, below)) == (sign | bits), "just below it, %04x", bits);
      CHECK(rounded(std::nextafter(middle, above)) == (sign | (bits + 1)), "just above it, %04x",
            bits);
    }
    const uint32_t infinity = dtype == Dtype::kBf16 ? 0x7f80u : 0x7c00u;
    const float signed_infinity = sign ? -INFINITY : INFINITY;
    CHECK(rounded(signed_infinity) == (sign | infinity), "infinity");
    CHECK(value(sign | infinity) == signed_infinity, "infinity");
    CHECK(rounded(sign ? -3.4e38f : 3.4e38f) == (sign | infinity), "too large");
  }
  CHECK(std::isnan(value(rounded(NAN))) && std::isnan(value(nan_bits(dtype))), "NaN");
}

// Every instruction set gives the bits of one chain of multiply, then add, for each element.
inline void check_variants() {
  constexpr uint32_t kRows = 7, kColumns = 48, kDepth = 100, kLda = 103, kLdb = 64, kLdc = 50;
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  std::vector<float> a(kRows * kLda), b(kDepth * kLdb), start(kRows * kLdc);
  for (auto* to : {&a, &b, &start}) {
    for (float& v : *to) v = normal(random);
  }
  for (const Variant& variant : variants()) {
    std::vector<float> acc = start;
    variant.function(a.data(), kLda, b.data(), kLdb, acc.data(), kLdc, kRows, kColumns, kDepth);
    for (uint32_t r = 0; r < kRows; ++r) {
      for (uint32_t c = 0; c < kLdc; ++c) {
        float sum = start[r * kLdc + c];
        for (uint32_t k = 0; c < kColumns && k < kDepth; ++k)
          sum += a[r * kLda + k] * b[k * kLdb + c];
        CHECK(acc[r * kLdc + c] == sum, "%s: row %u, column %u", variant.name, r, c);
      }
    }
    std::printf("ok  products with %s\n", variant.name);
  }
}

// All 16-bit values, eight by eight, as the loops over single ones widen them.
inline void check_widening(Dtype dtype) {
  constexpr uint32_t kRows = 256, kDepth = 256, kLd = 264;
  std::vector<uint16_t> from(kRows * kDepth);
  for (size_t i = 0; i < from.size(); ++i) from[i] = static_cast<uint16_t>(i);
  std::vector<float> one(kDepth * kLd), eight(kDepth * kLd), row(kDepth);
  for (uint32_t r = 0; r < kRows; ++r) {
    widen_column(dtype, from.data() + r * kDepth, one.data() + r, kLd, kDepth);
    widen(dtype, from.data() + r * kDepth, row.data(), kDepth);
    for (uint32_t k = 0; k < kDepth; ++k) {
      CHECK(std::memcmp(&row[k], &one[k * kLd + r], sizeof(float)) == 0, "row %u, k %u", r, k);
    }
  }
  widen_columns(dtype, from.data(), kDepth, eight.data(), kLd, kRows, kDepth);
  CHECK(std::memcmp(one.data(), eight.data(), one.size() * sizeof(float)) == 0, "by eights");
}

}  // namespace flashmoe::host
