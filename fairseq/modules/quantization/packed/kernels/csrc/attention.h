// Attention, a head and a tile of queries at a time: bfloat16 products, softmax in float, nothing of tokens x tokens.
//
// queries  [head][row of the call] in tiles, as the integers of a product: GROUP bytes of each row, then the next
// keys     [image][head][32 tokens][pair of columns][32][2], the tokens filled up to 32
// values   [image][head][32 columns][pair of tokens][32][2], the columns filled up to 32
//
// Reductions, columns of a head or tokens, are filled up with zeros to the numbers of a group.
#pragma once

#include "api.h"
#include "product.h"
#include "vector.h"

namespace {  // each instruction set has its own

// Rounds half to even to bfloat16; NaN stays NaN.
static inline Halves bfloat16(Floats x) {
#if defined(__AVX512BF16__)
  return (Halves)_mm512_cvtneps_pbh((__m512)x);
#else
  Words bits = (Words)x;
  Words up = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(x != x ? (bits >> 16) | 0x40 : up, Halves);
#endif
}

struct Heads {
  int64_t heads, size, pairs, panels, key_panels, token_pairs;  // pairs and panels of columns; panels, pairs of tokens
  Heads(int64_t heads, int64_t size, int64_t tokens)
      : heads(heads), size(size), pairs(divide_up(size, HALVES) * HALVES / 2), panels(divide_up(size, PANEL)),
        key_panels(divide_up(tokens, PANEL)), token_pairs(divide_up(tokens, HALVES) * HALVES / 2) {}
  uint16_t* query(const SharedWorkspace& shared, int64_t head, int64_t row) const {
    return shared.queries + (head * shared.rows + row) * pairs * 2;
  }
  uint16_t* key(const SharedWorkspace& shared, int64_t image, int64_t head) const {
    return shared.keys + (image * heads + head) * key_panels * pairs * PANEL * 2;
  }
  uint16_t* value(const SharedWorkspace& shared, int64_t image, int64_t head) const {
    return shared.values + (image * heads + head) * panels * token_pairs * PANEL * 2;
  }
};

// Consecutive numbers of a row to a tile of `rows` rows, from `to` on.
static inline void store_groups(Halves halves, uint16_t* to, int64_t rows) {
#if LANES == 16
  typedef uint16_t Group __attribute__((vector_size(GROUP)));
  store(to, __builtin_shufflevector(halves, halves, 0, 1, 2, 3, 4, 5, 6, 7), All());
  store(to + HALVES * rows, (Group)__builtin_shufflevector(halves, halves, 8, 9, 10, 11, 12, 13, 14, 15), All());
#else
  (void)rows;  // no more than a group
  store(to, halves);
#endif
}

enum Part { QUERY, KEY, VALUE };

// Where column `column` of a head goes, of the token in row `i` of a tile.
static inline uint16_t* place(Part part, const Heads& heads, const SharedWorkspace& shared, const Tile& tile, int64_t i,
                              int64_t head, int64_t column) {
  const int64_t token = tile.token + i;
  if (part == QUERY)
    return heads.query(shared, head, tile.row) + column / HALVES * HALVES * tile.rows + HALVES * i + column % HALVES;
  if (part == KEY)
    return heads.key(shared, tile.image, head) + token / PANEL * heads.pairs * PANEL * 2 +
           (column / 2 * PANEL + token % PANEL) * 2 + column % 2;
  return heads.value(shared, tile.image, head) + column / PANEL * heads.token_pairs * PANEL * 2 +
         (token / 2 * PANEL + column % PANEL) * 2 + token % 2;
}

// Takes the numbers of columns from `first` on, counted over all heads, of each row of a tile to where they are read.
struct Placer {
  Part part;
  const Heads& heads;
  const SharedWorkspace& shared;
  const Tile& tile;
  int64_t first, count, head, column;
  bool whole;  // all lanes are of one head and panel
  Placer(Part part, const Heads& heads, const SharedWorkspace& shared, const Tile& tile, int64_t first, int64_t width)
      : part(part), heads(heads), shared(shared), tile(tile), first(first),
        count(width - first < LANES ? width - first : LANES), head(first / heads.size), column(first % heads.size),
        whole(count == LANES && heads.size % LANES == 0) {}

  void operator()(int64_t i, Floats numbers) const {
    const Halves halves = bfloat16(numbers);
    if (!whole) {
      for (int64_t lane = 0; lane < count; lane++)
        *place(part, heads, shared, tile, i, (first + lane) / heads.size, (first + lane) % heads.size) = halves[lane];
      return;
    }
    uint16_t* to = place(part, heads, shared, tile, i, head, column);
    if (part == QUERY) {
      store_groups(halves, to, tile.rows);
    } else if (part == KEY) {
      uint32_t pairs[LANES / 2];
      memcpy(pairs, &halves, sizeof(pairs));
      for (int64_t pair = 0; pair < LANES / 2; pair++) memcpy(to + 2 * PANEL * pair, pairs + pair, 4);
    } else {  // the even token of a pair comes first, and clears the place of the odd one
      const Words words = __builtin_convertvector(halves, Words);
      if ((tile.token + i) % 2 == 0) store((uint32_t*)to, words);
      else store((uint32_t*)(to - 1), load<Words>((const uint32_t*)(to - 1)) | words << 16);
    }
  }
};

// Zeros where reductions are filled up: garbage there would be multiplied by zero, and NaN remains.
static void fill_up(const Heads& heads, const SharedWorkspace& shared, const Tile& tile) {
  for (int64_t head = 0; head < heads.heads; head++) {
    for (int64_t column = heads.size; column < 2 * heads.pairs; column++) {
      for (int64_t i = 0; i < tile.rows; i++) {
        *place(QUERY, heads, shared, tile, i, head, column) = 0;
        *place(KEY, heads, shared, tile, i, head, column) = 0;
      }
    }
    if (tile.token + tile.rows < shared.tokens) continue;
    for (int64_t token = shared.tokens; token < 2 * heads.token_pairs; token++)
      for (int64_t column = 0; column < heads.panels * PANEL; column++)
        *place(VALUE, heads, shared, tile, token - tile.token, head, column) = 0;
  }
}

static void attention_pack(const float* const* qkv, int64_t row_stride, int64_t head_count, int64_t size,
                           const SharedWorkspace& shared, ThreadWorkspace& own) {
  const Heads heads(head_count, size, shared.tokens);
  for (int64_t t = 0; t < own.tile_count; t++) {
    const Tile& tile = own.tiles[t];
    for (int part = QUERY; part <= VALUE; part++)
      for (int64_t i = 0; i < tile.rows; i++)
        for (int64_t column = 0, left; (left = head_count * size - column) > 0; column += LANES)
          Placer((Part)part, heads, shared, tile, column, head_count * size)(
              i, load<Floats>(qkv[part] + (tile.row + i) * row_stride + column, left));
    fill_up(heads, shared, tile);
  }
}

// exp((scores - the largest) * scaling) of a row of `tokens` scores, as bfloat16 to row `row` of a tile; their sum.
static inline float softmax(float* scores, int64_t tokens, float scaling, uint16_t* tile, int64_t row, int64_t rows) {
  const int64_t filled = divide_up(tokens, PANEL) * PANEL;
  for (int64_t j = tokens; j < filled; j++) scores[j] = -__builtin_inff();
  Floats most = floats(-__builtin_inff());
  for (int64_t j = 0; j < filled; j += LANES) most = largest(most, load<Floats>(scores + j));
  const float top = largest(most);
  Floats total = {};
  for (int64_t j = 0; j < divide_up(tokens, HALVES) * HALVES; j += LANES) {  // whole groups
    const Floats weights = exp_of((load<Floats>(scores + j) - top) * scaling);
    total += weights;
    store_groups(bfloat16(weights), tile + j / HALVES * HALVES * rows + HALVES * row + j % HALVES, rows);
  }
  return sum(total);
}

// attended (rows, heads * size) of the own tiles.
static void attend(int64_t head_count, int64_t size, float scaling, const SharedWorkspace& shared, ThreadWorkspace& own) {
  const Heads heads(head_count, size, shared.tokens);
  const int64_t width = head_count * size, stride = heads.key_panels * PANEL;
  for (int64_t head = 0; head < head_count; head++) {
    for (int64_t t = 0; t < own.tile_count; t++) {
      const Tile& tile = own.tiles[t];
      const uint16_t* query = heads.query(shared, head, tile.row);
      const uint16_t* key = heads.key(shared, tile.image, head);
      const uint16_t* value = heads.value(shared, tile.image, head);
      for (int64_t panel = 0; panel < heads.key_panels; panel++)
        half_product(query, key + panel * heads.pairs * PANEL * 2, tile.rows, heads.pairs, own.scores + panel * PANEL,
                     stride);
      float inverse[TILE];
      for (int64_t i = 0; i < tile.rows; i++)
        inverse[i] = 1.0f / softmax(own.scores + i * stride, shared.tokens, scaling, own.weights, i, tile.rows);
      for (int64_t panel = 0; panel < heads.panels; panel++) {
        half_product(own.weights, value + panel * heads.token_pairs * PANEL * 2, tile.rows, heads.token_pairs,
                     own.values, PANEL);
        const int64_t column = panel * PANEL, columns = size - column < PANEL ? size - column : PANEL;
        for (int64_t i = 0; i < tile.rows; i++) {
          float* to = shared.attended + (tile.row + i) * width + head * size + column;
          for (int64_t j = 0; j < columns; j += LANES)
            store(to + j, load<Floats>(own.values + PANEL * i + j) * inverse[i], columns - j);
        }
      }
    }
  }
}

}  // namespace
