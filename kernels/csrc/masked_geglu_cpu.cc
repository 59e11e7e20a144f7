// masked_geglu on the CPU. GCC or Clang, little-endian; the loops over a group of features are written for their vectoriser.

#include "masked_geglu_cpu.h"

#include <string.h>

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "a packed mask is read eight bytes at a time");

#define INLINE inline __attribute__((always_inline))

namespace {

// As many features as one word of a packed mask has bits.
constexpr int kGroup = 64;

template <typename To, typename From>
INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "another size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// Choices are made by bits, because compilers vectorise no branches, and no comparisons of floats, which may trap.

// All bits where a < b, as signed numbers whose difference is one too; else none.
INLINE uint32_t below(uint32_t a, uint32_t b) { return static_cast<uint32_t>(static_cast<int32_t>(a - b) >> 31); }

INLINE uint32_t choose(uint32_t where, uint32_t there, uint32_t elsewhere) { return (there & where) | (elsewhere & ~where); }

// gelu(g) = g Phi(g), with Phi(-x) = 2^-q(x) = erfc(x / sqrt 2) / 2 for x >= 0, and Phi(x) = 1 - Phi(-x).
//
// q on [0, 6.5] and 2^f on [-1/2, 1/2] are polynomials fitted to scipy.special.log_ndtr and to 2^f in fp64, by least squares
// reweighted until the largest error is least: 2.3e-8 of max(1, q), and 1.9e-9. Beyond, Phi(-x) < 5e-11 is taken for zero, as
// 1 + erf(g / sqrt 2) is in fp32. In all, gelu(g) is off by less than 2^-23 |g|.
INLINE float gelu(float g) {
  constexpr uint32_t kEnd = 0x40d00000u;  // 6.5, as bits
  constexpr float kShift = 0x1.8p23f;  // a float of that size has no fraction: adding it rounds
  const uint32_t size = bit_cast<uint32_t>(g) & 0x7fffffffu;
  const float x = bit_cast<float>(size);
  float q = -0x1.27b7a6p-29f;
  q = q * x + 0x1.685f5ep-24f;
  q = q * x - 0x1.8312bep-20f;
  q = q * x + 0x1.de53acp-17f;
  q = q * x - 0x1.6cde76p-14f;
  q = q * x + 0x1.38caf6p-12f;
  q = q * x - 0x1.f63fb8p-17f;
  q = q * x - 0x1.c758d6p-8f;
  q = q * x + 0x1.adad6ep-5f;
  q = q * x + 0x1.d63caep-2f;
  q = q * x + 0x1.26aecep0f;
  q = q * x + 1.0f;
  const float shifted = kShift - q;
  const float f = (kShift - shifted) - q;
  float power = 0x1.41d332p-13f;
  power = power * f + 0x1.5f456ap-10f;
  power = power * f + 0x1.3b2dbcp-7f;
  power = power * f + 0x1.c6aed4p-5f;
  power = power * f + 0x1.ebfbdap-3f;
  power = power * f + 0x1.62e430p-1f;
  power = power * f + 1.0f;
  // The low bits of `shifted` are the whole part of -q, which goes into the exponent.
  const float whole = bit_cast<float>((bit_cast<uint32_t>(shifted) << 23) + 0x3f800000u);
  const float product = power * whole;
  const float lower = bit_cast<float>(choose(below(kEnd, size), 0u, bit_cast<uint32_t>(product)));
  const uint32_t upper = bit_cast<uint32_t>(1.0f - lower);
  return g * bit_cast<float>(choose(below(bit_cast<uint32_t>(g), 0u), bit_cast<uint32_t>(lower), upper));
}

struct Float32 {
  using Stored = float;
  static INLINE float load(float stored) { return stored; }
  static INLINE float store(float number) { return number; }
};

struct Float16 {
  using Stored = uint16_t;
  static INLINE float load(uint16_t stored) {
    const uint32_t sign = (stored & 0x8000u) << 16;
    const uint32_t size = stored & 0x7fffu;
    const uint32_t finite = bit_cast<uint32_t>(bit_cast<float>(size << 13) * 0x1p112f);  // the exponent's other bias
    return bit_cast<float>(sign | finite | (below(0x7bffu, size) & 0x7f800000u));
  }
  static INLINE uint16_t store(float number) {
    const uint32_t bits = bit_cast<uint32_t>(number);
    const uint32_t size = bits & 0x7fffffffu;
    const uint32_t normal = (size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13;
    const uint32_t denormal = bit_cast<uint32_t>(bit_cast<float>(size) + 0.5f) - 0x3f000000u;
    uint32_t rounded = choose(below(size, 0x38800000u), denormal, normal);
    rounded = choose(below(0x477fefffu, size), 0x7c00u, rounded);
    rounded = choose(below(0x7f800000u, size), 0x7e00u, rounded);
    return static_cast<uint16_t>(((bits >> 16) & 0x8000u) | rounded);
  }
};

struct BFloat16 {
  using Stored = uint16_t;
  static INLINE float load(uint16_t stored) { return bit_cast<float>(static_cast<uint32_t>(stored) << 16); }
  static INLINE uint16_t store(float number) {
    const uint32_t bits = bit_cast<uint32_t>(number);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const uint32_t nan = (bits >> 16) | 0x40u;
    return static_cast<uint16_t>(choose(below(0x7f800000u, bits & 0x7fffffffu), nan, rounded));
  }
};

template <typename Float>
struct Operation {
  using Stored = typename Float::Stored;

  const Stored* proj;
  const uint8_t* bits;
  const Stored* value;
  Stored* out;
  int64_t tokens;
  int64_t width;

  static INLINE void geglu(const Stored* __restrict a, const Stored* __restrict g, Stored* __restrict out) {
    for (int j = 0; j < kGroup; ++j) out[j] = Float::store(Float::load(a[j]) * gelu(Float::load(g[j])));
  }

  // The features from `start` on of a row, as many as a group has or as are left.
  INLINE void group(int64_t row, int64_t start) const {
    const Stored* a = proj + row * 2 * width + start;
    Stored* to = out + row * width + start;
    const int64_t token = row % tokens;
    const Stored* constants = value + token * width + start;
    const int64_t left = width - start;
    const int count = left < kGroup ? static_cast<int>(left) : kGroup;
    const uint64_t all = ~uint64_t{0} >> (kGroup - count);
    uint64_t set = 0;
    memcpy(&set, bits + token * ((width + 7) / 8) + start / 8, count == kGroup ? sizeof set : (count + 7) / 8);
    set &= all;
    if (set == all) {
      memcpy(to, constants, count * sizeof(Stored));
      return;
    }
    if (count == kGroup) {
      geglu(a, a + width, to);
    } else {
      Stored padded[3][kGroup] = {};
      memcpy(padded[0], a, count * sizeof(Stored));
      memcpy(padded[1], a + width, count * sizeof(Stored));
      geglu(padded[0], padded[1], padded[2]);
      memcpy(to, padded[2], count * sizeof(Stored));
    }
    for (; set != 0; set &= set - 1) {
      const int place = __builtin_ctzll(set);
      to[place] = constants[place];
    }
  }

  INLINE void rows(int64_t first, int64_t last) const {
    for (int64_t row = first; row < last; ++row)
      for (int64_t start = 0; start < width; start += kGroup) group(row, start);
  }
};

#ifdef __x86_64__
template <typename Float>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))) void rows_avx512(Operation<Float> it, int64_t first,
                                                                                       int64_t last) {
  it.rows(first, last);
}

template <typename Float>
__attribute__((target("avx2,fma"))) void rows_avx2(Operation<Float> it, int64_t first, int64_t last) {
  it.rows(first, last);
}
#endif

template <typename Float>
void rows(Operation<Float> it, int64_t first, int64_t last, int isa) {
#ifdef __x86_64__
  const int best = bakeout_cpu_isa();
  switch (isa < best ? isa : best) {
    case BAKEOUT_AVX512:
      return rows_avx512(it, first, last);
    case BAKEOUT_AVX2:
      return rows_avx2(it, first, last);
    default:
      break;
  }
#endif
  it.rows(first, last);
}

}  // namespace

int bakeout_cpu_isa() {
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return wide ? BAKEOUT_AVX512 : BAKEOUT_AVX2;
  }
#endif
  return BAKEOUT_PORTABLE;
}

void bakeout_pack_mask(const uint8_t* mask, uint8_t* bits, int64_t rows, int64_t width) {
  if (width == 0) return;  // of which a shape may have any number of rows
  for (int64_t row = 0; row < rows; ++row, mask += width)
    for (int64_t start = 0; start < width; start += 8) {
      uint8_t byte = 0;
      for (int64_t j = start; j < width && j < start + 8; ++j) byte |= static_cast<uint8_t>((mask[j] != 0) << (j - start));
      *bits++ = byte;
    }
}

void bakeout_masked_geglu_cpu_f32(const float* proj, const uint8_t* bits, const float* value, float* out, int64_t tokens,
                                  int64_t width, int64_t first, int64_t last, int isa) {
  rows(Operation<Float32>{proj, bits, value, out, tokens, width}, first, last, isa);
}

void bakeout_masked_geglu_cpu_f16(const uint16_t* proj, const uint8_t* bits, const uint16_t* value, uint16_t* out,
                                  int64_t tokens, int64_t width, int64_t first, int64_t last, int isa) {
  rows(Operation<Float16>{proj, bits, value, out, tokens, width}, first, last, isa);
}

void bakeout_masked_geglu_cpu_bf16(const uint16_t* proj, const uint8_t* bits, const uint16_t* value, uint16_t* out,
                                   int64_t tokens, int64_t width, int64_t first, int64_t last, int isa) {
  rows(Operation<BFloat16>{proj, bits, value, out, tokens, width}, first, last, isa);
}
