// What is done to one row: LayerNorm, GELU, rounding to integers.
#pragma once

#include "api.h"
#include "vector.h"

// x * (1 + erf(x / sqrt(2))) / 2 = max(x, 0) - g(|x|), g(u) = u * (1 - Phi(u)); g is a polynomial of degree 14 in
// 2 u / 5.5 - 1 on [0, 5.5], its interpolation at Chebyshev's nodes, and below 1.2e-7 beyond. Off by 1.2e-6 at most.
static inline Floats gelu_of(Floats x) {
  static const float g[] = {
      8.194348896e-03f,  -6.058012618e-02f, 1.912505653e-01f, -3.086178868e-01f, 1.794655779e-01f,
      2.598730352e-01f,  -6.340375484e-01f, 4.618007528e-01f, 1.788213130e-01f,  -5.494658837e-01f,
      2.049030888e-01f,  2.368763455e-01f,  -1.686572991e-01f, -3.988635261e-02f, 4.006091723e-02f};
  Floats size = (Floats)(bits_of(x) & 0x7fffffff);
  Floats s = (size > 5.5f ? floats(5.5f) : size) * (2 / 5.5f) - 1.0f;
  Floats value = s * g[14] + g[13];
  for (int power = 12; power >= 0; power--) value = value * s + g[power];
  return (x > 0.0f ? x : x != x ? x : floats(0.0f)) - value;
}

static void gelu(const float* x, int64_t count, float* y) {
  for (int64_t i = 0; i < count; i += LANES) store(y + i, gelu_of(load<Floats>(x + i, count - i)), count - i);
}

// Zeros in the lanes from `count` on.
static inline Floats keep(Floats vector, int64_t count) {
  float copy[LANES];
  store(copy, vector);
  return load<Floats>(copy, count);
}

// y = (x - mean) / sqrt(variance + epsilon) * weight + bias. The row is read three times, from the cache.
static void layer_norm(const float* x, int64_t width, const float* weight, const float* bias, float epsilon, float* y) {
  Floats total = {};
  for (int64_t i = 0; i < width; i += LANES) total += load<Floats>(x + i, width - i);
  float mean = sum(total) / width;
  Floats squares = {};
  for (int64_t i = 0; i < width; i += LANES) {
    Floats from_mean = load<Floats>(x + i, width - i) - mean;
    if (i + LANES > width) from_mean = keep(from_mean, width - i);
    squares += from_mean * from_mean;
  }
  float factor = 1.0f / __builtin_sqrtf(sum(squares) / width + epsilon);
  for (int64_t i = 0; i < width; i += LANES) {
    int64_t left = width - i;
    Floats normal = (load<Floats>(x + i, left) - mean) * factor;
    store(y + i, normal * load<Floats>(weight + i, left) + load<Floats>(bias + i, left), left);
  }
}

// x / scale rounded half to even, as integers: exactly as a division rounds, by a product wherever that is the same.
static inline Ints rounded(Floats x, float scale, float inverse) {
  Floats quotient = x * inverse;
  Floats shifted = quotient + ROUNDER;
  Floats distance = quotient - (shifted - ROUNDER);
  Ints near_half = (Floats)(bits_of(distance) & 0x7fffffff) > 0.4999f;
  if (__builtin_expect(any(near_half), 0)) shifted = x / scale + ROUNDER;
  return bits_of(shifted) - bits_of(floats(ROUNDER));
}

// Writes LANES integers + 128, fewer at the end of a row, as groups of 4 bytes `rows` groups apart.
static inline void scatter(Ints integers, uint8_t* to, int64_t rows, int64_t count) {
  uint8_t bytes[LANES];
  Bytes narrow = __builtin_convertvector((Words)(integers + 128) & 0xff, Bytes);
  memcpy(bytes, &narrow, LANES);
  if (count > LANES) count = LANES;
  for (int64_t i = 0; i < count; i += 4) memcpy(to + i * rows, bytes + i, 4);
}

// One row onto the grid of a Linear: its own scale, the largest magnitude / 127, or a static one. The integers + 128 go
// to row `row` of a tile of `rows` rows; a NaN makes the scale NaN. `scratch` holds a row, and may be x.
static void quantize(const float* x, const Linear& grid, float* scratch, uint8_t* tile, int64_t row, int64_t rows,
                     float* scale, int32_t* sum_of_row) {
  int64_t width = grid.in;
  if (grid.factor) {
    for (int64_t i = 0; i < width; i += LANES) {
      int64_t left = width - i;
      store(scratch + i, load<Floats>(x + i, left) * load<Floats>(grid.factor + i, left), left);
    }
    x = scratch;
  }
  Ints most = {};  // magnitudes as integers, where NaN is above Inf and Inf above all numbers
  for (int64_t i = 0; i < width; i += LANES) most = largest(most, bits_of(load<Floats>(x + i, width - i)) & 0x7fffffff);
  int32_t most_bits = largest(most);
  float magnitude;
  memcpy(&magnitude, &most_bits, 4);
  uint8_t* to = tile + 4 * row;
  Ints total = {};
  if (grid.input_scale > 0) {
    float inverse = 1.0f / grid.input_scale;
    for (int64_t i = 0; i < width; i += LANES) {
      Floats value = load<Floats>(x + i, width - i);
      Floats bound = floats(1024.0f * grid.input_scale);  // beyond every grid, within what `rounded` can do
      value = value > bound ? bound : value < -bound ? -bound : value;
      Ints q = rounded(value, grid.input_scale, inverse) + grid.input_zero;
      q = q < -128 ? ints(-128) : q > 127 ? ints(127) : q;
      scatter(q, to + i * rows, rows, width - i);
      if (i + LANES > width) for (int64_t lane = width - i; lane < LANES; lane++) q[lane] = 0;
      total += q;
    }
    *scale = magnitude != magnitude ? magnitude : grid.input_scale;
  } else {
    const float tiny = 1.17549435e-38f;
    float own = magnitude * (1 / 127.0f);
    own = own < tiny ? tiny : own;
    float inverse = 1.0f / own;
    for (int64_t i = 0; i < width; i += LANES) {
      Ints q = rounded(load<Floats>(x + i, width - i), own, inverse);
      scatter(q, to + i * rows, rows, width - i);
      total += q;
    }
    *scale = own;
  }
  *sum_of_row = sum((Words)total);
}
