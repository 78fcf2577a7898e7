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
    pairs<sizeof...(I)>((const int8_t*)tile, (const int32_t*)panel, steps, sums,
                        typename Count<(sizeof...(I) + 1) / 2>::type());
  }

  // The bits of a fused multiply-add of floats for each number of a pair, the even one first.
  template <int... I>
  static inline __attribute__((always_inline)) void half_rows(const uint16_t* tile, const uint16_t* panel, int64_t steps,
                                                              float* out, int64_t stride, Numbers<I...>) {
    const int count = sizeof...(I);
    for (int64_t column = 0; column < PANEL; column += 8) {
      const bfloat16_t *x = (const bfloat16_t*)tile, *weights = (const bfloat16_t*)panel + 2 * column;
      float32x4_t total[count][2] = {};
      for (int64_t step = 0; step < steps; step += 2, x += GROUP / 2 * count, weights += 4 * PANEL) {
        const bfloat16x8_t codes[] = {vld1q_bf16(weights), vld1q_bf16(weights + 8), vld1q_bf16(weights + 2 * PANEL),
                                      vld1q_bf16(weights + 2 * PANEL + 8)};
        (add_halves(vld1_bf16(x + GROUP / 2 * I), codes, total[I]), ...);
      }
      ((vst1q_f32(out + stride * I + column, total[I][0]), vst1q_f32(out + stride * I + column + 4, total[I][1])), ...);
    }
  }

 private:
  // A tile of `count` rows, two and two, 8 outputs at a time.
  template <int count, int... P>
  static inline __attribute__((always_inline)) void pairs(const int8_t* tile, const int32_t* panel, int64_t steps,
                                                          int32_t* sums, Numbers<P...>) {
    for (int64_t column = 0; column < PANEL; column += 8) {
      const int8_t* x = tile;
      const int32_t* weights = panel + column;
      int32x4_t total[sizeof...(P)][4] = {};
      for (int64_t step = 0; step < steps; step += 2, x += GROUP * count, weights += 2 * PANEL) {
        // Two steps of a panel, four outputs each, become two times two outputs of eight bytes.
        const int32x4_t a = vld1q_s32(weights), b = vld1q_s32(weights + PANEL);
        const int32x4_t c = vld1q_s32(weights + 4), d = vld1q_s32(weights + PANEL + 4);
        const int32x4_t codes[] = {vzip1q_s32(a, b), vzip2q_s32(a, b), vzip1q_s32(c, d), vzip2q_s32(c, d)};
        (add(pair_of<2 * P + 1 < count>(x + 2 * GROUP * P), codes, total[P]), ...);
      }
      (store_pair<2 * P + 1 < count>(total[P], sums + 2 * PANEL * P + column), ...);
    }
  }

  static inline __attribute__((always_inline)) void add(int8x16_t two, const int32x4_t* codes, int32x4_t* total) {
#pragma GCC unroll 4
    for (int vector = 0; vector < 4; vector++)
      total[vector] = vmmlaq_s32(total[vector], two, vreinterpretq_s8_s32(codes[vector]));
  }

  // Two rows, or the last one of an odd number and zeros.
  template <bool two>
  static inline int8x16_t pair_of(const int8_t* x) {
    if constexpr (two) return vld1q_s8(x);
    else return vcombine_s8(vld1_s8(x), vdup_n_s8(0));
  }

  template <bool two>
  static inline __attribute__((always_inline)) void store_pair(const int32x4_t* total, int32_t* sums) {
#pragma GCC unroll 2
    for (int vector = 0; vector < 4; vector += 2) {
      const int64x2_t left = vreinterpretq_s64_s32(total[vector]), right = vreinterpretq_s64_s32(total[vector + 1]);
      vst1q_s32(sums + 2 * vector, vreinterpretq_s32_s64(vzip1q_s64(left, right)));
      if constexpr (two) vst1q_s32(sums + PANEL + 2 * vector, vreinterpretq_s32_s64(vzip2q_s64(left, right)));
    }
  }

  // As assembly: gcc 12 hands its intrinsics registers beyond the 15th, which these instructions do not take.
#define ADD_EVEN(total, codes, x, lane) asm("bfmlalb %0.4s, %1.8h, %2.h[" #lane "]" : "+w"(total) : "w"(codes), "x"(x))
#define ADD_ODD(total, codes, x, lane) asm("bfmlalt %0.4s, %1.8h, %2.h[" #lane "]" : "+w"(total) : "w"(codes), "x"(x))
  static inline __attribute__((always_inline)) void add_halves(bfloat16x4_t x, const bfloat16x8_t* codes,
                                                               float32x4_t* total) {
#pragma GCC unroll 2
    for (int vector = 0; vector < 2; vector++) {
      ADD_EVEN(total[vector], codes[vector], x, 0);
      ADD_ODD(total[vector], codes[vector], x, 1);
      ADD_EVEN(total[vector], codes[vector + 2], x, 2);
      ADD_ODD(total[vector], codes[vector + 2], x, 3);
    }
  }
#undef ADD_EVEN
#undef ADD_ODD
};

}  // namespace
