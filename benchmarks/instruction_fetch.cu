// How fast a GPU fetches instructions: cycles an instruction of straight code that a loop runs again and again, by the
// code's length.  Where it no longer fits a cache of instructions, the rate drops to that of the next one.
//
//   nvcc -O1 -std=c++17 -gencode arch=compute_90a,code=sm_90a -o instruction_fetch benchmarks/instruction_fetch.cu
//   ./instruction_fetch
//
// Eight sums that do not wait for each other, so that one warp could execute an instruction a cycle; of eight warps two
// share a scheduler, so 2 is the least for them.  On one SM or on all.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

constexpr int kRounds = 64;
constexpr int kInstructions = 64;  // of a KB of code

void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(status));
  std::exit(1);
}

// cycles[block] of kRounds rounds, after two that bring the code; `only` one block, or all where it is negative.
template <int kKb>
__global__ void rounds(uint64_t* cycles, float by, int only) {
  if (only >= 0 && blockIdx.x != only) return;
  float a = by, b = a + 1, c = a + 2, d = a + 3, e = a + 4, f = a + 5, g = a + 6, h = a + 7;
  uint64_t begin = 0;
#pragma unroll 1
  for (int round = -2; round < kRounds; ++round) {
    if (round == 0) begin = clock64();
#pragma unroll
    for (int i = 0; i < kKb * kInstructions / 8; ++i) {
      asm volatile(
          "fma.rn.f32 %0, %0, %8, %8;\nfma.rn.f32 %1, %1, %8, %8;\n"
          "fma.rn.f32 %2, %2, %8, %8;\nfma.rn.f32 %3, %3, %8, %8;\n"
          "fma.rn.f32 %4, %4, %8, %8;\nfma.rn.f32 %5, %5, %8, %8;\n"
          "fma.rn.f32 %6, %6, %8, %8;\nfma.rn.f32 %7, %7, %8, %8;\n"
          : "+f"(a), "+f"(b), "+f"(c), "+f"(d), "+f"(e), "+f"(f), "+f"(g), "+f"(h)
          : "f"(by));
    }
  }
  const uint64_t end = clock64();
  if (threadIdx.x == 0) cycles[blockIdx.x] = end - begin;
  if (a + b + c + d + e + f + g + h == 12345.0f) cycles[0] = 0;  // the sums are wanted
}

template <int kKb>
void measure(int sms, uint64_t* cycles) {
  // So much shared memory that an SM has one block.
  constexpr int kShared = 200 * 1024;
  check(cudaFuncSetAttribute(rounds<kKb>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
  std::printf("%4d", kKb);
  for (const int threads : {32, 256}) {
    for (const int only : {sms / 2, -1}) {
      check(cudaMemset(cycles, 0, sms * sizeof *cycles));
      rounds<kKb><<<sms, threads, kShared>>>(cycles, 3.0f, only);
      check(cudaGetLastError());
      std::vector<uint64_t> of_block(sms);
      check(cudaMemcpy(of_block.data(), cycles, sms * sizeof *cycles, cudaMemcpyDeviceToHost));
      double sum = 0;
      for (const uint64_t n : of_block) sum += static_cast<double>(n);
      std::printf("  %12.3f", sum / (only < 0 ? sms : 1) / kRounds / (kKb * kInstructions));
    }
  }
  std::printf("\n");
}

template <int... kKbs>
void measure_all(int sms, uint64_t* cycles) {
  (measure<kKbs>(sms, cycles), ...);
}

}  // namespace

int main() {
  cudaDeviceProp device;
  check(cudaGetDeviceProperties(&device, 0));
  const int sms = device.multiProcessorCount;
  uint64_t* cycles;
  check(cudaMalloc(&cycles, sms * sizeof *cycles));
  std::printf(
      "%s, cycles an instruction\n  KB    warp, an SM      all SMs    8 warps, one      all SMs\n",
      device.name);
  measure_all<4, 16, 24, 28, 32, 40, 64, 96, 112, 128, 144, 192, 256>(sms, cycles);
  return 0;
}
