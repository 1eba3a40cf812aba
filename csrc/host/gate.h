// Which experts a token goes to, and with what weight.
#pragma once

#include <cstdint>
#include <vector>

#include "core/shape.h"

namespace flashmoe {

// Scratch of one lane, so that a token allocates nothing.
struct GateScratch {
  std::vector<float> scores;
  std::vector<uint32_t> order;
  std::vector<float> group_scores;
  std::vector<uint32_t> group_order;
};

// The k experts of one token by its logits [E], best first, and their weights.  Ties go to the
// lower id; NaN ranks last.  `bias` [E] or null.  Softmax and sigmoid routing; see
// flashmoe/reference.py.
void choose_experts(const Shape& s, const float* logits, const float* bias, GateScratch& scratch,
                    uint32_t* ids, float* weights);

// Whether k given ids are distinct experts.
bool ids_are_valid(const Shape& s, const int32_t* ids);

}  // namespace flashmoe
