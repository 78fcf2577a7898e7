// Products of rows and the panels of a Linear, and what is done with their sums.
#pragma once

#include <type_traits>

#include "api.h"
#include "groups.h"
#include "panels.h"
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

// Which tiles are multiplied with which panels: [from, to) and [first, last).
struct Region {
  const Tile* tiles;
  int64_t from, to, first, last;
};

// Whether an epilogue takes two vectors of columns at once.
template <typename At, typename = void>
struct InTwos : std::false_type {};
template <typename At>
struct InTwos<At, std::void_t<decltype(At::IN_TWOS)>> : std::true_type {};

// Gives `at` its rows of a vector of columns: at(row, y_of(row)) for each, or all of them for one that takes them so.
template <typename At, typename YOf>
static inline __attribute__((always_inline)) auto take(const At& at, int64_t first, int64_t last, YOf y_of)
    -> decltype(at.take(first, last, y_of)) {
  at.take(first, last, y_of);
}
template <typename At, typename YOf>
static inline __attribute__((always_inline)) auto take(const At& at, int64_t first, int64_t last, YOf y_of)
    -> decltype(at(first, y_of(first))) {
  for (int64_t row = first; row < last; row++) at(row, y_of(row));
}

// y = x @ W.T + bias of a region. Results are taken by epilogue.at(column), for a vector of columns, and what that
// returns, see `take`; beyond the last output y is anything. `coming` is multiplied next, from panel `coming_first` on,
// or null. What is done with one tile's sums runs in the pauses of the next tile's product, if the instruction set has
// any: tiles multiply by themselves.
template <typename Arithmetic, typename Epilogue>
static inline void multiply_in(const typename Arithmetic::Layer& linear, const Rounded& x, const Region& region,
                               const Linear* coming, int64_t coming_first, ThreadWorkspace& own,
                               const Epilogue& epilogue) {
  typedef decltype(epilogue.at(0)) At;
  typedef typename Arithmetic::Sum Sum;
  struct Pending {
    typename Arithmetic::Columns columns;
    At at[PANEL / LANES];
  };
  const int64_t steps = Arithmetic::steps(linear), bytes = panel_bytes(linear), tile_count = region.to - region.from;
  if (tile_count <= 0 || region.first >= region.last) return;
  union Both {  // constructed by assignment
    Pending pending[2];
    Both() {}
    ~Both() {}
  } both;
  const auto finish = [&](const Pending& pending, const Tile& tile, const Sum* sums, int64_t from, int64_t to) {
    if constexpr (InTwos<At>::value) {
      for (int64_t j = 0; j < PANEL / LANES; j += 2) {
        const auto first = pending.columns.lanes(LANES * j), second = pending.columns.lanes(LANES * (j + 1));
        const At at = pending.at[j];
        for (int64_t i = from; i < to; i++) {
          const Sum* own_sums = sums + PANEL * i + LANES * j;
          at(tile.row + i, first(own_sums, x, tile.row + i), second(own_sums + LANES, x, tile.row + i));
        }
      }
    } else {
#pragma GCC unroll 2
      for (int64_t j = 0; j < PANEL / LANES; j++) {
        const auto lanes = pending.columns.lanes(LANES * j);
        const At at = pending.at[j];
        take(at, tile.row + from, tile.row + to,
             [&](int64_t row) { return lanes(sums + PANEL * (row - tile.row) + LANES * j, x, row); });
      }
    }
  };
  // Long reductions are cut into chunks, so that a chunk of the panel stays in the first cache while tiles pass.
  const bool cut = Arithmetic::IN_CHUNKS && tile_count < TILES_AT_ONCE;
  const int64_t chunk = cut ? Isa::chunk(steps) : steps, chunks = divide_up(steps, chunk);
  const int64_t buffers = chunks > 1 ? tile_count + 1 : 2, buffer = Isa::ROWS * PANEL;
  struct {
    const Tile* tile;  // whose sums are complete, and have not become outputs; or null
    const Sum* sums;
    int panel;
  } waiting = {};
  int64_t first_buffer = 0;
  Arithmetic panels = {linear, own};
  Piece& piece = panels.piece;
  panels.begin(region.first, 0, least(chunk, steps));
  for (int64_t panel = region.first; panel < region.last; panel++) {
    const int now = panel % 2;
    const bool more = panel + 1 < region.last;
    const int64_t following = more ? bytes : coming ? panel_bytes(*coming) : 0;
    const uint8_t* next = more     ? linear.panels + (panel + 1) * bytes
                          : coming ? coming->panels + coming_first * panel_bytes(*coming)
                                   : nullptr;
    for (int64_t c = 0; c < chunks; c++) {
      const int64_t start = c * chunk, count = least(chunk, steps - start), pauses = panels.pauses(count);
      if (piece.left) {
        panels.unpack_some(piece.left);
        lap(own, STAGE_UNPACK);
      }
      const uint8_t* const codes = piece.panel;
      if (c + 1 < chunks) {
        panels.begin(panel, start + count, least(chunk, steps - start - count));
      } else {  // the panel before the last one has been finished: its place is free
        panels.finish(panel, both.pending[now].columns);
        for (int64_t j = 0; j < PANEL / LANES; j++) both.pending[now].at[j] = epilogue.at(panel * PANEL + LANES * j);
        if (more) panels.begin(panel + 1, 0, least(chunk, steps));
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
          for (const uint8_t* stop = least(fetch + lines, fetched); fetch < stop; fetch += ALIGNMENT)
            __builtin_prefetch(fetch, 0, 2);
          if (done < rows) some(share);
          if (piece.left) panels.unpack_some(least(unpacked, piece.left));
        };
        const uint8_t* numbers = x.bytes + tile.row * x.stride + start * 4 * tile.rows;
        panels.product(x, tile, numbers, codes, count, sums, c > 0, pause);
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
  if (linear.group_size) multiply_in<InGroups>(linear, x, region, coming, coming_first, own, epilogue);
  else if (linear.halves) multiply_in<InHalves>(linear, x, region, coming, coming_first, own, epilogue);
  else multiply_in<InIntegers>(linear, x, region, coming, coming_first, own, epilogue);
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
    template <typename YOf>
    void take(int64_t first, int64_t last, YOf y_of) const {
      if (left < LANES) {
        for (int64_t row = first; left > 0 && row < last; row++) store(out + row * stride, activate(y_of(row)), left);
        return;
      }
      float* to = out + first * stride;
      for (int64_t row = first; row < last; row++, to += stride) store(to, activate(y_of(row)));
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
    template <typename YOf>
    void take(int64_t first, int64_t last, YOf y_of) const {
      if (left < LANES || rows) {
        for (int64_t row = first; left > 0 && row < last; row++) {
          const int64_t to = rows ? rows[row] : row;
          if (to < 0) continue;
          const Floats y = y_of(row), added = scale ? y * load<Floats>(scale, left) : y;
          store(out + to * columns, load<Floats>(residual + to * columns, left) + added, left);
        }
      } else if (scale) {
        const Floats by = load<Floats>(scale);
        add_whole(first, last, [&](int64_t row) { return y_of(row) * by; });
      } else {
        add_whole(first, last, y_of);
      }
    }
    template <typename YOf>
    void add_whole(int64_t first, int64_t last, YOf y_of) const {
      const float* from = residual + first * columns;
      float* to = out + first * columns;
      for (int64_t row = first; row < last; row++, from += columns, to += columns)
        store(to, load<Floats>(from) + y_of(row));
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
