// The tiles of AMX in plain C++, so that what is built upon them is tested on every processor.
//
// Intel's Architecture Instruction Set Extensions Programming Reference, chapter "Intel AMX": TILELOADD, TDPBUSD, ...
#pragma once

#include <stdint.h>
#include <string.h>

#define TILE_ROWS 16

namespace {

struct TileRegister {
  alignas(64) uint8_t bytes[TILE_ROWS][64];
};
static thread_local TileRegister tile_registers[8];
static thread_local bool tiles_configured = false;

static inline void tile_configure(const void*) { tiles_configured = true; }
static inline void tile_release() { tiles_configured = false; }

// An instruction without a configuration is a fault.
static inline TileRegister& tile_register(int tile) {
  if (!tiles_configured) __builtin_trap();
  return tile_registers[tile];
}

static inline void tile_zero(int tile) { memset(&tile_register(tile), 0, sizeof(TileRegister)); }

static inline void tile_load(int tile, const void* from, int64_t stride) {
  for (int row = 0; row < TILE_ROWS; row++)
    memcpy(tile_register(tile).bytes[row], (const uint8_t*)from + row * stride, 64);
}

static inline void tile_load_once(int tile, const void* from, int64_t stride) { tile_load(tile, from, stride); }

static inline void tile_store(int tile, void* to, int64_t stride) {
  for (int row = 0; row < TILE_ROWS; row++) memcpy((uint8_t*)to + row * stride, tile_register(tile).bytes[row], 64);
}

static inline void tile_bytes(int sums, int rows, int weights) {
  const TileRegister &a = tile_register(rows), &b = tile_register(weights);
  for (int m = 0; m < TILE_ROWS; m++) {
    int32_t c[16];
    memcpy(c, tile_register(sums).bytes[m], 64);
    for (int k = 0; k < 16; k++)
      for (int n = 0; n < 16; n++)
        for (int j = 0; j < 4; j++) c[n] += a.bytes[m][4 * k + j] * (int8_t)b.bytes[k][4 * n + j];
    memcpy(tile_register(sums).bytes[m], c, 64);
  }
}

static inline float tile_half(const uint8_t* from) {
  uint16_t half;
  memcpy(&half, from, 2);
  const uint32_t bits = (uint32_t)half << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// The processor flushes what is subnormal to zero, and adds pairs in an order of its own.
static inline void tile_halves(int sums, int rows, int weights) {
  const TileRegister &a = tile_register(rows), &b = tile_register(weights);
  for (int m = 0; m < TILE_ROWS; m++) {
    float c[16];
    memcpy(c, tile_register(sums).bytes[m], 64);
    for (int k = 0; k < 16; k++)
      for (int n = 0; n < 16; n++)
        for (int j = 0; j < 2; j++)
          c[n] += tile_half(a.bytes[m] + 4 * k + 2 * j) * tile_half(b.bytes[k] + 4 * n + 2 * j);
    memcpy(tile_register(sums).bytes[m], c, 64);
  }
}

}  // namespace

#include "amx.h"
