// Products whose sums stay in registers: a tile of up to 14 rows times a panel, for processors without tiles of their
// own.
#pragma once

#include "../api.h"
#include "../vector.h"

namespace {  // each instruction set has its own

template <int... I>
struct Numbers {};
template <int N, int... I>
struct Count : Count<N - 1, N - 1, I...> {};
template <int... I>
struct Count<0, I...> {
  typedef Numbers<I...> type;
};

// What the instruction sets without tiles share. `Own` gives
//   rows(tile, panel, steps, sums, Numbers<0, 1, ...>), the products of bytes, and
//   half_rows(tile, panel, steps, out, stride, Numbers<0, 1, ...>), those of bfloat16.
template <typename Own>
struct Registers {
  static const int64_t ROWS = 14;     // of a tile: 28 accumulators, 2 weight vectors, 2 spare, of 32 registers
  static const int64_t GROUP = 16;    // bytes of a row that lie together in a tile
  static const int32_t OFFSET = 128;  // what is added to an integer to make it a byte
  static const bool FAST_HALVES = false;

  static void enter() {}
  static void leave() {}

  template <int count>
  static __attribute__((noinline)) void some_rows(const uint8_t* tile, const uint8_t* panel, int64_t steps,
                                                  int32_t* sums) {
    Own::rows(tile, panel, steps, sums, typename Count<count>::type());
  }

  template <int count>
  static __attribute__((noinline)) void some_half_rows(const uint16_t* tile, const uint16_t* panel, int64_t steps,
                                                       float* out, int64_t stride) {
    Own::half_rows(tile, panel, steps, out, stride, typename Count<count>::type());
  }

  // Integer sums of a tile, (rows, PANEL), over 4 * steps inputs.
  static void product(const uint8_t* tile, const uint8_t* panel, int64_t rows, int64_t steps, int32_t* sums) {
    switch (rows) {
      // clang-format off
#define CASE(n) case n: return some_rows<n>(tile, panel, steps, sums)
      CASE(1); CASE(2); CASE(3); CASE(4); CASE(5); CASE(6); CASE(7);
      CASE(8); CASE(9); CASE(10); CASE(11); CASE(12); CASE(13); CASE(14);
#undef CASE
      // clang-format on
    }
  }

  // The same for a caller that has something else to do in the pauses of a product: there is one, before it.
  template <typename Pause>
  static void product(const uint8_t* tile, const uint8_t* panel, int64_t rows, int64_t steps, int32_t* sums, bool,
                      Pause pause) {
    pause();
    product(tile, panel, rows, steps, sums);
  }
  static int64_t pauses(int64_t) { return 1; }
  static int64_t chunk(int64_t steps) { return steps; }  // no sums are gone on with

  // Products of bfloat16, summed in float over 2 * steps numbers: (rows, PANEL), `stride` floats a row.
  static void half_product(const uint16_t* tile, const uint16_t* panel, int64_t rows, int64_t steps, float* out,
                           int64_t stride) {
    switch (rows) {
      // clang-format off
#define CASE(n) case n: return some_half_rows<n>(tile, panel, steps, out, stride)
      CASE(1); CASE(2); CASE(3); CASE(4); CASE(5); CASE(6); CASE(7);
      CASE(8); CASE(9); CASE(10); CASE(11); CASE(12); CASE(13); CASE(14);
#undef CASE
      // clang-format on
    }
  }

  // The same with something else to do in its pauses, `PANEL` floats a row.
  template <typename Pause>
  static void half_product(const uint16_t* tile, const uint16_t* panel, int64_t rows, int64_t steps, float* out, bool,
                           Pause pause) {
    pause();
    half_product(tile, panel, rows, steps, out, PANEL);
  }

  // For processors without instructions for bfloat16: pairs as floats, in the order of the inputs.
  template <int... I>
  static inline __attribute__((always_inline)) void half_rows(const uint16_t* tile, const uint16_t* panel,
                                                              int64_t steps, float* out, int64_t stride,
                                                              Numbers<I...>) {
    const int rows = sizeof...(I);
    const int64_t halves = GROUP / 2;
    for (int64_t column = 0; column < PANEL; column += LANES) {
      Floats total[rows] = {};
      for (int64_t step = 0; step < steps; step++) {
        const Words pairs = load<Words>((const uint32_t*)(panel + 2 * (PANEL * step + column)));
        const Floats even = (Floats)(pairs << 16), odd = (Floats)(pairs & 0xffff0000u);
        const uint16_t* x = tile + step / 4 * halves * rows + step % 4 * 2;
        ((total[I] = fma(odd, wide(x[halves * I + 1]), fma(even, wide(x[halves * I]), total[I]))), ...);
      }
      ((store(out + stride * I + column, total[I])), ...);
    }
  }

 private:
  static inline Floats wide(uint16_t half) { return (Floats)((Words){} + ((uint32_t)half << 16)); }
};

// The same with `Own::dot4(x, weights, sums)`: four products of bytes a lane, added up.
template <typename Own>
struct ByLanes : Registers<Own> {
  using Registers<Own>::GROUP;

  template <int... I>
  static inline __attribute__((always_inline)) void rows(const uint8_t* tile, const uint8_t* panel, int64_t steps,
                                                         int32_t* sums, Numbers<I...>) {
    const int count = sizeof...(I);
    for (int64_t column = 0; column < PANEL; column += LANES) {
      Ints total[count] = {};
      for (int64_t step = 0; step < steps; step++) {
        const uint8_t* weights = panel + 4 * (PANEL * step + column);
        const uint8_t* x = tile + step / 4 * GROUP * count + step % 4 * 4;
        ((total[I] = Own::dot4(x + GROUP * I, weights, total[I])), ...);
      }
      ((store(sums + PANEL * I + column, total[I])), ...);
    }
  }
};

}  // namespace
