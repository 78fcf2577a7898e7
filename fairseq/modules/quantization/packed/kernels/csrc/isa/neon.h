// NEON with dot products, of ARM's processors since about 2018: four products of signed bytes a lane.
#pragma once

#include "registers.h"

namespace {

struct Isa : Registers<Isa> {
  static const int32_t OFFSET = 0;  // signed bytes are multiplied as they are

  template <int... I>
  static inline __attribute__((always_inline)) void rows(const uint8_t* tile, const uint8_t* panel, int64_t steps,
                                                         int32_t* sums, Numbers<I...>) {
    in_two<sizeof...(I)>([&](auto numbers, int64_t first) {
      some<sizeof...(I)>((const int8_t*)tile + GROUP * first, (const int8_t*)panel, steps, sums + PANEL * first,
                         numbers);
    });
  }

  template <int... I>
  static inline __attribute__((always_inline)) void half_rows(const uint16_t* tile, const uint16_t* panel,
                                                              int64_t steps, float* out, int64_t stride,
                                                              Numbers<I...>) {
    in_two<sizeof...(I)>([&](auto numbers, int64_t first) {
      some_halves<sizeof...(I)>(tile + GROUP / 2 * first, panel, steps, out + stride * first, stride, numbers);
    });
  }

 private:
  // Rows of a tile of `count`, 16 outputs at a time: sums of bytes are 24 of 32 registers, beside 6 of the rows' own.
  template <int count, int... I>
  static inline __attribute__((always_inline)) void some(const int8_t* tile, const int8_t* panel, int64_t steps,
                                                         int32_t* sums, Numbers<I...> numbers) {
    for (int64_t column = 0; column < PANEL; column += 16) {
      const int8_t *x = tile, *weights = panel + 4 * column;
      int32x4_t total[sizeof...(I)][4] = {};
      for (int64_t step = 0; step < steps; step += 4, x += GROUP * count) {
        const int8x16_t four[] = {load<int8x16_t>(x + GROUP * I)...};
        add<0>(weights, four, total, numbers);
        add<1>(weights + 4 * PANEL, four, total, numbers);
        add<2>(weights + 8 * PANEL, four, total, numbers);
        add<3>(weights + 12 * PANEL, four, total, numbers);
        weights += 16 * PANEL;
      }
#pragma GCC unroll 4
      for (int vector = 0; vector < 4; vector++) (store(sums + PANEL * I + column + 4 * vector, total[I][vector]), ...);
    }
  }

  template <int step, int... I>
  static inline __attribute__((always_inline)) void add(const int8_t* weights, const int8x16_t* four,
                                                        int32x4_t (*total)[4], Numbers<I...>) {
#pragma GCC unroll 4
    for (int vector = 0; vector < 4; vector++) {
      const int8x16_t codes = load<int8x16_t>(weights + 16 * vector);
      ((total[I][vector] = dot<step>(total[I][vector], codes, four[I])), ...);
    }
  }

  // The same for bfloat16, 8 outputs at a time: as floats, the even numbers of a group and the odd ones.
  template <int count, int... I>
  static inline __attribute__((always_inline)) void some_halves(const uint16_t* tile, const uint16_t* panel,
                                                                int64_t steps, float* out, int64_t stride,
                                                                Numbers<I...> numbers) {
    for (int64_t column = 0; column < PANEL; column += 8) {
      const uint16_t *x = tile, *weights = panel + 2 * column;
      float32x4_t total[sizeof...(I)][2] = {};
      for (int64_t step = 0; step < steps; step += 4, x += GROUP / 2 * count) {
        const float32x4_t even[] = {even_of(x + GROUP / 2 * I)...}, odd[] = {odd_of(x + GROUP / 2 * I)...};
        add_halves<0>(weights, even, odd, total, numbers);
        add_halves<1>(weights + 2 * PANEL, even, odd, total, numbers);
        add_halves<2>(weights + 4 * PANEL, even, odd, total, numbers);
        add_halves<3>(weights + 6 * PANEL, even, odd, total, numbers);
        weights += 8 * PANEL;
      }
#pragma GCC unroll 2
      for (int vector = 0; vector < 2; vector++) (store(out + stride * I + column + 4 * vector, total[I][vector]), ...);
    }
  }

  template <int step, int... I>
  static inline __attribute__((always_inline)) void add_halves(const uint16_t* weights, const float32x4_t* even,
                                                               const float32x4_t* odd, float32x4_t (*total)[2],
                                                               Numbers<I...>) {
#pragma GCC unroll 2
    for (int vector = 0; vector < 2; vector++) {
      const float32x4_t first = even_of(weights + 8 * vector), second = odd_of(weights + 8 * vector);
      ((total[I][vector] = multiply_add<step>(total[I][vector], first, even[I])), ...);
      ((total[I][vector] = multiply_add<step>(total[I][vector], second, odd[I])), ...);
    }
  }

  // Functions, since clang's intrinsics are macros that take no parameter pack.
  template <int lane>
  static inline int32x4_t dot(int32x4_t total, int8x16_t codes, int8x16_t x) {
    return vdotq_laneq_s32(total, codes, x, lane);
  }
  template <int lane>
  static inline float32x4_t multiply_add(float32x4_t total, float32x4_t codes, float32x4_t x) {
    return vfmaq_laneq_f32(total, codes, x, lane);
  }
  static inline float32x4_t even_of(const uint16_t* halves) { return (float32x4_t)(load<uint32x4_t>(halves) << 16); }
  static inline float32x4_t odd_of(const uint16_t* halves) {
    return (float32x4_t)(load<uint32x4_t>(halves) & vdupq_n_u32(0xffff0000u));
  }
};

}  // namespace
