// The fused MoE forward for Hopper, peers reached by pointer where there is one and by NVSHMEM's
// put-with-signal where there is none.  Entries and launch are those of moe_p2p_sm90a.cu.
#define FLASHMOE_NVSHMEM
#include "device/kernel.h"

#define FLASHMOE_KERNEL(name, type, gated, traced)                    \
  extern "C" __global__ void __launch_bounds__(flashmoe::kThreads, 1) \
      name(const __grid_constant__ flashmoe::LaunchArgs args) {       \
    flashmoe::moe_forward<type, gated, traced>(args);                 \
  }

FLASHMOE_KERNEL(moe_bf16_gated_untraced, __nv_bfloat16, true, false)
FLASHMOE_KERNEL(moe_bf16_gated_traced, __nv_bfloat16, true, true)
FLASHMOE_KERNEL(moe_bf16_plain_untraced, __nv_bfloat16, false, false)
FLASHMOE_KERNEL(moe_bf16_plain_traced, __nv_bfloat16, false, true)
FLASHMOE_KERNEL(moe_fp16_gated_untraced, __half, true, false)
FLASHMOE_KERNEL(moe_fp16_gated_traced, __half, true, true)
FLASHMOE_KERNEL(moe_fp16_plain_untraced, __half, false, false)
FLASHMOE_KERNEL(moe_fp16_plain_traced, __half, false, true)
