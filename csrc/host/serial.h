// One MoE layer in plain serial loops, in the order of operations the engine promises: every
// product one chain over K, h and the result rows rounded to the dtype, the combine in the order of
// k.  So the engine's output must equal this bit for bit, whatever W and S are.  Only driver.cpp
// uses it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "core/shape.h"
#include "host/arithmetic.h"
#include "host/dtype.h"

namespace flashmoe::host {

struct SerialLayer {
  Shape shape;
  Dtype dtype;
  std::vector<uint16_t> gate, up, down;
  std::vector<float> bias;

  float value(uint16_t bits) const {
    return dtype == Dtype::kBf16 ? bf16_to_float(bits) : fp16_to_float(bits);
  }
  uint16_t rounded(float v) const {
    return dtype == Dtype::kBf16 ? float_to_bf16(v) : float_to_fp16(v);
  }

  float product(const uint16_t* a, const uint16_t* b, uint32_t depth) const {
    float sum = 0.0f;
    for (uint32_t k = 0; k < depth; ++k) sum += value(a[k]) * value(b[k]);
    return sum;
  }

  // Experts by score, best first, of those that may be chosen.
  std::vector<uint32_t> ranked(const std::vector<float>& scores,
                               const std::vector<bool>& open) const {
    std::vector<uint32_t> order;
    for (uint32_t e = 0; e < scores.size(); ++e) {
      if (open[e]) order.push_back(e);
    }
    std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) {
      if (std::isnan(scores[a]) || std::isnan(scores[b])) {
        return !std::isnan(scores[a]) && std::isnan(scores[b]);
      }
      return scores[a] > scores[b];
    });
    return order;
  }

  void route(const uint16_t* x, uint32_t* ids, float* weights) const {
    const Shape& s = shape;
    const bool sigmoids = s.routing == RoutingKind::kSigmoid;
    std::vector<float> logits(s.experts), scores(s.experts);
    for (uint32_t e = 0; e < s.experts; ++e) {
      logits[e] = product(x, gate.data() + uint64_t{e} * s.hidden, s.hidden);
      scores[e] = sigmoids ? 1.0f / (1.0f + std::exp(-logits[e])) + bias[e] : logits[e];
    }
    std::vector<bool> open(s.experts, true);
    if (sigmoids && s.top_groups < s.groups) {
      const uint32_t size = s.experts / s.groups;
      std::vector<float> of_group(s.groups);
      for (uint32_t g = 0; g < s.groups; ++g) {
        std::vector<bool> inside(s.experts, false);
        std::fill_n(inside.begin() + g * size, size, true);
        const auto best = ranked(scores, inside);
        of_group[g] = scores[best[0]] + scores[best[1]];
      }
      const auto groups = ranked(of_group, std::vector<bool>(s.groups, true));
      open.assign(s.experts, false);
      for (uint32_t i = 0; i < s.top_groups; ++i) {
        std::fill_n(open.begin() + groups[i] * size, size, true);
      }
    }
    const auto order = ranked(scores, open);
    float most = -INFINITY, sum = 0.0f;
    for (uint32_t j = 0; j < s.top_k; ++j) ids[j] = order[j];
    if (sigmoids) {
      for (uint32_t j = 0; j < s.top_k; ++j) {
        weights[j] = 1.0f / (1.0f + std::exp(-logits[ids[j]]));
        sum += weights[j];
      }
      for (uint32_t j = 0; j < s.top_k; ++j) {
        if (s.renormalize) weights[j] /= sum + 1e-20f;
        weights[j] *= s.scale;
      }
      return;
    }
    auto over = [&](auto&& visit) {
      if (s.renormalize) {
        for (uint32_t j = 0; j < s.top_k; ++j) visit(logits[ids[j]]);
      } else {
        for (const float l : logits) visit(l);
      }
    };
    over([&](float l) { most = l > most ? l : most; });
    over([&](float l) { sum += std::exp(l - most); });
    for (uint32_t j = 0; j < s.top_k; ++j) {
      weights[j] = std::exp(logits[ids[j]] - most) / sum * s.scale;
    }
  }

  // y [H] of one token's x [H].
  void token(const uint16_t* x, const uint32_t* ids, const float* weights, uint16_t* y) const {
    const Shape& s = shape;
    const bool gated = is_gated(s.activation);
    std::vector<uint16_t> hidden(s.inter);
    std::vector<float> sum(s.hidden, 0.0f);
    for (uint32_t j = 0; j < s.top_k; ++j) {
      const uint16_t* w = up.data() + uint64_t{ids[j]} * (gated ? 2 : 1) * s.inter * s.hidden;
      for (uint32_t i = 0; i < s.inter; ++i) {
        const float first = product(x, w + uint64_t{i} * s.hidden, s.hidden);
        const float second =
            gated ? product(x, w + uint64_t{s.inter + i} * s.hidden, s.hidden) : 0.0f;
        float activated;
        activate(s.activation, &first, &second, &activated, 1);
        hidden[i] = rounded(activated);
      }
      const uint16_t* d = down.data() + uint64_t{ids[j]} * s.hidden * s.inter;
      for (uint32_t i = 0; i < s.hidden; ++i) {
        const uint16_t row = rounded(product(hidden.data(), d + uint64_t{i} * s.inter, s.inter));
        sum[i] += weights[j] * value(row);
      }
    }
    for (uint32_t i = 0; i < s.hidden; ++i) y[i] = rounded(sum[i]);
  }
};

}  // namespace flashmoe::host
