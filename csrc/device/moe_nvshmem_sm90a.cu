// The fused MoE forward for Hopper, peers reached by pointer where there is one and by NVSHMEM's
// put-with-signal where there is none.  Entries and launch are those of moe_p2p_sm90a.cu; bf16 alone, since
// each entry takes a compiler most of a minute.
#define FLASHMOE_NVSHMEM
#include "device/kernel.h"

FLASHMOE_KERNEL(moe_bf16_gated_untraced, __nv_bfloat16, true, false)
FLASHMOE_KERNEL(moe_bf16_gated_traced, __nv_bfloat16, true, true)
FLASHMOE_KERNEL(moe_bf16_plain_untraced, __nv_bfloat16, false, false)
FLASHMOE_KERNEL(moe_bf16_plain_traced, __nv_bfloat16, false, true)
