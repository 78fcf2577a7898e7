// Panels: how a product reads them, in place or unpacked piece by piece, and how its sums become outputs.
#pragma once

#include "api.h"
#include "rounding.h"
#include "vector.h"

namespace {  // each instruction set has its own

// Two codes a byte to one, and to `sums` the sum of each output's codes, as it passes by.
static void unpack(const uint8_t* narrow, int64_t steps, uint8_t* panel, int32_t* sums) {
#if defined(__AVX512VNNI__)
  const __m512i ones = _mm512_set1_epi8(1), mask = _mm512_set1_epi8(15);
  __m512i left = _mm512_loadu_si512(sums), right = _mm512_loadu_si512(sums + 16);
  for (int64_t step = 0; step < steps; step++, narrow += 64, panel += 4 * PANEL) {
    const __m512i both = _mm512_loadu_si512(narrow);
    const __m512i low = _mm512_and_si512(both, mask), high = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
    _mm512_storeu_si512(panel, low);
    _mm512_storeu_si512(panel + 64, high);
    left = _mm512_dpbusd_epi32(left, low, ones);
    right = _mm512_dpbusd_epi32(right, high, ones);
  }
  _mm512_storeu_si512(sums, left);
  _mm512_storeu_si512(sums + 16, right);
#else
  typedef uint8_t Line __attribute__((vector_size(64)));
  typedef uint16_t Pairs __attribute__((vector_size(64)));
  const int64_t most_steps = 1000;  // whose sums of codes up to 15, two at a time, fit 16 bits
  Words totals[PANEL / LANES];
  for (int64_t j = 0; j < PANEL / LANES; j++) totals[j] = load<Words>(sums + LANES * j);
  for (int64_t step = 0; step < steps;) {
    const int64_t stop = least(steps, step + most_steps);
    Pairs partial[2] = {};
    for (; step < stop; step++, narrow += 64, panel += 4 * PANEL) {
      Line both;
      memcpy(&both, narrow, 64);
      const Line low = both & 15, high = both >> 4;
      memcpy(panel, &low, 64);
      memcpy(panel + 64, &high, 64);
      partial[0] += ((Pairs)low & 0xff) + ((Pairs)low >> 8);
      partial[1] += ((Pairs)high & 0xff) + ((Pairs)high >> 8);
    }
    uint32_t pairs[PANEL];
    memcpy(pairs, partial, sizeof(pairs));
    for (int64_t j = 0; j < PANEL / LANES; j++) {
      const Words two = load<Words>(pairs + LANES * j);
      totals[j] += (two & 0xffff) + (two >> 16);
    }
  }
  for (int64_t j = 0; j < PANEL / LANES; j++) store(sums + LANES * j, totals[j]);
#endif
}

// An integer that becomes the lowest bits of such a float is added to it; differences of them are exact.
const float FROM_BIT_0 = 8388608.0f, FROM_BIT_8 = 32768.0f;  // 2^23, 2^15

// Four codes of each lane, a byte each, less a zero that FROM_BIT_0 and FROM_BIT_8 are added to: exactly, as pairs of
// bfloat16. `used` are the bits of a byte that are a code, `flipped` those to be flipped before.
static inline void widen(Words codes, uint32_t used, uint32_t flipped, Floats zero, Floats zero_from_8,
                         Words (&pairs)[2]) {
  const uint32_t low = bits_of(floats(FROM_BIT_0))[0] | flipped, high = bits_of(floats(FROM_BIT_8))[0] | flipped << 8;
#pragma GCC unroll 2
  for (int two = 0; two < 2; two++, codes >>= 16) {
    const Floats even = (Floats)((codes & used) ^ low) - zero, odd = (Floats)((codes & used << 8) ^ high) - zero_from_8;
    pairs[two] = (Words)even >> 16 | (Words)odd;  // of a number of 8 bits, the lower half is zero
  }
}

typedef Group::Zeros Zeros;  // of the outputs of a panel, as `widen` takes them

// Steps of 4 inputs of a panel to bfloat16: [pair of inputs][32][2].
static __attribute__((noinline)) void unpack_halves(const Linear& linear, const uint8_t* codes, int64_t steps,
                                                    const Zeros& zeros, uint16_t* panel) {
  const bool narrow = linear.narrow;
  const uint32_t used = narrow ? 15 : 255, flipped = linear.zero_offset;
  for (const int64_t bytes = step_bytes(linear); steps > 0; steps--, codes += bytes, panel += 4 * PANEL) {
#pragma GCC unroll 2
    for (int64_t j = 0; j < PANEL; j += LANES) {
      const int64_t at = narrow ? j % (PANEL / 2) : j, shift = narrow && at < j ? 4 : 0;
      const Words four = load<Words>(codes + 4 * at) >> (uint32_t)shift;
      Words pairs[2];
      widen(four, used, flipped, load<Floats>(zeros.zero + j), load<Floats>(zeros.zero_from_8 + j), pairs);
      store(panel + 2 * j, pairs[0]);
      store(panel + 2 * (PANEL + j), pairs[1]);
    }
  }
}

// The scales and biases of the outputs of a panel; beyond the last output those of the first.
struct Scaling {
  float scale[PANEL], bias[PANEL];

  // Takes them if all outputs are there, each with one scale of its own; otherwise `of` does.
  bool taken(const Linear& linear, int64_t panel) {
    const int64_t column = panel * PANEL;
    if (linear.out - column < PANEL || linear.scale_step != 1) return false;
    memcpy(scale, linear.scale + column, sizeof(scale));
    if (linear.bias) memcpy(bias, linear.bias + column, sizeof(bias));
    else memset(bias, 0, sizeof(bias));
    return true;
  }

  template <typename Each>
  void of(const Linear& linear, int64_t panel, Each each) {
    const int64_t column = panel * PANEL, columns = linear.out - column;
    for (int64_t j = 0; j < PANEL; j++) {
      const int64_t n = column + (j < columns ? j : 0), s = n * linear.scale_step;
      scale[j] = linear.scale[s];
      bias[j] = linear.bias ? linear.bias[n] : 0.0f;
      each(j, n, s);
    }
  }
};

// The rounded numbers of rows, in tiles; scales and sums are of integers.
struct Rounded {
  const uint8_t* bytes;
  int64_t stride;
  const float* scales;
  const int32_t* sums;
};

// Where the product finds a panel: in place, or unpacked piece by piece while the piece before is multiplied.
struct Piece {
  const uint8_t* panel;  // what the product reads
  const uint8_t* codes;  // what is to be unpacked yet
  uint8_t* to;
  int64_t left;  // steps of 4 inputs
  int turn;      // which of two buffers it is in
};

// The product of an instruction set, by its faster one where codes are from -15 to 15 and there is one.
template <typename Own, typename Pause>
static inline __attribute__((always_inline)) void product_of(bool narrow, const uint8_t* tile, const uint8_t* panel,
                                                             int64_t rows, int64_t steps, int32_t* sums, bool go_on,
                                                             Pause pause) {
  if constexpr (Own::FAST_NARROW) {
    if (narrow) {
      pause();
      return Own::narrow_product(tile, panel, rows, steps, sums);
    }
  }
  Own::product(tile, panel, rows, steps, sums, go_on, pause);
}

// Integers: y = ((sum - zero point's share) * scale) * scale of the row + bias, each operation rounded once. It is the
// order that every kernel of this library has, in whatever language.
struct InIntegers {
  typedef int32_t Sum;
  typedef Linear Layer;
  static const bool IN_CHUNKS = true;  // whether long reductions may be cut into chunks
  const Linear& linear;
  ThreadWorkspace& own;
  Piece piece = {};
  int32_t code_sums[PANEL] = {};  // of a panel that is unpacked

  static int64_t steps(const Linear& linear) { return steps_of(linear.in); }
  static int64_t pauses(int64_t steps) { return Isa::pauses(steps); }

  // What comes next: steps from `start` on. What came before has been unpacked.
  void begin(int64_t panel, int64_t start, int64_t count) {
    piece.codes = linear.panels + panel * panel_bytes(linear) + start * step_bytes(linear);
    if (!linear.narrow) {
      piece.panel = piece.codes;
      return;
    }
    if (start == 0) memset(code_sums, 0, sizeof(code_sums));
    piece.turn = 1 - piece.turn;
    piece.panel = piece.to = own.panel[piece.turn];
    piece.left = count;
  }
  void unpack_some(int64_t steps) { unpack_into(steps, code_sums); }
  void unpack_into(int64_t steps, int32_t* sums) {
    unpack(piece.codes, steps, piece.to, sums);
    piece.codes += steps * step_bytes(linear);
    piece.to += steps * 4 * PANEL;
    piece.left -= steps;
  }

  struct Columns : Scaling {
    int32_t zero[PANEL], offset[PANEL];
    struct Lanes {
      Words zeros, offsets;
      Floats scale, bias;
      Floats operator()(const int32_t* sums, const Rounded& x, int64_t row) const {
        // As words: the sum of a row that holds NaN is garbage, and its product may overflow.
        const Ints total = (Ints)(load<Words>(sums) - offsets - zeros * (uint32_t)x.sums[row]);
        return __builtin_convertvector(total, Floats) * scale * x.scales[row] + bias;
      }
    };
    Lanes lanes(int64_t j) const {
      return {load<Words>(zero + j), load<Words>(offset + j), load<Floats>(scale + j), load<Floats>(bias + j)};
    }
  };
  // After its last piece has been unpacked.
  void finish(int64_t panel, Columns& columns) const {
    if (columns.taken(linear, panel)) {
      const int32_t offset = linear.zero_offset, *const sums = linear.narrow ? code_sums : linear.sums + panel * PANEL;
      const uint8_t* const zeros = linear.zero + panel * PANEL;
      for (int64_t j = 0; j < PANEL; j += LANES) {
        store(columns.zero + j, __builtin_convertvector(load<Bytes>(zeros + j), Ints) - offset);
        store(columns.offset + j, load<Ints>(sums + j) * Isa::OFFSET);
      }
      return;
    }
    columns.of(linear, panel, [&](int64_t j, int64_t n, int64_t s) {
      columns.zero[j] = (int32_t)linear.zero[s] - linear.zero_offset;
      columns.offset[j] = Isa::OFFSET * (linear.narrow ? code_sums[j] : linear.sums[n]);
    });
  }

  template <typename Pause>
  inline __attribute__((always_inline)) void product(const Rounded&, const Tile& tile, const uint8_t* numbers,
                                                     const uint8_t* panel, int64_t steps, int32_t* sums, bool go_on,
                                                     Pause pause) const {
    product_of<Isa>(linear.narrow, numbers, panel, tile.rows, steps, sums, go_on, pause);
  }
};

// Numbers in bfloat16, and codes less their zeros, which bfloat16 holds exactly: y = sum * scale + bias.
struct InHalves {
  typedef float Sum;
  typedef Linear Layer;
  static const bool IN_CHUNKS = true;
  const Linear& linear;
  ThreadWorkspace& own;
  Piece piece = {};
  Zeros zeros = {};

  static int64_t steps(const Linear& linear) { return round_up(linear.in, HALVES) / 2; }  // of two inputs
  static int64_t pauses(int64_t steps) { return Isa::pauses(steps); }

  void begin(int64_t panel, int64_t start, int64_t count) {
    if (start == 0) set_zeros(linear, panel, 0, zeros);
    begin_piece(linear, own, panel, start, count, piece);
  }
  static void begin_piece(const Linear& linear, const ThreadWorkspace& own, int64_t panel, int64_t start, int64_t count,
                          Piece& piece) {
    piece.codes = linear.panels + panel * panel_bytes(linear) + start / 2 * step_bytes(linear);
    piece.turn = 1 - piece.turn;
    piece.panel = piece.to = own.panel[piece.turn];
    piece.left = most(0, least(count / 2, steps_of(linear.in) - start / 2));
    memset(piece.to + piece.left * 8 * PANEL, 0,
           (count - 2 * piece.left) * 4 * PANEL);  // there may be less than a group
  }
  static void set_zeros(const Linear& linear, int64_t panel, int64_t group, Zeros& of) {
    const int64_t columns = linear.out - panel * PANEL;
    for (int64_t j = 0; j < PANEL; j++) {
      const float zero = linear.zero[(panel * PANEL + (j < columns ? j : 0)) * linear.scale_step + group];
      of.zero[j] = FROM_BIT_0 + zero;
      of.zero_from_8[j] = FROM_BIT_8 + zero;
    }
  }
  void unpack_some(int64_t steps) { unpack_piece(linear, piece, steps, zeros); }
  static void unpack_piece(const Linear& linear, Piece& piece, int64_t steps, const Zeros& of) {
    unpack_halves(linear, piece.codes, steps, of, (uint16_t*)piece.to);
    piece.codes += steps * step_bytes(linear);
    piece.to += steps * 8 * PANEL;
    piece.left -= steps;
  }

  struct Columns : Scaling {
    struct Lanes {
      Floats scale, bias;
      Floats operator()(const float* sums, const Rounded&, int64_t) const { return load<Floats>(sums) * scale + bias; }
    };
    Lanes lanes(int64_t j) const { return {load<Floats>(scale + j), load<Floats>(bias + j)}; }
  };
  void finish(int64_t panel, Columns& columns) const {
    if (!columns.taken(linear, panel)) columns.of(linear, panel, [](int64_t, int64_t, int64_t) {});
  }

  template <typename Pause>
  static inline __attribute__((always_inline)) void product(const Rounded&, const Tile& tile, const uint8_t* numbers,
                                                            const uint8_t* panel, int64_t steps, float* sums,
                                                            bool go_on, Pause pause) {
    Isa::half_product((const uint16_t*)numbers, (const uint16_t*)panel, tile.rows, steps, sums, go_on, pause);
  }
};

}  // namespace
