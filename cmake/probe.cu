// Compiled at configure time only: does this nvcc, with its headers, make an sm_90a cubin?
#include <cuda/atomic>

extern "C" __global__ void flashmoe_probe(unsigned* word) {
  cuda::atomic_ref<unsigned, cuda::thread_scope_system>(*word).fetch_add(
      1u, cuda::memory_order_relaxed);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
