// The fused MoE forward for Hopper, peers reached by pointer.
//
// One cubin holds every variant; nothing is compiled per shape.  Entry points are named
// moe_<dtype>_<expert kind>_<traced>, take one LaunchArgs by value (so that a captured graph holds its
// own), and are launched with ranks * chunks blocks of 384 threads, all resident at once.
#include "device/kernel.h"

FLASHMOE_KERNEL(moe_bf16_gated_untraced, __nv_bfloat16, true, false)
FLASHMOE_KERNEL(moe_bf16_gated_traced, __nv_bfloat16, true, true)
FLASHMOE_KERNEL(moe_bf16_plain_untraced, __nv_bfloat16, false, false)
FLASHMOE_KERNEL(moe_bf16_plain_traced, __nv_bfloat16, false, true)
FLASHMOE_KERNEL(moe_fp16_gated_untraced, __half, true, false)
FLASHMOE_KERNEL(moe_fp16_gated_traced, __half, true, true)
FLASHMOE_KERNEL(moe_fp16_plain_untraced, __half, false, false)
FLASHMOE_KERNEL(moe_fp16_plain_traced, __half, false, true)

// Measures the clock and the tracer: out = {step of %globaltimer in ns, ns and SM cycles that writing
// `records` spans took, records}.  One thread; scratch holds a RingHeader and 256 records.
extern "C" __global__ void flashmoe_clock_probe(uint64_t* out, char* scratch,
                                                flashmoe::FlightSlot* slot) {
  using namespace flashmoe;
  constexpr uint32_t kRecords = 256;
  uint64_t step = ~0ull, last = ptx::globaltimer();
  for (int i = 0; i < 4096; ++i) {
    const uint64_t now = ptx::globaltimer();
    if (now != last && now - last < step) step = now - last;
    last = now;
  }
  const uint64_t never = 0;
  GpuActor<true> actor{};
  actor.slot = slot;
  actor.record_into(reinterpret_cast<RingHeader*>(scratch),
                    reinterpret_cast<Record*>(scratch + sizeof(RingHeader) * 2), 0, kRecords, false,
                    {});
  actor.abort_word = &never;
  actor.begin(1, 0);
  actor.begin_launch(0);
  const uint64_t begin_ns = ptx::globaltimer(), begin_cycles = clock64();
  for (uint32_t i = 0; i < kRecords; ++i) actor.span(EventKind::k_gemm1, kNoPeer, 0, i, i);
  const uint64_t cycles = clock64() - begin_cycles;
  out[0] = step;
  out[1] = ptx::globaltimer() - begin_ns;
  out[2] = cycles;
  out[3] = kRecords;
}

// Tells the host where this kernel's code lies, or that of another which the host has put in its place
// (flashmoe/kernels/places.py).  One thread.
extern "C" __global__ void flashmoe_code_place(uint64_t* out) {
  uint64_t at;
  asm volatile("mov.u64 %0, flashmoe_code_place;" : "=l"(at));
  *out = at;
}

// Tells the host what time it is: `answer` (pinned) = {%globaltimer in ns, number of the question}, the
// number last.  One thread.
extern "C" __global__ void flashmoe_now(volatile uint64_t* answer, uint64_t number) {
  answer[0] = flashmoe::ptx::globaltimer();
  __threadfence_system();
  answer[1] = number;
}

// Epochs are 32 bits, and tags of the launch before must never be this one's.
inline constexpr uint64_t kLastEpoch = 1ull << 31;

// Runs behind a forward of one rank: leaves in `workspace` how that ended (the heap's status word) and,
// unless it ended well, tells the host by `failed` (pinned) and fills y, of a multiple of 16 bytes, with
// ones, which are NaNs in both dtypes.  Once in kLastEpoch launches it begins the signals, `signal_bytes` of zeros at
// the heap's beginning, anew.  Any grid.
extern "C" __global__ void flashmoe_poison(uint64_t* signals, uint64_t signal_bytes,
                                           const uint64_t* status_word, const uint64_t* abort_word,
                                           const uint64_t* epoch_word, uint4* y, uint64_t bytes,
                                           uint64_t* workspace, volatile uint64_t* failed) {
  // Where no CTA got as far as leaving, only the abort word tells.  Words that become zero meanwhile say the same.
  const uint64_t ended = *status_word != 0 ? *status_word : *abort_word;
  const uint64_t index = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index == 0) {
    *workspace = ended;
    if (ended != 0) *failed = ended;
  }
  if (ended == 0) {
    if (blockIdx.x != 0) return;
    const bool over = *epoch_word >= kLastEpoch;
    __syncthreads();  // each thread has seen the word that one of them clears
    if (!over) return;
    for (uint64_t i = threadIdx.x; i < signal_bytes / sizeof(uint64_t); i += blockDim.x) {
      signals[i] = 0;
    }
    return;
  }
  const uint64_t threads = static_cast<uint64_t>(gridDim.x) * blockDim.x;
  for (uint64_t i = index; i < bytes / sizeof(uint4); i += threads) {
    y[i] = make_uint4(~0u, ~0u, ~0u, ~0u);
  }
}
