// Integers of 64 bits in vectors, requantization, and what is done to one row: LayerNorm, rounding to bytes, activations.
// Nothing here or in integer_block.h is a float; fairseq/modules/quantization/integer is the reference, bit by bit.
#pragma once

#include "api.h"
#include "gemm.h"
#include "vector.h"

namespace {  // each instruction set has its own

typedef int64_t Longs __attribute__((vector_size(4 * LANES)));
typedef uint64_t LongWords __attribute__((vector_size(4 * LANES)));
typedef int16_t Shorts __attribute__((vector_size(2 * LANES)));

static inline Longs longs(int64_t value) { return value - (Longs){}; }

// The even lanes of 32 bits are the low halves of lanes of 64; these are the odd ones.
static inline Longs odd_lanes(Ints x) { return (Longs)((LongWords)x >> 32); }

// Products of the low halves, which have a sign.
static inline Longs times(Longs a, Longs b) {
#if defined(__AVX512F__)
  return (Longs)_mm512_mul_epi32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Longs)_mm256_mul_epi32((__m256i)a, (__m256i)b);
#elif defined(__aarch64__)
  return (Longs)vmull_s32(vmovn_s64((int64x2_t)a), vmovn_s64((int64x2_t)b));
#else
  return (Longs){(int64_t)(int32_t)a[0] * (int32_t)b[0], (int64_t)(int32_t)a[1] * (int32_t)b[1]};
#endif
}

// The same without a sign.
static inline Longs times_words(Longs a, Longs b) {
#if defined(__AVX512F__)
  return (Longs)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Longs)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__aarch64__)
  return (Longs)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b));
#else
  return (Longs)(((LongWords)a & 0xffffffff) * ((LongWords)b & 0xffffffff));
#endif
}

// The high halves of even and odd lanes, as they lay.
static inline Ints high_halves(Longs even, Longs odd) {
#if defined(__AVX512F__)
  return (Ints)_mm512_mask_shuffle_epi32((__m512i)odd, 0x5555, (__m512i)even, (_MM_PERM_ENUM)0xf5);
#elif defined(__AVX2__)
  return (Ints)_mm256_blend_epi32(_mm256_shuffle_epi32((__m256i)even, 0xf5), (__m256i)odd, 0xaa);
#elif defined(__aarch64__)
  return (Ints)vtrn2q_s32((int32x4_t)even, (int32x4_t)odd);
#else
  return __builtin_shufflevector((Ints)even, (Ints)odd, 1, 5, 3, 7);
#endif
}

// x >> count, for abs(x) < 2^62: few processors shift lanes of 64 bits with their sign.
static inline Longs shift_right(Longs x, int64_t count) {
#if defined(__AVX512F__)
  return (Longs)_mm512_sra_epi64((__m512i)x, _mm_cvtsi64_si128(count));
#else
  const int64_t above = (int64_t)1 << 62;
  return (Longs)((LongWords)(x + above) >> (uint64_t)count) - (above >> count);
#endif
}

static inline Ints smaller(Ints a, Ints b) {
#if defined(__AVX512F__)
  return (Ints)_mm512_min_epi32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Ints)_mm256_min_epi32((__m256i)a, (__m256i)b);
#else
  return a < b ? a : b;
#endif
}

static inline Ints larger(Ints a, Ints b) {
#if defined(__AVX512F__)
  return (Ints)_mm512_max_epi32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Ints)_mm256_max_epi32((__m256i)a, (__m256i)b);
#else
  return a > b ? a : b;
#endif
}

static inline Ints between(Ints x, int32_t low, int32_t high) { return smaller(larger(x, ints(low)), ints(high)); }

// Products of numbers of 16 bits that are not negative, or small enough.
static inline Ints times_shorts(Ints a, Ints b) {
#if defined(__AVX512F__)
  return (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
  return a * b;
#endif
}

// Integers of 16 bits, widened; and back, those that fit.
static inline Ints wide(Shorts x) {
#if defined(__AVX512F__)
  return (Ints)_mm512_cvtepi16_epi32((__m256i)x);
#elif defined(__AVX2__)
  return (Ints)_mm256_cvtepi16_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, Ints);
#endif
}

static inline Shorts narrow(Ints x) {
#if defined(__AVX512F__)
  return (Shorts)_mm512_cvtepi32_epi16((__m512i)x);
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packs_epi32((__m256i)x, (__m256i)x);
  return (Shorts)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return __builtin_convertvector(x, Shorts);
#endif
}

// Twice as many integers of 16 bits.
typedef int16_t Pairs16 __attribute__((vector_size(4 * LANES)));
static inline Pairs16 larger(Pairs16 a, Pairs16 b) {
#if defined(__AVX512F__)
  return (Pairs16)_mm512_max_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Pairs16)_mm256_max_epi16((__m256i)a, (__m256i)b);
#else
  return a > b ? a : b;
#endif
}
static inline Pairs16 smaller(Pairs16 a, Pairs16 b) {
#if defined(__AVX512F__)
  return (Pairs16)_mm512_min_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Pairs16)_mm256_min_epi16((__m256i)a, (__m256i)b);
#else
  return a < b ? a : b;
#endif
}

// The largest and the smallest of integers of 16 bits, and 0.
struct Extent {
  Pairs16 high = {}, low = {};
  void take(const int16_t* z, int64_t count) {
    int64_t i = 0;
    for (; i + 2 * LANES <= count; i += 2 * LANES) {
      const Pairs16 x = load<Pairs16>(z + i);
      high = larger(high, x);
      low = smaller(low, x);
    }
    if (i == count) return;
    int16_t rest[2 * LANES] = {};
    memcpy(rest, z + i, (count - i) * sizeof(*z));
    high = larger(high, load<Pairs16>(rest));
    low = smaller(low, load<Pairs16>(rest));
  }
  // Those of 16 bits are the high halves of 32, and the low ones shifted there.
  int32_t highest() const { return largest(larger((Ints)high >> 16, (Ints)high << 16 >> 16)); }
  int32_t magnitude() const {
    return largest(larger(larger((Ints)high >> 16, (Ints)high << 16 >> 16), -smaller((Ints)low >> 16, (Ints)low << 16 >> 16)));
  }
};

// The entries of a table that the lanes name.
static inline Ints entries(const int32_t* table, Ints which) {
#if defined(__AVX512F__)
  return (Ints)_mm512_i32gather_epi32((__m512i)which, table, 4);
#elif defined(__AVX2__)
  return (Ints)_mm256_i32gather_epi32(table, (__m256i)which, 4);
#else
  Ints result;
  for (int lane = 0; lane < LANES; lane++) result[lane] = table[which[lane]];
  return result;
#endif
}

// Requantizes a vector of columns.
struct Requantized {
  Ints multiplier, shift, low, high;
  Longs even, odd;  // offsets
  int32_t lift;

  Requantized() {}
  Requantized(const Requantize& of, int64_t column)
      : multiplier(load<Ints>(of.multiplier + column)), shift(load<Ints>(of.shift + column)), low(ints(of.low)),
        high(ints(of.high)), lift(of.lift) {
    const Longs first = load<Longs>(of.offset + column), second = load<Longs>(of.offset + column + LANES / 2);
#if LANES == 16
    even = __builtin_shufflevector(first, second, 0, 2, 4, 6, 8, 10, 12, 14);
    odd = __builtin_shufflevector(first, second, 1, 3, 5, 7, 9, 11, 13, 15);
#elif LANES == 8
    even = __builtin_shufflevector(first, second, 0, 2, 4, 6);
    odd = __builtin_shufflevector(first, second, 1, 3, 5, 7);
#else
    even = __builtin_shufflevector(first, second, 0, 2);
    odd = __builtin_shufflevector(first, second, 1, 3);
#endif
  }
  Ints operator()(Ints x) const { return by(x, multiplier); }
  Ints operator()(Ints x, int32_t m) const { return by(x, multiplier * m); }
  // Of lanes of 64 bits whose low halves are x; their high ones may be anything.
  Ints of(Longs x_even, Longs x_odd) const {
    const Longs a = times((Longs)((LongWords)x_even << (uint64_t)lift), (Longs)multiplier) + even;
    const Longs b = times((Longs)((LongWords)x_odd << (uint64_t)lift), odd_lanes(multiplier)) + odd;
    return smaller(larger(high_halves(a, b) >> shift, low), high);
  }

 private:
  Ints by(Ints x, Ints factor) const {
    x <<= lift;
    const Longs a = times((Longs)x, (Longs)factor) + even, b = times(odd_lanes(x), odd_lanes(factor)) + odd;
    return smaller(larger(high_halves(a, b) >> shift, low), high);
  }
};

// Products of bytes whose sums become integers of another scale.
struct InBytes {
  typedef int32_t Sum;
  typedef IntegerLinear Layer;
  const IntegerLinear& linear;
  ThreadWorkspace& own;
  Piece piece = {};

  static int64_t steps(const Linear& linear) { return steps_of(linear.in); }
  void begin(int64_t panel, int64_t start, int64_t) {
    piece.panel = linear.panels + panel * panel_bytes(linear) + start * step_bytes(linear);
  }
  void unpack_some(int64_t) {}

  struct Columns {
    Requantized by[PANEL / LANES];
    int32_t offset[PANEL];
    struct Lanes {
      Requantized by;
      Words offsets;
      Ints operator()(const int32_t* sums, const Rounded& x, int64_t row) const {
        return by((Ints)(load<Words>(sums) - offsets), x.sums[row]);
      }
    };
    Lanes lanes(int64_t j) const { return {by[j / LANES], load<Words>(offset + j)}; }
  };
  void finish(int64_t panel, Columns& columns) const {
    for (int64_t j = 0; j < PANEL / LANES; j++) columns.by[j] = Requantized(linear.output, panel * PANEL + LANES * j);
    for (int64_t j = 0; j < PANEL; j++) {
      const int64_t n = panel * PANEL + j;
      columns.offset[j] = n < linear.out ? (Isa::OFFSET - linear.centre) * linear.sums[n] : 0;
    }
  }

  template <typename Pause>
  static inline __attribute__((always_inline)) void product(const uint8_t* tile, const uint8_t* panel, int64_t rows, int64_t steps,
                                                            int32_t* sums, bool go_on, Pause pause) {
    Isa::product(tile, panel, rows, steps, sums, go_on, pause);
  }
};

// Where results of a layer go: rows of 16 or 32 bits.
template <typename Element>
struct IntegerRows {
  Element* out;
  int64_t stride, columns;
  struct At {
    Element* out;
    int64_t stride, left;
    void operator()(int64_t row, Ints y) const {
      if (left <= 0) return;
      if constexpr (sizeof(Element) == 2) store(out + row * stride, narrow(y), left);
      else store(out + row * stride, y, left);
    }
  };
  At at(int64_t column) const { return {out + column, stride, columns - column}; }
};

const int32_t STREAM_LIMIT = 1 << 21;  // of 22 bits

// Added to the residual stream, which saturates.
struct IntegerAdded {
  int32_t* stream;
  int64_t columns;
  struct At {
    int32_t* stream;
    int64_t columns, left;
    void operator()(int64_t row, Ints y) const {
      if (left <= 0) return;
      int32_t* const to = stream + row * columns;
      store(to, between(load<Ints>(to, left) + y, -STREAM_LIMIT, STREAM_LIMIT - 1), left);
    }
  };
  At at(int64_t column) const { return {stream + column, columns, columns - column}; }
};

// An activation, piece by piece, and its result at another scale.
struct IntegerActivated {
  const int32_t* table;
  const Requantize& output;
  int16_t* out;
  int64_t stride, columns;
  struct At {
    const int32_t* table;
    Requantized by;
    int16_t* out;
    int64_t stride, left;
    void operator()(int64_t row, Ints t) const {
      if (left <= 0) return;
      const int32_t limit = 1 << 15;
      const Ints inside = between(t, -limit, limit - 1), entry = entries(table, (inside >> 8) + 128);
      const Ints line = (entry << 16 >> 16) + (((entry >> 16) * (inside & 255) + 128) >> 8);
      const Ints y = t >= limit ? t : t < -limit ? ints(0) : line;
      store(out + row * stride, narrow(by(y)), left);
    }
  };
  At at(int64_t column) const { return {table, Requantized(output, column), out + column, stride, columns - column}; }
};

// The roots of what begins with 8 bits, 64 to 255, in the middle: right to 8 bits.
struct FirstRoots {
  uint32_t root[256] = {};
  constexpr FirstRoots() {
    for (int64_t top = 64, root = 8192; top < 256; top++) {
      while ((root + 1) * (root + 1) <= (top << 20) + (1 << 19)) root++;
      this->root[top] = (uint32_t)root;
    }
  }
};

// floor(sqrt(x)), 2^60 <= x < 2^62: two steps of Newton's method, and one unit if it was too large.
static inline int64_t integer_root(int64_t x) {
  static constexpr FirstRoots first;
  int64_t root = (int64_t)first.root[x >> 54] << 17;
  root = (root + x / root) >> 1;
  root = (root + x / root) >> 1;
  return root - (root * root > x);
}

static inline int64_t divide_down(int64_t a, int64_t b) {  // rounded down, b > 0
  const int64_t quotient = a / b;
  return quotient - (a % b < 0);
}

static inline int64_t total_of(Longs x) {
  int64_t total = 0;
  for (int lane = 0; lane < LANES / 2; lane++) total += x[lane];
  return total;
}
static inline int64_t total_of(Ints x) {
  int64_t total = 0;
  for (int lane = 0; lane < LANES; lane++) total += x[lane];
  return total;
}

template <typename Left>
static inline void store_integers(int16_t* to, Ints x, Left left) { store(to, narrow(x), left); }
template <typename Left>
static inline void store_integers(int32_t* to, Ints x, Left left) { store(to, x, left); }

// LayerNorm of a row of the residual stream: integers of 16 bits; or of up to 24 bits, which may lie where it lay.
template <typename To>
static void integer_norm(const IntegerNorm& norm, const int32_t* h, int64_t width, To* to) {
  const int64_t few = 256 * LANES;  // whose sums, by lane, fit 32 bits
  int64_t total = 0;
  for (int64_t first = 0; first < width; first += few) {
    Ints sums = {};
    each(least(few, width - first), [&](int64_t i, auto left) { sums += load<Ints>(h + first + i, left); });
    total += total_of(sums);
  }
  const int32_t mean = (int32_t)divide_down(2 * total + width, 2 * width);
  Longs squares = {};
  each(width, [&](int64_t i, auto left) {
    const Ints d = keep(load<Ints>(h + i, left) - mean, left);
    const Longs odd = odd_lanes(d);
    squares += times((Longs)d, (Longs)d) + times(odd, odd);
  });
  const int64_t v = total_of(squares) + norm.epsilon;
  const int j = (62 - (64 - __builtin_clzll(v))) >> 1;
  const int64_t root = integer_root(v << 2 * j), count = 37 - j;
  const Longs r = longs((((int64_t)1 << 61) - 1) / root), half = longs((int64_t)1 << (count - 1));
  each(width, [&](int64_t i, auto left) {
    const Ints d = load<Ints>(h + i, left) - mean;
    const Longs even = shift_right(times((Longs)d, r) + half, count), odd = shift_right(times(odd_lanes(d), r) + half, count);
    store_integers(to + i, Requantized(norm.output, i).of(even, odd), left);
  });
}

// A row of `count` integers of 16 bits as bytes, which give(column, bytes, columns left) takes; their scale.
template <typename Give>
static inline int32_t integer_row(const Rows& how, const int16_t* z, int64_t count, Give give) {
  if (how.kind == ROWS_BYTES) {
    each(count, [&](int64_t i, auto left) {
      Ints byte = {};
      if (how.columns) {
        for (int64_t j = 0; j < LANES && i + j < count; j++)
          byte[j] = (z[how.columns[i + j]] + how.added[i + j]) >> how.shift[i + j];
        byte = between(byte + how.zero, -128, 127);
      } else {
        byte = wide(load<Shorts>(z + i, left));
      }
      give(i, byte, left);
    });
    return 1;
  }
  const bool has_sign = how.kind == ROWS_SIGNED;
  Extent extent;
  extent.take(z, count);
  const int32_t m = (int32_t)most(1, has_sign ? extent.magnitude() : extent.highest()), bits = has_sign ? 23 : 22, r = ((has_sign ? 127 : 255) << bits) / m;
  const int32_t half = 1 << (bits - 1), less = has_sign ? 0 : 128;
  each(count, [&](int64_t i, auto left) {
    Ints x = wide(load<Shorts>(z + i, left));
    if (!has_sign) x = larger(x, ints(0));
    give(i, ((x * r + half) >> bits) - less, left);
  });
  return m;
}

// The same to row `row` of a tile of `rows`.
static inline int32_t integer_row(const Rows& how, const int16_t* z, int64_t count, uint8_t* tile, int64_t row, int64_t rows) {
  uint8_t* const to = tile + Isa::GROUP * row;
  return integer_row(how, z, count, [&](int64_t i, Ints bytes, auto left) { put(bytes, to, rows, i, left); });
}

}  // namespace
