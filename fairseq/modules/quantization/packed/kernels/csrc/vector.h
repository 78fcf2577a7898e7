// Vectors of the width that the instruction set of the including file has, and the few functions on them.
//
// Written with the vector extensions of gcc and clang, so that one source serves every instruction set. Everything is
// static: each file that includes this one is compiled for another instruction set, and none may use another's code.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {  // each instruction set has its own

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

static inline Floats floats(float value) { return value - (Floats){}; }
static inline Ints ints(int32_t value) { return value - (Ints){}; }

template <typename Vector, typename Element>
static inline Vector load(const Element* from) {
  Vector vector;
  memcpy(&vector, from, sizeof(vector));
  return vector;
}

struct All {};  // in the place of a count: all lanes

template <typename Vector, typename Element>
static inline Vector load(const Element* from, All) {
  return load<Vector>(from);
}

template <typename Vector, typename Element>
static inline void store(Element* to, Vector vector, All) {
  memcpy(to, &vector, sizeof(vector));
}

// visit(i, All) for every whole vector of `count` elements, then visit(i, rest) for the rest.
template <typename Visit>
static inline __attribute__((always_inline)) void each(int64_t count, Visit visit) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) visit(i, All());
  if (i < count) visit(i, count - i);
}

// Sums are of 64 lanes on every processor, whatever its width, so that their bits are the same: SPLIT vectors.
const int SUMMED = 64, SPLIT = SUMMED / LANES;

// As `each`, with the part of the 64 lanes as a third argument.
template <typename Visit>
static inline __attribute__((always_inline)) void each_part(int64_t count, Visit visit) {
  int64_t i = 0;
  for (; i + SUMMED <= count; i += SUMMED) {
#pragma GCC unroll 16
    for (int part = 0; part < SPLIT; part++) visit(i + part * LANES, All(), part);
  }
#pragma GCC unroll 16
  for (int part = 0; part < SPLIT; part++) {
    const int64_t left = count - i - part * LANES;
    if (left >= LANES) visit(i + part * LANES, All(), part);
    else if (left > 0) visit(i + part * LANES, left, part);
  }
}

// Parts of a vector, apart, so that whole ones need not go through memory.
template <typename Vector, typename Element>
static __attribute__((noinline, cold)) Vector load_part(const Element* from, int64_t count) {
  Vector vector = {};
  memcpy(&vector, from, sizeof(Element) * count);
  return vector;
}

template <typename Vector, typename Element>
static __attribute__((noinline, cold)) void store_part(Element* to, Vector vector, int64_t count) {
  memcpy(to, &vector, sizeof(Element) * count);
}

// The first `count` lanes from memory, zeros in the others.
template <typename Vector, typename Element>
static inline Vector load(const Element* from, int64_t count) {
  return __builtin_expect(count >= LANES, 1) ? load<Vector>(from) : load_part<Vector>(from, count);
}

template <typename Vector, typename Element>
static inline void store(Element* to, Vector vector) {
  memcpy(to, &vector, sizeof(vector));
}

template <typename Vector, typename Element>
static inline void store(Element* to, Vector vector, int64_t count) {
  if (__builtin_expect(count >= LANES, 1)) store(to, vector);
  else store_part(to, vector, count);
}

static inline Ints bits_of(Floats x) { return (Ints)x; }

// The lowest byte of each.
static inline Bytes low_bytes(Words words) {
#if defined(__AVX512F__)
  return (Bytes)_mm512_cvtepi32_epi8((__m512i)words);
#else
  return __builtin_convertvector(words & 0xff, Bytes);
#endif
}

static inline Ints largest(Ints a, Ints b) { return a > b ? a : b; }

// All lanes combined, halves with halves, in a number of steps that is the logarithm of theirs.
template <typename Vector, typename Combine>
static inline auto reduce(Vector vector, Combine combine) {
  typedef decltype(vector[0] + vector[0]) Element;
  typedef Element Four __attribute__((vector_size(16)));
#if LANES == 16
  typedef Element Eight __attribute__((vector_size(32)));
  const Eight half = combine(__builtin_shufflevector(vector, vector, 0, 1, 2, 3, 4, 5, 6, 7),
                             __builtin_shufflevector(vector, vector, 8, 9, 10, 11, 12, 13, 14, 15));
#else
  const auto half = vector;
#endif
#if LANES >= 8
  const Four quarter =
      combine(__builtin_shufflevector(half, half, 0, 1, 2, 3), __builtin_shufflevector(half, half, 4, 5, 6, 7));
#else
  const Four quarter = half;
#endif
  const Four two = combine(quarter, __builtin_shufflevector(quarter, quarter, 2, 3, 0, 1));
  const Four one = combine(two, __builtin_shufflevector(two, two, 1, 0, 3, 2));
  return (Element)one[0];
}

static inline float sum(Floats vector) {
  return reduce(vector, [](auto a, auto b) { return a + b; });
}
static inline int32_t sum(Words vector) {
  return (int32_t)reduce(vector, [](auto a, auto b) { return a + b; });
}
static inline int32_t largest(Ints vector) {
  return reduce(vector, [](auto a, auto b) { return a > b ? a : b; });
}
static inline float largest(Floats vector) {
  return reduce(vector, [](auto a, auto b) { return a > b ? a : b; });
}

// The sum of the 64 lanes, halves with halves: in an order that does not depend on the width.
static inline float total_of(Floats (&parts)[SPLIT]) {
  for (int half = SPLIT / 2; half; half /= 2)
    for (int part = 0; part < half; part++) parts[part] += parts[part + half];
  return sum(parts[0]);
}

// a * b + c, rounded once on every processor.
static inline Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
  return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  // The product is exact in double; their sum is rounded to odd, so that rounding it to float is the only rounding.
  typedef double Doubles __attribute__((vector_size(8 * LANES)));
  typedef int64_t Longs __attribute__((vector_size(8 * LANES)));
  const Doubles product = __builtin_convertvector(a, Doubles) * __builtin_convertvector(b, Doubles);
  const Doubles addend = __builtin_convertvector(c, Doubles), sum = product + addend;
  const Doubles from_product = sum - addend, from_addend = sum - from_product;
  const Doubles error = (product - from_product) + (addend - from_addend);
  const Longs bits = (Longs)sum;
  const Longs between = (error != 0.0) & (error == error) & ((bits & 1) == 0);  // not for Inf and NaN
  const Longs nearer = ((Longs)error ^ bits) < 0;                               // zero lies on that side
  return __builtin_convertvector((Doubles)(bits + (between & (nearer | 1))), Floats);
#endif
}

static inline Floats fma(Floats a, Floats b, float c) { return fma(a, b, floats(c)); }
static inline Floats fma(Floats a, float b, float c) { return fma(a, floats(b), floats(c)); }

// Rounds half to even to bfloat16; NaN stays NaN.
static inline Halves bfloat16(Floats x) {
#if defined(__AVX512BF16__)
  return (Halves)_mm512_cvtneps_pbh((__m512)x);
#else
  const Words bits = (Words)x;
  const Words up = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(x != x ? (bits >> 16) | 0x40 : up, Halves);
#endif
}

// The entries of a table of 16 that the lowest 4 bits of each lane name.
static inline Floats entries(const float (&table)[16], Ints which) {
#if defined(__AVX512F__)
  return (Floats)_mm512_permutexvar_ps((__m512i)which, _mm512_loadu_ps(table));
#elif defined(__AVX2__)
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)which);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), (__m256i)which);
  return (Floats)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32((__m256i)which, 28)));
#elif defined(__aarch64__)
  const uint8x16x4_t bytes = vld1q_u8_x4((const uint8_t*)table);
  const Words first = ((Words)which & 15) * 0x04040404 + 0x03020100;
  return (Floats)vqtbl4q_u8(bytes, (uint8x16_t)first);
#else
  Floats result;
  for (int lane = 0; lane < LANES; lane++) result[lane] = table[which[lane] & 15];
  return result;
#endif
}

// Whether a lane of x is above the limit.
static inline bool any_above(Floats x, float limit) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(limit), _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)x, _mm256_set1_ps(limit), _CMP_GT_OQ)) != 0;
#elif defined(__ARM_NEON) && defined(__aarch64__)
  return vmaxvq_u32((uint32x4_t)(x > limit)) != 0;
#else
  for (int lane = 0; lane < LANES; lane++)
    if (x[lane] > limit) return true;
  return false;
#endif
}

// 1.5 * 2**23: what is added to it comes out rounded half to even, as an integer in the low bits of the sum.
static const float ROUNDER = 12582912.0f;

// The larger of two numbers; the second one where one of them is NaN.
static inline Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// The smaller of two numbers; the second one where one of them is NaN.
static inline Floats smaller(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Floats)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

// value * 2**power, for a power that is an integer; NaN where that is NaN.
static inline Floats scaled(Floats value, Floats power, Floats shifted) {
#if defined(__AVX512F__)
  (void)shifted;
  return (Floats)_mm512_scalef_ps((__m512)value, (__m512)power);
#else
  const Floats result = (Floats)(bits_of(value) + (bits_of(shifted) << 23));  // `shifted` has the power in its low bits
  return power != power ? power : result;
#endif
}

// 2**x for x <= 0, to 3e-7 of the value; below -125 that of -125, 2e-38. 2**f, f in [-1/2, 1/2], is a polynomial of
// degree 5, the interpolation at Chebyshev's nodes.
static inline Floats power_of_two(Floats x) {
  const Floats from = larger(floats(-125.0f), x);
  const Floats shifted = from + ROUNDER, whole = shifted - ROUNDER;
  const Floats f = from - whole, square = f * f;
  const Floats low = fma(f, 6.931471880e-01f, 1.000000075f), middle = fma(f, 5.550357114e-02f, 2.402210749e-01f);
  const Floats high = fma(f, 1.339086336e-03f, 9.676031918e-03f);
  return scaled(fma(fma(high, square, middle), square, low), whole, shifted);
}

// The same to 7.5e-5 of the value, a fiftieth of what rounding it to bfloat16 costs. 2**f, f in [0, 1], is the
// polynomial of degree 3 with the smallest relative error.
static inline Floats power_of_two_to_bfloat16(Floats x) {
  const Floats from = larger(floats(-125.0f), x);
#if defined(__AVX512F__)
  const Floats whole = (Floats)_mm512_roundscale_ps((__m512)from, _MM_FROUND_TO_NEG_INF);
#else
  const Floats nearest = (from + ROUNDER) - ROUNDER, whole = nearest > from ? nearest - 1.0f : nearest;
#endif
  const Floats f = from - whole;
  return scaled(fma(fma(fma(f, 7.802452147e-02f, 2.260671556e-01f), f, 6.958335638e-01f), f, 9.999251962e-01f), whole,
                whole + ROUNDER);
}

const float LOG2_E = 1.44269504f;

// e**x for x <= 0.
static inline Floats exp_of(Floats x) { return power_of_two(x * LOG2_E); }

}  // namespace
