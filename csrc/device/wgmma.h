// The tensor cores' warp-group product, D[64 x N] += A[64 x 16] B[16 x N], for every N of a tile
// family, bf16 and fp16 with float32 sums.
//
// An asm statement needs each of its registers by number, so the lists below are spelt out once, each
// the one before and the next registers; a thread holds N / 2 sums.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace flashmoe::ptx {

// Descriptors `a` and `b` are of K-major operands in shared memory.  The first form adds to D; the
// second overwrites it, so that what D held before, maybe nothing, is not alive for the compiler.
template <class T, uint32_t kN>
__device__ __forceinline__ void wgmma(float (&d)[kN / 2], uint64_t a, uint64_t b);
template <class T, uint32_t kN>
__device__ __forceinline__ void wgmma_first(float (&d)[kN / 2], uint64_t a, uint64_t b);

// clang-format off
#define FLASHMOE_PLACES_4 "%0, %1, %2, %3"
#define FLASHMOE_SUMS_4(how) how(d[0]), how(d[1]), how(d[2]), how(d[3])
#define FLASHMOE_PLACES_8 FLASHMOE_PLACES_4 ", " "%4, %5, %6, %7"
#define FLASHMOE_SUMS_8(how) FLASHMOE_SUMS_4(how), how(d[4]), how(d[5]), how(d[6]), how(d[7])
#define FLASHMOE_PLACES_16 FLASHMOE_PLACES_8 ", " "%8, %9, %10, %11, %12, %13, %14, %15"
#define FLASHMOE_SUMS_16(how) FLASHMOE_SUMS_8(how), how(d[8]), how(d[9]), how(d[10]), how(d[11]), how(d[12]), how(d[13]), how(d[14]), how(d[15])
#define FLASHMOE_PLACES_24 FLASHMOE_PLACES_16 ", " "%16, %17, %18, %19, %20, %21, %22, %23"
#define FLASHMOE_SUMS_24(how) FLASHMOE_SUMS_16(how), how(d[16]), how(d[17]), how(d[18]), how(d[19]), how(d[20]), how(d[21]), how(d[22]), how(d[23])
#define FLASHMOE_PLACES_32 FLASHMOE_PLACES_24 ", " "%24, %25, %26, %27, %28, %29, %30, %31"
#define FLASHMOE_SUMS_32(how) FLASHMOE_SUMS_24(how), how(d[24]), how(d[25]), how(d[26]), how(d[27]), how(d[28]), how(d[29]), how(d[30]), how(d[31])
#define FLASHMOE_PLACES_40 FLASHMOE_PLACES_32 ", " "%32, %33, %34, %35, %36, %37, %38, %39"
#define FLASHMOE_SUMS_40(how) FLASHMOE_SUMS_32(how), how(d[32]), how(d[33]), how(d[34]), how(d[35]), how(d[36]), how(d[37]), how(d[38]), how(d[39])
#define FLASHMOE_PLACES_48 FLASHMOE_PLACES_40 ", " "%40, %41, %42, %43, %44, %45, %46, %47"
#define FLASHMOE_SUMS_48(how) FLASHMOE_SUMS_40(how), how(d[40]), how(d[41]), how(d[42]), how(d[43]), how(d[44]), how(d[45]), how(d[46]), how(d[47])
#define FLASHMOE_PLACES_56 FLASHMOE_PLACES_48 ", " "%48, %49, %50, %51, %52, %53, %54, %55"
#define FLASHMOE_SUMS_56(how) FLASHMOE_SUMS_48(how), how(d[48]), how(d[49]), how(d[50]), how(d[51]), how(d[52]), how(d[53]), how(d[54]), how(d[55])
#define FLASHMOE_PLACES_64 FLASHMOE_PLACES_56 ", " "%56, %57, %58, %59, %60, %61, %62, %63"
#define FLASHMOE_SUMS_64(how) FLASHMOE_SUMS_56(how), how(d[56]), how(d[57]), how(d[58]), how(d[59]), how(d[60]), how(d[61]), how(d[62]), how(d[63])
#define FLASHMOE_PLACES_72 FLASHMOE_PLACES_64 ", " "%64, %65, %66, %67, %68, %69, %70, %71"
#define FLASHMOE_SUMS_72(how) FLASHMOE_SUMS_64(how), how(d[64]), how(d[65]), how(d[66]), how(d[67]), how(d[68]), how(d[69]), how(d[70]), how(d[71])
#define FLASHMOE_PLACES_80 FLASHMOE_PLACES_72 ", " "%72, %73, %74, %75, %76, %77, %78, %79"
#define FLASHMOE_SUMS_80(how) FLASHMOE_SUMS_72(how), how(d[72]), how(d[73]), how(d[74]), how(d[75]), how(d[76]), how(d[77]), how(d[78]), how(d[79])
#define FLASHMOE_PLACES_88 FLASHMOE_PLACES_80 ", " "%80, %81, %82, %83, %84, %85, %86, %87"
#define FLASHMOE_SUMS_88(how) FLASHMOE_SUMS_80(how), how(d[80]), how(d[81]), how(d[82]), how(d[83]), how(d[84]), how(d[85]), how(d[86]), how(d[87])

// `r` registers of sums, then the numbers of the two operands that follow them; `one` is 1 to add.
#define FLASHMOE_WGMMA(name, type, word, n, r, pb, one, sums)                                       \
  template <>                                                                                       \
  __device__ __forceinline__ void name<type, n>(float (&d)[r], uint64_t a, uint64_t b) {            \
    asm volatile("{\n.reg .pred p;\nsetp.eq.u32 p, " #one ", 1;\n"                                  \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." word "." word " {"               \
                 FLASHMOE_PLACES_##r "}, %" #r ", %" #pb ", p, 1, 1, 0, 0;\n}\n"                    \
                 : sums                                                                             \
                 : "l"(a), "l"(b));                                                                 \
  }
#define FLASHMOE_WGMMA_BOTH(n, r, pb)                                                               \
  FLASHMOE_WGMMA(wgmma, __nv_bfloat16, "bf16", n, r, pb, 1, FLASHMOE_SUMS_##r("+f"))                \
  FLASHMOE_WGMMA(wgmma, __half, "f16", n, r, pb, 1, FLASHMOE_SUMS_##r("+f"))                        \
  FLASHMOE_WGMMA(wgmma_first, __nv_bfloat16, "bf16", n, r, pb, 0, FLASHMOE_SUMS_##r("=f"))          \
  FLASHMOE_WGMMA(wgmma_first, __half, "f16", n, r, pb, 0, FLASHMOE_SUMS_##r("=f"))

FLASHMOE_WGMMA_BOTH(8, 4, 5)
FLASHMOE_WGMMA_BOTH(16, 8, 9)
FLASHMOE_WGMMA_BOTH(32, 16, 17)
FLASHMOE_WGMMA_BOTH(48, 24, 25)
FLASHMOE_WGMMA_BOTH(64, 32, 33)
FLASHMOE_WGMMA_BOTH(80, 40, 41)
FLASHMOE_WGMMA_BOTH(96, 48, 49)
FLASHMOE_WGMMA_BOTH(112, 56, 57)
FLASHMOE_WGMMA_BOTH(128, 64, 65)
FLASHMOE_WGMMA_BOTH(144, 72, 73)
FLASHMOE_WGMMA_BOTH(160, 80, 81)
FLASHMOE_WGMMA_BOTH(176, 88, 89)
// clang-format on

}  // namespace flashmoe::ptx
