// Attention, a head and a tile of queries at a time: bfloat16 products, softmax in float, nothing of tokens x tokens.
//
// queries  [head][image][tile of an image's tokens], as the integers of a product: a group of each row, then the next
// keys     [image][head][32 tokens][pair of columns][32][2], the tokens filled up to 32
// values   [image][head][32 columns][pair of tokens][32][2], the columns filled up to 32
//
// Reductions, columns of a head or tokens, are filled up with zeros to the numbers of a group.
//
// An exact one is of floats, each sum in the order of its terms, with the same bits on every processor:
// queries  [head][image][token][column]
// keys     [image][head][32 tokens][column][32], the tokens filled up to 32
// values   [image][head][32 columns][token][32], the columns filled up to 32
#pragma once

#include "api.h"
#include "gemm.h"
#include "vector.h"

namespace {  // each instruction set has its own

struct Heads {
  bool exact;
  int64_t heads, size, images, tokens;
  int64_t pairs, panels, key_panels, token_pairs;  // pairs and panels of columns; panels, pairs of tokens
  uint16_t *queries, *keys, *values;
  float *exact_queries, *exact_keys, *exact_values;
  Heads(const Block& block, const Call& call, const SharedWorkspace& shared)
      : exact(call.exact), heads(block.heads), size(block.head_size), images(shared.images), tokens(shared.tokens),
        pairs(round_up(size, HALVES) / 2), panels(divide_up(size, PANEL)), key_panels(divide_up(tokens, PANEL)),
        token_pairs(round_up(tokens, HALVES) / 2), queries((uint16_t*)shared.queries), keys((uint16_t*)shared.keys),
        values((uint16_t*)shared.values), exact_queries((float*)shared.queries), exact_keys((float*)shared.keys),
        exact_values((float*)shared.values) {}
  // The tile of queries that begins with a token.
  uint16_t* query(int64_t image, int64_t head, int64_t token) const {
    return queries + ((head * images + image) * tokens + token) * pairs * 2;
  }
  uint16_t* key(int64_t image, int64_t head) const {
    return keys + (image * heads + head) * key_panels * pairs * PANEL * 2;
  }
  uint16_t* value(int64_t image, int64_t head) const {
    return values + (image * heads + head) * panels * token_pairs * PANEL * 2;
  }
  float* exact_query(int64_t image, int64_t head, int64_t token) const {
    return exact_queries + ((head * images + image) * tokens + token) * size;
  }
  float* exact_key(int64_t image, int64_t head) const {
    return exact_keys + (image * heads + head) * key_panels * size * PANEL;
  }
  float* exact_value(int64_t image, int64_t head) const {
    return exact_values + (image * heads + head) * panels * tokens * PANEL;
  }
  int64_t tile_rows(int64_t first) const { return least(Isa::ROWS, tokens - first); }
};

enum Part { QUERY, KEY, VALUE };

// Where column `column` of a head goes.
static inline uint16_t* place(Part part, const Heads& heads, const Place& at, int64_t head, int64_t column) {
  const int64_t token = at.token;
  if (part == QUERY) {
    const int64_t first = token / Isa::ROWS * Isa::ROWS;
    return heads.query(at.image, head, first) + column / HALVES * HALVES * heads.tile_rows(first) +
           HALVES * (token - first) + column % HALVES;
  }
  if (part == KEY)
    return heads.key(at.image, head) + token / PANEL * heads.pairs * PANEL * 2 +
           (column / 2 * PANEL + token % PANEL) * 2 + column % 2;
  return heads.value(at.image, head) + column / PANEL * heads.token_pairs * PANEL * 2 +
         (token / 2 * PANEL + column % PANEL) * 2 + token % 2;
}

// The same of floats.
static inline float* exact_place(Part part, const Heads& heads, const Place& at, int64_t head, int64_t column) {
  const int64_t token = at.token;
  if (part == QUERY) return heads.exact_query(at.image, head, token) + column;
  if (part == KEY)
    return heads.exact_key(at.image, head) + (token / PANEL * heads.size + column) * PANEL + token % PANEL;
  return heads.exact_value(at.image, head) + (column / PANEL * heads.tokens + token) * PANEL + column % PANEL;
}

// Takes the numbers of columns from `first` on, counted over all heads, of a row to where attention reads them.
struct Placer {
  Part part;
  const Heads* heads;
  const Place* places;
  const Slot* slots;
  int64_t first, count, head, column;
  bool whole;  // all lanes are of one head and panel
  Placer(Part part, const Heads& heads, const SharedWorkspace& shared, int64_t first, int64_t most_lanes = LANES)
      : part(part), heads(&heads), places(shared.places), slots(shared.slots), first(first),
        count(least(heads.heads * heads.size - first, most_lanes)), head(first / heads.size),
        column(first % heads.size), whole(count == LANES && heads.size % LANES == 0 && !heads.exact) {}

  void operator()(int64_t row, Floats numbers) const {
    const Place at = places[row];
    if (heads->exact) return put_exactly(at, numbers);
    const Halves halves = bfloat16(numbers);
    for (int64_t lane = 0; lane < count; lane++)
      *place(part, *heads, at, (first + lane) / heads->size, (first + lane) % heads->size) = halves[lane];
  }

  // The same of rows [from, to), whose numbers y_of(row) gives.
  template <typename YOf>
  inline __attribute__((always_inline)) void take(int64_t from, int64_t to, YOf y_of) const {
    if (!whole) {
      for (int64_t row = from; row < to; row++) (*this)(row, y_of(row));
    } else if (part == QUERY) {
      uint16_t* const base = heads->query(0, head, 0) + column % HALVES;
      for (int64_t row = from; row < to; row++) {
        const Slot& slot = slots[row];
        store_groups(bfloat16(y_of(row)), base + slot.parts[QUERY] + column / HALVES * HALVES * slot.rows, slot.rows);
      }
    } else if (part == KEY) {
      uint16_t* const base = heads->key(0, head) + column * PANEL;
      for (int64_t row = from; row < to; row++) {
        const Halves halves = bfloat16(y_of(row));
        uint16_t* const at = base + slots[row].parts[KEY];
        uint32_t pairs[LANES / 2];
        memcpy(pairs, &halves, sizeof(pairs));
#pragma GCC unroll 8
        for (int64_t pair = 0; pair < LANES / 2; pair++) memcpy(at + 2 * PANEL * pair, pairs + pair, 4);
      }
    } else {  // the even token of a pair comes first, and clears the place of the odd one
      uint16_t* const base =
          heads->value(0, head) + column / PANEL * heads->token_pairs * PANEL * 2 + column % PANEL * 2;
      for (int64_t row = from; row < to; row++) {
        const Words words = __builtin_convertvector(bfloat16(y_of(row)), Words);
        const int64_t slot = slots[row].parts[VALUE];
        uint32_t* const at = (uint32_t*)(base + slot / 2 * 2);
        store(at, slot % 2 == 0 ? words : load<Words>(at) | words << 16);
      }
    }
  }

  void put_exactly(const Place& at, Floats numbers) const {
    float lanes[LANES];
    store(lanes, numbers);
    for (int64_t lane = 0; lane < count; lane++)
      *exact_place(part, *heads, at, (first + lane) / heads->size, (first + lane) % heads->size) = lanes[lane];
  }
};

// Results of a projection that go to one part; or of one projection for all three, a third of the columns each.
struct Placed {
  Part part;
  bool thirds;
  const Heads& heads;
  const SharedWorkspace& shared;
  struct At {
    Placer first, second;
    int64_t before;  // lanes of the first part; the others are of the second
    template <typename YOf>
    void take(int64_t from, int64_t to, YOf y_of) const {
      if (before == LANES) return first.take(from, to, y_of);
      for (int64_t row = from; row < to; row++) {
        const Floats y = y_of(row);
        if (before > 0) first(row, y);
        if (before >= first.count + second.count) continue;
        float numbers[2 * LANES] = {};
        store(numbers, y);
        second(row, load<Floats>(numbers + before));
      }
    }
  };
  At at(int64_t column) const {
    const int64_t inner = heads.heads * heads.size, all = thirds ? 3 * inner : inner;
    const int64_t third = thirds ? least(column / inner, 2) : 0, within = column - third * inner;
    const Placer one((Part)(part + third), heads, shared, within);
    const int64_t before = most(one.count, 0);
    if (before == LANES || column + before >= all) return {one, one, LANES * (before > 0)};
    return {one, Placer((Part)(part + third + 1), heads, shared, 0, LANES - before), before};
  }
};

// A member's rows, from an even token on: two tokens share the words of a value.
static inline Share rows_of_pairs(const SharedWorkspace& shared, const Crew& crew) {
  Share rows(shared.rows, crew);
  if (rows.first < shared.rows) rows.first -= shared.places[rows.first].token % 2;
  if (rows.last < shared.rows) rows.last -= shared.places[rows.last].token % 2;
  return rows;
}

// The slots of rows, and zeros where reductions are filled up: garbage there would be multiplied by zero, and NaN
// remains.
static void prepare_places(const Heads& heads, const SharedWorkspace& shared, const Share& rows) {
  if (heads.exact) return;  // there are no slots, and no reductions that are filled up
  for (int64_t row = rows.first; row < rows.last; row++) {
    const Place at = shared.places[row];
    Slot& slot = shared.slots[row];
    slot.parts[QUERY] = place(QUERY, heads, at, 0, 0) - heads.queries;
    slot.parts[KEY] = place(KEY, heads, at, 0, 0) - heads.keys;
    slot.parts[VALUE] = place(VALUE, heads, at, 0, 0) - heads.values;
    slot.rows = heads.tile_rows(at.token / Isa::ROWS * Isa::ROWS);
    for (int64_t head = 0; head < heads.heads; head++) {
      for (int64_t column = heads.size; column < 2 * heads.pairs; column++) {
        *place(QUERY, heads, at, head, column) = 0;
        *place(KEY, heads, at, head, column) = 0;
      }
      if (at.token + 1 < heads.tokens) continue;
      for (int64_t token = heads.tokens; token < 2 * heads.token_pairs; token++) {
        for (int64_t column = 0; column < heads.panels * PANEL; column++)
          *place(VALUE, heads, {at.image, (int32_t)token}, head, column) = 0;
      }
    }
  }
}

// One row of queries or keys, normed and rotated in place, head by head.
static inline void turn(const Norm& norm_of_head, const Call& call, const Heads& heads, int64_t token, float* row,
                        float* scratch) {
  const int64_t size = heads.size, half = size / 2;
  for (int64_t head = 0; head < heads.heads; head++, row += size) {
    if (norm_of_head.kind != NORM_NONE) norm(norm_of_head, row, size, row);
    if (!call.cosines) continue;
    const float *cosine = call.cosines + token * size, *sine = call.sines + token * size;
    memcpy(scratch, row, size * sizeof(float));
    for (int64_t i = 0; i < half; i++) {
      const int64_t a = call.neighbours ? 2 * i : i, b = call.neighbours ? a + 1 : i + half;
      row[a] = scratch[a] * cosine[a] - scratch[b] * sine[a];
      row[b] = scratch[b] * cosine[b] + scratch[a] * sine[b];
    }
  }
}

// Rows of floats to where attention reads them.
static void pack_part(Part part, const Heads& heads, const SharedWorkspace& shared, const float* rows, int64_t stride,
                      const Share& share) {
  const int64_t inner = heads.heads * heads.size;
  for (int64_t column = 0; column < inner; column += LANES)
    Placer(part, heads, shared, column).take(share.first, share.last, [&](int64_t row) {
      return load<Floats>(rows + row * stride + column, inner - column);
    });
}

// exp(scores * scaling - the largest) of `at_once` rows from row `row` of a tile on, given to put(row, column,
// weights), and 1 / their sums. `stride` scores from row to row, of which `groups` are read. Rows beside each other do
// not wait for each other. Exact ones are right to the float, others to what bfloat16 keeps.
template <int at_once, bool exact, typename Put>
static inline void softmax(const float* scores, int64_t stride, int64_t groups, float scaling, int64_t row,
                           float* inverse, Put put) {
  Floats highest[at_once];
#pragma GCC unroll 5
  for (int r = 0; r < at_once; r++) highest[r] = load<Floats>(scores + (row + r) * stride);
  for (int64_t j = LANES; j < stride; j += LANES) {
#pragma GCC unroll 5
    for (int r = 0; r < at_once; r++) highest[r] = larger(highest[r], load<Floats>(scores + (row + r) * stride + j));
  }
  Floats total[at_once][16 / LANES] = {};
  float top[at_once];
#pragma GCC unroll 5
  for (int r = 0; r < at_once; r++) top[r] = largest(highest[r]) * scaling;
  for (int64_t j = 0; j < groups; j += 16) {  // as many on every processor
#pragma GCC unroll 4
    for (int part = 0; part < 16 / LANES; part++) {
      const int64_t column = j + part * LANES;
#pragma GCC unroll 5
      for (int r = 0; r < at_once; r++) {
        const Floats score = load<Floats>(scores + (row + r) * stride + column) * scaling;
        const Floats from_top = (score - top[r]) * LOG2_E;
        const Floats weights = exact ? power_of_two(from_top) : power_of_two_to_bfloat16(from_top);
        total[r][part] += weights;
        put(row + r, column, weights);
      }
    }
  }
#pragma GCC unroll 5
  for (int r = 0; r < at_once; r++) {
#pragma GCC unroll 2
    for (int half = 16 / LANES / 2; half; half /= 2)
#pragma GCC unroll 2
      for (int part = 0; part < half; part++) total[r][part] += total[r][part + half];
    inverse[row + r] = 1.0f / sum(total[r][0]);
  }
}

// scores * scaling + bias + mask, of `tokens` scores.
static inline void shift(float* scores, int64_t tokens, float scaling, const float* bias, const float* mask) {
  each(tokens, [&](int64_t j, auto left) {
    Floats score = load<Floats>(scores + j) * scaling;
    if (bias) score = score + load<Floats>(bias + j, left);
    if (mask) score = score + load<Floats>(mask + j, left);
    store(scores + j, score);
  });
}

// Scores of `rows` rows to 1 / the sums of their exponentials, which put() gets; bias and mask are of the first row.
template <bool exact, typename Put>
static inline void softmax_rows(float* scores, int64_t rows, int64_t tokens, int64_t stride, int64_t groups,
                                float scaling, bool shifted, const float* bias, const float* mask, float* inverse,
                                Put put) {
  for (int64_t i = 0; i < rows; i++) {
    float* own = scores + i * stride;
    if (shifted) shift(own, tokens, scaling, bias ? bias + i * tokens : nullptr, mask ? mask + i * tokens : nullptr);
    for (int64_t j = tokens; j < stride; j++) own[j] = -__builtin_inff();
  }
  const float factor = shifted ? 1.0f : scaling;
  int64_t row = 0;
  if constexpr (LANES == 16) {
    for (int64_t left = rows; together(left) == 5; row += 5, left -= 5)
      softmax<5, exact>(scores, stride, groups, factor, row, inverse, put);
  }
  for (; row + 4 <= rows; row += 4) softmax<4, exact>(scores, stride, groups, factor, row, inverse, put);
  for (; row < rows; row++) softmax<1, exact>(scores, stride, groups, factor, row, inverse, put);
}

// Products of `rows` rows and a panel of floats, (count, PANEL): each sum in the order of its terms.
template <int rows>
static inline void exact_rows(const float* x, int64_t x_stride, const float* panel, int64_t count, float* out,
                              int64_t stride) {
  for (int64_t column = 0; column < PANEL; column += LANES) {
    Floats total[rows] = {};
    for (int64_t k = 0; k < count; k++) {
      const Floats weights = load<Floats>(panel + PANEL * k + column);
#pragma GCC unroll 4
      for (int i = 0; i < rows; i++) total[i] = fma(floats(x[i * x_stride + k]), weights, total[i]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++) store(out + i * stride + column, total[i]);
  }
}

static void exact_product(const float* x, int64_t x_stride, const float* panel, int64_t rows, int64_t count, float* out,
                          int64_t stride) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4)
    exact_rows<4>(x + row * x_stride, x_stride, panel, count, out + row * stride, stride);
  for (; row < rows; row++) exact_rows<1>(x + row * x_stride, x_stride, panel, count, out + row * stride, stride);
}

// attended (rows, heads * size) of the member's share of heads and tiles.
static void attend(const Block& block, const Call& call, int64_t first_image, const SharedWorkspace& shared,
                   ThreadWorkspace& own, const Crew& crew) {
  const Heads heads(block, call, shared);
  const int64_t tokens = heads.tokens, width = heads.heads * heads.size, stride = heads.key_panels * PANEL;
  const int64_t tiles = divide_up(tokens, Isa::ROWS), groups = 2 * heads.token_pairs;
  const Share share(heads.images * heads.heads * tiles, crew);
  uint16_t* const weights = (uint16_t*)own.weights;
  float* const exact_weights = (float*)own.weights;
  for (int64_t item = share.first; item < share.last; item++) {
    const int64_t image = item / tiles / heads.heads, head = item / tiles % heads.heads;
    const int64_t first = item % tiles * Isa::ROWS, rows = heads.tile_rows(first);
    for (int64_t panel = 0; panel < heads.key_panels; panel++) {
      float* scores = own.scores + panel * PANEL;
      if (heads.exact)
        exact_product(heads.exact_query(image, head, first), heads.size,
                      heads.exact_key(image, head) + panel * heads.size * PANEL, rows, heads.size, scores, stride);
      else
        Isa::half_product(heads.query(image, head, first), heads.key(image, head) + panel * heads.pairs * PANEL * 2,
                          rows, heads.pairs, scores, stride);
    }
    const float* bias = call.bias ? call.bias + (head * tokens + first) * tokens : nullptr;
    const float* mask =
        call.mask ? call.mask + ((first_image + image) % call.masks * tokens + first) * tokens : nullptr;
    const float scaling = block.head_scale ? block.head_scale[head] : block.scaling;
    const bool shifted = bias || mask || block.head_scale;
    float inverse[Isa::ROWS];
    if (heads.exact) {
      softmax_rows<true>(
          own.scores, rows, tokens, stride, stride, scaling, shifted, bias, mask, inverse,
          [&](int64_t row, int64_t column, Floats w) { store(exact_weights + row * stride + column, w); });
    } else {
      softmax_rows<false>(own.scores, rows, tokens, stride, groups, scaling, shifted, bias, mask, inverse,
                          [&](int64_t row, int64_t column, Floats w) {
        store_groups(bfloat16(w), weights + column / HALVES * HALVES * rows + HALVES * row + column % HALVES, rows);
      });
    }
    for (int64_t panel = 0; panel < heads.panels; panel++) {
      if (heads.exact)
        exact_product(exact_weights, stride, heads.exact_value(image, head) + panel * tokens * PANEL, rows, tokens,
                      own.values, PANEL);
      else
        Isa::half_product(weights, heads.value(image, head) + panel * heads.token_pairs * PANEL * 2, rows,
                          heads.token_pairs, own.values, PANEL);
      const int64_t column = panel * PANEL, columns = least(heads.size - column, PANEL);
      for (int64_t i = 0; i < rows; i++) {
        float* to = shared.attended + (image * tokens + first + i) * width + head * heads.size + column;
        for (int64_t j = 0; j < columns; j += LANES)
          store(to + j, load<Floats>(own.values + PANEL * i + j) * inverse[i], columns - j);
      }
    }
  }
}

static void attention_pack(const float* const* qkv, int64_t row_stride, const Block& block, const Call& call,
                           const SharedWorkspace& shared, const Crew& crew) {
  const Heads heads(block, call, shared);
  const Share rows = rows_of_pairs(shared, crew);
  prepare_places(heads, shared, rows);
  for (int part = QUERY; part <= VALUE; part++) pack_part((Part)part, heads, shared, qkv[part], row_stride, rows);
}

}  // namespace
