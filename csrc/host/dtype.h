// bf16 and fp16 as bits, to and from float: rounding to nearest, ties to even.  No branches that
// depend on the value, so that loops over rows vectorise.
#pragma once

#include <bit>
#include <cstdint>

namespace flashmoe {

enum class Dtype : uint32_t { kBf16 = 0, kFp16 = 1 };

inline float bf16_to_float(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x40u;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded);
}

inline float fp16_to_float(uint16_t bits) {
  // Shifted into place, the exponent is too small by 112 (subnormals included); 2^112 puts it
  // right.
  const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fffu) << 13;
  const float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t finite = std::bit_cast<uint32_t>(scaled);
  const uint32_t special = magnitude | 0x7f800000u;
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  return std::bit_cast<float>(sign | ((bits & 0x7c00u) == 0x7c00u ? special : finite));
}

inline uint16_t float_to_fp16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t sign = (bits >> 16) & 0x8000u;
  // Below 2^-14 results are multiples of 2^-24, the spacing of floats at 0.5: adding 0.5 rounds.
  const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
  const uint32_t subnormal = std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(0.5f);
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x477ff000u ? 0x7c00u : result;  // 65520 and up round to infinity
  result = magnitude > 0x7f800000u ? 0x7e00u : result;
  return static_cast<uint16_t>(sign | result);
}

// Both, chosen at compile time so that the loops around them stay free of branches.
template <Dtype kDtype>
inline float to_float(uint16_t bits) {
  if constexpr (kDtype == Dtype::kBf16) return bf16_to_float(bits);
  return fp16_to_float(bits);
}
template <Dtype kDtype>
inline uint16_t from_float(float value) {
  if constexpr (kDtype == Dtype::kBf16) return float_to_bf16(value);
  return float_to_fp16(value);
}

// What an output holds after a launch that did not end well.
inline uint16_t nan_bits(Dtype dtype) { return dtype == Dtype::kBf16 ? 0x7fc0u : 0x7e00u; }

}  // namespace flashmoe
