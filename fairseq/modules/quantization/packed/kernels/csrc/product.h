// Products of a tile of rows and a panel of 32 outputs, of bytes and of bfloat16, and what follows them.
#pragma once

#include "api.h"
#include "rows.h"
#include "vector.h"

#if defined(__AVX512VNNI__) || defined(__AVX2__)
#include <immintrin.h>
#endif

extern "C" double fairseq_seconds();

namespace {  // each instruction set has its own

template <int... I>
struct Numbers {};
template <int N, int... I>
struct Count : Count<N - 1, N - 1, I...> {};
template <int... I>
struct Count<0, I...> {
  typedef Numbers<I...> type;
};

#if defined(__AVX512VNNI__)

// All sums of a tile stay in registers. As intrinsics over an array gcc 12 keeps them on the stack, at a third of the
// speed; as one instruction of assembly each, over an array that only constants index, it does not.
inline __attribute__((always_inline)) void add_products(const uint8_t (&x)[4], __m512i first, __m512i second,
                                                        __m512i& left, __m512i& right) {
  __m512i four;
  asm("vpbroadcastd %1, %0" : "=v"(four) : "m"(x));
  asm("vpdpbusd %2, %1, %0" : "+v"(left) : "v"(four), "v"(first));
  asm("vpdpbusd %2, %1, %0" : "+v"(right) : "v"(four), "v"(second));
}

template <int... I>
static inline __attribute__((always_inline)) void product_of(const uint8_t* tile, const uint8_t* panel, int64_t steps,
                                                             int32_t* sums, Numbers<I...>) {
  const int rows = sizeof...(I);
  __m512i left[rows], right[rows];
  ((left[I] = right[I] = _mm512_setzero_si512()), ...);
  for (int64_t step = 0; step < steps; step += 4, tile += GROUP * rows) {
#pragma GCC unroll 4
    for (int64_t four = 0; four < GROUP; four += 4, panel += 4 * PANEL) {
      const __m512i first = _mm512_loadu_si512(panel), second = _mm512_loadu_si512(panel + 64);
      (add_products(*(const uint8_t(*)[4])(tile + GROUP * I + four), first, second, left[I], right[I]), ...);
    }
  }
  ((_mm512_storeu_si512(sums + PANEL * I, left[I]), _mm512_storeu_si512(sums + PANEL * I + 16, right[I])), ...);
}

#else

// Four products of bytes per lane and step: exact, unlike AVX2's own, which saturates at 16 bits.
static inline Ints dot4(const uint8_t* x, const uint8_t* weights, Ints sums) {
#if defined(__AVXVNNI__)
  int32_t four;
  memcpy(&four, x, 4);
  return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sums, _mm256_set1_epi32(four), _mm256_loadu_si256((const __m256i*)weights));
#elif defined(__AVX2__)
  int32_t four;
  memcpy(&four, x, 4);
  __m256i wide = _mm256_cvtepu8_epi16(_mm_set1_epi32(four));
  __m256i low = _mm256_madd_epi16(wide, _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)weights)));
  __m256i high = _mm256_madd_epi16(wide, _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(weights + 16))));
  return sums + (Ints)_mm256_permute4x64_epi64(_mm256_hadd_epi32(low, high), 0xd8);
#else
  for (int lane = 0; lane < LANES; lane++)
    for (int k = 0; k < 4; k++) sums[lane] += x[k] * (int8_t)weights[4 * lane + k];
  return sums;
#endif
}

template <int... I>
static inline __attribute__((always_inline)) void product_of(const uint8_t* tile, const uint8_t* panel, int64_t steps,
                                                             int32_t* sums, Numbers<I...>) {
  const int rows = sizeof...(I);
  for (int64_t column = 0; column < PANEL; column += LANES) {
    Ints total[rows] = {};
    for (int64_t step = 0; step < steps; step++) {
      const uint8_t* weights = panel + 4 * (PANEL * step + column);
      ((total[I] = dot4(tile + step / 4 * GROUP * rows + GROUP * I + step % 4 * 4, weights, total[I])), ...);
    }
    ((store(sums + PANEL * I + column, total[I])), ...);
  }
}

#endif

const int64_t HALVES = GROUP / 2;  // numbers of bfloat16 in a group

#if defined(__AVX512BF16__)
inline __attribute__((always_inline)) void add_half_products(const uint16_t (&x)[2], __m512i first, __m512i second,
                                                             __m512& left, __m512& right) {
  __m512i two;
  asm("vpbroadcastd %1, %0" : "=v"(two) : "m"(x));
  asm("vdpbf16ps %2, %1, %0" : "+v"(left) : "v"(two), "v"(first));
  asm("vdpbf16ps %2, %1, %0" : "+v"(right) : "v"(two), "v"(second));
}
#else
inline __attribute__((always_inline)) void add_half_products(const uint16_t* x, Floats even, Floats odd, Floats& total) {
  const uint32_t low = (uint32_t)x[0] << 16, high = (uint32_t)x[1] << 16;
  float x_even, x_odd;
  memcpy(&x_even, &low, 4);
  memcpy(&x_odd, &high, 4);
  total = total + even * x_even + odd * x_odd;
}
#endif

// Products of bfloat16 pairs, summed in float: out[row][column] of `stride` floats a row.
template <int... I>
static inline __attribute__((always_inline)) void half_product_of(const uint16_t* tile, const uint16_t* panel,
                                                                  int64_t steps, float* out, int64_t stride,
                                                                  Numbers<I...>) {
  const int rows = sizeof...(I);
#if defined(__AVX512BF16__)
  __m512 left[rows], right[rows];
  ((left[I] = right[I] = _mm512_setzero_ps()), ...);
  for (int64_t step = 0; step < steps; step += 4, tile += HALVES * rows) {
#pragma GCC unroll 4
    for (int64_t two = 0; two < HALVES; two += 2, panel += 2 * PANEL) {
      const __m512i first = _mm512_loadu_si512(panel), second = _mm512_loadu_si512(panel + 32);
      (add_half_products(*(const uint16_t(*)[2])(tile + HALVES * I + two), first, second, left[I], right[I]), ...);
    }
  }
  ((_mm512_storeu_ps(out + stride * I, left[I]), _mm512_storeu_ps(out + stride * I + 16, right[I])), ...);
#else
  for (int64_t column = 0; column < PANEL; column += LANES) {
    Floats total[rows] = {};
    for (int64_t step = 0; step < steps; step++) {
      Words pairs = load<Words>((const uint32_t*)(panel + 2 * (PANEL * step + column)));
      Floats even = (Floats)(pairs << 16), odd = (Floats)(pairs & 0xffff0000u);
      (add_half_products(tile + step / 4 * HALVES * rows + HALVES * I + step % 4 * 2, even, odd, total[I]), ...);
    }
    ((store(out + stride * I + column, total[I])), ...);
  }
#endif
}

template <int rows>
static __attribute__((noinline)) void product_rows(const uint8_t* tile, const uint8_t* panel, int64_t steps, int32_t* sums) {
  product_of(tile, panel, steps, sums, typename Count<rows>::type());
}

template <int rows>
static __attribute__((noinline)) void half_product_rows(const uint16_t* tile, const uint16_t* panel, int64_t steps,
                                                        float* out, int64_t stride) {
  half_product_of(tile, panel, steps, out, stride, typename Count<rows>::type());
}

static void product(const uint8_t* tile, const uint8_t* panel, int64_t rows, int64_t steps, int32_t* sums) {
  switch (rows) {
#define ROWS(n) case n: return product_rows<n>(tile, panel, steps, sums)
    ROWS(1); ROWS(2); ROWS(3); ROWS(4); ROWS(5); ROWS(6); ROWS(7);
    ROWS(8); ROWS(9); ROWS(10); ROWS(11); ROWS(12); ROWS(13); ROWS(14);
#undef ROWS
  }
}

static void half_product(const uint16_t* tile, const uint16_t* panel, int64_t rows, int64_t steps, float* out,
                         int64_t stride) {
  switch (rows) {
#define ROWS(n) case n: return half_product_rows<n>(tile, panel, steps, out, stride)
    ROWS(1); ROWS(2); ROWS(3); ROWS(4); ROWS(5); ROWS(6); ROWS(7);
    ROWS(8); ROWS(9); ROWS(10); ROWS(11); ROWS(12); ROWS(13); ROWS(14);
#undef ROWS
  }
}

// Two codes a byte to one, and the sum of each output's codes, as it passes by.
void unpack(const uint8_t* narrow, int64_t steps, uint8_t* panel, int32_t* sums) {
  typedef uint8_t Line __attribute__((vector_size(64)));
#if defined(__AVX512VNNI__)
  __m512i left = _mm512_setzero_si512(), right = left;
  const __m512i ones = _mm512_set1_epi8(1);
#else
  Ints totals[PANEL / LANES] = {};
  const uint8_t ones[4] = {1, 1, 1, 1};
#endif
  for (int64_t step = 0; step < steps; step++, narrow += 64, panel += 128) {
    Line both;
    memcpy(&both, narrow, 64);
    Line low = both & 15, high = both >> 4;
    memcpy(panel, &low, 64);
    memcpy(panel + 64, &high, 64);
#if defined(__AVX512VNNI__)
    left = _mm512_dpbusd_epi32(left, (__m512i)low, ones);
    right = _mm512_dpbusd_epi32(right, (__m512i)high, ones);
#else
    for (int64_t j = 0; j < PANEL / LANES; j++) totals[j] = dot4(ones, panel + 4 * LANES * j, totals[j]);
#endif
  }
#if defined(__AVX512VNNI__)
  _mm512_storeu_si512(sums, left);
  _mm512_storeu_si512(sums + 16, right);
#else
  for (int64_t j = 0; j < PANEL / LANES; j++) store(sums + LANES * j, totals[j]);
#endif
}

// Adds the time since the last call to a stage.
static inline void lap(ThreadWorkspace& own, Stage stage) {
  if (__builtin_expect(own.stages == nullptr, 1)) return;
  double now = fairseq_seconds();
  own.stages[stage] += now - own.started;
  own.started = now;
}

int64_t panel_bytes(const Linear& linear) { return steps_of(linear.in) * 4 * PANEL / (linear.narrow ? 2 : 1); }

// y = x @ W.T + bias of the own tiles for the panels first ... last - 1; `epilogue` takes each tile's results:
// epilogue(tile, column)(i, y), the outputs from `column` on of row i of the tile, zeros or nonsense beyond the last one.
// `next_layer` is what is multiplied next, or null.
// `integers`, `stride` bytes a row, `scales` and `sums` are of the rows from `first_row` on.
template <typename Epilogue>
static inline void multiply(const Linear& linear, const uint8_t* integers, int64_t stride, const float* scales,
                            const int32_t* sums, int64_t first_row, const Tile* tiles, int64_t tile_count, int64_t first, int64_t last,
                            const Linear* next_layer, ThreadWorkspace& own, Epilogue epilogue) {
  const int64_t steps = steps_of(linear.in), bytes = panel_bytes(linear);
  for (int64_t panel = first; panel < last; panel++) {
    const int64_t column = panel * PANEL, columns = linear.out - column;
    const uint8_t* codes = linear.panels + panel * bytes;
    float scale[PANEL], bias[PANEL];
    int32_t zero[PANEL], sum[PANEL], offset[PANEL];
    if (linear.narrow) {
      unpack(codes, steps, own.panel, sum);
      codes = own.panel;
      lap(own, STAGE_UNPACK);
    }
    for (int64_t j = 0; j < PANEL; j++) {
      const int64_t n = column + (j < columns ? j : 0), s = n * linear.scale_step;
      scale[j] = linear.scale[s];
      bias[j] = linear.bias ? linear.bias[n] : 0.0f;
      zero[j] = (int32_t)linear.zero[s] - linear.zero_offset;
      offset[j] = 128 * (linear.narrow ? sum[j] : linear.sums[n]);
    }
    for (int64_t t = 0; t < tile_count; t++) {
      const Tile& tile = tiles[t];
      const int64_t row = tile.row - first_row;
      // Each tile has its share of the next panel brought from memory.
      const int64_t coming = panel + 1 < last ? bytes : next_layer ? panel_bytes(*next_layer) : 0;
      const uint8_t* from = panel + 1 < last ? linear.panels + (panel + 1) * bytes : next_layer ? next_layer->panels : nullptr;
      for (int64_t at = coming * t / tile_count; at < coming * (t + 1) / tile_count; at += ALIGNMENT)
        __builtin_prefetch(from + at, 0, 2);
      product(integers + row * stride, codes, tile.rows, steps, own.accumulators);
      lap(own, STAGE_PRODUCT);
      for (int64_t j = 0; j < PANEL; j += LANES) {
        const Words zeros = load<Words>(zero + j), offsets = load<Words>(offset + j);
        const Floats scaled = load<Floats>(scale + j), added = load<Floats>(bias + j);
        const auto put = epilogue(tile, column + j);
        for (int64_t i = 0; i < tile.rows; i++) {
          // As words: the sum of a row that holds NaN is garbage, and its product may overflow.
          const Ints total = (Ints)(load<Words>(own.accumulators + PANEL * i + j) - offsets - zeros * (uint32_t)sums[row + i]);
          put(i, __builtin_convertvector(total, Floats) * scaled * scales[row + i] + added);
        }
      }
      lap(own, STAGE_EPILOGUE);
    }
  }
}

// Whole rows of results to (rows, linear.out): y, GELU of y, or residual + y.
static void linear_before(const Linear& linear, const Linear* next_layer, const SharedWorkspace& shared, ThreadWorkspace& own, int64_t first,
                        int64_t last, bool with_gelu, const float* residual, float* out) {
  auto epilogue = [&](const Tile& tile, int64_t column) {
    return [=, &linear, &tile](int64_t i, Floats y) {
      const int64_t at = (tile.row + i) * linear.out + column, left = linear.out - column;
      if (left <= 0) return;
      if (with_gelu) y = gelu_of(y);
      if (residual) y = y + load<Floats>(residual + at, left);
      store(out + at, y, left);
    };
  };
  multiply(linear, shared.integers, shared.stride, shared.scales, shared.sums, 0, own.tiles, own.tile_count, first, last, next_layer, own, epilogue);
}

static void linear(const Linear& layer, const SharedWorkspace& shared, ThreadWorkspace& own, int64_t first, int64_t last, bool with_gelu,
                   const float* residual, float* out) {
  linear_before(layer, nullptr, shared, own, first, last, with_gelu, residual, out);
}

}  // namespace
