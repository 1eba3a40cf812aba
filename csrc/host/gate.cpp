#include "host/gate.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace flashmoe {
namespace {

// A strict order over all values: larger first, NaN last, then the lower id.
struct Better {
  const float* score;
  bool operator()(uint32_t a, uint32_t b) const {
    const float x = score[a], y = score[b];
    const bool x_nan = std::isnan(x), y_nan = std::isnan(y);
    if (x_nan != y_nan) return y_nan;
    if (!x_nan && x != y) return x > y;
    return a < b;
  }
};

float largest(const float* values, uint32_t n) {
  float most = -std::numeric_limits<float>::infinity();
  for (uint32_t i = 0; i < n; ++i) most = values[i] > most ? values[i] : most;
  return most;
}

// Leaves in scratch.order the experts of the best groups, in ascending order.
void keep_best_groups(const Shape& s, GateScratch& scratch) {
  const uint32_t size = s.experts / s.groups;
  const Better better{scratch.scores.data()};
  scratch.group_scores.resize(s.groups);
  scratch.group_order.resize(s.groups);
  for (uint32_t g = 0; g < s.groups; ++g) {
    // The sum of the group's two best.
    uint32_t first = g * size, second = first + 1;
    if (better(second, first)) std::swap(first, second);
    for (uint32_t e = g * size + 2; e < (g + 1) * size; ++e) {
      if (better(e, first)) {
        second = first;
        first = e;
      } else if (better(e, second)) {
        second = e;
      }
    }
    scratch.group_scores[g] = scratch.scores[first] + scratch.scores[second];
    scratch.group_order[g] = g;
  }
  auto& groups = scratch.group_order;
  std::partial_sort(groups.begin(), groups.begin() + s.top_groups, groups.end(),
                    Better{scratch.group_scores.data()});
  std::sort(groups.begin(), groups.begin() + s.top_groups);
  uint32_t n = 0;
  for (uint32_t i = 0; i < s.top_groups; ++i) {
    for (uint32_t e = groups[i] * size; e < (groups[i] + 1) * size; ++e) scratch.order[n++] = e;
  }
  scratch.order.resize(n);
}

void softmax_weights(const Shape& s, const float* logits, const uint32_t* ids, float* weights) {
  float most, sum = 0.0f;
  for (uint32_t j = 0; j < s.top_k; ++j) weights[j] = logits[ids[j]];
  if (s.renormalize) {
    // Softmax over all, divided by the sum of the chosen, is softmax over the chosen.
    most = largest(weights, s.top_k);
    for (uint32_t j = 0; j < s.top_k; ++j) sum += std::exp(weights[j] - most);
  } else {
    most = largest(logits, s.experts);
    for (uint32_t e = 0; e < s.experts; ++e) sum += std::exp(logits[e] - most);
  }
  for (uint32_t j = 0; j < s.top_k; ++j) weights[j] = std::exp(weights[j] - most) / sum;
}

float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

void sigmoid_weights(const Shape& s, const float* logits, const uint32_t* ids, float* weights) {
  float sum = 0.0f;
  for (uint32_t j = 0; j < s.top_k; ++j) sum += weights[j] = sigmoid(logits[ids[j]]);
  if (!s.renormalize) return;
  for (uint32_t j = 0; j < s.top_k; ++j) weights[j] /= sum + 1e-20f;
}

}  // namespace

void choose_experts(const Shape& s, const float* logits, const float* bias, GateScratch& scratch,
                    uint32_t* ids, float* weights) {
  const bool sigmoids = s.routing == RoutingKind::kSigmoid;
  scratch.scores.resize(s.experts);
  for (uint32_t e = 0; e < s.experts; ++e) {
    scratch.scores[e] = sigmoids ? sigmoid(logits[e]) + (bias ? bias[e] : 0.0f) : logits[e];
  }
  scratch.order.resize(s.experts);
  std::iota(scratch.order.begin(), scratch.order.end(), 0u);
  if (sigmoids && s.top_groups < s.groups) keep_best_groups(s, scratch);
  std::partial_sort(scratch.order.begin(), scratch.order.begin() + s.top_k, scratch.order.end(),
                    Better{scratch.scores.data()});
  std::copy_n(scratch.order.begin(), s.top_k, ids);
  sigmoids ? sigmoid_weights(s, logits, ids, weights) : softmax_weights(s, logits, ids, weights);
  for (uint32_t j = 0; j < s.top_k; ++j) weights[j] *= s.scale;
}

bool ids_are_valid(const Shape& s, const int32_t* ids) {
  for (uint32_t j = 0; j < s.top_k; ++j) {
    if (ids[j] < 0 || static_cast<uint32_t>(ids[j]) >= s.experts) return false;
    for (uint32_t i = 0; i < j; ++i) {
      if (ids[i] == ids[j]) return false;
    }
  }
  return true;
}

}  // namespace flashmoe
