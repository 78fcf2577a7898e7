// What is done to one row: LayerNorm, GELU, rounding to integers.
#pragma once

#include "api.h"
#include "vector.h"

namespace {  // each instruction set has its own

// x * (1 + erf(x / sqrt(2))) / 2 = max(x, 0) - g(|x|), g(u) = u * (1 - Phi(u)); g is a polynomial of degree 14 in
// 2 u / 5.5 - 1 on [0, 5.5], its interpolation at Chebyshev's nodes, and below 1.2e-7 beyond. Off by 1.2e-6 at most.
static inline Floats gelu_of(Floats x) {
  static const float g[] = {
      8.194348896e-03f,  -6.058012618e-02f, 1.912505653e-01f, -3.086178868e-01f, 1.794655779e-01f,
      2.598730352e-01f,  -6.340375484e-01f, 4.618007528e-01f, 1.788213130e-01f,  -5.494658837e-01f,
      2.049030888e-01f,  2.368763455e-01f,  -1.686572991e-01f, -3.988635261e-02f, 4.006091723e-02f};
  const Floats size = (Floats)(bits_of(x) & 0x7fffffff);
  const Floats s = (size > 5.5f ? floats(5.5f) : size) * (2 / 5.5f) - 1.0f, square = s * s;
  Floats even = square * g[14] + g[12], odd = square * g[13] + g[11];  // two chains, each half as long
  for (int power = 10; power >= 2; power -= 2) {
    even = even * square + g[power];
    odd = odd * square + g[power - 1];
  }
  even = even * square + g[0];
  return (x < 0.0f ? floats(0.0f) : x) - (odd * s + even);
}

static void gelu(const float* x, int64_t count, float* y) {
  each(count, [&](int64_t i, auto left) { store(y + i, gelu_of(load<Floats>(x + i, left)), left); });
}

// Zeros in the lanes from `count` on.
static inline Floats keep(Floats vector, All) { return vector; }
static inline Floats keep(Floats vector, int64_t count) {
  float copy[LANES];
  store(copy, vector);
  return load<Floats>(copy, count);
}

// y = (x - mean) / sqrt(variance + epsilon) * weight + bias. The row is read three times, from the cache.
static void layer_norm(const float* x, int64_t width, const float* weight, const float* bias, float epsilon, float* y) {
  Floats total = {}, squares = {};
  each(width, [&](int64_t i, auto left) { total += load<Floats>(x + i, left); });
  const float mean = sum(total) / width;
  each(width, [&](int64_t i, auto left) {
    const Floats from_mean = keep(load<Floats>(x + i, left) - mean, left);
    squares += from_mean * from_mean;
  });
  const float factor = 1.0f / __builtin_sqrtf(sum(squares) / width + epsilon);
  each(width, [&](int64_t i, auto left) {
    const Floats normal = (load<Floats>(x + i, left) - mean) * factor;
    store(y + i, normal * load<Floats>(weight + i, left) + load<Floats>(bias + i, left), left);
  });
}

// x / scale rounded half to even, as integers: exactly as a division rounds, by a product wherever that is the same.
static inline Ints rounded(Floats x, float scale, float inverse) {
  Floats quotient = x * inverse;
  Floats shifted = quotient + ROUNDER;
  Floats distance = quotient - (shifted - ROUNDER);
  if (__builtin_expect(any_above((Floats)(bits_of(distance) & 0x7fffffff), 0.49995f), 0)) shifted = x / scale + ROUNDER;
  return bits_of(shifted) - bits_of(floats(ROUNDER));
}

// Writes integers + 128 as columns from `column` on of a row that begins at `to`.
template <typename Left>
static inline void put(Ints integers, uint8_t* to, int64_t rows, int64_t column, Left left) {
  const Bytes bytes = __builtin_convertvector((Words)(integers + 128) & 0xff, Bytes);
  store(to + column / GROUP * GROUP * rows + column % GROUP, bytes, left);
}

static inline Ints keep(Ints vector, All) { return vector; }
static inline Ints keep(Ints vector, int64_t count) {
  int32_t copy[LANES];
  store(copy, vector);
  return load<Ints>(copy, count);
}

// One row onto the grid of a Linear: its own scale, the largest magnitude / 127, or a static one. The integers + 128 go
// to row `row` of a tile of `rows` rows; a NaN makes the scale NaN. `scratch` holds a row, and may be x.
static void quantize(const float* x, const Linear& grid, float* scratch, uint8_t* tile, int64_t row, int64_t rows,
                     float* scale, int32_t* sum_of_row) {
  const int64_t width = grid.in;
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
  uint8_t* to = tile + GROUP * row;
  Words total = {};  // of garbage, too, for a row that holds NaN
  if (grid.input_scale > 0) {
    const float fixed = grid.input_scale, inverse = 1.0f / fixed;
    const Floats bound = floats(1024.0f * fixed);  // beyond every grid, within what `rounded` can do
    each(width, [&](int64_t i, auto left) {
      Floats value = load<Floats>(x + i, left);
      value = value > bound ? bound : value < -bound ? -bound : value;
      Ints q = rounded(value, fixed, inverse) + grid.input_zero;
      q = q < -128 ? ints(-128) : q > 127 ? ints(127) : q;
      put(q, to, rows, i, left);
      total += (Words)keep(q, left);
    });
    *scale = magnitude != magnitude ? magnitude : fixed;
  } else {
    const float tiny = 1.17549435e-38f;
    const float share = magnitude * (1 / 127.0f), own = share < tiny ? tiny : share, inverse = 1.0f / own;
    each(width, [&](int64_t i, auto left) {
      const Ints q = rounded(load<Floats>(x + i, left), own, inverse);
      put(q, to, rows, i, left);
      total += (Words)q;
    });
    *scale = own;
  }
  *sum_of_row = sum(total);
}

}  // namespace
