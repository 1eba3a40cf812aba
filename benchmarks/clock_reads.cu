// What a GPU's clocks take to read: cycles a read of straight code, by the clock and by the warps of an SM that read it.
//
//   nvcc -O3 -std=c++17 -gencode arch=compute_90a,code=sm_90a -o clock_reads benchmarks/clock_reads.cu
//   ./clock_reads
//
// Nobody waits for what is read but a sum, whose steps are shorter than a read.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace {

constexpr int kReads = 64;
constexpr int kMostWarps = 12;

void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(status));
  std::exit(1);
}

enum class Clock { kNone, kClock32, kClock64, kGlobalTimer32, kGlobalTimer64 };

template <Clock kClock>
__device__ __forceinline__ uint64_t read(int i, uint64_t sum) {
  uint32_t low = 0;
  uint64_t all = 0;
  if constexpr (kClock == Clock::kNone) return sum ^ i;
  if constexpr (kClock == Clock::kClock32) asm volatile("mov.u32 %0, %%clock;" : "=r"(low));
  if constexpr (kClock == Clock::kClock64) asm volatile("mov.u64 %0, %%clock64;" : "=l"(all));
  if constexpr (kClock == Clock::kGlobalTimer32) {
    asm volatile("mov.u32 %0, %%globaltimer_lo;" : "=r"(low));
  }
  if constexpr (kClock == Clock::kGlobalTimer64) {
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(all));
  }
  return all + low;
}

// cycles[warp] of kReads reads, the last of three times: the first ones bring the code.
template <Clock kClock>
__global__ void reads(uint64_t* cycles, uint64_t* sums) {
  uint64_t sum = 0, took = 0;
#pragma unroll 1
  for (int round = 0; round < 3; ++round) {
    const uint64_t begin = clock64();
#pragma unroll
    for (int i = 0; i < kReads; ++i) sum += read<kClock>(i, sum);
    took = clock64() - begin;
  }
  sums[threadIdx.x] = sum;  // it is wanted
  if (threadIdx.x % 32 == 0) cycles[threadIdx.x / 32] = took;
}

template <Clock kClock>
void measure(const char* name, uint64_t* cycles, uint64_t* sums) {
  std::printf("%-16s", name);
  for (const int warps : {1, 4, kMostWarps}) {
    reads<kClock><<<1, 32 * warps>>>(cycles, sums);
    check(cudaGetLastError());
    uint64_t of_warp[kMostWarps];
    check(cudaMemcpy(of_warp, cycles, warps * sizeof *cycles, cudaMemcpyDeviceToHost));
    double sum = 0;
    for (int i = 0; i < warps; ++i) sum += static_cast<double>(of_warp[i]);
    std::printf("  %8.2f", sum / warps / kReads);
  }
  std::printf("\n");
}

}  // namespace

int main() {
  cudaDeviceProp device;
  check(cudaGetDeviceProperties(&device, 0));
  uint64_t *cycles, *sums;
  check(cudaMalloc(&cycles, kMostWarps * sizeof *cycles));
  check(cudaMalloc(&sums, 32 * kMostWarps * sizeof *sums));
  std::printf("%s, cycles a read\n%-16s    1 warp   4 warps  12 warps\n", device.name, "");
  measure<Clock::kNone>("none", cycles, sums);
  measure<Clock::kClock32>("clock", cycles, sums);
  measure<Clock::kClock64>("clock64", cycles, sums);
  measure<Clock::kGlobalTimer32>("globaltimer_lo", cycles, sums);
  measure<Clock::kGlobalTimer64>("globaltimer", cycles, sums);
  return 0;
}
