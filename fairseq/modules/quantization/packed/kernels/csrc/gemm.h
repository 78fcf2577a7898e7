// Products of rows and the panels of a Linear, and what is done with their sums.
#pragma once

#include "api.h"
#include "rows.h"
#include "vector.h"

extern "C" double fairseq_seconds();

namespace {  // each instruction set has its own

// Adds the time since the last call to a stage.
static inline void lap(ThreadWorkspace& own, Stage stage) {
  if (__builtin_expect(own.stages == nullptr, 1)) return;
  const double now = fairseq_seconds();
  own.stages[stage] += now - own.started;
  own.started = now;
}

static inline void wait(const Crew& crew, ThreadWorkspace& own) {
  if (crew.members > 1) fairseq_wait(crew.barrier, crew.members);
  lap(own, STAGE_WAIT);
}

// The part of `count` things that is a member's: [first, last).
struct Share {
  int64_t first, last;
  Share(int64_t count, const Crew& crew)
      : first(count * crew.member / crew.members), last(count * (crew.member + 1) / crew.members) {}
};

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
static inline void widen(Words codes, uint32_t used, uint32_t flipped, Floats zero, Floats zero_from_8, Words (&pairs)[2]) {
  const uint32_t low = bits_of(floats(FROM_BIT_0))[0] | flipped, high = bits_of(floats(FROM_BIT_8))[0] | flipped << 8;
#pragma GCC unroll 2
  for (int two = 0; two < 2; two++, codes >>= 16) {
    const Floats even = (Floats)((codes & used) ^ low) - zero, odd = (Floats)((codes & used << 8) ^ high) - zero_from_8;
    pairs[two] = (Words)even >> 16 | (Words)odd;  // of a number of 8 bits, the lower half is zero
  }
}

// The zeros of the outputs of a panel, as `widen` takes them.
struct Zeros {
  float zero[PANEL], zero_from_8[PANEL];
};

// Steps of 4 inputs of a panel to bfloat16: [pair of inputs][32][2].
static __attribute__((noinline)) void unpack_halves(const uint8_t* codes, int64_t steps, bool narrow, uint32_t flipped,
                                                    const Zeros& zeros, uint16_t* panel) {
  const uint32_t used = narrow ? 15 : 255;
  for (; steps > 0; steps--, codes += 4 * PANEL / (narrow ? 2 : 1), panel += 4 * PANEL) {
#pragma GCC unroll 2
    for (int64_t j = 0; j < PANEL; j += LANES) {
      const Words four = narrow ? load<Words>(codes + 4 * (j % (PANEL / 2))) >> (j < PANEL / 2 ? 0 : 4) : load<Words>(codes + 4 * j);
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
  int64_t left;          // steps of 4 inputs
  int turn;              // which of two buffers it is in
};

// Integers: y = ((sum - zero point's share) * scale) * scale of the row + bias, each operation rounded once. It is the
// order that every kernel of this library has, in whatever language.
struct ByIntegers {
  typedef int32_t Sum;
  const Linear& linear;
  ThreadWorkspace& own;
  Piece piece = {};
  int32_t code_sums[PANEL] = {};  // of a panel that is unpacked

  static int64_t steps(const Linear& linear) { return steps_of(linear.in); }

  // What comes next: steps from `start` on. What came before has been unpacked.
  void begin(int64_t panel, int64_t start, int64_t count) {
    piece.codes = linear.panels + panel * panel_bytes(linear) + start * 4 * PANEL / (linear.narrow ? 2 : 1);
    if (!linear.narrow) {
      piece.panel = piece.codes;
      return;
    }
    if (start == 0) memset(code_sums, 0, sizeof(code_sums));
    piece.turn = 1 - piece.turn;
    piece.panel = piece.to = own.panel[piece.turn];
    piece.left = count;
  }
  void unpack_some(int64_t steps) {
    unpack(piece.codes, steps, piece.to, code_sums);
    piece.codes += steps * 2 * PANEL;
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
    columns.of(linear, panel, [&](int64_t j, int64_t n, int64_t s) {
      columns.zero[j] = (int32_t)linear.zero[s] - linear.zero_offset;
      columns.offset[j] = Isa::OFFSET * (linear.narrow ? code_sums[j] : linear.sums[n]);
    });
  }

  template <typename Pause>
  static inline __attribute__((always_inline)) void product(const uint8_t* tile, const uint8_t* panel, int64_t rows, int64_t steps,
                                                            int32_t* sums, bool go_on, Pause pause) {
    Isa::product(tile, panel, rows, steps, sums, go_on, pause);
  }
};

// Numbers in bfloat16, and codes less their zeros, which bfloat16 holds exactly: y = sum * scale + bias.
struct ByHalves {
  typedef float Sum;
  const Linear& linear;
  ThreadWorkspace& own;
  Piece piece = {};
  Zeros zeros = {};

  static int64_t steps(const Linear& linear) { return round_up(linear.in, HALVES) / 2; }  // of two inputs

  void begin(int64_t panel, int64_t start, int64_t count) {
    const int64_t columns = linear.out - panel * PANEL;
    for (int64_t j = 0; start == 0 && j < PANEL; j++) {
      const float zero = linear.zero[(panel * PANEL + (j < columns ? j : 0)) * linear.scale_step];
      zeros.zero[j] = FROM_BIT_0 + zero;
      zeros.zero_from_8[j] = FROM_BIT_8 + zero;
    }
    piece.codes = linear.panels + panel * panel_bytes(linear) + start / 2 * 4 * PANEL / (linear.narrow ? 2 : 1);
    piece.turn = 1 - piece.turn;
    piece.panel = piece.to = own.panel[piece.turn];
    piece.left = most(0, least(count / 2, steps_of(linear.in) - start / 2));
    memset(piece.to + piece.left * 8 * PANEL, 0, (count - 2 * piece.left) * 4 * PANEL);  // there may be less than a group
  }
  void unpack_some(int64_t steps) {
    unpack_halves(piece.codes, steps, linear.narrow, linear.zero_offset, zeros, (uint16_t*)piece.to);
    piece.codes += steps * 4 * PANEL / (linear.narrow ? 2 : 1);
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
    columns.of(linear, panel, [](int64_t, int64_t, int64_t) {});
  }

  template <typename Pause>
  static inline __attribute__((always_inline)) void product(const uint8_t* tile, const uint8_t* panel, int64_t rows, int64_t steps,
                                                            float* sums, bool go_on, Pause pause) {
    Isa::half_product((const uint16_t*)tile, (const uint16_t*)panel, rows, steps, sums, go_on, pause);
  }
};

// Which tiles are multiplied with which panels: [from, to) and [first, last).
struct Region {
  const Tile* tiles;
  int64_t from, to, first, last;
};

// y = x @ W.T + bias of a region. Results are taken by epilogue.at(column), for a vector of columns, and what that
// returns: at(row, y) for each row; beyond the last output y is anything. `coming` is multiplied next, from panel
// `coming_first` on, or null. What is done with one tile's sums runs in the pauses of the next tile's product, if the
// instruction set has any: tiles multiply by themselves.
template <typename Way, typename Epilogue>
static inline void multiply_by(const Linear& linear, const Rounded& x, const Region& region, const Linear* coming,
                               int64_t coming_first, ThreadWorkspace& own, const Epilogue& epilogue) {
  typedef decltype(epilogue.at(0)) At;
  typedef typename Way::Sum Sum;
  struct Pending {
    typename Way::Columns columns;
    At at[PANEL / LANES];
  };
  const int64_t steps = Way::steps(linear), bytes = panel_bytes(linear), tile_count = region.to - region.from;
  if (tile_count <= 0 || region.first >= region.last) return;
  union Both {  // constructed by assignment
    Pending pending[2];
    Both() {}
    ~Both() {}
  } both;
  const auto finish = [&](const Pending& pending, const Tile& tile, const Sum* sums, int64_t from, int64_t to) {
#pragma GCC unroll 2
    for (int64_t j = 0; j < PANEL / LANES; j++) {
      const auto lanes = pending.columns.lanes(LANES * j);
      for (int64_t i = from; i < to; i++)
        pending.at[j](tile.row + i, lanes(sums + PANEL * i + LANES * j, x, tile.row + i));
    }
  };
  // Long reductions are cut into chunks, so that a chunk of the panel stays in the first cache while tiles pass.
  const int64_t chunk = tile_count < TILES_AT_ONCE ? Isa::chunk(steps) : steps, chunks = divide_up(steps, chunk);
  const int64_t buffers = chunks > 1 ? tile_count + 1 : 2, buffer = Isa::ROWS * PANEL;
  struct {
    const Tile* tile;  // whose sums are complete, and have not become outputs; or null
    const Sum* sums;
    int panel;
  } waiting = {};
  int64_t first_buffer = 0;
  Way way = {linear, own};
  Piece& piece = way.piece;
  way.begin(region.first, 0, least(chunk, steps));
  for (int64_t panel = region.first; panel < region.last; panel++) {
    const int now = panel % 2;
    const bool more = panel + 1 < region.last;
    const int64_t following = more ? bytes : coming ? panel_bytes(*coming) : 0;
    const uint8_t* next = more ? linear.panels + (panel + 1) * bytes : coming ? coming->panels + coming_first * panel_bytes(*coming) : nullptr;
    for (int64_t c = 0; c < chunks; c++) {
      const int64_t start = c * chunk, count = least(chunk, steps - start), pauses = Isa::pauses(count);
      if (piece.left) {
        way.unpack_some(piece.left);
        lap(own, STAGE_UNPACK);
      }
      const uint8_t* const codes = piece.panel;
      if (c + 1 < chunks) {
        way.begin(panel, start + count, least(chunk, steps - start - count));
      } else {  // the panel before the last one has been finished: its place is free
        way.finish(panel, both.pending[now].columns);
        for (int64_t j = 0; j < PANEL / LANES; j++) both.pending[now].at[j] = epilogue.at(panel * PANEL + LANES * j);
        if (more) way.begin(panel + 1, 0, least(chunk, steps));
      }
      const int64_t unpacked = divide_up(piece.left, tile_count * pauses);  // in a pause
      for (int64_t t = 0; t < tile_count; t++) {
        const Tile& tile = region.tiles[region.from + t];
        Sum* const sums = (Sum*)own.accumulators + (first_buffer + t) % buffers * buffer;
        const int64_t rows = waiting.tile ? waiting.tile->rows : 0, share = divide_up(rows, pauses);
        int64_t done = 0;
        const auto some = [&](int64_t more_rows) {
          finish(both.pending[waiting.panel], *waiting.tile, waiting.sums, done, least(done + more_rows, rows));
          done += more_rows;
        };
        // Each product has its share of the next panel brought from memory, a bit in each pause.
        const int64_t turn = c * tile_count + t, turns = chunks * tile_count;
        const uint8_t *fetch = next + following * turn / turns, *const fetched = next + following * (turn + 1) / turns;
        const int64_t lines = divide_up(fetched - fetch, ALIGNMENT * pauses) * ALIGNMENT;
        const auto pause = [&] {
          for (const uint8_t* stop = least(fetch + lines, fetched); fetch < stop; fetch += ALIGNMENT) __builtin_prefetch(fetch, 0, 2);
          if (done < rows) some(share);
          if (piece.left) way.unpack_some(least(unpacked, piece.left));
        };
        const uint8_t* numbers = x.bytes + tile.row * x.stride + start * 4 * tile.rows;
        Way::product(numbers, codes, tile.rows, count, sums, c > 0, pause);
        lap(own, STAGE_PRODUCT);
        if (done < rows) some(rows);
        lap(own, STAGE_EPILOGUE);
        if (c + 1 < chunks) waiting.tile = nullptr;
        else waiting = {&tile, sums, now};
      }
    }
    first_buffer = (first_buffer + tile_count) % buffers;
  }
  if (waiting.tile) finish(both.pending[waiting.panel], *waiting.tile, waiting.sums, 0, waiting.tile->rows);
  lap(own, STAGE_EPILOGUE);
}

template <typename Epilogue>
static inline void multiply(const Linear& linear, const Rounded& x, const Region& region, const Linear* coming,
                            int64_t coming_first, ThreadWorkspace& own, const Epilogue& epilogue) {
  if (linear.halves) multiply_by<ByHalves>(linear, x, region, coming, coming_first, own, epilogue);
  else multiply_by<ByIntegers>(linear, x, region, coming, coming_first, own, epilogue);
}

// Rows of floats: y, or what an activation makes of it.
template <typename Activate>
struct ToRows {
  float* out;
  int64_t stride, columns;
  Activate activate;
  struct At {
    float* out;
    int64_t stride, left;
    Activate activate;
    void operator()(int64_t row, Floats y) const {
      if (left > 0) store(out + row * stride, activate(y), left);
    }
  };
  At at(int64_t column) const { return {out + column, stride, columns - column, activate}; }
};

struct AsItIs {
  Floats operator()(Floats y) const { return y; }
};

template <Activation activation>
struct Activated {
  Floats operator()(Floats y) const { return activated(y, activation); }
};

// Calls with(Activated<...>), or with AsItIs for -1: one loop for each activation, not a choice in the loop.
template <typename With>
static inline void with_activation(int32_t activation, With with) {
  switch (activation) {
    case GELU: return with(Activated<GELU>());
    case GELU_TANH: return with(Activated<GELU_TANH>());
    case GELU_QUICK: return with(Activated<GELU_QUICK>());
    case SILU: return with(Activated<SILU>());
    case RELU: return with(Activated<RELU>());
    default: return with(AsItIs());
  }
}

// Multiplies what stands there already.
struct Multiplied {
  float* out;
  int64_t stride, columns;
  struct At {
    float* out;
    int64_t stride, left;
    void operator()(int64_t row, Floats y) const {
      float* to = out + row * stride;
      if (left > 0) store(to, load<Floats>(to, left) * y, left);
    }
  };
  At at(int64_t column) const { return {out + column, stride, columns - column}; }
};

// residual + scale * y, to rows that may lie elsewhere: those of which the number is -1 nowhere.
struct Added {
  const float *residual, *scale;  // scale may be null
  float* out;
  int64_t columns;
  const int32_t* rows;  // or null
  struct At {
    const float *residual, *scale;
    float* out;
    int64_t columns, left;
    const int32_t* rows;
    void operator()(int64_t row, Floats y) const {
      const int64_t to = rows ? rows[row] : row;
      if (left <= 0 || to < 0) return;
      if (scale) y = y * load<Floats>(scale, left);
      store(out + to * columns, load<Floats>(residual + to * columns, left) + y, left);
    }
  };
  At at(int64_t column) const {
    return {residual + column, scale ? scale + column : nullptr, out + column, columns, columns - column, rows};
  }
};

static void linear(const Linear& layer, const SharedWorkspace& shared, ThreadWorkspace& own, int64_t from, int64_t to,
                   int64_t first, int64_t last, int32_t activation, const float* residual, float* out) {
  const Rounded x = {shared.integers, row_bytes(layer, Isa::GROUP), shared.scales, shared.sums};
  const Region region = {shared.tiles, from, to, first, last};
  if (residual) return multiply(layer, x, region, nullptr, 0, own, Added{residual, nullptr, out, layer.out, nullptr});
  with_activation(activation, [&](auto activate) {
    multiply(layer, x, region, nullptr, 0, own, ToRows<decltype(activate)>{out, layer.out, layer.out, activate});
  });
}

}  // namespace
