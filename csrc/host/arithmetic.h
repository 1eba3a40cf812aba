// The host engine's arithmetic on float panels.
//
// Every element of a product is one chain of multiply, then add, over K in ascending order,
// whatever the vector width: the same bits on every instruction set, block shape, world size and
// run.  This file's users are compiled with -ffp-contract=off.
#pragma once

#include <cstdint>
#include <vector>

#include "core/shape.h"
#include "host/dtype.h"

namespace flashmoe {

inline constexpr uint32_t kColumnStep = 16;  // columns of a panel are a multiple of this

// acc[rows][cols] += a[rows][depth] * b[depth][cols]; leading dimensions in floats; cols a multiple
// of kColumnStep.
using MultiplyAdd = void (*)(const float* a, uint32_t lda, const float* b, uint32_t ldb, float* acc,
                             uint32_t ldc, uint32_t rows, uint32_t cols, uint32_t depth);

// The variant for this machine's vector unit, and its name.
MultiplyAdd multiply_add();
const char* vector_unit();

struct Variant {
  MultiplyAdd function;
  const char* name;
};
// All that this machine can run, the widest first.
std::vector<Variant> variants();

// to[i] = from[i] as floats.
void widen(Dtype dtype, const uint16_t* from, float* to, uint32_t n);
// to[k * ld + column] = from[k] for k in [0, n): one row of weights becomes a column of a panel.
void widen_column(Dtype dtype, const uint16_t* from, float* to, uint32_t ld, uint32_t n);
// The same for `columns` rows of weights, `stride` apart, at once: to[k * ld + c] = from[c * stride +
// k].  n and columns are multiples of 8.
void widen_columns(Dtype dtype, const uint16_t* from, uint64_t stride, float* to, uint32_t ld,
                   uint32_t columns, uint32_t n);
// to[i] = round(from[i]).
void narrow(Dtype dtype, const float* from, uint16_t* to, uint32_t n);

// out[i] = activation(gate[i]), times up[i] where the activation is gated.
void activate(Activation activation, const float* gate, const float* up, float* out, uint32_t n);

}  // namespace flashmoe
