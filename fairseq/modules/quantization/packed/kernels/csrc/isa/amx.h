// AMX: tiles of 16 rows of 64 bytes, two by two: 32 rows times a panel of 32 outputs, 64 inputs at a time.
//
// Tiles 0 to 3 hold the sums (rows 0-15 and 16-31, outputs 0-15 and 16-31), 4 and 5 the rows, 6 and 7 the weights.
// Rows beyond those of a tile are multiplied, too, and looked at by nobody; memory behind a tile must be readable.
#pragma once

#include "../api.h"
#include "../vector.h"

#ifndef TILE_ROWS  // not emulated
#define TILE_ROWS 16
#define tile_configure(configuration) _tile_loadconfig(configuration)
#define tile_release() _tile_release()
#define tile_zero(tile) _tile_zero(tile)
#define tile_load(tile, from, stride) _tile_loadd(tile, from, stride)
#define tile_load_once(tile, from, stride) _tile_stream_loadd(tile, from, stride)
#define tile_store(tile, to, stride) _tile_stored(tile, to, stride)
#define tile_bytes(sums, rows, weights) _tile_dpbusd(sums, rows, weights)
#define tile_halves(sums, rows, weights) _tile_dpbf16ps(sums, rows, weights)
#endif

namespace {  // each instruction set has its own

struct TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

struct Isa {
  static const int64_t ROWS = 2 * TILE_ROWS, GROUP = 64;
  static const int32_t OFFSET = 128;
  static const bool EVEN_TILES = false;
  static const bool FAST_HALVES = true, FAST_FLOATS = false, FAST_NARROW = false, ADDS_GROUPS = false,
                    ADDS_HALF_GROUPS = false;
  static const int64_t CHUNK = 192;        // steps of a long panel that are multiplied before the next tile
  static const int64_t STEPS = GROUP / 4;  // of a panel, that are multiplied at a time

  // Other libraries load tile configurations of their own: on each thread at the beginning of each call, not once.
  static void enter() {
    TileConfiguration configuration;
    for (int tile = 0; tile < 8; tile++) {
      configuration.row_bytes[tile] = GROUP;
      configuration.rows[tile] = TILE_ROWS;
    }
    asm volatile("" : : "r"(&configuration) : "memory");  // gcc 12 believes that only its first 8 bytes are read
    tile_configure(&configuration);
  }
  static void leave() { tile_release(); }

  // Integer sums of a tile, (rows, PANEL), over 4 * steps inputs. They may go on from the sums of the inputs
  // before. pause() is called after each 64 inputs, for what else there is to do while the tiles multiply.
  template <typename Pause>
  static inline __attribute__((always_inline)) void product(const uint8_t* tile, const uint8_t* panel, int64_t rows,
                                                            int64_t steps, int32_t* sums, bool go_on, Pause pause) {
    multiply<false, true>(tile, panel, rows, steps, sums, PANEL, go_on, pause);
  }

  static void product(const uint8_t* tile, const uint8_t* panel, int64_t rows, int64_t steps, int32_t* sums) {
    product(tile, panel, rows, steps, sums, false, [] {});
  }

  static int64_t pauses(int64_t steps) { return divide_up(steps, STEPS); }

  // The first cache has room for half a panel of 1,024 inputs beside what passes: a quarter of longer ones' at a time.
  static int64_t chunk(int64_t steps) { return steps <= 256 ? steps : CHUNK; }

  // Products of bfloat16, summed in float over 2 * steps numbers: (rows, PANEL), `stride` floats a row.
  static void half_product(const uint16_t* tile, const uint16_t* panel, int64_t rows, int64_t steps, float* out,
                           int64_t stride) {
    multiply<true, false>((const uint8_t*)tile, (const uint8_t*)panel, rows, steps, out, stride, false, [] {});
  }

  // The same for sums that may go on, with pauses, as those of integers.
  template <typename Pause>
  static inline __attribute__((always_inline)) void half_product(const uint16_t* tile, const uint16_t* panel,
                                                                 int64_t rows, int64_t steps, float* out, bool go_on,
                                                                 Pause pause) {
    multiply<true, true>((const uint8_t*)tile, (const uint8_t*)panel, rows, steps, out, PANEL, go_on, pause);
  }

 private:
  // A step is 4 bytes of a row: of bytes, or of `halves`. `once`: no other product is to find the rows in the first
  // cache.
  template <bool halves, bool once, typename Sum, typename Pause>
  static inline __attribute__((always_inline)) void multiply(const uint8_t* tile, const uint8_t* panel, int64_t rows,
                                                             int64_t steps, Sum* sums, int64_t stride, bool go_on,
                                                             Pause pause) {
// Tiles are named by constants.
#define LOAD_ROWS(tile, from)                            \
  if constexpr (once) tile_load_once(tile, from, GROUP); \
  else tile_load(tile, from, GROUP)
#define ADD_PRODUCTS(sums, rows, weights)                 \
  if constexpr (halves) tile_halves(sums, rows, weights); \
  else tile_bytes(sums, rows, weights)
    const int64_t whole = steps / STEPS, rest = steps % STEPS, parts = whole + (rest != 0), next = rows * GROUP;
    alignas(64) uint8_t last[STEPS * 4 * PANEL];  // the steps of a panel that are no whole tile, filled up
    if (rest) {
      memset(last, 0, sizeof(last));
      memcpy(last, panel + whole * STEPS * 4 * PANEL, rest * 4 * PANEL);
    }
    asm volatile("" ::: "memory");  // what tiles are loaded from has been written
    const bool both = rows > TILE_ROWS;
    if (go_on) {
      tile_load(0, sums, 4 * stride);
      tile_load(1, sums + 16, 4 * stride);
      if (both) {
        tile_load(2, sums + TILE_ROWS * stride, 4 * stride);
        tile_load(3, sums + TILE_ROWS * stride + 16, 4 * stride);
      }
    } else {
      tile_zero(0);
      tile_zero(1);
      tile_zero(2);
      tile_zero(3);
    }
    for (int64_t part = 0; part < parts; part++, tile += next) {
      const uint8_t* weights = part < whole ? panel + part * STEPS * 4 * PANEL : last;
      LOAD_ROWS(4, tile);  // the panel is to stay in the first cache, not the rows
      tile_load(6, weights, 4 * PANEL);
      ADD_PRODUCTS(0, 4, 6);
      tile_load(7, weights + GROUP, 4 * PANEL);
      ADD_PRODUCTS(1, 4, 7);
      if (both) {
        LOAD_ROWS(5, tile + TILE_ROWS * GROUP);
        ADD_PRODUCTS(2, 5, 6);
        ADD_PRODUCTS(3, 5, 7);
      }
      pause();
    }
    tile_store(0, sums, 4 * stride);
    tile_store(1, sums + 16, 4 * stride);
    if (both) {
      tile_store(2, sums + TILE_ROWS * stride, 4 * stride);
      tile_store(3, sums + TILE_ROWS * stride + 16, 4 * stride);
    }
    asm volatile("" ::: "memory");
#undef LOAD_ROWS
#undef ADD_PRODUCTS
  }
};

}  // namespace
