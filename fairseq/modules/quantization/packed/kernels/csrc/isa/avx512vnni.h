// AVX512-VNNI: products of bytes in vectors of 16 lanes.
#pragma once

#include "registers.h"

namespace {

// All sums of a tile stay in registers. As intrinsics over an array gcc 12 keeps them on the stack, at a third of the
// speed; as one instruction of assembly each, over an array that only constants index, it does not.
inline __attribute__((always_inline)) void add_products(const uint8_t (&x)[4], __m512i first, __m512i second,
                                                        __m512i& left, __m512i& right) {
  __m512i four;
  asm("vpbroadcastd %1, %0" : "=v"(four) : "m"(x));
  asm("vpdpbusd %2, %1, %0" : "+v"(left) : "v"(four), "v"(first));
  asm("vpdpbusd %2, %1, %0" : "+v"(right) : "v"(four), "v"(second));
}

inline __attribute__((always_inline)) void add_float_products(const float& x, __m512 first, __m512 second, __m512& left,
                                                              __m512& right) {
  __m512 one;
  asm("vbroadcastss %1, %0" : "=v"(one) : "m"(x));
  asm("vfmadd231ps %2, %1, %0" : "+v"(left) : "v"(one), "v"(first));
  asm("vfmadd231ps %2, %1, %0" : "+v"(right) : "v"(one), "v"(second));
}

template <typename Own>
struct ByVnni : Registers<Own> {
  using Registers<Own>::GROUP;
  using Registers<Own>::FLOATS;
  static const bool ADDS_GROUPS = true, FAST_FLOATS = true;

  template <int... I>
  static inline __attribute__((always_inline)) void rows(const uint8_t* tile, const uint8_t* panel, int64_t steps,
                                                         int32_t* sums, Numbers<I...> numbers) {
    const __m512i nothing = _mm512_setzero_si512();
    __m512i left[sizeof...(I)], right[sizeof...(I)];
    sums_of(tile, panel, steps, nothing, nothing, left, right, numbers);
    ((_mm512_storeu_si512(sums + PANEL * I, left[I]), _mm512_storeu_si512(sums + PANEL * I + 16, right[I])), ...);
  }

  template <int... I>
  static inline __attribute__((always_inline)) void float_rows(const float* tile, const float* panel, int64_t steps,
                                                               float* out, Numbers<I...>) {
    __m512 left[sizeof...(I)], right[sizeof...(I)];
    ((left[I] = right[I] = _mm512_setzero_ps()), ...);
    for (int64_t step = 0; step < steps; step += FLOATS, tile += FLOATS * sizeof...(I)) {
#pragma GCC unroll 4
      for (int64_t k = 0; k < FLOATS; k++, panel += PANEL) {
        const __m512 first = _mm512_loadu_ps(panel), second = _mm512_loadu_ps(panel + 16);
        (add_float_products(tile[FLOATS * I + k], first, second, left[I], right[I]), ...);
      }
    }
    ((_mm512_storeu_ps(out + PANEL * I, left[I]), _mm512_storeu_ps(out + PANEL * I + 16, right[I])), ...);
  }

  // A group's integer sums, which never leave the registers: begun less their offset, so that only the zeros are left
  // to be taken off, which a fused multiplication does as exactly as two operations.
  template <int... I>
  static inline __attribute__((always_inline)) void group_rows(const uint8_t* tile, const uint8_t* panel, int64_t steps,
                                                               const Group& group, const int32_t* row_sums,
                                                               int64_t stride, float* totals, Numbers<I...> numbers) {
    const __m512i nothing = _mm512_setzero_si512();
    __m512i left[sizeof...(I)], right[sizeof...(I)];
    sums_of(tile, panel, steps, _mm512_sub_epi32(nothing, _mm512_cvtps_epi32(_mm512_loadu_ps(group.offset))),
            _mm512_sub_epi32(nothing, _mm512_cvtps_epi32(_mm512_loadu_ps(group.offset + 16))), left, right, numbers);
    const __m512 zero[2] = {_mm512_loadu_ps(group.zero), _mm512_loadu_ps(group.zero + 16)};
    const __m512 scale[2] = {_mm512_loadu_ps(group.scale), _mm512_loadu_ps(group.scale + 16)};
    const auto add = [](__m512i sums, __m512 zero, __m512 row_sum, __m512 scale, float* total)
                         __attribute__((always_inline)) {
      const __m512 term = _mm512_mul_ps(_mm512_fnmadd_ps(zero, row_sum, _mm512_cvtepi32_ps(sums)), scale);
      _mm512_storeu_ps(total, _mm512_add_ps(_mm512_loadu_ps(total), term));
    };
    const auto both = [&](int64_t row, __m512i first, __m512i second) __attribute__((always_inline)) {
      const __m512 row_sum = _mm512_cvtepi32_ps(_mm512_set1_epi32(row_sums[stride * row]));
      add(first, zero[0], row_sum, scale[0], totals + PANEL * row);
      add(second, zero[1], row_sum, scale[1], totals + PANEL * row + 16);
    };
    (both(I, left[I], right[I]), ...);
  }

 private:
  template <int count, int... I>
  static inline __attribute__((always_inline)) void sums_of(const uint8_t* tile, const uint8_t* panel, int64_t steps,
                                                            __m512i left_start, __m512i right_start,
                                                            __m512i (&left)[count], __m512i (&right)[count],
                                                            Numbers<I...>) {
    ((left[I] = left_start, right[I] = right_start), ...);
    for (int64_t step = 0; step < steps; step += 4, tile += GROUP * count) {
#pragma GCC unroll 4
      for (int64_t four = 0; four < GROUP; four += 4, panel += 4 * PANEL) {
        const __m512i first = _mm512_loadu_si512(panel), second = _mm512_loadu_si512(panel + 64);
        (add_products(*(const uint8_t (*)[4])(tile + GROUP * I + four), first, second, left[I], right[I]), ...);
      }
    }
  }
};

#ifndef BY_VNNI  // of the files that build upon this one
struct Isa : ByVnni<Isa> {};
#endif

}  // namespace
