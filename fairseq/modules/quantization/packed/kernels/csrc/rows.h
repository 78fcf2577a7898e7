// What is done to one row: norms, activations, rounding to integers or bfloat16, with the same bits on every processor.
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
  const Floats s = fma(smaller(floats(5.5f), size), 2 / 5.5f, -1.0f), square = s * s;
  Floats even = fma(square, g[14], g[12]), odd = fma(square, g[13], g[11]);  // two chains, each half as long
  for (int power = 10; power >= 2; power -= 2) {
    even = fma(even, square, g[power]);
    odd = fma(odd, square, g[power - 1]);
  }
  even = fma(even, square, g[0]);
  return larger(floats(0.0f), x) - fma(odd, s, even);
}

// x / (1 + exp(-z))
static inline Floats times_sigmoid(Floats x, Floats z) {
  const Floats tail = exp_of((Floats)(bits_of(z) | (int32_t)0x80000000));  // e**-|z|
  return x * ((z < 0.0f ? tail : floats(1.0f)) / (tail + 1.0f));
}

static inline Floats activated(Floats x, Activation activation) {
  switch (activation) {
    case GELU: return gelu_of(x);
    case GELU_TANH:  // x * (1 + tanh(u)) / 2 = x / (1 + exp(-2 u)), u = sqrt(2 / pi) * (x + 0.044715 * x**3)
      return times_sigmoid(x, fma(x * x * x, floats(0.044715f), x) * 1.595769122f);
    case GELU_QUICK: return times_sigmoid(x, x * 1.702f);
    case SILU: return times_sigmoid(x, x);
    case RELU: return larger(floats(0.0f), x) + 0.0f;  // no -0, which some compilers keep and some do not
  }
  return x;
}

static void activate(int32_t activation, const float* x, int64_t count, float* y) {
  each(count, [&](int64_t i, auto left) { store(y + i, activated(load<Floats>(x + i, left), (Activation)activation), left); });
}

// Zeros in the lanes from `count` on.
static inline Floats keep(Floats vector, All) { return vector; }
static inline Floats keep(Floats vector, int64_t count) {
  float copy[LANES];
  store(copy, vector);
  return load<Floats>(copy, count);
}

// The row is read three times, from the cache. y may be x.
static void norm(const Norm& norm, const float* x, int64_t width, float* y) {
  float mean = 0.0f, factor = 1.0f;
  if (norm.kind == NORM_LAYER) {
    Floats total[SPLIT] = {};
    each_part(width, [&](int64_t i, auto left, int part) { total[part] += load<Floats>(x + i, left); });
    mean = total_of(total) / width;
  }
  if (norm.kind != NORM_NONE) {
    Floats squares[SPLIT] = {};
    each_part(width, [&](int64_t i, auto left, int part) {
      const Floats from_mean = keep(load<Floats>(x + i, left) - mean, left);
      squares[part] += from_mean * from_mean;
    });
    const float total = total_of(squares), size = __builtin_sqrtf(total);
    if (norm.kind == NORM_L2) factor = 1.0f / (size > norm.epsilon || size != size ? size : norm.epsilon);
    else factor = 1.0f / __builtin_sqrtf(total / width + norm.epsilon);
  }
  each(width, [&](int64_t i, auto left) {
    Floats normal = (load<Floats>(x + i, left) - mean) * factor;
    if (norm.weight) normal = normal * load<Floats>(norm.weight + i, left);
    if (norm.bias) normal = normal + load<Floats>(norm.bias + i, left);
    store(y + i, normal, left);
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

// Writes integers + OFFSET as columns from `column` on of a row that begins at `to`.
template <typename Left>
static inline void put(Ints integers, uint8_t* to, int64_t rows, int64_t column, Left left) {
  const Bytes bytes = __builtin_convertvector((Words)(integers + Isa::OFFSET) & 0xff, Bytes);
  store(to + column / Isa::GROUP * Isa::GROUP * rows + column % Isa::GROUP, bytes, left);
}

static inline Ints keep(Ints vector, All) { return vector; }
static inline Ints keep(Ints vector, int64_t count) {
  int32_t copy[LANES];
  store(copy, vector);
  return load<Ints>(copy, count);
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

// One row, times the factor of a Linear, as bfloat16 to row `row` of a tile of `rows` rows; zeros fill its last group up.
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

// One row onto the grid of a Linear: its own scale, the largest magnitude / 127, or a static one. The integers + OFFSET go
// to row `row` of a tile of `rows` rows; a NaN makes the scale NaN. `scratch` holds a row, and may be x.
static void quantize(const float* x, const Linear& grid, float* scratch, uint8_t* tile, int64_t row, int64_t rows,
                     float* scale, int32_t* sum_of_row) {
  const int64_t width = grid.in;
  if (grid.halves) {
    *scale = 1.0f;
    *sum_of_row = 0;
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
