// Layers whose scales are of groups of inputs: each group's sums are scaled, and added up in float, in their order.
#pragma once

#include "api.h"
#include "panels.h"
#include "vector.h"

namespace {  // each instruction set has its own

// product(numbers, first step, steps, whether the sums go on) for the steps [start, stop) of 4 bytes of the rows of a
// tile: where they begin within what lies together in it, that part and the rest.
template <typename Product>
static inline __attribute__((always_inline)) void in_parts(const uint8_t* tile, int64_t rows, int64_t start,
                                                           int64_t stop, Product product) {
  const int64_t together = Isa::GROUP / 4;
  for (int64_t from = start, next; from < stop; from = next) {
    const int64_t within = Isa::GROUP > PANEL_STEP ? from % together : 0;
    next = within ? least(stop, from - within + together) : stop;
    product(tile + from / together * Isa::GROUP * rows + 4 * within, from, next - from, from > start);
  }
}

// What `scaled(sums, row)` makes of a group's sums, added to `totals`.
template <typename Sum, typename Scaled>
static inline __attribute__((always_inline)) void add_group(const Sum* sums, int64_t rows, float* totals,
                                                            Scaled scaled) {
  for (int64_t i = 0; i < rows; i++, sums += PANEL, totals += PANEL)
    store(totals, load<Floats>(totals) + scaled(sums, i));
}

// y = (t * scale of the row) + bias, t the sum over groups of (sum - zero point's share) * scale, each operation
// rounded once. A group has up to 128 inputs, so that sums of integers are whole numbers that float32 holds exactly.
// Numbers in bfloat16 have rows of scale 1 and codes less their zeros, and groups of a multiple of 32 inputs: what lies
// behind one in a tile of 64 bytes, which may be NaN, is never multiplied.
struct InGroups : InIntegers {
  typedef float Sum;
  static const bool IN_CHUNKS = false;

  static int64_t steps(const Linear& linear) {
    return linear.halves ? InHalves::steps(linear) : InIntegers::steps(linear);
  }
  int64_t pauses(int64_t) const { return groups_of(linear); }

  void begin(int64_t panel, int64_t start, int64_t count) {
    if (linear.halves) InHalves::begin_piece(linear, own, panel, start, count, piece);
    else InIntegers::begin(panel, start, count);
    for (int64_t g = 0; g < groups_of(linear); g++) {
      Group& group = own.groups[g];
      if (linear.halves) InHalves::set_zeros(linear, panel, g, group.halves);
      else if (linear.narrow) memset(group.code_sums, 0, sizeof(group.code_sums));
    }
  }
  void unpack_some(int64_t steps) {
    while (steps > 0) {
      const int64_t at = (piece.to - own.panel[piece.turn]) / ((linear.halves ? 8 : 4) * PANEL);
      Group& group = own.groups[4 * at / linear.group_size];
      const int64_t some = least(steps, (linear.group_size - 4 * at % linear.group_size) / 4);
      if (linear.halves) InHalves::unpack_piece(linear, piece, some, group.halves);
      else unpack_into(some, group.code_sums);
      steps -= some;
    }
  }

  struct Columns : Scaling {
    struct Lanes {
      Floats bias;
      Floats operator()(const float* sums, const Rounded& x, int64_t row) const {
        return load<Floats>(sums) * x.scales[row] + bias;
      }
    };
    Lanes lanes(int64_t j) const { return {load<Floats>(bias + j)}; }
  };
  void finish(int64_t panel, Columns& columns) const {
    columns.of(linear, panel, [&](int64_t j, int64_t, int64_t first) {
      for (int64_t g = 0; g < groups_of(linear); g++) {
        Group& group = own.groups[g];
        const int64_t s = first + g;
        group.scale[j] = linear.scale[s];
        if (linear.halves) continue;
        group.zero[j] = (int32_t)linear.zero[s] - linear.zero_offset;
        group.offset[j] = Isa::OFFSET * (linear.narrow ? group.code_sums[j] : linear.sums[s]);
      }
    });
  }

  template <typename Pause>
  inline __attribute__((always_inline)) void product(const Rounded& x, const Tile& tile, const uint8_t* numbers,
                                                     const uint8_t* panel, int64_t steps, float* totals, bool,
                                                     Pause pause) const {
    const Floats nothing = floats(-0.0f);  // added to a term, 0 and -0 among them, it gives that
    for (int64_t i = 0; i < tile.rows * PANEL; i += LANES) store(totals + i, nothing);
    for (int64_t g = 0; g < groups_of(linear); g++) {
      pause();
      if (linear.halves) add_halves<Isa>(tile.rows, numbers, panel, steps, g, totals);
      else add_integers<Isa>(x, tile, numbers, panel, steps, g, totals);
    }
  }

 private:
  template <typename Own>
  __attribute__((noinline)) void add_integers(const Rounded& x, const Tile& tile, const uint8_t* numbers,
                                              const uint8_t* panel, int64_t steps, int64_t g, float* totals) const {
    const int64_t groups = groups_of(linear), group_steps = linear.group_size / 4, start = g * group_steps,
                  stop = least(start + group_steps, steps);
    const Group& group = own.groups[g];
    const int32_t* const row_sums = x.sums + tile.row * groups + g;
    if constexpr (Own::ADDS_GROUPS)
      return Own::add_group(numbers + start * 4 * tile.rows, panel + start * 4 * PANEL, tile.rows, stop - start, group,
                            row_sums, groups, totals);
    alignas(ALIGNMENT) int32_t sums[Isa::ROWS * PANEL];
    in_parts(numbers, tile.rows, start, stop, [&](const uint8_t* part, int64_t from, int64_t count, bool go_on) {
      product_of<Own>(linear.narrow, part, panel + from * 4 * PANEL, tile.rows, count, sums, go_on, [] {});
    });
    for (int64_t j = 0; j < PANEL; j += LANES) {
      const Floats scale = load<Floats>(group.scale + j), zero = load<Floats>(group.zero + j),
                   offset = load<Floats>(group.offset + j);
      add_group(sums + j, tile.rows, totals + j, [&](const int32_t* of_row, int64_t i) {
        const Floats sum = __builtin_convertvector(load<Ints>(of_row), Floats);
        return (sum - offset - zero * (float)row_sums[i * groups]) * scale;
      });
    }
  }

  template <typename Own>
  __attribute__((noinline)) void add_halves(int64_t rows, const uint8_t* numbers, const uint8_t* panel, int64_t steps,
                                            int64_t g, float* totals) const {
    const int64_t start = g * (linear.group_size / 2), stop = least(start + linear.group_size / 2, steps);
    const uint16_t *tile = (const uint16_t*)(numbers + start * 4 * rows),
                   *codes = (const uint16_t*)(panel + start * 4 * PANEL);
    if constexpr (Own::ADDS_HALF_GROUPS)
      return Own::add_half_group(tile, codes, rows, stop - start, own.groups[g].scale, totals);
    alignas(ALIGNMENT) float sums[Isa::ROWS * PANEL];
    Own::half_product(tile, codes, rows, stop - start, sums, PANEL);
    for (int64_t j = 0; j < PANEL; j += LANES) {
      const Floats scale = load<Floats>(own.groups[g].scale + j);
      add_group(sums + j, rows, totals + j, [&](const float* of_row, int64_t) { return load<Floats>(of_row) * scale; });
    }
  }
};

}  // namespace
