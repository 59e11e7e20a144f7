// Half precision as bits, its conversions, and powers of two. CUDA's own headers of these types need those of CCCL,
// which the package with nvcc does not bring.
#ifndef BAKEOUT_ARITHMETIC_CUH
#define BAKEOUT_ARITHMETIC_CUH

#include <cstdint>

struct Half {
  uint16_t bits;
};

struct Bfloat16 {
  uint16_t bits;
};

__device__ inline float to_float(float x) { return x; }

__device__ inline float to_float(Half x) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
  return result;
}

__device__ inline float to_float(Bfloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }

template <typename T>
__device__ T from_float(float x);

template <>
__device__ inline float from_float(float x) {
  return x;
}

template <>
__device__ inline Half from_float(float x) {
  Half result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
  return result;
}

template <>
__device__ inline Bfloat16 from_float(float x) {
  Bfloat16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
  return result;
}

// 2 to the x, or 0 where that is below the smallest normal number: without the scaling that exp2f needs for the others.
__device__ inline float exp2_flushed(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

#endif
