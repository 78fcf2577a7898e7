// AVX512-BF16 beside VNNI: products of pairs of bfloat16, too.
#pragma once

#define BY_VNNI
#include "avx512vnni.h"

namespace {

inline __attribute__((always_inline)) void add_half_products(const uint16_t (&x)[2], __m512i first, __m512i second,
                                                             __m512& left, __m512& right) {
  __m512i two;
  asm("vpbroadcastd %1, %0" : "=v"(two) : "m"(x));
  asm("vdpbf16ps %2, %1, %0" : "+v"(left) : "v"(two), "v"(first));
  asm("vdpbf16ps %2, %1, %0" : "+v"(right) : "v"(two), "v"(second));
}

struct Isa : ByVnni<Isa> {
  static const bool ADDS_HALF_GROUPS = true;

  template <int... I>
  static inline __attribute__((always_inline)) void half_rows(const uint16_t* tile, const uint16_t* panel,
                                                              int64_t steps, float* out, int64_t stride,
                                                              Numbers<I...> numbers) {
    __m512 left[sizeof...(I)], right[sizeof...(I)];
    half_sums_of(tile, panel, steps, left, right, numbers);
    ((_mm512_storeu_ps(out + stride * I, left[I]), _mm512_storeu_ps(out + stride * I + 16, right[I])), ...);
  }

  // A group's sums, which never leave the registers.
  template <int... I>
  static inline __attribute__((always_inline)) void half_group_rows(const uint16_t* tile, const uint16_t* panel,
                                                                    int64_t steps, const float* scale, float* totals,
                                                                    Numbers<I...> numbers) {
    __m512 left[sizeof...(I)], right[sizeof...(I)];
    half_sums_of(tile, panel, steps, left, right, numbers);
    const __m512 first = _mm512_loadu_ps(scale), second = _mm512_loadu_ps(scale + 16);
    const auto add = [](__m512 sums, __m512 scale, float* total) __attribute__((always_inline)) {
      _mm512_storeu_ps(total, _mm512_add_ps(_mm512_loadu_ps(total), _mm512_mul_ps(sums, scale)));
    };
    ((add(left[I], first, totals + PANEL * I), add(right[I], second, totals + PANEL * I + 16)), ...);
  }

 private:
  template <int count, int... I>
  static inline __attribute__((always_inline)) void half_sums_of(const uint16_t* tile, const uint16_t* panel,
                                                                 int64_t steps, __m512 (&left)[count],
                                                                 __m512 (&right)[count], Numbers<I...>) {
    const int64_t halves = GROUP / 2;
    ((left[I] = right[I] = _mm512_setzero_ps()), ...);
    for (int64_t step = 0; step < steps; step += 4, tile += halves * count) {
#pragma GCC unroll 4
      for (int64_t two = 0; two < halves; two += 2, panel += 2 * PANEL) {
        const __m512i first = _mm512_loadu_si512(panel), second = _mm512_loadu_si512(panel + 32);
        (add_half_products(*(const uint16_t (*)[2])(tile + halves * I + two), first, second, left[I], right[I]), ...);
      }
    }
  }
};

}  // namespace
