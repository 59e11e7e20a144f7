// masked_geglu, which memory bounds: every element of proj is read once and every one of out written once, 16 bytes at
// a time where they are aligned.

#include "bakeout_kernels.h"
#include "arithmetic.cuh"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>

namespace {

// A warp is on 32 neighbouring groups of features of one row, so that it reads 512 bytes in a piece. A thread has ROWS
// rows, whose loads do not wait for each other: 24 warps to a multiprocessor, of 80 registers a thread, then keep 48
// KiB in flight. Without BLOCKS the compiler saves registers for more warps, and each waits for one load after the
// other.
constexpr int LANES = 32;
constexpr int WARPS = 4;
constexpr int ROWS = 2;
constexpr int BLOCKS = 5;
constexpr int64_t GRID_X = 0x7fffffff;
constexpr int64_t GRID_YZ = 0xffff;

template <typename T>
struct Problem {
  const T* proj;
  int64_t batch_stride, row_stride;
  const uint8_t* mask;
  int64_t mask_row_stride;
  const T* value;
  int64_t value_row_stride;
  T* out;
  int64_t batch, tokens, width;
};

template <int BYTES>
struct WordOf;
template <>
struct WordOf<1> {
  using Type = unsigned char;
};
template <>
struct WordOf<2> {
  using Type = unsigned short;
};
template <>
struct WordOf<4> {
  using Type = unsigned int;
};
template <>
struct WordOf<8> {
  using Type = uint2;
};
template <>
struct WordOf<16> {
  using Type = uint4;
};

// N elements that one instruction loads or stores.
template <typename T, int N>
struct Group {
  using Word = typename WordOf<sizeof(T) * N>::Type;
  T element[N];

  __device__ void unpack(Word word) { memcpy(element, &word, sizeof(word)); }
  __device__ Word pack() const {
    Word word;
    memcpy(&word, element, sizeof(word));
    return word;
  }
  __device__ static const Word* at(const T* place) { return reinterpret_cast<const Word*>(place); }
};

// The mask of N features: as it is stored, and then bit j of feature j.
template <int N, bool PACKED>
struct Mask {
  Group<uint8_t, PACKED ? 1 : N> stored;

  __device__ void load(const uint8_t* row, int64_t column) {
    stored.unpack(__ldg(stored.at(row + (PACKED ? column / 8 : column))));
  }
  __device__ unsigned bits(int64_t column) const {
    if constexpr (PACKED) {
      return stored.element[0] >> (column % 8) & ((1u << N) - 1);
    } else {
      // Four bools at a time: the product has the lowest bit of byte i as its bit 24 + i.
      unsigned bits = 0;
#pragma unroll
      for (int j = 0; j < N; j += 4) {
        uint32_t four = 0;
        memcpy(&four, stored.element + j, N < 4 ? N : 4);
        bits |= ((four & 0x01010101u) * 0x01020408u >> 24 & 15) << j;
      }
      return bits;
    }
  }
};

// max(g, 0) - |g| erfc(|g| / sqrt 2) / 2, with the logarithm of the last factor, to the base 2, by a polynomial: that
// of `gelu` in kernels/masked_geglu.py, which says how exact it is. Half the instructions of erff. The bound of x gives
// gelu(inf) = inf.
__device__ inline float gelu(float g) {
  const float x = fminf(fabsf(g), 14.0f);
  constexpr float POWER[] = {-2.8286632812112097e-08f, 8.355015221976057e-07f,   -1.0623505519263797e-05f,
                             7.395667726887855e-05f,   -0.0002695751533400262f,  -2.3314559849368905e-05f,
                             0.006977189897350794f,    -0.05246202642201864f,    -0.4592143040038446f,
                             -1.1511048584704582f,     -1.0f};
  float power = POWER[0];
#pragma unroll
  for (size_t i = 1; i < sizeof(POWER) / sizeof(float); ++i) power = fmaf(power, x, POWER[i]);
  const float positive = g < 0 ? 0 : g;  // unlike fmaxf, NaN where g is
  return fmaf(-x, exp2_flushed(power), positive);
}

template <typename T, int N, bool PACKED>
__device__ inline void patch(const Problem<T>& p) {
  const int64_t column = (int64_t(blockIdx.x) * LANES + threadIdx.x) * N;
  if (column >= p.width) return;
  const int64_t step = int64_t(gridDim.y) * WARPS * ROWS;
  for (int64_t batch = blockIdx.z; batch < p.batch; batch += gridDim.z) {
    for (int64_t first = (int64_t(blockIdx.y) * WARPS + threadIdx.y) * ROWS; first < p.tokens; first += step) {
      Group<T, N> a[ROWS], g[ROWS], value[ROWS] = {};
      Mask<N, PACKED> mask[ROWS];
      unsigned bits[ROWS];
      int64_t token[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        // The last row again, rather than a branch between loads.
        token[r] = min(first + r, p.tokens - 1);
        mask[r].load(p.mask + token[r] * p.mask_row_stride, column);
        const T* row = p.proj + batch * p.batch_stride + token[r] * p.row_stride + column;
        // Nobody reads proj again, and out is read next: it should be what stays in the cache.
        a[r].unpack(__ldcs(a[r].at(row)));
        g[r].unpack(__ldcs(g[r].at(row + p.width)));
      }
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        bits[r] = mask[r].bits(column);
        if (bits[r]) value[r].unpack(__ldg(value[r].at(p.value + token[r] * p.value_row_stride + column)));
      }
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        Group<T, N> out;
#pragma unroll
        for (int j = 0; j < N; ++j) {
          const float patched = to_float(a[r].element[j]) * gelu(to_float(g[r].element[j]));
          out.element[j] = from_float<T>(bits[r] >> j & 1 ? to_float(value[r].element[j]) : patched);
        }
        T* place = p.out + (batch * p.tokens + token[r]) * p.width + column;
        __stcg(reinterpret_cast<typename Group<T, N>::Word*>(place), out.pack());
      }
    }
  }
}

template <typename T, int N, bool PACKED>
__global__ void __launch_bounds__(LANES* WARPS, BLOCKS) masked_geglu(const Problem<T> p) {
  patch<T, N, PACKED>(p);
}

template <typename T>
int launch(Problem<T> p, bool packed, void* stream) {
  if (p.batch < 0 || p.tokens < 0 || p.width < 0) return cudaErrorInvalidValue;
  if (p.batch == 0 || p.tokens == 0 || p.width == 0) return cudaSuccess;

  // Rows that share one mask are as many tokens, which fill blocks better than as many batches of few tokens.
  if (p.tokens == 1) {
    p.row_stride = p.batch_stride;
    p.mask_row_stride = p.value_row_stride = 0;
  }
  if (p.batch == 1) p.batch_stride = p.tokens * p.row_stride;
  if (p.mask_row_stride == 0 && p.value_row_stride == 0 && p.batch_stride == p.tokens * p.row_stride) {
    p.tokens *= p.batch;
    p.batch = 1;
  }

  constexpr int N = 16 / sizeof(T);
  const auto address = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); };
  const uintptr_t elements = p.batch_stride | p.row_stride | p.value_row_stride | p.width;
  const uintptr_t bytes = address(p.proj) | address(p.value) | address(p.out) | elements * sizeof(T);
  const uintptr_t mask_bytes = packed ? 0 : address(p.mask) | p.mask_row_stride;
  const bool aligned = bytes % 16 == 0 && mask_bytes % N == 0;

  const auto blocks = [](int64_t size, int64_t block) { return (size - 1) / block + 1; };
  const int64_t columns = blocks(p.width, LANES * (aligned ? N : 1));
  if (columns > GRID_X) return cudaErrorInvalidValue;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(columns, std::min(blocks(p.tokens, WARPS * ROWS), GRID_YZ), std::min(p.batch, GRID_YZ));
  config.blockDim = dim3(LANES, WARPS);
  config.stream = static_cast<cudaStream_t>(stream);
  if (aligned) return cudaLaunchKernelEx(&config, packed ? masked_geglu<T, N, true> : masked_geglu<T, N, false>, p);
  return cudaLaunchKernelEx(&config, packed ? masked_geglu<T, 1, true> : masked_geglu<T, 1, false>, p);
}

}  // namespace

#ifdef BAKEOUT_AOT_TYPE

// The kernel alone, for a host that launches PTX itself: of contiguous tensors, with a bool mask, and arguments as
// kernels/aot.py describes them. Strides count groups of BAKEOUT_AOT_GROUP features.
extern "C" __global__ void __launch_bounds__(LANES* WARPS, BLOCKS)
    masked_geglu_aot(const BAKEOUT_AOT_TYPE* proj, const uint8_t* mask, const BAKEOUT_AOT_TYPE* value, int batches,
                     int tokens, int proj_batch, int proj_token, int mask_token, int value_token,
                     BAKEOUT_AOT_TYPE* out) {
  constexpr int64_t N = BAKEOUT_AOT_GROUP;
  patch<BAKEOUT_AOT_TYPE, N, false>({proj, proj_batch * N, proj_token * N, mask, mask_token * N, value,
                                     value_token * N, out, batches, tokens, proj_token * N / 2});
}

#else

#define ENTRY_POINT(NAME, T)                                                                                          \
  int NAME(const void* proj, int64_t batch_stride, int64_t row_stride, const void* mask, int mask_is_packed,          \
           int64_t mask_row_stride, const void* value, int64_t value_row_stride, void* out, int64_t batch,            \
           int64_t tokens, int64_t width, void* stream) {                                                             \
    const Problem<T> problem = {static_cast<const T*>(proj), batch_stride, row_stride,                                \
                                static_cast<const uint8_t*>(mask), mask_row_stride,                                   \
                                static_cast<const T*>(value), value_row_stride,                                       \
                                static_cast<T*>(out), batch, tokens, width};                                          \
    return launch(problem, mask_is_packed != 0, stream);                                                              \
  }

ENTRY_POINT(bakeout_masked_geglu_f32, float)
ENTRY_POINT(bakeout_masked_geglu_f16, Half)
ENTRY_POINT(bakeout_masked_geglu_bf16, Bfloat16)

const char* bakeout_cuda_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

#endif
