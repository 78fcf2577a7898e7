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

// The first `count` lanes from memory, zeros in the others.
template <typename Vector, typename Element>
static inline Vector load(const Element* from, int64_t count) {
  if (count >= LANES) return load<Vector>(from);
  Vector vector = {};
  memcpy(&vector, from, sizeof(Element) * count);
  return vector;
}

template <typename Vector, typename Element>
static inline void store(Element* to, Vector vector) {
  memcpy(to, &vector, sizeof(vector));
}

template <typename Vector, typename Element>
static inline void store(Element* to, Vector vector, int64_t count) {
  if (count >= LANES) return store(to, vector);
  memcpy(to, &vector, sizeof(Element) * count);
}

static inline Ints bits_of(Floats x) { return (Ints)x; }
static inline Floats largest(Floats a, Floats b) { return a > b ? a : b; }
static inline Ints largest(Ints a, Ints b) { return a > b ? a : b; }

template <typename Vector>
static inline auto sum(Vector vector) {
  auto total = vector[0];
  for (int lane = 1; lane < LANES; lane++) total += vector[lane];
  return total;
}

static inline int32_t largest(Ints vector) {
  int32_t result = vector[0];
  for (int lane = 1; lane < LANES; lane++) result = vector[lane] > result ? vector[lane] : result;
  return result;
}

static inline float largest(Floats vector) {
  float result = vector[0];
  for (int lane = 1; lane < LANES; lane++) result = vector[lane] > result ? vector[lane] : result;
  return result;
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

// e**x for x <= 0, to 2e-7 of the value; 0 below -87.
static inline Floats exp_of(Floats x) {
  Floats scaled = largest(x, floats(-87.0f)) * 1.44269504f;
  Floats shifted = scaled + ROUNDER;
  Floats part = scaled - (shifted - ROUNDER);  // in [-1/2, 1/2]
  Floats value = part * 1.33335581e-3f + 9.61812910e-3f;  // Taylor's coefficients ln(2)**n / n!, the last one higher
  value = value * part + 5.55041087e-2f;
  value = value * part + 2.40226507e-1f;
  value = value * part + 6.93147181e-1f;
  value = value * part + 1.0f;
  Ints exponent = bits_of(shifted) << 23;
  Floats result = (Floats)(bits_of(value) + exponent);
  return x > -87.0f ? result : x != x ? x : floats(0.0f);
}
