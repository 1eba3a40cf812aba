// A CTA as the engine sees it: six lanes to be run, each on a thread of its own.
#pragma once

#include <cstdint>
#include <memory>

#include "core/events.h"

namespace flashmoe::host {

struct Machine;

class CtaRun {
 public:
  virtual ~CtaRun() = default;
  // One lane, from its first instruction of the launch to its last.
  virtual void run(Lane lane) = 0;
};

std::unique_ptr<CtaRun> make_cta(Machine& machine, uint32_t rank, uint32_t cta);

}  // namespace flashmoe::host
