// A convolution over patches that do not overlap, as a product of their pixels, filled up with zeros to PATCH_STEP.
//
// Of floats, panels are [32 outputs][number][32], and each sum is in the order of its terms, the same on every
// processor. Where products of bfloat16 are many times as fast, x = high + low, two of these, and so are the weights;
// x * w is high * high + high * low + low * high, off by 3 * 2^-18 of |x * w| at most. A row of a tile is the high
// numbers of a patch, these once more, and the low ones; panels hold the high, low and high numbers of weights,
// [32 outputs][pair of numbers][32][2].
#pragma once

#include "api.h"
#include "attention.h"

namespace {  // each instruction set has its own

static inline int64_t patch_numbers(const Patches& patches) {
  return round_up(patches.channels * patches.patch_height * patches.patch_width, PATCH_STEP);
}

// The pixels of one patch, in the order of the weights, and zeros.
static inline void gather(const Patches& patches, const float* pixels, int64_t patch, int64_t numbers, float* to) {
  const int64_t across = patches.width / patches.patch_width, size = patches.patch_width;
  const float* corner = pixels + patch / across * patches.patch_height * patches.width + patch % across * size;
  float* next = to;
  for (int64_t channel = 0; channel < patches.channels; channel++) {
    const float* line = corner + channel * patches.height * patches.width;
    for (int64_t y = 0; y < patches.patch_height; y++, line += patches.width, next += size)
      each(size, [&](int64_t x, auto left) { store(next + x, load<Floats>(line + x, left), left); });
  }
  memset(next, 0, (to + numbers - next) * sizeof(float));
}

static inline void split(const float* row, int64_t numbers, int64_t rows, uint16_t* to) {
  for (int64_t j = 0; j < numbers; j += LANES) {
    const Floats x = load<Floats>(row + j);
    const Halves high = bfloat16(x);
    const Halves low = bfloat16(x - (Floats)(__builtin_convertvector(high, Words) << 16));
    uint16_t* const at = to + j / HALVES * HALVES * rows + j % HALVES;
    store_groups(high, at, rows);
    store_groups(high, at + numbers * rows, rows);
    store_groups(low, at + 2 * numbers * rows, rows);
  }
}

// How the rows of a tile are held, and multiplied.
template <typename Own, bool halves = Own::FAST_HALVES>
struct PatchRows {  // as pairs of bfloat16
  static const int64_t BYTES = 3 * sizeof(uint16_t);
  static void put(const float* row, int64_t numbers, uint8_t* tile, int64_t i, int64_t rows) {
    split(row, numbers, rows, (uint16_t*)tile + HALVES * i);
  }
  static void product(const uint8_t* tile, const uint8_t* panel, int64_t rows, int64_t numbers, float* out) {
    Own::half_product((const uint16_t*)tile, (const uint16_t*)panel, rows, 3 * numbers / 2, out, PANEL);
  }
};

template <typename Own>
struct PatchRows<Own, false> {  // as floats
  static const int64_t BYTES = sizeof(float);
  static void put(const float* row, int64_t numbers, uint8_t* tile, int64_t i, int64_t rows) {
    float* const to = (float*)tile;
    if constexpr (Own::FAST_FLOATS) {
      for (int64_t k = 0; k < numbers; k += Own::FLOATS)
        memcpy(to + k * rows + Own::FLOATS * i, row + k, Own::FLOATS * sizeof(float));
    } else {
      memcpy(to + numbers * i, row, numbers * sizeof(float));
    }
  }
  static void product(const uint8_t* tile, const uint8_t* panel, int64_t rows, int64_t numbers, float* out) {
    if constexpr (Own::FAST_FLOATS) Own::float_product((const float*)tile, (const float*)panel, rows, numbers, out);
    else exact_product((const float*)tile, numbers, (const float*)panel, rows, numbers, out, PANEL);
  }
};

// out (images, patches, out) of the images of a chunk, whose crew shares patches, and then panels.
static void patches(const Patches& patches, const float* pixels, float* out, const SharedWorkspace& shared,
                    ThreadWorkspace& own, const Crew& crew) {
  typedef PatchRows<Isa> Rows;
  const int64_t numbers = patch_numbers(patches), picture = patches.channels * patches.height * patches.width;
  const int64_t row_bytes = numbers * Rows::BYTES;
  const Share tiles(shared.tile_count, crew), panels(divide_up(patches.out, PANEL), crew);
  for (int64_t t = tiles.first; t < tiles.last; t++) {
    const Tile& tile = shared.tiles[t];
    for (int64_t i = 0; i < tile.rows; i++) {
      const Place at = shared.places[tile.row + i];
      gather(patches, pixels + at.image * picture, at.token, numbers, own.row);
      Rows::put(own.row, numbers, shared.integers + tile.row * row_bytes, i, tile.rows);
    }
  }
  wait(crew, own);
  for (int64_t panel = panels.first; panel < panels.last; panel++) {
    const int64_t column = panel * PANEL, columns = least(patches.out - column, PANEL);
    for (int64_t t = 0; t < shared.tile_count; t++) {
      const Tile& tile = shared.tiles[t];
      Rows::product(shared.integers + tile.row * row_bytes, patches.panels + panel * row_bytes * PANEL, tile.rows,
                    numbers, own.values);
      for (int64_t i = 0; i < tile.rows; i++) {
        for (int64_t j = 0; j < columns; j += LANES) {
          Floats y = load<Floats>(own.values + PANEL * i + j);
          if (patches.bias) y = y + load<Floats>(patches.bias + column + j, columns - j);
          store(out + (tile.row + i) * patches.out + column + j, y, columns - j);
        }
      }
    }
  }
  wait(crew, own);
}

}  // namespace
