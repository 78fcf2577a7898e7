// How one row becomes integers or bfloat16, with the same bits on every processor.
#pragma once

#include "api.h"
#include "rows.h"
#include "vector.h"

namespace {  // each instruction set has its own

// x / scale rounded half to even, as integers: exactly as a division rounds, by a product wherever that is the same.
static inline Ints rounded(Floats x, float scale, float inverse) {
  Floats quotient = x * inverse;
  Floats shifted = quotient + ROUNDER;
  Floats distance = quotient - (shifted - ROUNDER);
  if (__builtin_expect(any_above((Floats)(bits_of(distance) & 0x7fffffff), 0.49995f), 0)) shifted = x / scale + ROUNDER;
  return bits_of(shifted) - bits_of(floats(ROUNDER));
}

// Rounds `vectors` vectors of a row, from column `i` on, as `rounded` does, and writes them; `bits` are the integers
// plus those of BYTES_FROM, which has as its lowest byte what integers are written with.
const float BYTES_FROM = ROUNDER + Isa::OFFSET;

template <int vectors, typename Left>
static inline void round_some(const float* x, int64_t i, Left left, float scale, float inverse, uint8_t* to,
                              int64_t rows, Words& bits) {
  Floats shifted[vectors], farthest = {};
#pragma GCC unroll 8
  for (int v = 0; v < vectors; v++) {
    const Floats quotient = load<Floats>(x + i + v * LANES, left) * inverse;
    shifted[v] = quotient + BYTES_FROM;
    const Floats distance = quotient - (shifted[v] - BYTES_FROM);
    farthest = larger((Floats)(bits_of(distance) & 0x7fffffff), farthest);
  }
  if (__builtin_expect(any_above(farthest, 0.49995f), 0)) {
    for (int v = 0; v < vectors; v++) shifted[v] = load<Floats>(x + i + v * LANES, left) / scale + BYTES_FROM;
  }
#pragma GCC unroll 8
  for (int v = 0; v < vectors; v++) {
    const int64_t column = i + v * LANES;
    bits += (Words)shifted[v];
    store(to + column / Isa::GROUP * Isa::GROUP * rows + column % Isa::GROUP, low_bytes((Words)shifted[v]), left);
  }
}

// Writes integers + OFFSET as columns from `column` on of a row that begins at `to`.
template <typename Left>
static inline void put(Ints integers, uint8_t* to, int64_t rows, int64_t column, Left left) {
  store(to + column / Isa::GROUP * Isa::GROUP * rows + column % Isa::GROUP, low_bytes((Words)(integers + Isa::OFFSET)),
        left);
}

const int64_t HALVES = Isa::GROUP / 2;  // numbers of bfloat16 in a group

// Consecutive numbers of a row to a tile of `rows` rows, from `to` on.
static inline void store_groups(Halves halves, uint16_t* to, int64_t rows) {
#if LANES == 16
  if constexpr (LANES > HALVES) {
    typedef uint16_t Group __attribute__((vector_size(16)));
    store(to, __builtin_shufflevector(halves, halves, 0, 1, 2, 3, 4, 5, 6, 7), All());
    store(to + HALVES * rows, (Group)__builtin_shufflevector(halves, halves, 8, 9, 10, 11, 12, 13, 14, 15), All());
    return;
  }
#endif
  (void)rows;
  store(to, halves);
}

// One row, times the factor of a Linear, as bfloat16 to row `row` of a tile of `rows` rows; zeros fill its last group
// up.
static void quantize_halves(const float* x, const Linear& grid, uint16_t* tile, int64_t row, int64_t rows) {
  uint16_t* const to = tile + HALVES * row;
  for (int64_t i = 0; i < round_up(grid.in, HALVES); i += LANES) {
    const int64_t left = most(0, grid.in - i);
    Floats numbers = load<Floats>(x + i, left);
    if (grid.factor) numbers = numbers * load<Floats>(grid.factor + i, left);
    uint16_t* const group = to + i / HALVES * HALVES * rows + i % HALVES;
    if (left <= HALVES && HALVES < LANES) store(group, bfloat16(numbers), HALVES);  // the last one, no two
    else store_groups(bfloat16(numbers), group, rows);
  }
}

// A grid of fewer than 8 bits for a row: x is close to scale * q, q from `low` to `high`.
struct Levels {
  float scale, inverse;
  int32_t low, high;

  // From `from` <= 0 to `to` >= 0, in integers from 0 to `most` less a zero point. Where a processor is set to flush
  // what is subnormal to zero, numbers up to 2^126 times the levels at most: beyond, the inverse is.
  Levels(float from, float to, int32_t most) {
    const float tiny = 1.17549435e-38f, step = to / most - from / most;  // the range itself may overflow
    scale = step < tiny ? tiny : step;
    inverse = 1.0f / scale;
    low = (int32_t)(ROUNDER - (-from / scale + ROUNDER));
    high = most + low;
  }

  Ints of(Floats x) const {
    const Ints q = rounded(x, scale, inverse);
    return q < low ? ints(low) : q > high ? ints(high) : q;
  }

  // The squared errors of two vectors, added up.
  Floats error(Floats a, Floats b) const {
    const Floats by = floats(inverse);
    Floats p = fma(a, by, ROUNDER) - ROUNDER, q = fma(b, by, ROUNDER) - ROUNDER;
    const Ints first = bits_of(fma(a, by, -p)), second = bits_of(fma(b, by, -q));  // distances to the quotients
    if (__builtin_expect(any_above(larger((Floats)(first & 0x7fffffff), (Floats)(second & 0x7fffffff)), 0.49995f), 0)) {
      p = (a / scale + ROUNDER) - ROUNDER;
      q = (b / scale + ROUNDER) - ROUNDER;
    }
    const Floats least = floats((float)low), most = floats((float)high);
    const Floats one = smaller(larger(p, least), most) * scale - a, other = smaller(larger(q, least), most) * scale - b;
    return one * one + other * other;
  }
};

// The squared error of a row: the second half is added to the first, again and again. `scratch` holds half a row. The
// grid is a copy, which no store can change.
static float error_of(const Levels levels, const float* x, int64_t width, float* scratch) {
  int64_t half = divide_up(width, 2);
  each(half, [&](int64_t i, auto left) {
    store(scratch + i, levels.error(load<Floats>(x + i, left), load<Floats>(x + half + i, width - half - i)), left);
  });
  for (int64_t count = half; count > 1; count = half) {
    half = divide_up(count, 2);
    int64_t i = 0;
    for (; i + LANES <= count - half; i += LANES)
      store(scratch + i, load<Floats>(scratch + i) + load<Floats>(scratch + half + i));
    for (; i < count - half; i++) scratch[i] += scratch[half + i];
  }
  return scratch[0];
}

// The grid of a row that has the smallest squared error, of some from its smallest to its largest number, or less: that
// of scalar/tokens.py, to the bit. `scratch` holds a row.
static Levels best_levels(const float* x, int64_t width, int32_t most, float* scratch) {
  Floats above = {}, below = {};
  each(width, [&](int64_t i, auto left) {
    const Floats value = load<Floats>(x + i, left);
    above = larger(value, above);
    below = larger(-value, below);
  });
  const float from = -largest(below), to = largest(above);
  Levels best(from, to, most);
  float least_error = 0.0f;
  static const float shares[] = {1.0f, 0.9f, 0.8f, 0.7f};
  for (const float share : shares) {
    const Levels levels(from * share, to * share, most);
    const float error = error_of(levels, x, width, scratch);
    if (share < 1.0f && !(error < least_error)) continue;
    best = levels;
    least_error = error;
  }
  return best;
}

// The sums of the integers of each group of a row that begins at `to`, eight at a time: as bytes from 0 to 255, two of
// which 16 bits have room for, less 128 each.
static void sum_groups(const Linear& grid, const uint8_t* to, int64_t rows, int32_t* sums) {
  const uint64_t each = 0x0101010101010101, flipped = Isa::OFFSET ? 0 : 128 * each, odd = 0x00ff00ff00ff00ff;
  for (int64_t start = 0; start < grid.in; start += grid.group_size) {
    const int64_t stop = least(start + grid.group_size, grid.in);
    int32_t total = 0;
    for (int64_t k = start; k < stop; k += 8) {  // which never parts what lies together
      const uint8_t* from = to + k / Isa::GROUP * Isa::GROUP * rows + k % Isa::GROUP;
      uint64_t eight = Isa::OFFSET * each;  // zeros
      if (stop - k >= 8) memcpy(&eight, from, 8);
      else memcpy(&eight, from, stop - k);
      eight ^= flipped;
      const uint64_t pairs = (eight & odd) + (eight >> 8 & odd);
      total += (int32_t)(pairs * 0x0001000100010001 >> 48) - 8 * 128;
    }
    *sums++ = total;
  }
}

// The scale of a row of 8 bits, and 1 / scale, of the bits of its largest magnitude.
static inline float scale_of(int32_t most_bits, float& inverse) {
  const float tiny = 1.17549435e-38f;
  float magnitude;
  memcpy(&magnitude, &most_bits, 4);
  const float share = magnitude * (1 / 127.0f), own = share < tiny ? tiny : share;
  inverse = 1.0f / own;
  return own;
}

// Whether `quantize_together` does what `quantize` does.
static inline bool rounds_together(const Linear& grid) {
  return !grid.halves && !grid.factor && !grid.input_scale && grid.input_bits == 8 && groups_of(grid) == 1;
}

// `count` rows onto grids of 8 bits, each with a scale of its own, to rows from `row` on of a tile.
template <int count>
static inline void quantize_together(const float* const (&x)[count], const Linear& grid, uint8_t* tile, int64_t row,
                                     int64_t rows, float* scales, int32_t* sums) {
  Ints most[count] = {};
  each(grid.in, [&](int64_t i, auto left) {
#pragma GCC unroll 5
    for (int r = 0; r < count; r++) most[r] = largest(most[r], bits_of(load<Floats>(x[r] + i, left)) & 0x7fffffff);
  });
  float inverse[count];
#pragma GCC unroll 5
  for (int r = 0; r < count; r++) scales[r] = scale_of(largest(most[r]), inverse[r]);
  Words total[count] = {};
  uint8_t* const to = tile + Isa::GROUP * row;
  each(grid.in, [&](int64_t i, auto left) {
    Floats shifted[count], farthest = {};
#pragma GCC unroll 5
    for (int r = 0; r < count; r++) {
      const Floats quotient = load<Floats>(x[r] + i, left) * inverse[r];
      shifted[r] = quotient + BYTES_FROM;
      const Floats distance = quotient - (shifted[r] - BYTES_FROM);
      farthest = larger((Floats)(bits_of(distance) & 0x7fffffff), farthest);
    }
    if (__builtin_expect(any_above(farthest, 0.49995f), 0)) {
      for (int r = 0; r < count; r++) shifted[r] = load<Floats>(x[r] + i, left) / scales[r] + BYTES_FROM;
    }
    uint8_t* const at = to + i / Isa::GROUP * Isa::GROUP * rows + i % Isa::GROUP;
#pragma GCC unroll 5
    for (int r = 0; r < count; r++) {
      total[r] += (Words)shifted[r];
      store(at + Isa::GROUP * r, low_bytes((Words)shifted[r]), left);
    }
  });
  const Words begun = (Words)floats(BYTES_FROM) * (uint32_t)divide_up(grid.in, LANES);
#pragma GCC unroll 5
  for (int r = 0; r < count; r++) sums[r] = sum(total[r] - begun);
}

// One row onto the grid of a Linear: a scale of its own or a static one. At 8 bits its own is the largest magnitude /
// 127. The integers + OFFSET go to row `row` of a tile of `rows` rows; a NaN makes the scale NaN. Sums are of each
// group of inputs. `scratch` holds two rows, and x may be the first.
static void quantize(const float* x, const Linear& grid, float* scratch, uint8_t* tile, int64_t row, int64_t rows,
                     float* scale, int32_t* sums) {
  const int64_t width = grid.in;
  if (grid.halves) {
    *scale = 1.0f;
    *sums = 0;
    return quantize_halves(x, grid, (uint16_t*)tile, row, rows);
  }
  if (grid.factor) {
    each(width, [&](int64_t i, auto left) {
      store(scratch + i, load<Floats>(x + i, left) * load<Floats>(grid.factor + i, left), left);
    });
    x = scratch;
  }
  Ints most = {};  // magnitudes as integers, where NaN is above Inf and Inf above all numbers
  each(width, [&](int64_t i, auto left) { most = largest(most, bits_of(load<Floats>(x + i, left)) & 0x7fffffff); });
  const int32_t most_bits = largest(most);
  float magnitude;
  memcpy(&magnitude, &most_bits, 4);
  uint8_t* to = tile + Isa::GROUP * row;
  Words total = {};  // of garbage, too, for a row that holds NaN
  if (grid.input_scale > 0) {
    const float fixed = grid.input_scale, inverse = 1.0f / fixed;
    const int32_t half = 1 << (grid.input_bits - 1);
    const Floats bound = floats(1024.0f * fixed);  // beyond every grid, within what `rounded` can do
    each(width, [&](int64_t i, auto left) {
      Floats value = load<Floats>(x + i, left);
      value = value > bound ? bound : value < -bound ? -bound : value;
      Ints q = rounded(value, fixed, inverse) + grid.input_zero;
      q = q < -half ? ints(-half) : q > half - 1 ? ints(half - 1) : q;
      put(q, to, rows, i, left);
      total += (Words)keep(q, left);
    });
    *scale = magnitude != magnitude ? magnitude : fixed;
  } else if (grid.input_bits < 8) {
    const int32_t most = (1 << grid.input_bits) - 1;
    const bool finite = magnitude - magnitude == 0.0f;
    const Levels levels = finite ? best_levels(x, width, most, scratch + width) : Levels(0.0f, 0.0f, most);
    each(width, [&](int64_t i, auto left) {
      const Ints q = levels.of(finite ? load<Floats>(x + i, left) : floats(0.0f));
      put(q, to, rows, i, left);
      total += (Words)q;
    });
    *scale = finite ? levels.scale : magnitude - magnitude;
  } else {
    float inverse;
    const float own = scale_of(most_bits, inverse);
    const int at_once = 4;
    int64_t i = 0;
    for (; i + at_once * LANES <= width; i += at_once * LANES)
      round_some<at_once>(x, i, All(), own, inverse, to, rows, total);
    for (; i < width; i += LANES) round_some<1>(x, i, width - i, own, inverse, to, rows, total);
    total -= (Words)floats(BYTES_FROM) * (uint32_t)(i / LANES);
    *scale = own;
  }
  *sums = sum(total);
  if (groups_of(grid) > 1) sum_groups(grid, to, rows, sums);
}

}  // namespace
