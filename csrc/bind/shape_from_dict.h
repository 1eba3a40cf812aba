// A Shape from the dictionary that Python names it by: one entry a field, the same names.
#pragma once

#include <nanobind/nanobind.h>

#include <stdexcept>
#include <string>

#include "core/shape.h"

namespace flashmoe {

inline Activation activation_by_name(const std::string& name) {
  if (name == "swiglu") return Activation::kSwiglu;
  if (name == "geglu") return Activation::kGeglu;
  if (name == "relu") return Activation::kRelu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "silu") return Activation::kSilu;
  throw std::invalid_argument("unknown activation '" + name + "'");
}

inline RoutingKind routing_by_name(const std::string& name) {
  if (name == "softmax") return RoutingKind::kSoftmax;
  if (name == "sigmoid") return RoutingKind::kSigmoid;
  if (name == "external") return RoutingKind::kExternal;
  throw std::invalid_argument("unknown routing '" + name + "'");
}

// Raises KeyError for a field that is missing and ValueError for a size no launch could have.
inline Shape shape_from_dict(const nanobind::dict& d) {
  namespace nb = nanobind;
  auto u32 = [&d](const char* key) { return nb::cast<uint32_t>(d[key]); };
  Shape s{};
  s.world = u32("world");
  s.experts = u32("experts");
  s.top_k = u32("top_k");
  s.hidden = u32("hidden");
  s.inter = u32("inter");
  s.max_tokens = u32("max_tokens");
  s.pool_rows = u32("pool_rows");
  s.chunks = u32("chunks");
  s.tile_m = u32("tile_m");
  s.tile_step = u32("tile_step");
  s.tile_n1 = u32("tile_n1");
  s.tile_n2 = u32("tile_n2");
  s.wave_experts = u32("wave_experts");
  s.activation = activation_by_name(nb::cast<std::string>(d["activation"]));
  s.routing = routing_by_name(nb::cast<std::string>(d["routing"]));
  s.renormalize = nb::cast<bool>(nb::bool_(d["renormalize"])) ? 1 : 0;
  s.scale = nb::cast<float>(d["scale"]);
  s.groups = u32("groups");
  s.top_groups = u32("top_groups");
  if (s.world == 0 || s.experts == 0 || s.top_k == 0 || s.top_k > s.experts || s.hidden == 0 ||
      s.inter == 0 || s.chunks == 0 || s.tile_m == 0 || s.tile_step == 0 ||
      s.tile_m % s.tile_step != 0 || s.tile_n1 == 0 || s.tile_n2 == 0 || s.wave_experts == 0 ||
      s.groups == 0) {
    throw std::invalid_argument("a shape's sizes must be positive, and top_k at most experts");
  }
  return s;
}

}  // namespace flashmoe
