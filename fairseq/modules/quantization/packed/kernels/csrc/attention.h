// Attention, a head and a tile of queries at a time: bfloat16 products, softmax in float, nothing of tokens x tokens.
//
// queries  [head][row of the call][pair of columns] in tiles: pairs of columns row by row, then the next pair
// keys     [image][head][32 tokens][pair of columns][32][2], the tokens filled up to 32
// values   [image][head][32 columns][pair of tokens][32][2], tokens filled up to 2 with zeros, columns to 32
#pragma once

#include "api.h"
#include "product.h"
#include "vector.h"

// Rounds half to even to bfloat16, in the low halves of the lanes; NaN stays NaN.
static inline Words bfloat16(Floats x) {
  Words bits = (Words)x;
  Words up = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return x != x ? (bits >> 16) | 0x40 : up;
}

struct Heads {
  int64_t heads, size, pairs, panels, key_panels, token_pairs;  // pairs and panels of columns; panels, pairs of tokens
  Heads(int64_t heads, int64_t size, int64_t tokens)
      : heads(heads), size(size), pairs(divide_up(size, 2)), panels(divide_up(size, PANEL)),
        key_panels(divide_up(tokens, PANEL)), token_pairs(divide_up(tokens, 2)) {}
  uint16_t* query(const Shared& shared, int64_t head, int64_t row) const {
    return shared.queries + (head * shared.rows + row) * pairs * 2;
  }
  uint16_t* key(const Shared& shared, int64_t image, int64_t head) const {
    return shared.keys + (image * heads + head) * key_panels * pairs * PANEL * 2;
  }
  uint16_t* value(const Shared& shared, int64_t image, int64_t head) const {
    return shared.values + (image * heads + head) * panels * token_pairs * PANEL * 2;
  }
};

enum Part { QUERY, KEY, VALUE };

// One number of a query, key or value: column `column` of the token in row `i` of a tile.
static inline void place(Part part, const Heads& heads, const Shared& shared, const Tile& tile, int64_t i, int64_t head,
                         int64_t column, uint16_t number) {
  const int64_t token = tile.token + i;
  if (part == QUERY) {
    heads.query(shared, head, tile.row)[(column / 2 * tile.rows + i) * 2 + column % 2] = number;
  } else if (part == KEY) {
    uint16_t* panel = heads.key(shared, tile.image, head) + token / PANEL * heads.pairs * PANEL * 2;
    panel[(column / 2 * PANEL + token % PANEL) * 2 + column % 2] = number;
  } else {
    uint16_t* panel = heads.value(shared, tile.image, head) + column / PANEL * heads.token_pairs * PANEL * 2;
    panel[(token / 2 * PANEL + column % PANEL) * 2 + token % 2] = number;
  }
}

// `count` columns from `first` on of the token in row `i`: to where attention reads them.
static inline void place_row(Part part, const Heads& heads, const Shared& shared, const Tile& tile, int64_t i,
                             int64_t first, int64_t count, const float* numbers) {
  for (int64_t j = 0; j < count; j += LANES) {
    uint16_t halves[LANES];
    Halves narrow = __builtin_convertvector(bfloat16(load<Floats>(numbers + j, count - j)), Halves);
    memcpy(halves, &narrow, sizeof(halves));
    const int64_t lanes = count - j < LANES ? count - j : LANES;
    const int64_t head = (first + j) / heads.size, column = (first + j) % heads.size, token = tile.token + i;
    if (lanes == LANES && heads.size % LANES == 0) {  // all of one head and panel
      uint8_t* to;
      int64_t stride;  // bytes between pairs
      if (part == VALUE) {
        uint16_t* panel = heads.value(shared, tile.image, head) + column / PANEL * heads.token_pairs * PANEL * 2;
        panel += (token / 2 * PANEL + column % PANEL) * 2 + token % 2;
        for (int64_t lane = 0; lane < LANES; lane++) panel[2 * lane] = halves[lane];
        continue;
      }
      if (part == QUERY) {
        to = (uint8_t*)(heads.query(shared, head, tile.row) + (column / 2 * tile.rows + i) * 2);
        stride = 4 * tile.rows;
      } else {
        to = (uint8_t*)(heads.key(shared, tile.image, head) + token / PANEL * heads.pairs * PANEL * 2 +
                        (column / 2 * PANEL + token % PANEL) * 2);
        stride = 4 * PANEL;
      }
      for (int64_t pair = 0; pair < LANES / 2; pair++) memcpy(to + pair * stride, halves + 2 * pair, 4);
    } else {
      for (int64_t lane = 0; lane < lanes; lane++)
        place(part, heads, shared, tile, i, (first + j + lane) / heads.size, (first + j + lane) % heads.size,
              halves[lane]);
    }
  }
}

// Zeros where columns or tokens are filled up: garbage there would be multiplied by zero, and NaN remains.
static void fill_up(const Heads& heads, const Shared& shared, const Tile& tile) {
  for (int64_t head = 0; head < heads.heads; head++) {
    for (int64_t i = 0; i < tile.rows; i++) {
      const int64_t token = tile.token + i;
      if (heads.size % 2) {
        place(QUERY, heads, shared, tile, i, head, heads.size, 0);
        place(KEY, heads, shared, tile, i, head, heads.size, 0);
      }
      if (token == shared.tokens - 1 && token % 2 == 0) {
        for (int64_t panel = 0; panel < heads.panels; panel++) {
          uint16_t* last = heads.value(shared, tile.image, head) + panel * heads.token_pairs * PANEL * 2;
          for (int64_t j = 0; j < PANEL; j++) last[(token / 2 * PANEL + j) * 2 + 1] = 0;
        }
      }
    }
  }
}

static void attention_pack(const float* const* qkv, int64_t row_stride, int64_t head_count, int64_t size,
                           const Shared& shared, Own& own) {
  const Heads heads(head_count, size, shared.tokens);
  for (int64_t t = 0; t < own.tile_count; t++) {
    const Tile& tile = own.tiles[t];
    for (int part = QUERY; part <= VALUE; part++)
      for (int64_t i = 0; i < tile.rows; i++)
        place_row((Part)part, heads, shared, tile, i, 0, head_count * size, qkv[part] + (tile.row + i) * row_stride);
    fill_up(heads, shared, tile);
  }
}

// exp((scores - the largest) * scaling) of a row of `tokens` scores, as bfloat16 pairs `rows` pairs apart; their sum.
static inline float softmax(float* scores, int64_t tokens, float scaling, uint16_t* weights, int64_t rows) {
  const int64_t filled = divide_up(tokens, PANEL) * PANEL;
  for (int64_t j = tokens; j < filled; j++) scores[j] = -__builtin_inff();
  Floats most = floats(-__builtin_inff());
  for (int64_t j = 0; j < filled; j += LANES) most = largest(most, load<Floats>(scores + j));
  const float top = largest(most);
  Floats total = {};
  for (int64_t j = 0; j < tokens; j += LANES) {
    Words rounded = bfloat16(exp_of((load<Floats>(scores + j) - top) * scaling));
    total += (Floats)(rounded << 16);
    uint16_t halves[LANES];
    Halves narrow = __builtin_convertvector(rounded, Halves);
    memcpy(halves, &narrow, sizeof(halves));
    for (int64_t lane = 0; lane < LANES && j + lane < tokens; lane += 2)
      memcpy(weights + (j + lane) * rows, halves + lane, 4);
  }
  return sum(total);
}

// attended (rows, heads * size) of the own tiles.
static void attend(int64_t head_count, int64_t size, float scaling, const Shared& shared, Own& own) {
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
        inverse[i] = 1.0f / softmax(own.scores + i * stride, shared.tokens, scaling, own.weights + 2 * i, tile.rows);
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
