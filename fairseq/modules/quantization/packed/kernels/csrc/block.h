// An encoder block for the rows of one thread: everything before the keys of the other rows are needed, and the rest.
#pragma once

#include "api.h"
#include "attention.h"
#include "product.h"
#include "rows.h"

namespace {  // each instruction set has its own

static inline int64_t row_bytes(const Linear& linear) { return steps_of(linear.in) * 4; }
static inline int64_t panel_count(const Linear& linear) { return divide_up(linear.out, PANEL); }

// LayerNorm and rounding of the own rows, into the shared integers.
static void norm_rows(const Linear& linear, const float* x, int64_t width, const float* weight, const float* bias,
                      float epsilon, const SharedWorkspace& shared, ThreadWorkspace& own) {
  for (int64_t t = 0; t < own.tile_count; t++) {
    const Tile& tile = own.tiles[t];
    for (int64_t i = 0; i < tile.rows; i++) {
      const int64_t row = tile.row + i;
      layer_norm(x + row * width, width, weight, bias, epsilon, own.row);
      quantize(own.row, linear, own.row, shared.integers + tile.row * shared.stride, i, tile.rows,
               shared.scales + row, shared.sums + row);
    }
  }
  lap(own, STAGE_NORM);
}

static void before_attention(const Block& block, const float* x, const SharedWorkspace& shared, ThreadWorkspace& own) {
  const Heads heads(block.heads, block.head_size, shared.tokens);
  const Linear* linears[] = {&block.query, &block.key, &block.value};
  norm_rows(block.query, x, block.width, block.norm1_weight, block.norm1_bias, block.norm1_epsilon, shared, own);
  for (int part = QUERY; part <= VALUE; part++) {
    const Linear& linear = *linears[part];
    auto epilogue = [&](const Tile& tile, int64_t column) {
      return [place = Placer((Part)part, heads, shared, tile, column, linear.out)](int64_t i, Floats y) {
        place(i, y);
      };
    };
    multiply(linear, shared.integers, shared.stride, shared.scales, shared.sums, 0, own.tiles, own.tile_count, 0,
             panel_count(linear), part < VALUE ? linears[part + 1] : nullptr, own, epilogue);
  }
  for (int64_t t = 0; t < own.tile_count; t++) fill_up(heads, shared, own.tiles[t]);
  lap(own, STAGE_ATTENTION);
}

// out = h + MLP(LayerNorm(h)), h = x + output projection of the attended values; the MLP `slice` rows at a time.
static void after_attention(const Block& block, const float* x, const SharedWorkspace& shared, ThreadWorkspace& own, int64_t slice, float* out) {
  attend(block.heads, block.head_size, block.scaling, shared, own);
  lap(own, STAGE_ATTENTION);
  for (int64_t t = 0; t < own.tile_count; t++) {
    const Tile& tile = own.tiles[t];
    for (int64_t i = 0; i < tile.rows; i++) {
      const int64_t row = tile.row + i;
      quantize(shared.attended + row * block.output.in, block.output, own.row,
               shared.integers + tile.row * shared.stride, i, tile.rows, shared.scales + row,
               shared.sums + row);
    }
  }
  lap(own, STAGE_QUANTIZE);
  linear_before(block.output, &block.fc1, shared, own, 0, panel_count(block.output), false, x, out);
  norm_rows(block.fc1, out, block.width, block.norm2_weight, block.norm2_bias, block.norm2_epsilon, shared, own);
  for (int64_t first = 0, last; first < own.tile_count; first = last) {
    const Tile* tiles = own.tiles + first;
    const int64_t row = tiles->row;
    int64_t rows = 0;
    for (last = first; last < own.tile_count && rows + own.tiles[last].rows <= slice; last++) rows += own.tiles[last].rows;
    auto to_hidden = [&](const Tile& tile, int64_t column) {
      float* to = own.hidden + (tile.row - row) * block.mlp + column;
      const int64_t left = block.mlp - column, stride = block.mlp;
      return [=](int64_t i, Floats y) {
        if (left > 0) store(to + i * stride, gelu_of(y), left);
      };
    };
    multiply(block.fc1, shared.integers, shared.stride, shared.scales, shared.sums, 0, tiles, last - first, 0,
             panel_count(block.fc1), &block.fc2, own, to_hidden);
    for (int64_t t = 0; t < last - first; t++) {
      for (int64_t i = 0; i < tiles[t].rows; i++) {
        const int64_t at = tiles[t].row - row;
        quantize(own.hidden + (at + i) * block.mlp, block.fc2, own.row, own.hidden_integers + at * row_bytes(block.fc2),
                 i, tiles[t].rows, own.hidden_scales + at + i, own.hidden_sums + at + i);
      }
    }
    lap(own, STAGE_QUANTIZE);
    auto add = [&](const Tile& tile, int64_t column) {
      float* to = out + tile.row * block.width + column;
      const int64_t left = block.width - column, stride = block.width;
      return [=](int64_t i, Floats y) {
        if (left > 0) store(to + i * stride, load<Floats>(to + i * stride, left) + y, left);
      };
    };
    multiply(block.fc2, own.hidden_integers, row_bytes(block.fc2), own.hidden_scales, own.hidden_sums, row, tiles, last - first, 0,
             panel_count(block.fc2), last < own.tile_count ? &block.fc1 : nullptr, own, add);
  }
}

}  // namespace
