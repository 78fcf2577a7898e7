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
//   rows(tile, panel, steps, sums, Numbers<0, 1, ...>), the products of bytes, and may give
//   half_rows(tile, panel, steps, out, stride, Numbers<0, 1, ...>), those of bfloat16,
//   group_rows and half_group_rows, which scale a group's sums and add them up before they leave the registers.
template <typename Own>
struct Registers {
  // Rows of a tile, and those that are multiplied at once, by two vectors of weights: of 32 registers 28 are sums, and
  // 12 of 16.
  static const int64_t ROWS = LANES == 16 ? 14 : 12;
  static const int AT_ONCE = LANES == 16 ? 14 : 6;
  static const int64_t GROUP = 16;                 // bytes of a row that lie together in a tile
  static const int64_t FLOATS = 16;                // and floats
  static const int32_t OFFSET = 128;               // what is added to an integer to make it a byte
  static const bool EVEN_TILES = AT_ONCE == ROWS;  // a tile of a few rows would wait for each sum
  static const bool FAST_HALVES = false;           // whether products of bfloat16 are
  static const bool FAST_FLOATS = false;           // whether there is a float_product
  static const bool FAST_NARROW = false;           // whether there is a narrow_product, for codes from -15 to 15
  static const bool ADDS_GROUPS = false, ADDS_HALF_GROUPS = false;  // whether there are group_rows, half_group_rows

  static void enter() {}
  static void leave() {}

  // Integer sums of a tile, (rows, PANEL), over 4 * steps inputs.
  static void product(const uint8_t* tile, const uint8_t* panel, int64_t rows, int64_t steps, int32_t* sums) {
    with_numbers(rows, [&](auto numbers) { all_rows(tile, panel, steps, sums, numbers); });
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
    with_numbers(rows, [&](auto numbers) { all_half_rows(tile, panel, steps, out, stride, numbers); });
  }

  // The same with something else to do in its pauses, `PANEL` floats a row.
  template <typename Pause>
  static void half_product(const uint16_t* tile, const uint16_t* panel, int64_t rows, int64_t steps, float* out, bool,
                           Pause pause) {
    pause();
    half_product(tile, panel, rows, steps, out, PANEL);
  }

  // Products of floats, each sum in the order of its terms: (rows, PANEL), of FLOATS of each row, then the next ones.
  static void float_product(const float* tile, const float* panel, int64_t rows, int64_t steps, float* out) {
    with_numbers(rows, [&](auto numbers) { all_float_rows(tile, panel, steps, out, numbers); });
  }

  // (sums of a group less its offset - zero * sum of the row) * scale, added to totals; sums of rows `stride` apart.
  static void add_group(const uint8_t* tile, const uint8_t* panel, int64_t rows, int64_t steps, const Group& group,
                        const int32_t* row_sums, int64_t stride, float* totals) {
    with_numbers(rows,
                 [&](auto numbers) { all_group_rows(tile, panel, steps, group, row_sums, stride, totals, numbers); });
  }

  // Sums of a group of bfloat16 * scale, added to totals.
  static void add_half_group(const uint16_t* tile, const uint16_t* panel, int64_t rows, int64_t steps,
                             const float* scale, float* totals) {
    with_numbers(rows, [&](auto numbers) { all_half_group_rows(tile, panel, steps, scale, totals, numbers); });
  }

  // For processors without instructions for bfloat16: as floats, in the order of the inputs.
  template <int... I>
  static inline __attribute__((always_inline)) void half_rows(const uint16_t* tile, const uint16_t* panel,
                                                              int64_t steps, float* out, int64_t stride,
                                                              Numbers<I...>) {
    typedef uint16_t Eight __attribute__((vector_size(GROUP)));
    typedef uint32_t EightWords __attribute__((vector_size(2 * GROUP)));
    const int count = sizeof...(I);
    in_pieces<count, 2 * LANES, HALVES, float>(steps, [&](int64_t i) {
      return __builtin_convertvector(load<Eight>(tile + HALVES * i), EightWords) << 16;
    }, [&](const float* wide, int64_t step, int64_t groups, int64_t column, int64_t first, auto some) {
      some_halves<count>(wide, panel + 2 * (PANEL * step + column), groups, out + stride * first + column, stride,
                         step > 0, some);
    });
  }

 protected:
  static const int64_t HALVES = GROUP / 2;

  // with(Numbers<0, 1, ... rows - 1>).
  template <typename With>
  static inline __attribute__((always_inline)) void with_numbers(int64_t rows, With with) {
    switch (rows) {
      // clang-format off
#define CASE(n) case n: if constexpr (n <= Own::ROWS) with(typename Count<n>::type()); return
      CASE(1); CASE(2); CASE(3); CASE(4); CASE(5); CASE(6); CASE(7);
      CASE(8); CASE(9); CASE(10); CASE(11); CASE(12); CASE(13); CASE(14);
#undef CASE
      // clang-format on
    }
  }

  // multiply(rows as Numbers, the first of them), for all at once or for two parts that are nearly as large.
  template <int count, typename Multiply>
  static inline __attribute__((always_inline)) void in_two(Multiply multiply) {
    const int first = count <= AT_ONCE ? count : (count + 1) / 2;
    multiply(typename Count<first>::type(), 0);
    if constexpr (first < count) multiply(typename Count<count - first>::type(), first);
  }

  // The `numbers` of each group of a tile's `count` rows widened, which widen(i) gives for the i-th group, some groups
  // at a time, which stay in the first cache; then multiply(widened rows, step, groups, column, the first of the rows,
  // the rows as Numbers) for each `columns` outputs of a panel.
  template <int count, int64_t columns, int64_t numbers, typename Number, typename Widen, typename Multiply>
  static inline __attribute__((always_inline)) void in_pieces(int64_t steps, Widen widen, Multiply multiply) {
    const int64_t most_groups = 16;
    alignas(ALIGNMENT) Number wide[most_groups * numbers * count];
    for (int64_t step = 0; step < steps; step += 4 * most_groups) {
      const int64_t groups = least(most_groups, (steps - step) / 4);
      for (int64_t i = 0; i < groups * count; i++) store(wide + numbers * i, widen(step / 4 * count + i));
      for (int64_t column = 0; column < PANEL; column += columns)
        in_two<count>(
            [&](auto some, int64_t first) { multiply(wide + numbers * first, step, groups, column, first, some); });
    }
  }

 private:
  template <int... I>
  static __attribute__((noinline)) void all_rows(const uint8_t* tile, const uint8_t* panel, int64_t steps,
                                                 int32_t* sums, Numbers<I...> numbers) {
    Own::rows(tile, panel, steps, sums, numbers);
  }

  template <int... I>
  static __attribute__((noinline)) void all_half_rows(const uint16_t* tile, const uint16_t* panel, int64_t steps,
                                                      float* out, int64_t stride, Numbers<I...> numbers) {
    Own::half_rows(tile, panel, steps, out, stride, numbers);
  }

  template <int... I>
  static __attribute__((noinline)) void all_float_rows(const float* tile, const float* panel, int64_t steps, float* out,
                                                       Numbers<I...> numbers) {
    Own::float_rows(tile, panel, steps, out, numbers);
  }

  template <int... I>
  static __attribute__((noinline)) void all_group_rows(const uint8_t* tile, const uint8_t* panel, int64_t steps,
                                                       const Group& group, const int32_t* row_sums, int64_t stride,
                                                       float* totals, Numbers<I...> numbers) {
    Own::group_rows(tile, panel, steps, group, row_sums, stride, totals, numbers);
  }

  template <int... I>
  static __attribute__((noinline)) void all_half_group_rows(const uint16_t* tile, const uint16_t* panel, int64_t steps,
                                                            const float* scale, float* totals, Numbers<I...> numbers) {
    Own::half_group_rows(tile, panel, steps, scale, totals, numbers);
  }

  // Rows of floats, of a tile of `count`, times two vectors of pairs.
  template <int count, int... I>
  static __attribute__((noinline)) void some_halves(const float* x, const uint16_t* panel, int64_t groups, float* out,
                                                    int64_t stride, bool go_on, Numbers<I...>) {
    Floats left[sizeof...(I)] = {}, right[sizeof...(I)] = {};
    if (go_on) ((left[I] = load<Floats>(out + stride * I), right[I] = load<Floats>(out + stride * I + LANES)), ...);
    for (int64_t group = 0; group < groups; group++, x += HALVES * count) {
#pragma GCC unroll 4
      for (int64_t two = 0; two < HALVES; two += 2, panel += 2 * PANEL) {
        const uint32_t* pairs = (const uint32_t*)panel;
        Floats first = (Floats)(load<Words>(pairs) << 16), second = (Floats)(load<Words>(pairs + LANES) << 16);
        (add(x[HALVES * I + two], first, second, left[I], right[I]), ...);
        asm volatile("" ::: "memory");  // they are loaded again: there are no registers to keep them in
        first = (Floats)(load<Words>(pairs) & 0xffff0000u);
        second = (Floats)(load<Words>(pairs + LANES) & 0xffff0000u);
        (add(x[HALVES * I + two + 1], first, second, left[I], right[I]), ...);
      }
    }
    ((store(out + stride * I, left[I]), store(out + stride * I + LANES, right[I])), ...);
  }

  static inline __attribute__((always_inline)) void add(float x, Floats first, Floats second, Floats& left,
                                                        Floats& right) {
    left = fma(floats(x), first, left);
    right = fma(floats(x), second, right);
  }
};

// The same with `Own::dot4(x, weights, sums)`: four products of bytes a lane, added up.
template <typename Own>
struct ByLanes : Registers<Own> {
  using Registers<Own>::GROUP;

  template <int... I>
  static inline __attribute__((always_inline)) void rows(const uint8_t* tile, const uint8_t* panel, int64_t steps,
                                                         int32_t* sums, Numbers<I...>) {
    for (int64_t column = 0; column < PANEL; column += 2 * LANES)
      Registers<Own>::template in_two<sizeof...(I)>([&](auto some, int64_t first) {
        some_rows<sizeof...(I)>(tile + GROUP * first, panel + 4 * column, steps, sums + PANEL * first + column, some);
      });
  }

 private:
  template <int count, int... I>
  static inline __attribute__((always_inline)) void some_rows(const uint8_t* tile, const uint8_t* panel, int64_t steps,
                                                              int32_t* sums, Numbers<I...>) {
    Ints left[sizeof...(I)] = {}, right[sizeof...(I)] = {};
    for (int64_t step = 0; step < steps; step++, panel += 4 * PANEL) {
      const uint8_t* x = tile + step / 4 * GROUP * count + step % 4 * 4;
      ((left[I] = Own::dot4(x + GROUP * I, panel, left[I]),
        right[I] = Own::dot4(x + GROUP * I, panel + 4 * LANES, right[I])),
       ...);
    }
    ((store(sums + PANEL * I, left[I]), store(sums + PANEL * I + LANES, right[I])), ...);
  }
};

}  // namespace
