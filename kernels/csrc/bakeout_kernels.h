// The plain C entry points of the CUDA kernels, for PyTorch (ctypes), ONNX Runtime and TensorRT alike.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
#define BAKEOUT_EXPORT extern "C" __attribute__((visibility("default")))
#else
#define BAKEOUT_EXPORT
#endif

// where(M, v, a * gelu(g)) for each of batch * tokens rows, as `masked_geglu` of kernels/reference.py defines it.
//
//   proj    [batch, tokens, 2 * width]: a, then g. Strides in elements; the last is 1.
//   mask    M: one bool a feature, or packed: bit j of byte i, from the lowest, is feature 8 * i + j. Stride in bytes
//           from one token to the next; 0 is one mask for all tokens.
//   value   v, of proj's type. Stride in elements from one token to the next, or 0. Only read in groups of 16 bytes of
//           which a feature is masked.
//   out     [batch, tokens, width], contiguous.
//   stream  cudaStream_t of the current device, on which all of them lie.
//
// Any alignment and width will do; 16 bytes are read and written at a time where the pointers, the strides and the
// width are whole multiples (of a bool mask: multiples of as many bytes as 16 bytes have features). Returns a
// cudaError_t, of the arguments and the launch; the kernel runs later.
BAKEOUT_EXPORT int bakeout_masked_geglu_f32(
    const void* proj, int64_t batch_stride, int64_t row_stride, const void* mask, int mask_is_packed,
    int64_t mask_row_stride, const void* value, int64_t value_row_stride, void* out, int64_t batch, int64_t tokens,
    int64_t width, void* stream);
BAKEOUT_EXPORT int bakeout_masked_geglu_f16(
    const void* proj, int64_t batch_stride, int64_t row_stride, const void* mask, int mask_is_packed,
    int64_t mask_row_stride, const void* value, int64_t value_row_stride, void* out, int64_t batch, int64_t tokens,
    int64_t width, void* stream);
BAKEOUT_EXPORT int bakeout_masked_geglu_bf16(
    const void* proj, int64_t batch_stride, int64_t row_stride, const void* mask, int mask_is_packed,
    int64_t mask_row_stride, const void* value, int64_t value_row_stride, void* out, int64_t batch, int64_t tokens,
    int64_t width, void* stream);

// What an error of these says, in English.
BAKEOUT_EXPORT const char* bakeout_cuda_error(int error);
