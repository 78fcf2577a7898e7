// What Python and the instruction sets' files agree on: plain pointers, sizes and strides, no other library.
#pragma once

#include <stdint.h>

// One Linear: y = x @ W.T + bias, W[n, k] = scale[n] * (code[n, k] - zero[n]).
//
// panels: the codes in the order in which the products read them, 32 outputs (a panel) at a time: [panel][k / 4][32][4]
// bytes, filled up with zeros to 16 inputs and 32 outputs. Below 5 bits two outputs share a byte: [panel][k / 4][16][4],
// output j of the panel in the low half, output j + 16 in the high half.
struct Linear {
  const uint8_t* panels;
  const int32_t* sums;       // (out,): the sum of each output's codes; null where two share a byte, and are added up anew
  const float* scale;        // (out,), or (1,) with scale_step 0
  const uint8_t* zero;       // as scale; the code of 0.0 is zero - zero_offset
  const float* bias;         // (out,), or null
  const float* factor;       // (in,): what x is multiplied by before it is rounded, or null
  int64_t in, out;
  int32_t narrow;            // whether two codes share a byte
  int32_t zero_offset, scale_step;
  float input_scale;         // of a static range; 0 for a scale per row
  int32_t input_zero;
};

// A pre-norm encoder block. `width` is that of the hidden states, `head_size` that of a head.
struct Block {
  Linear query, key, value, output, fc1, fc2;
  const float *norm1_weight, *norm1_bias, *norm2_weight, *norm2_bias;
  float norm1_epsilon, norm2_epsilon, scaling;
  int64_t width, heads, head_size, mlp;
};

// Where the time goes, in seconds of one thread.
enum Stage { STAGE_NORM, STAGE_PRODUCT, STAGE_EPILOGUE, STAGE_ATTENTION, STAGE_QUANTIZE, STAGE_UNPACK, STAGE_WAIT, STAGES };

const int64_t PANEL = 32;     // outputs of a panel
const int64_t TILE = 14;      // most rows of a tile: 28 accumulators, 2 weight vectors, 2 spare, of 32 registers
const int64_t GROUP = 16;     // bytes of a row that lie together in a tile; the next group is that of the next row
const int64_t ALIGNMENT = 64;

static inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t steps_of(int64_t in) { return divide_up(in, GROUP) * (GROUP / 4); }  // of 4 inputs, of a panel

// Rows that are multiplied together: all of one image, the first is `row` of the call.
struct Tile {
  int64_t row, image, token;
  int32_t rows;
};

// Memory of one call, for all of its threads.
struct SharedWorkspace {
  uint8_t* integers;            // of all rows, in tiles: GROUP columns of each row, then the next GROUP
  float* scales;                // (rows,): of the integers
  int32_t* sums;                // (rows,): of the integers
  uint16_t *queries, *keys, *values;  // bfloat16, see attention.h
  float* attended;              // (rows, heads * head_size)
  int64_t rows, tokens;
  int64_t stride;               // bytes of a row among the integers, the same for all layers: rows stay with their thread
};

// Memory of one thread.
struct ThreadWorkspace {
  Tile* tiles;
  int64_t tile_count;
  float* row;                   // one row of any layer
  float* values;                // TILE x PANEL
  int32_t* accumulators;        // TILE x PANEL
  uint8_t* panel;               // the codes of a panel, a byte each
  float* scores;                // TILE x tokens, filled up to panels
  uint16_t* weights;            // TILE x tokens, filled up to pairs
  float* hidden;                // a slice of rows x mlp
  uint8_t* hidden_integers;
  float* hidden_scales;
  int32_t* hidden_sums;
  double* stages;               // STAGES seconds, or null
  double started;
};

// What one instruction set offers.
struct Kernels {
  const char* name;
  void (*layer_norm)(const float* x, int64_t width, const float* weight, const float* bias, float epsilon, float* y);
  void (*gelu)(const float* x, int64_t count, float* y);
  // Rounds one row into row `row` of a tile of `rows` rows; scale and sum are of the integers.
  void (*quantize)(const float* x, const Linear& grid, float* scratch, uint8_t* tile, int64_t row, int64_t rows,
                   float* scale, int32_t* sum);
  // Integer sums of a tile, (rows, PANEL).
  void (*product)(const uint8_t* tile, const uint8_t* panel, int64_t rows, int64_t steps, int32_t* sums);
  // Panels first ... last - 1 for the own tiles, from the shared integers of `first_row` on: out = y (+ residual).
  void (*linear)(const Linear& linear, const SharedWorkspace& shared, ThreadWorkspace& own, int64_t first, int64_t last, bool gelu,
                 const float* residual, float* out);
  void (*attention_pack)(const float* const* qkv, int64_t row_stride, int64_t heads, int64_t head_size,
                         const SharedWorkspace& shared, ThreadWorkspace& own);
  void (*attend)(int64_t heads, int64_t head_size, float scaling, const SharedWorkspace& shared, ThreadWorkspace& own);
  void (*before_attention)(const Block& block, const float* x, const SharedWorkspace& shared, ThreadWorkspace& own);
  void (*after_attention)(const Block& block, const float* x, const SharedWorkspace& shared, ThreadWorkspace& own, int64_t slice, float* out);
};
