// What the approximate functions behind the kernel's activations err by, against float64, over all finite floats but
// those below 1e-30, of which the functions are lines.
//
//     nvcc -std=c++17 -arch=sm_90a -Icsrc -o activation_error benchmarks/activation_error.cu
//     ./activation_error
//
// Prints the largest error of tanh.approx.f32, of tanh itself, and those of SiLU made from it and from
// ex2.approx and rcp.approx, of their argument: what flashmoe/rounding.py's ACTIVATION_UNIT stands for.
#include <cmath>
#include <cstdint>
#include <cstdio>

#include "device/store.h"

namespace {

enum Figure { kTanh, kSiluByTanh, kSiluByExponential, kFigures };

__device__ void keep_largest(double* figure, double value) {
  // Of numbers that are not negative the order is that of their bits.
  atomicMax(reinterpret_cast<unsigned long long*>(figure),
            static_cast<unsigned long long>(__double_as_longlong(value)));
}

__global__ void sweep(double* figures) {
  using namespace flashmoe;
  double largest[kFigures] = {};
  const uint64_t step = static_cast<uint64_t>(gridDim.x) * blockDim.x;
  for (uint64_t bits = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       bits < 1ull << 32; bits += step) {
    const float v = __uint_as_float(static_cast<uint32_t>(bits));
    if (!isfinite(v) || fabsf(v) < 1e-30f) continue;
    const double exact_tanh = tanh(static_cast<double>(v));
    const double exact_silu = v / (1.0 + exp(-static_cast<double>(v)));
    const float by_tanh = SiluGate{}(v);
    const float e = ptx::exp2_approximate(-1.4426950408889634f * v);
    const float by_exponential = v * ptx::reciprocal_approximate(1.0f + e);
    const double error[kFigures] = {(ptx::tanh_approximate(v) - exact_tanh) / exact_tanh,
                                    (by_tanh - exact_silu) / v, (by_exponential - exact_silu) / v};
    for (int i = 0; i < kFigures; ++i) largest[i] = fmax(largest[i], fabs(error[i]));
  }
  for (int i = 0; i < kFigures; ++i) keep_largest(figures + i, largest[i]);
}

}  // namespace

int main() {
  double* figures;
  double host[kFigures];
  cudaDeviceProp device;
  if (cudaGetDeviceProperties(&device, 0) != cudaSuccess ||
      cudaMalloc(&figures, sizeof(host)) != cudaSuccess ||
      cudaMemset(figures, 0, sizeof(host)) != cudaSuccess) {
    std::printf("no GPU: %s\n", cudaGetErrorString(cudaGetLastError()));
    return 1;
  }
  sweep<<<8 * device.multiProcessorCount, 256>>>(figures);
  if (cudaMemcpy(host, figures, sizeof(host), cudaMemcpyDeviceToHost) != cudaSuccess) {
    std::printf("%s\n", cudaGetErrorString(cudaGetLastError()));
    return 1;
  }
  const char* names[kFigures] = {"tanh.approx.f32, of tanh", "SiLU by it, of its argument",
                                 "SiLU by ex2 and rcp, of its argument"};
  std::printf("%s\n", device.name);
  for (int i = 0; i < kFigures; ++i) {
    std::printf("%-38s %.3g = 2^%.2f\n", names[i], host[i], std::log2(host[i]));
  }
}
