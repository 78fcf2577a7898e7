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

template <typename Own>
struct ByVnni : Registers<Own> {
  using Registers<Own>::GROUP;

  template <int... I>
  static inline __attribute__((always_inline)) void rows(const uint8_t* tile, const uint8_t* panel, int64_t steps,
                                                         int32_t* sums, Numbers<I...>) {
    const int count = sizeof...(I);
    __m512i left[count], right[count];
    ((left[I] = right[I] = _mm512_setzero_si512()), ...);
    for (int64_t step = 0; step < steps; step += 4, tile += GROUP * count) {
#pragma GCC unroll 4
      for (int64_t four = 0; four < GROUP; four += 4, panel += 4 * PANEL) {
        const __m512i first = _mm512_loadu_si512(panel), second = _mm512_loadu_si512(panel + 64);
        (add_products(*(const uint8_t (*)[4])(tile + GROUP * I + four), first, second, left[I], right[I]), ...);
      }
    }
    ((_mm512_storeu_si512(sums + PANEL * I, left[I]), _mm512_storeu_si512(sums + PANEL * I + 16, right[I])), ...);
  }
};

#ifndef BY_VNNI  // of the files that build upon this one
struct Isa : ByVnni<Isa> {};
#endif

}  // namespace
