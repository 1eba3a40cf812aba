// flashmoe._host: the host engine, and what a GPU world packs before a launch.
#include <nanobind/nanobind.h>

namespace nb = nanobind;

void bind_host(nb::module_& m);
void bind_launch(nb::module_& m);

NB_MODULE(_host, m) {
  m.doc() = "The compiled side of flashmoe that needs no GPU.";
  bind_host(m);
  bind_launch(m);
}
