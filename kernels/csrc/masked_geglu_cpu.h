// The plain C entry points of the CPU kernels.
#pragma once

#include <stdint.h>

#include "bakeout_kernels.h"

// The instruction sets that there is code for, each a superset of the one before; on other processors than x86-64 only the first.
enum BakeoutIsa { BAKEOUT_PORTABLE = 0, BAKEOUT_AVX2 = 1, BAKEOUT_AVX512 = 2 };

// The widest of them that this processor has.
BAKEOUT_EXPORT int bakeout_cpu_isa();

// Packs a mask as kernels/packing.py does: bit j of byte i, from the lowest, is feature 8 * i + j.
//
//   mask    [rows, width], a byte a feature, set unless it is zero.
//   bits    [rows, ceil(width / 8)]; bits past the last feature are zero.
BAKEOUT_EXPORT void bakeout_pack_mask(const uint8_t* mask, uint8_t* bits, int64_t rows, int64_t width);

// where(M, v, a * gelu(g)) for the rows from `first` up to `last`, as `masked_geglu` of kernels/reference.py defines it.
//
//   proj    [rows, 2 * width]: a, then g.
//   bits    M, packed: [tokens, ceil(width / 8)]; row r is patched as token r % tokens.
//   value   v, of proj's type, [tokens, width]. Read only where a bit is set.
//   out     [rows, width]; must not overlap the others.
//   isa     the widest of BakeoutIsa that may be used; what the processor lacks is not.
//
// Everything is contiguous, of any alignment. Half precision is computed in fp32 and rounded once, to nearest even.
BAKEOUT_EXPORT void bakeout_masked_geglu_cpu_f32(const float* proj, const uint8_t* bits, const float* value, float* out,
                                                 int64_t tokens, int64_t width, int64_t first, int64_t last, int isa);
BAKEOUT_EXPORT void bakeout_masked_geglu_cpu_f16(const uint16_t* proj, const uint8_t* bits, const uint16_t* value,
                                                 uint16_t* out, int64_t tokens, int64_t width, int64_t first, int64_t last,
                                                 int isa);
BAKEOUT_EXPORT void bakeout_masked_geglu_cpu_bf16(const uint16_t* proj, const uint8_t* bits, const uint16_t* value,
                                                  uint16_t* out, int64_t tokens, int64_t width, int64_t first, int64_t last,
                                                  int isa);
