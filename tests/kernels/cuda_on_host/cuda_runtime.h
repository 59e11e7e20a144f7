// What kernels/csrc/masked_geglu.cu needs of CUDA, on the host: with this instead of CUDA's own header, a C++ compiler
// makes of the file, as it is, a library that runs its threads one after the other. They share nothing and wait for
// nobody, so that any order will do.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define __device__
#define __global__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  dim3(unsigned x, unsigned y, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline dim3 threadIdx, blockIdx, gridDim;

// Bytes that were read through the cache, read past it, and written.
extern "C" {
inline int64_t bytes_cached = 0, bytes_streamed = 0, bytes_written = 0;
}

template <typename T>
T __ldg(const T* place) {
  bytes_cached += sizeof(T);
  return *place;
}
template <typename T>
T __ldcs(const T* place) {
  bytes_streamed += sizeof(T);
  return *place;
}
template <typename T>
void __stcg(T* place, T word) {
  bytes_written += sizeof(T);
  *place = word;
}
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidValue ? "invalid argument" : "another";
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... given) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  const bool is_empty = !grid.x || !grid.y || !grid.z || !block.x || !block.y || !block.z;
  if (is_empty || grid.x > 0x7fffffff || grid.y > 0xffff || grid.z > 0xffff || block.x * block.y * block.z > 1024) {
    return cudaErrorInvalidConfiguration;
  }
  gridDim = grid;
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x)
        for (threadIdx.z = 0; threadIdx.z < block.z; ++threadIdx.z)
          for (threadIdx.y = 0; threadIdx.y < block.y; ++threadIdx.y)
            for (threadIdx.x = 0; threadIdx.x < block.x; ++threadIdx.x) kernel(given...);
  return cudaSuccess;
}

// In place of kernels/csrc/arithmetic.cuh, which is instructions of the GPU.
#define BAKEOUT_ARITHMETIC_CUH

struct Half {
  _Float16 number;
};
struct Bfloat16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(Half x) { return static_cast<float>(x.number); }
inline float to_float(Bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float result;
  memcpy(&result, &bits, sizeof(result));
  return result;
}

template <typename T>
T from_float(float x);
template <>
inline float from_float(float x) {
  return x;
}
template <>
inline Half from_float(float x) {
  return {static_cast<_Float16>(x)};
}
template <>
inline Bfloat16 from_float(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  if (std::isnan(x)) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline float exp2_flushed(float x) { return std::exp2(x); }
