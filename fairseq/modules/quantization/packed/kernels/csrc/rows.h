// What is done to one row of floats: norms and activations, with the same bits on every processor.
#pragma once

#include "api.h"
#include "vector.h"

namespace {  // each instruction set has its own

// x * (1 + erf(x / sqrt(2))) / 2 = max(x, 0) - g(|x|), g(u) = u * (1 - Phi(u)). Around each of the integers from 0 to
// 15, g(t / SCALE) is a polynomial of degree 3, its interpolation at Chebyshev's nodes. Beyond 4.8 it is
// g(4.8), 3.8e-6. Off by 4e-6 at most, and 0 at 0.
static inline Floats gelu_of(Floats x) {
  const float SCALE = 3.2270834f, LARGEST = 4.8f, FIRST = 8388608.0f;  // 15.49 / 4.8; 2^23
  // clang-format off
  alignas(64) static const float g0[16] = {
      0, 1.172312051e-01f, 1.659128666e-01f, 1.638773084e-01f, 1.333469450e-01f,
      9.396415949e-02f, 5.855901912e-02f, 3.261594102e-02f, 1.632991619e-02f, 7.374719717e-03f,
      3.010540269e-03f, 1.112462254e-03f, 3.724551643e-04f, 1.130551682e-04f, 3.112660488e-05f,
      7.775700396e-06f};
  alignas(64) static const float g1[16] = {
      1.549410522e-01f, 8.072313666e-02f, 1.972897165e-02f, -1.997588202e-02f, -3.774058819e-02f,
      -3.888125718e-02f, -3.105311096e-02f, -2.084861882e-02f, -1.214598399e-02f, -6.236837246e-03f,
      -2.847787458e-03f, -1.162606291e-03f, -4.258967238e-04f, -1.403485367e-04f, -4.167990483e-05f,
      -1.116976819e-05f};
  alignas(64) static const float g2[16] = {
      -3.839373589e-02f, -3.463766724e-02f, -2.549676783e-02f, -1.415405795e-02f, -4.196827766e-03f,
      2.229364822e-03f, 4.898766987e-03f, 4.903931171e-03f, 3.673507599e-03f, 2.272849204e-03f,
      1.206055516e-03f, 5.591774825e-04f, 2.289501572e-04f, 8.334006998e-05f, 2.709272303e-05f,
      7.890973393e-06f};
  alignas(64) static const float g3[16] = {
      4.579187662e-04f, 2.269402612e-03f, 3.642113879e-03f, 3.730676835e-03f, 2.797667403e-03f,
      1.479162020e-03f, 3.610661952e-04f, -2.821867820e-04f, -4.839178291e-04f, -4.256729153e-04f,
      -2.826028795e-04f, -1.547051943e-04f, -7.237075624e-05f, -2.946519817e-05f, -1.055455778e-05f,
      -3.349594181e-06f};
  // clang-format on
  const Floats size = smaller(floats(LARGEST), (Floats)(bits_of(x) & 0x7fffffff));
  const Floats shifted = fma(size, SCALE, FIRST);  // t, rounded, in its lowest bits
  const Floats f = fma(size, floats(SCALE), FIRST - shifted);
  const Ints which = bits_of(shifted);
  const Floats g =
      fma(fma(fma(entries(g3, which), f, entries(g2, which)), f, entries(g1, which)), f, entries(g0, which));
  return larger(floats(0.0f), x) - g;
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
  each(count,
       [&](int64_t i, auto left) { store(y + i, activated(load<Floats>(x + i, left), (Activation)activation), left); });
}

// Zeros in the lanes from `count` on.
template <typename Vector>
static inline Vector keep(Vector vector, All) {
  return vector;
}
template <typename Vector>
static inline Vector keep(Vector vector, int64_t count) {
  decltype(vector[0] + vector[0]) copy[LANES];
  store(copy, vector);
  return load<Vector>(copy, count);
}

// Rows that are computed beside each other, of `left` that are left: four, or five, so that few are computed alone. One
// where there are not registers enough.
const int MOST_TOGETHER = 5;
static_assert(MOST_TOGETHER <= ROW_COUNT, "each has a row of scratch");
static inline int64_t together(int64_t left) {
  if (LANES < 16 || left < 4) return 1;
  return left % 4 && left >= 5 ? 5 : 4;
}

// Rows `width` wide, which do not wait for each other's sums. They are read three times, from the cache. y may be x.
template <int count>
static inline void norm_rows(const Norm& norm, const float* const (&x)[count], int64_t width,
                             float* const (&y)[count]) {
  float mean[count] = {}, factor[count];
  if (norm.kind == NORM_LAYER) {
    Floats total[count][SPLIT] = {};
    each_part(width, [&](int64_t i, auto left, int part) {
#pragma GCC unroll 5
      for (int r = 0; r < count; r++) total[r][part] += load<Floats>(x[r] + i, left);
    });
#pragma GCC unroll 5
    for (int r = 0; r < count; r++) mean[r] = total_of(total[r]) / width;
  }
  Floats squares[count][SPLIT] = {};
  each_part(width, [&](int64_t i, auto left, int part) {
#pragma GCC unroll 5
    for (int r = 0; r < count; r++) {
      const Floats from_mean = keep(load<Floats>(x[r] + i, left) - mean[r], left);
      squares[r][part] = fma(from_mean, from_mean, squares[r][part]);
    }
  });
#pragma GCC unroll 5
  for (int r = 0; r < count; r++) {
    const float total = total_of(squares[r]);
    if (norm.kind == NORM_L2) {
      const float size = __builtin_sqrtf(total);
      factor[r] = 1.0f / (size > norm.epsilon || size != size ? size : norm.epsilon);
    } else {
      factor[r] = 1.0f / __builtin_sqrtf(total / width + norm.epsilon);
    }
  }
  each(width, [&](int64_t i, auto left) {
    Floats weight = {}, bias = {};
    if (norm.weight) weight = load<Floats>(norm.weight + i, left);
    if (norm.bias) bias = load<Floats>(norm.bias + i, left);
#pragma GCC unroll 5
    for (int r = 0; r < count; r++) {
      Floats normal = (load<Floats>(x[r] + i, left) - mean[r]) * factor[r];
      if (norm.weight && norm.bias) normal = fma(normal, weight, bias);
      else if (norm.weight) normal = normal * weight;
      else if (norm.bias) normal = normal + bias;
      store(y[r] + i, normal, left);
    }
  });
}

static void norm(const Norm& norm, const float* x, int64_t width, float* y) {
  if (norm.kind != NORM_NONE) return norm_rows<1>(norm, {x}, width, {y});
  if (x != y) memcpy(y, x, width * sizeof(float));
}

}  // namespace
