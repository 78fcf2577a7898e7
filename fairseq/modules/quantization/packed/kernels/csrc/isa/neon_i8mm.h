// NEON with matrices of bytes (smmla) and products of bfloat16, of ARM's processors since about 2021: two rows of eight
// bytes times two outputs of eight, the sums two by two.
#pragma once

#include "registers.h"

namespace {

struct Isa : Registers<Isa> {
  static const int64_t ROWS = 12;   // of a tile: times 8 outputs, 24 of 32 registers hold sums
  static const int64_t GROUP = 8;   // so that two rows lie as smmla takes them
  static const int32_t OFFSET = 0;  // signed bytes are multiplied as they are

  template <int... I>
  static inline __attribute__((always_inline)) void rows(const uint8_t* tile, const uint8_t* panel, int64_t steps,
                                                         int32_t* sums, Numbers<I...>) {
    pairs<sizeof...(I)>(tile, (const int32_t*)panel, steps, sums, typename Count<(sizeof...(I) + 1) / 2>::type());
  }

  template <int... I>
  static inline __attribute__((always_inline)) void half_rows(const uint16_t* tile, const uint16_t* panel,
                                                              int64_t steps, float* out, int64_t stride,
                                                              Numbers<I...>) {
    half_pairs<sizeof...(I)>((const uint8_t*)tile, panel, steps, out, stride,
                             typename Count<(sizeof...(I) + 1) / 2>::type());
  }

 private:
  // The groups of rows 2 P and 2 P + 1 of a tile of `count`, or of the last one of an odd number and zeros.
  template <int count, int P>
  static inline uint8x16_t pair(const uint8_t* x) {
    if constexpr (2 * P + 1 < count) return load<uint8x16_t>(x + 2 * GROUP * P);
    else return vcombine_u8(load<uint8x8_t>(x + 2 * GROUP * P), vdup_n_u8(0));
  }

  // A tile of `count` rows, two and two, 8 outputs at a time.
  template <int count, int... P>
  static inline __attribute__((always_inline)) void pairs(const uint8_t* tile, const int32_t* panel, int64_t steps,
                                                          int32_t* sums, Numbers<P...>) {
    for (int64_t column = 0; column < PANEL; column += 8) {
      const uint8_t* x = tile;
      const int32_t* weights = panel + column;
      int32x4_t total[sizeof...(P)][4] = {};
      for (int64_t step = 0; step < steps; step += 2, x += GROUP * count, weights += 2 * PANEL) {
        // Two steps of a panel, four outputs each, become two times two outputs of eight bytes.
        const int32x4_t a = load<int32x4_t>(weights), b = load<int32x4_t>(weights + PANEL);
        const int32x4_t c = load<int32x4_t>(weights + 4), d = load<int32x4_t>(weights + PANEL + 4);
        const int32x4_t codes[] = {vzip1q_s32(a, b), vzip2q_s32(a, b), vzip1q_s32(c, d), vzip2q_s32(c, d)};
        (add((int8x16_t)pair<count, P>(x), codes, total[P]), ...);
      }
      (store_pair<2 * P + 1 < count>(total[P], sums + 2 * PANEL * P + column), ...);
    }
  }

  static inline __attribute__((always_inline)) void add(int8x16_t two, const int32x4_t* codes, int32x4_t* total) {
#pragma GCC unroll 4
    for (int vector = 0; vector < 4; vector++) total[vector] = vmmlaq_s32(total[vector], two, (int8x16_t)codes[vector]);
  }

  template <bool two>
  static inline __attribute__((always_inline)) void store_pair(const int32x4_t* total, int32_t* sums) {
#pragma GCC unroll 2
    for (int vector = 0; vector < 4; vector += 2) {
      const int64x2_t left = (int64x2_t)total[vector], right = (int64x2_t)total[vector + 1];
      store(sums + 2 * vector, vzip1q_s64(left, right));
      if constexpr (two) store(sums + PANEL + 2 * vector, vzip2q_s64(left, right));
    }
  }

  // The same for bfloat16.
  template <int count, int... P>
  static inline __attribute__((always_inline)) void half_pairs(const uint8_t* tile, const uint16_t* panel,
                                                               int64_t steps, float* out, int64_t stride,
                                                               Numbers<P...>) {
    for (int64_t column = 0; column < PANEL; column += 8) {
      const uint8_t* x = tile;
      const uint16_t* weights = panel + 2 * column;
      float32x4_t total[sizeof...(P)][2][2] = {};
      for (int64_t step = 0; step < steps; step += 2, x += GROUP * count, weights += 4 * PANEL) {
        const bfloat16x8_t first[] = {load<bfloat16x8_t>(weights), load<bfloat16x8_t>(weights + 8)};
        const bfloat16x8_t second[] = {load<bfloat16x8_t>(weights + 2 * PANEL),
                                       load<bfloat16x8_t>(weights + 2 * PANEL + 8)};
        (add_halves<2 * P + 1 < count>((bfloat16x8_t)pair<count, P>(x), first, second, total[P]), ...);
      }
      (store_halves<2 * P + 1 < count>(total[P], out + 2 * stride * P + column, stride), ...);
    }
  }

  // The numbers of two steps times those of one or two rows, each pair the even one first: the bits of fused
  // multiply-adds of floats. As assembly, since gcc 12 hands the intrinsics registers that these instructions do not
  // take.
#define ADD_PAIR(total, codes, x, even, odd)                                          \
  asm("bfmlalb %0.4s, %1.8h, %2.h[" #even "]\n\tbfmlalt %0.4s, %1.8h, %2.h[" #odd "]" \
      : "+w"(total)                                                                   \
      : "w"(codes), "x"(x))
  template <bool two>
  static inline __attribute__((always_inline)) void add_halves(bfloat16x8_t x, const bfloat16x8_t* first,
                                                               const bfloat16x8_t* second, float32x4_t (*total)[2]) {
#pragma GCC unroll 2
    for (int vector = 0; vector < 2; vector++) {
      ADD_PAIR(total[0][vector], first[vector], x, 0, 1);
      ADD_PAIR(total[0][vector], second[vector], x, 2, 3);
      if constexpr (two) {
        ADD_PAIR(total[1][vector], first[vector], x, 4, 5);
        ADD_PAIR(total[1][vector], second[vector], x, 6, 7);
      }
    }
  }
#undef ADD_PAIR

  template <bool two>
  static inline
      __attribute__((always_inline)) void store_halves(const float32x4_t (*total)[2], float* out, int64_t stride) {
#pragma GCC unroll 2
    for (int vector = 0; vector < 2; vector++) {
      store(out + 4 * vector, total[0][vector]);
      if constexpr (two) store(out + stride + 4 * vector, total[1][vector]);
    }
  }
};

}  // namespace
