// Vectors of the width that the instruction set of the including file has, and the few functions on them.
//
// Written with the vector extensions of gcc and clang, so that one source serves every instruction set. Everything is
// static: each file that includes this one is compiled for another instruction set, and none may use another's code.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
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
static inline Floats largest(Floats a, Floats b) { return a > b ? a : b; }
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
  const Four quarter = combine(__builtin_shufflevector(half, half, 0, 1, 2, 3), __builtin_shufflevector(half, half, 4, 5, 6, 7));
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

// Whether a lane of x is above the limit.
static inline bool any_above(Floats x, float limit) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(limit), _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)x, _mm256_set1_ps(limit), _CMP_GT_OQ)) != 0;
#else
  for (int lane = 0; lane < LANES; lane++)
    if (x[lane] > limit) return true;
  return false;
#endif
}

// 1.5 * 2**23: what is added to it comes out rounded half to even, as an integer in the low bits of the sum.
static const float ROUNDER = 12582912.0f;

// e**x for x <= 0, to 3e-7 of the value; below -87 that of -87, 2e-38. 2**f, f in [-1/2, 1/2], is a polynomial of degree
// 5, the interpolation at Chebyshev's nodes.
static inline Floats exp_of(Floats x) {
  const Floats scaled = (x < -87.0f ? floats(-87.0f) : x) * 1.44269504f;
  const Floats shifted = scaled + ROUNDER;
  const Floats f = scaled - (shifted - ROUNDER), square = f * f;
  const Floats low = f * 6.931471880e-01f + 1.000000075f, middle = f * 5.550357114e-02f + 2.402210749e-01f;
  const Floats high = f * 1.339086336e-03f + 9.676031918e-03f;
  const Floats value = (high * square + middle) * square + low;
  const Floats result = (Floats)(bits_of(value) + (bits_of(shifted) << 23));
  return x != x ? x : result;
}

}  // namespace
