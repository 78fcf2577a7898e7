// Integers of 64 bits in vectors, requantization, and what is done to one row: LayerNorm, rounding to bytes,
// activations. Nothing here or in integer_block.h is a float; fairseq/modules/quantization/integer is the reference,
// bit by bit.
#pragma once

#include "api.h"
#include "gemm.h"
#include "vector.h"

namespace {  // each instruction set has its own

typedef int64_t Longs __attribute__((vector_size(4 * LANES)));
typedef uint64_t LongWords __attribute__((vector_size(4 * LANES)));
typedef int16_t Shorts __attribute__((vector_size(2 * LANES)));

static inline Longs longs(int64_t value) { return value - (Longs){}; }

static inline Ints lane_numbers() {
  Ints numbers;
  for (int lane = 0; lane < LANES; lane++) numbers[lane] = lane;
  return numbers;
}

// Whether a lane of x is above the limit.
static inline bool any_above(Ints x, int32_t limit) {
#if defined(__AVX512F__)
  return _mm512_cmpgt_epi32_mask((__m512i)x, _mm512_set1_epi32(limit)) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8(_mm256_cmpgt_epi32((__m256i)x, _mm256_set1_epi32(limit))) != 0;
#else
  return largest(x) > limit;
#endif
}

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
typedef int32_t WidePairs __attribute__((vector_size(8 * LANES)));

static inline Pairs16 pairs(int16_t value) { return value - (Pairs16){}; }
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

// (a * b) >> 16.
static inline Pairs16 high_product(Pairs16 a, Pairs16 b) {
#if defined(__AVX512F__)
  return (Pairs16)_mm512_mulhi_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Pairs16)_mm256_mulhi_epi16((__m256i)a, (__m256i)b);
#else
  return __builtin_convertvector((__builtin_convertvector(a, WidePairs) * __builtin_convertvector(b, WidePairs)) >> 16,
                                 Pairs16);
#endif
}

// (a * b + 2^14) >> 15, where that fits.
static inline Pairs16 rounded_product(Pairs16 a, Pairs16 b) {
#if defined(__AVX512F__)
  return (Pairs16)_mm512_mulhrs_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Pairs16)_mm256_mulhrs_epi16((__m256i)a, (__m256i)b);
#elif defined(__aarch64__)
  return (Pairs16)vqrdmulhq_s16((int16x8_t)a, (int16x8_t)b);
#else
  const WidePairs product = __builtin_convertvector(a, WidePairs) * __builtin_convertvector(b, WidePairs);
  return __builtin_convertvector((product + (1 << 14)) >> 15, Pairs16);
#endif
}

// The even and the odd ones, widened; and two vectors of integers that fit 16 bits as the even and the odd ones of one.
static inline Ints even_pairs(Pairs16 x) { return (Ints)x << 16 >> 16; }
static inline Ints odd_pairs(Pairs16 x) { return (Ints)x >> 16; }
static inline Pairs16 woven(Ints even, Ints odd) { return (Pairs16)((even & 0xffff) | odd << 16); }

// The lowest byte of each to memory; and four bytes of each column, two of them in each vector, side by side.
typedef uint8_t PairBytes __attribute__((vector_size(2 * LANES)));
static inline PairBytes low_bytes(Pairs16 x) {
#if defined(__AVX512F__)
  return (PairBytes)_mm512_cvtepi16_epi8((__m512i)x);
#else
  return __builtin_convertvector(x & 0xff, PairBytes);
#endif
}
static inline void store_fours(Pairs16 first, Pairs16 second, uint8_t* to) {
#if LANES == 16
  const Pairs16 low = __builtin_shufflevector(first, second, 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8,
                                              40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47);
  const Pairs16 high = __builtin_shufflevector(first, second, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54,
                                               23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63);
#elif LANES == 8
  const Pairs16 low = __builtin_shufflevector(first, second, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const Pairs16 high =
      __builtin_shufflevector(first, second, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#else
  const Pairs16 low = __builtin_shufflevector(first, second, 0, 8, 1, 9, 2, 10, 3, 11);
  const Pairs16 high = __builtin_shufflevector(first, second, 4, 12, 5, 13, 6, 14, 7, 15);
#endif
  store(to, low, All());
  store(to + sizeof(low), high, All());
}

// The sum of integers of 16 bits.
static inline int32_t sum(Pairs16 x) { return sum((Words)(even_pairs(x) + odd_pairs(x))); }

// The largest of numbers of 16 bits without a sign.
static inline int32_t largest_without_sign(Pairs16 x) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  const __m256i half = _mm256_max_epu16(_mm512_castsi512_si256((__m512i)x), _mm512_extracti64x4_epi64((__m512i)x, 1));
#else
  const __m256i half = (__m256i)x;
#endif
  const __m128i eight = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  return 0xffff ^ (_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(eight, _mm_set1_epi32(-1)))) & 0xffff);
#else
  return largest(largest((Ints)((Words)x >> 16), (Ints)x & 0xffff));
#endif
}

// visit(i, vector) for the integers of a row, 2 * LANES at a time, the last ones filled up with zeros.
template <typename Visit>
static inline void each_pairs(const int16_t* z, int64_t count, Visit visit) {
  int64_t i = 0;
  for (; i + 2 * LANES <= count; i += 2 * LANES) visit(i, load<Pairs16>(z + i));
  if (i == count) return;
  int16_t rest[2 * LANES] = {};
  memcpy(rest, z + i, (count - i) * sizeof(*z));
  visit(i, load<Pairs16>(rest));
}

// The largest and the smallest of integers of 16 bits, and 0.
struct Extent {
  Pairs16 high = {}, low = {};
  void take(const int16_t* z, int64_t count) {
    each_pairs(z, count, [&](int64_t, Pairs16 x) {
      high = larger(high, x);
      low = smaller(low, x);
    });
  }
  int32_t highest() const { return largest_without_sign(high); }
  int32_t magnitude() const {  // that of -2^15 is 2^15, without a sign
    typedef uint16_t WordPairs __attribute__((vector_size(4 * LANES)));
    const WordPairs a = (WordPairs)high, b = -(WordPairs)low;
    return largest_without_sign((Pairs16)(a > b ? a : b));
  }
};

// The lowest byte of each, plus what makes bytes of them, to a row of a tile, from `to` on; the last group is written
// whole.
static inline void put(Pairs16 integers, uint8_t* to, int64_t rows, int64_t column, int64_t count) {
  static_assert(2 * LANES <= Isa::GROUP || Isa::GROUP == 16, "they are whole groups, or within one");
  const PairBytes low = low_bytes(integers + (int16_t)Isa::OFFSET);
  if constexpr (2 * LANES <= Isa::GROUP) {
    store(to + column / Isa::GROUP * Isa::GROUP * rows + column % Isa::GROUP, low, All());
  } else {
    typedef uint8_t Group __attribute__((vector_size(16)));
    to += column * rows;
    Group groups[2 * LANES / 16];
    memcpy(groups, &low, sizeof(low));
    for (int64_t g = 0; g < 2 * LANES / 16 && column + 16 * g < count; g++) store(to + 16 * rows * g, groups[g], All());
  }
}

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
  static const bool IN_CHUNKS = true;
  const IntegerLinear& linear;
  ThreadWorkspace& own;
  Piece piece = {};

  static int64_t steps(const Linear& linear) { return steps_of(linear.in); }
  static int64_t pauses(int64_t steps) { return Isa::pauses(steps); }
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
  inline __attribute__((always_inline)) void product(const Rounded&, const Tile& tile, const uint8_t* numbers,
                                                     const uint8_t* panel, int64_t steps, int32_t* sums, bool go_on,
                                                     Pause pause) const {
    product_of<Isa>(linear.small, numbers, panel, tile.rows, steps, sums, go_on, pause);
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

const int32_t TABLE_LIMIT = 1 << 15;  // of the input of an activation, within its table

// What a table of 256 pieces gives for integers of 16 bits, if that fits 16 bits, too.
static inline Pairs16 on_lines(const Lines& lines, Pairs16 t) {
  Pairs16 value, gain;
#if defined(__AVX512F__)
  const __m512i from_0 = _mm512_xor_si512((__m512i)t, _mm512_set1_epi16((short)0x8000)),
                which = _mm512_srli_epi16(from_0, 8);
  const __mmask32 last = _mm512_movepi16_mask(from_0),
                  odd = _mm512_movepi16_mask(_mm512_slli_epi16(from_0, 1));  // of 64
  const auto taken = [&](const int16_t* table) {
    const auto among = [&](int64_t first) {
      return _mm512_permutex2var_epi16(_mm512_loadu_si512(table + first), which,
                                       _mm512_loadu_si512(table + first + 32));
    };
    const __m512i low = _mm512_mask_mov_epi16(among(0), odd, among(64)),
                  high = _mm512_mask_mov_epi16(among(128), odd, among(192));
    return (Pairs16)_mm512_mask_mov_epi16(low, last, high);
  };
  value = taken(lines.values);
  gain = taken(lines.gains);
#else
  const Ints even = entries(lines.both, (even_pairs(t) >> 8) + 128),
             odd = entries(lines.both, (odd_pairs(t) >> 8) + 128);
  value = woven(even, odd);
  gain = woven(even >> 16, odd >> 16);
#endif
  return value + rounded_product(gain, (t & 255) << 7);
}

// Requantizes a vector of columns in 32 bits, where that has room.
struct Requantized32 {
  Ints multiplier, offset, shift, low, high;
  Requantized32() {}
  Requantized32(const Requantize32& of, int64_t column)
      : multiplier(load<Ints>(of.multiplier + column)), offset(load<Ints>(of.offset + column)),
        shift(load<Ints>(of.shift + column)), low(ints(of.low)), high(ints(of.high)) {}
  Ints operator()(Ints x) const { return smaller(larger((x * multiplier + offset) >> shift, low), high); }
};

// An activation, piece by piece, and its result at another scale. Where no input is beyond the table, and all of it
// fits, two vectors are one of 16 bits.
struct IntegerActivated {
  const Lines& lines;
  const Requantize& output;
  const Requantize32& output32;
  int16_t* out;
  int64_t stride, columns;
  struct At {
    static const bool IN_TWOS = true;
    const Lines* lines;
    const Requantize* output;
    bool fits;
    Requantized32 even, odd;
    int64_t column;
    int16_t* out;
    int64_t stride, left;
    void operator()(int64_t row, Ints first, Ints second) const {
      if (left <= 0) return;
      int16_t* const to = out + row * stride;
      if (!fits || any_above(larger(first, second), TABLE_LIMIT - 1)) {
        one(first, column, to, left);
        if (left > LANES) one(second, column + LANES, to + LANES, left - LANES);
        return;
      }
      const Ints lowest = ints(-TABLE_LIMIT);  // below it stands the 0 that the table begins with
      const Pairs16 y = on_lines(*lines, woven(larger(first, lowest), larger(second, lowest)));
      store(to, narrow(even(even_pairs(y))), left);
      if (left > LANES) store(to + LANES, narrow(odd(odd_pairs(y))), left - LANES);
    }
    __attribute__((noinline)) void one(Ints t, int64_t at, int16_t* to, int64_t count) const {
      const Ints inside = between(t, -TABLE_LIMIT, TABLE_LIMIT - 1), entry = entries(lines->both, (inside >> 8) + 128);
      const Ints line = (entry << 16 >> 16) + (((entry >> 16) * (inside & 255) + 128) >> 8);
      const Ints y = t >= TABLE_LIMIT ? t : t < -TABLE_LIMIT ? ints(0) : line;
      store(to, narrow(Requantized(*output, at)(y)), count);
    }
  };
  At at(int64_t column) const {
    At result = {&lines, &output,         output32.multiplier != nullptr, {}, {}, column, out + column,
                 stride, columns - column};
    if (result.fits) {
      result.even = Requantized32(output32, column);
      result.odd = Requantized32(output32, column + LANES);
    }
    return result;
  }
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
static inline void store_integers(int16_t* to, Ints x, Left left) {
  store(to, narrow(x), left);
}
template <typename Left>
static inline void store_integers(int32_t* to, Ints x, Left left) {
  store(to, x, left);
}

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
    const Longs even = shift_right(times((Longs)d, r) + half, count),
                odd = shift_right(times(odd_lanes(d), r) + half, count);
    store_integers(to + i, Requantized(norm.output, i).of(even, odd), left);
  });
}

// Integers z of 16 bits, of a row whose largest magnitude or number is m, times 127 or 255 by m: bytes, less 128 if
// they have no sign. With r = (127 << 23) / m, or (255 << 22) / m, and r = 2^16 high + low, low from -2^15 on, (z * r +
// half) >> bits = (z * high + (z * low >> 16) + (half >> 16)) >> (bits - 16), which fits 16 bits.
struct ToBytes {
  Pairs16 high, low, half;
  int shift;
  bool has_sign;
  ToBytes(int32_t m, bool has_sign) : has_sign(has_sign) {
    const int bits = has_sign ? 23 : 22;
    const int32_t r = ((has_sign ? 127 : 255) << bits) / m, rest = (int16_t)r;
    high = pairs((int16_t)((r - rest) >> 16));
    low = pairs((int16_t)rest);
    shift = bits - 16;
    half = pairs((int16_t)(1 << (shift - 1)));
  }
  Pairs16 operator()(Pairs16 z) const {
    if (!has_sign) z = larger(z, Pairs16{});
    const Pairs16 bytes = (z * high + high_product(z, low) + half) >> shift;
    return has_sign ? bytes : bytes - (int16_t)128;
  }
};

// A row of `count` integers of 16 bits as bytes, which give(column, bytes) takes, 2 * LANES at a time; their scale.
template <typename Give>
static inline int32_t integer_row(const Rows& how, const int16_t* z, int64_t count, Give give) {
  if (how.kind == ROWS_BYTES) {
    if (!how.columns) {
      each_pairs(z, count, give);
      return 1;
    }
    const Pairs16 low = pairs((int16_t)(-128 - how.zero)), high = pairs((int16_t)(127 - how.zero));
    for (int64_t i = 0; i < count; i += 2 * LANES) {
      if (how.alone[i] >= 2 * LANES) {
        give(i, smaller(larger(load<Pairs16>(z + how.columns[i]), low), high) + (int16_t)how.zero);
        continue;
      }
      int16_t bytes[2 * LANES] = {};
      for (int64_t j = i; j < least(count, i + 2 * LANES); j++) {
        const int32_t part = ((z[how.columns[j]] + how.added[j]) >> how.shift[j]) + how.zero;
        bytes[j - i] = (int16_t)(part < -128 ? -128 : part > 127 ? 127 : part);
      }
      give(i, load<Pairs16>(bytes));
    }
    return 1;
  }
  const bool has_sign = how.kind == ROWS_SIGNED;
  Extent extent;
  extent.take(z, count);
  const int32_t m = (int32_t)most(1, has_sign ? extent.magnitude() : extent.highest());
  const ToBytes to_bytes(m, has_sign);
  each_pairs(z, count, [&](int64_t i, Pairs16 x) { give(i, to_bytes(x)); });
  return m;
}

// The same to row `row` of a tile of `rows`.
static inline int32_t integer_row(const Rows& how, const int16_t* z, int64_t count, uint8_t* tile, int64_t row,
                                  int64_t rows) {
  uint8_t* const to = tile + Isa::GROUP * row;
  return integer_row(how, z, count, [&](int64_t i, Pairs16 bytes) { put(bytes, to, rows, i, count); });
}

}  // namespace
