// AVX2: products of bytes by way of 16 bits, since its own instruction for bytes saturates at them; with codes from -15
// to 15 it does not.
#pragma once

#include "registers.h"

namespace {

struct Isa : Registers<Isa> {
  static const bool FAST_NARROW = true;

  // Numbers and codes are widened to 16 bits.
  template <int... I>
  static inline __attribute__((always_inline)) void rows(const uint8_t* tile, const uint8_t* panel, int64_t steps,
                                                         int32_t* sums, Numbers<I...>) {
    const int count = sizeof...(I);
    in_pieces<count, LANES, GROUP, int16_t>(steps, [&](int64_t i) {
      return _mm256_cvtepu8_epi16(load<__m128i>(tile + GROUP * i));
    }, [&](const int16_t* wide, int64_t step, int64_t groups, int64_t column, int64_t first, auto some) {
      some_rows<count>(wide, panel + 4 * (PANEL * step + column), groups, sums + PANEL * first + column, step > 0,
                       some);
    });
  }

  // Codes from -15 to 15: the sum of two products is up to 7650, and those of 16 inputs fit 16 bits.
  static void narrow_product(const uint8_t* tile, const uint8_t* panel, int64_t rows, int64_t steps, int32_t* sums) {
    with_numbers(rows, [&](auto numbers) { narrow_rows(tile, panel, steps, sums, numbers); });
  }

 private:
  // Rows of a tile of `count`. A vector of sums is of 4 outputs: of each, the first two of four inputs and the others.
  template <int count, int... I>
  static __attribute__((noinline)) void some_rows(const int16_t* x, const uint8_t* panel, int64_t groups, int32_t* sums,
                                                  bool go_on, Numbers<I...>) {
    __m256i left[sizeof...(I)], right[sizeof...(I)];
    ((left[I] = right[I] = _mm256_setzero_si256()), ...);
    for (int64_t group = 0; group < groups; group++, x += GROUP * count) {
#pragma GCC unroll 4
      for (int64_t four = 0; four < GROUP; four += 4, panel += 4 * PANEL) {
        const __m256i first = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)panel)),
                      second = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)panel + 1));
        (add(x + GROUP * I + four, first, second, left[I], right[I]), ...);
      }
    }
    (put(left[I], right[I], sums + PANEL * I, go_on), ...);
  }

  static inline __attribute__((always_inline)) void add(const int16_t* x, __m256i first, __m256i second, __m256i& left,
                                                        __m256i& right) {
    int64_t bits;
    memcpy(&bits, x, 8);
    const __m256i four = _mm256_set1_epi64x(bits);
    left = _mm256_add_epi32(left, _mm256_madd_epi16(four, first));
    right = _mm256_add_epi32(right, _mm256_madd_epi16(four, second));
    asm("" : "+x"(left), "+x"(right));  // or gcc adds up several steps first, for which there are no registers
  }

  static inline void put(__m256i left, __m256i right, int32_t* sums, bool go_on) {
    Ints total = (Ints)_mm256_permute4x64_epi64(_mm256_hadd_epi32(left, right), 0xd8);
    if (go_on) total += load<Ints>(sums);
    store(sums, total);
  }

  template <int... I>
  static __attribute__((noinline)) void narrow_rows(const uint8_t* tile, const uint8_t* panel, int64_t steps,
                                                    int32_t* sums, Numbers<I...>) {
    for (int64_t column = 0; column < PANEL; column += LANES)
      in_two<sizeof...(I)>([&](auto some, int64_t first) {
        some_narrow_rows<sizeof...(I)>(tile + GROUP * first, panel + 4 * column, steps, sums + PANEL * first + column,
                                       some);
      });
  }

  template <int count, int... I>
  static inline __attribute__((always_inline)) void some_narrow_rows(const uint8_t* x, const uint8_t* panel,
                                                                     int64_t steps, int32_t* sums, Numbers<I...>) {
    Ints total[sizeof...(I)] = {};
    for (int64_t step = 0; step < steps; step += 4, x += GROUP * count, panel += GROUP * PANEL) {
      const __m256i codes[] = {load<__m256i>(panel), load<__m256i>(panel + 4 * PANEL), load<__m256i>(panel + 8 * PANEL),
                               load<__m256i>(panel + 12 * PANEL)};
      ((total[I] += sum_of_16(x + GROUP * I, codes)), ...);
    }
    ((store(sums + PANEL * I, total[I])), ...);
  }

  static inline __attribute__((always_inline)) Ints sum_of_16(const uint8_t* x, const __m256i (&codes)[4]) {
    __m256i pairs = products(x, codes[0]);
    pairs = _mm256_add_epi16(pairs, products(x + 4, codes[1]));
    pairs = _mm256_add_epi16(pairs, products(x + 8, codes[2]));
    pairs = _mm256_add_epi16(pairs, products(x + 12, codes[3]));
    return (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }

  static inline __m256i products(const uint8_t* x, __m256i codes) {
    int32_t bits;
    memcpy(&bits, x, 4);
    return _mm256_maddubs_epi16(_mm256_set1_epi32(bits), codes);
  }
};

}  // namespace
