// Put-with-signal on the GPU: what reaches ranks beyond pointers (core/arrival.h).  In the cubin's
// flavour `nvshmem` it is NVSHMEM's; the flavour `p2p` has none, and no code for it.
//
// NVSHMEM's device functions are inlined into the kernel.  Linked from its library they would be calls out
// of the translation unit, under which ptxas puts the products one after another and ignores setmaxnreg:
// 14 KB of a thread's registers in memory (nvcc 13.0.88).  Nor may they be calls within it, which would not
// know how few registers setmaxnreg has left the warp.  NVSHMEM's proxy carries what no pointer reaches;
// IBGDA's code needs headers of rdma-core, and is left out.
#pragma once

#include <cstdint>

#include "device/ptx.h"

#ifdef FLASHMOE_NVSHMEM
// In this order: the first defines what is then left out.
#include <non_abi/nvshmem_build_options.h>
#undef NVSHMEM_IBGDA_SUPPORT
#define NVSHMEM_ENABLE_ALL_DEVICE_INLINING
// nvshmem.h without the collectives, which take longer to compile than all else.
#include <device/nvshmem_defines.h>
#include <device/nvshmemx_defines.h>
#include <non_abi/nvshmem_version.h>

// The library looks for it, and for nvshmemi_device_state_d of the headers, when it takes up a module.
__constant__ nvshmemi_version_t nvshmemi_device_lib_version_d = {
    NVSHMEM_VENDOR_MAJOR_VERSION, NVSHMEM_VENDOR_MINOR_VERSION, NVSHMEM_VENDOR_PATCH_VERSION};
#endif

namespace flashmoe {

#ifdef FLASHMOE_NVSHMEM
inline constexpr bool kPuts = true;
#else
inline constexpr bool kPuts = false;
#endif

// Addresses in the heap of another rank are given as the same place in the own one; a rank is a PE.
// What a put reads stays until the peer is known to have it, so nothing here waits for its end.
namespace transport {

// Sets one word of the rank's heap, after what this thread wrote or acquired.
__device__ void signal(uint64_t* word, uint64_t value, uint32_t rank);

// Moves `bytes` from `from` to `to` of the rank's heap, and then sets its word: who sees the value sees
// the bytes.  One thread, or all of a warp, behind a fence of whoever knows that `from` is written.
__device__ void put(char* to, const char* from, uint64_t bytes, uint64_t* word, uint64_t value,
                    uint32_t rank);
__device__ void put_by_warp(char* to, const char* from, uint64_t bytes, uint64_t* word,
                            uint64_t value, uint32_t rank);

// After a wait for a word that a put has set to `value` or more: the bytes it moved are visible, also
// where the network writes them behind the caches.
__device__ void arrived(uint64_t* word, uint64_t value);

#ifdef FLASHMOE_NVSHMEM

__device__ __forceinline__ void signal(uint64_t* word, uint64_t value, uint32_t rank) {
  ptx::fence_acq_rel_sys();
  nvshmemx_signal_op(word, value, NVSHMEM_SIGNAL_SET, static_cast<int>(rank));
}

__device__ __forceinline__ void put(char* to, const char* from, uint64_t bytes, uint64_t* word,
                                    uint64_t value, uint32_t rank) {
  nvshmem_putmem_signal_nbi(to, from, bytes, word, value, NVSHMEM_SIGNAL_SET,
                            static_cast<int>(rank));
}

__device__ __forceinline__ void put_by_warp(char* to, const char* from, uint64_t bytes,
                                            uint64_t* word, uint64_t value, uint32_t rank) {
  nvshmemx_putmem_signal_nbi_warp(to, from, bytes, word, value, NVSHMEM_SIGNAL_SET,
                                  static_cast<int>(rank));
}

__device__ __forceinline__ void arrived(uint64_t* word, uint64_t value) {
  nvshmem_uint64_test(word, NVSHMEM_CMP_GE, value);
}

#endif

}  // namespace transport
}  // namespace flashmoe
