// What Python and the instruction sets' files agree on: plain pointers, sizes and strides, no other library.
#pragma once

#include <stdint.h>

// One Linear: y = x @ W.T + bias, W[n, k] = scale[n] * (code[n, k] - zero[n]).
//
// panels: the codes in the order in which the products read them, 32 outputs (a panel) at a time: [panel][k / 4][32][4]
// bytes, filled up with zeros to 16 inputs and 32 outputs. Below 5 bits two outputs share a byte, output j of a panel
// in the low half, output j + 16 in the high half: [panel][k / 4][16][4].
struct Linear {
  const uint8_t* panels;
  const int32_t* sums;  // (out,), or (out, groups): of codes; null where two share a byte, and are added up anew
  const float* scale;   // (out,); or (1,) with scale_step 0; or (out, groups)
  const uint8_t* zero;  // as scale; the code of 0.0 is zero - zero_offset
  const float* bias;    // (out,), or null
  const float* factor;  // (in,): what x is multiplied by before it is rounded, or null
  int64_t in, out;
  int32_t narrow;  // whether two codes share a byte
  int32_t zero_offset, scale_step;
  float input_scale;  // of a static range; 0 for a scale per row
  int32_t input_zero;
  int32_t halves;      // whether x is rounded to bfloat16, not to integers
  int32_t input_bits;  // of the integers that x becomes
  int64_t group_size;  // inputs that share a scale, 16 to 128 in steps of 16 (32 with halves); 0 where all do
};

enum NormKind { NORM_NONE, NORM_LAYER, NORM_RMS, NORM_L2 };

// LayerNorm; x / sqrt(mean(x^2) + epsilon) * weight; or x / max(|x|, epsilon).
struct Norm {
  const float *weight, *bias;  // of the row's width, or null for 1 and 0
  float epsilon;
  int32_t kind;
};

enum Activation { GELU, GELU_TANH, GELU_QUICK, SILU, RELU };
enum Gating { GATING_NONE, GATING_LAYER, GATING_HALVES };

// An encoder block:
//   h = x + scale1 * post1(output(attended_norm(attention(norm1(x)))))
//   y = h + scale2 * post2(fc2(hidden_norm(hidden)))
//   hidden = act(fc1(norm2(h))), or act(gate(norm2(h))) * fc1(norm2(h)), or act(g) * u of the halves g, u that fc1
//   gives
struct Block {
  Linear query, key, value;  // with one projection, query gives all three, each of heads * head_size columns
  Linear output, fc1, gate, fc2;
  Norm norm1, norm2, post1, post2;  // of a row
  Norm query_norm, key_norm;        // of each head's part of a row, before its rotation
  Norm attended_norm, hidden_norm;
  const float *scale1, *scale2;  // LayerScale, (width,), or null
  const float* head_scale;       // (heads,): what products of queries and keys are multiplied by, or null for scaling
  float scaling;
  int32_t projections, activation, gating;
  int64_t width, heads, head_size, mlp;  // mlp: the inputs of fc2
};

// What a block is called with, besides the hidden states (row_count, width).
struct Call {
  int64_t images, tokens, row_count;  // an image is what attends to itself: a window, where there are windows
  const int32_t* rows;  // (images * tokens,): the row of the hidden states that stands there, -1 for zeros; or null
  const float *cosines, *sines;  // (tokens, head_size), the rotation of queries and keys, or null
  const float* bias;             // (heads, tokens, tokens), added to the scaled products, or null
  const float* mask;             // (masks, tokens, tokens), added, too: image i has mask i % masks; or null
  int64_t masks;
  int32_t neighbours;  // whether a rotation is of columns 2 i and 2 i + 1, not i and i + head_size / 2
  int32_t exact;       // whether attention is in float, in an order that is the same everywhere
};

// A convolution over patches that do not overlap: float (images, channels, height, width) -> (images, rows, columns,
// out).
struct Patches {
  const uint8_t* panels;  // see patches.h
  const float* bias;      // (out,), or null
  int64_t channels, height, width, patch_height, patch_width, out;
};

// Inference on integers alone, see docs/integer_only.rst. Integers of one scale become those of another:
//   y = clamp((((x << lift) * multiplier [* m] + offset) >> 32) >> shift, low, high), m the scale of x's row, if it has
//   one.
// Arrays of columns are filled up to whole panels.
struct Requantize {
  const int32_t *multiplier, *shift;
  const int64_t* offset;  // with half a unit, which rounds
  int32_t lift, low, high;
};

// The same of integers for which 32 bits have room: y = clamp((x * multiplier + offset) >> shift, low, high).
struct Requantize32 {
  const int32_t *multiplier, *offset, *shift;  // null where there is no room
  int32_t low, high;
};

// The product of bytes and the codes of `panels`, requantized; `sums` are of the codes.
struct IntegerLinear : Linear {
  Requantize output;
  int32_t centre;  // what the bytes are less: 128 of those that have no sign, or 0
  int32_t small;   // whether its codes are from -15 to 15, as those of 4 bits less their zeros are
};

// LayerNorm of the residual stream.
struct IntegerNorm {
  Requantize output;
  int64_t epsilon;  // columns * eps / scale^2
};

// How a row of integers becomes bytes.
enum RowKind { ROWS_SIGNED, ROWS_UNSIGNED, ROWS_BYTES };  // scaled by the largest one; or bytes as they are
struct Rows {
  const int32_t *columns, *added, *shift;  // of each byte, where one integer becomes several; or null
  int32_t kind, zero;
  const int32_t* alone;  // from each byte on, how many are of columns side by side that become no others; or null
};

struct IntegerAttention {
  const int32_t *multiplier, *shift;  // (heads,), of products of queries and keys
  Requantize output;
  int32_t lift, dynamic;  // dynamic: scales for each token's queries and keys, and each image's values
};

// An activation at the beginning of each of 256 pieces, and what it gains in it.
struct Lines {
  const int32_t* both;  // the one in the lower half, the other in the higher
  const int16_t *values, *gains;
};

struct IntegerBlock {
  IntegerLinear query, key, value, output, fc1, fc2;
  IntegerNorm norm1, norm2;
  Rows rows1, attended_rows, rows2, hidden_rows;
  IntegerAttention attention;
  Lines lines;
  Requantize activation;
  Requantize32 activation32;  // of what `lines` give, which fits 16 bits and begins with 0
};

struct IntegerModel {
  IntegerLinear patches, classifier;  // a classifier without outputs: the residual stream is what is wanted
  const int32_t* constants;           // (tokens, width): class token and positions
  const IntegerBlock* const* blocks;
  int64_t block_count, channels, picture_height, picture_width, patch_height, patch_width;
  int64_t tokens, width, heads, head_size, mlp;
  IntegerNorm norm;  // of the first token
  Rows rows;
  const IntegerNorm* before;  // of all tokens, before the blocks; or null
};

// Where the time goes, in seconds of one thread.
enum Stage {
  STAGE_NORM,
  STAGE_PRODUCT,
  STAGE_EPILOGUE,
  STAGE_ATTENTION,
  STAGE_QUANTIZE,
  STAGE_UNPACK,
  STAGE_WAIT,
  STAGES
};

const int64_t PANEL = 32;       // outputs of a panel
const int64_t PANEL_STEP = 16;  // inputs are filled up to a multiple of it
const int64_t PATCH_STEP = 32;  // numbers of a patch are filled up to a multiple of it
const int64_t ALIGNMENT = 64;
const int64_t ROW_COUNT = 5;       // of a thread's scratch
const int64_t TILES_AT_ONCE = 16;  // whose sums are kept while a long reduction goes on

static inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
template <typename Type>
static inline Type* least(Type* a, Type* b) {
  return a < b ? a : b;
}
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t steps_of(int64_t in) { return round_up(in, PANEL_STEP) / 4; }  // of 4 inputs, of a panel
static inline int64_t groups_of(const Linear& linear) {
  return linear.group_size ? divide_up(linear.in, linear.group_size) : 1;
}
static inline int64_t panel_count(const Linear& linear) { return divide_up(linear.out, PANEL); }
static inline int64_t row_bytes(const Linear& linear, int64_t together) {  // of its rounded input
  return round_up(linear.in * (linear.halves ? 2 : 1), together);
}
static inline int64_t step_bytes(const Linear& linear) { return 4 * PANEL / (linear.narrow ? 2 : 1); }
static inline int64_t panel_bytes(const Linear& linear) { return steps_of(linear.in) * step_bytes(linear); }

// Rows that are multiplied together, counted from the first of a chunk.
struct Tile {
  int32_t row, rows;
};

// Where a row of a chunk belongs.
struct Place {
  int32_t image, token;
};

// Where the first column of the first head of a row of a chunk lies for attention.
struct Slot {
  int64_t parts[3];  // of queries, keys and values, counted in numbers from the beginning of each
  int64_t rows;      // of the tile of queries
};

// Threads that work on the same rows, each on its share; all of them call wait().
struct Crew {
  int member, members;
  struct Barrier* barrier;  // null for a single one
};
extern "C" void fairseq_wait(struct Barrier* barrier, int members);

// Memory of a crew, for the rows of a chunk.
struct SharedWorkspace {
  Tile* tiles;
  Place* places;  // (rows,)
  Slot* slots;    // (rows,); none of integers alone
  int64_t tile_count, rows, images, tokens;
  uint8_t* integers;  // of all rows, in tiles: a group of columns of each row, then the next group; or bfloat16
  float* scales;      // (rows,): of the integers
  int32_t* sums;      // (rows, groups of inputs): of the integers
  void *queries, *keys, *values;  // see attention.h
  float* projected;               // (rows, 3 * heads * head_size): what is normed or rotated, and what comes with it
  float* attended;                // (rows, heads * head_size)
  float* added;                   // (rows, width): what is normed before it is added
  float* hidden;                  // (rows of a slice, outputs of fc1)
  // Of integers alone, which have their rows' scales in `sums`:
  int32_t* stream;         // (rows, width)
  int16_t *parts, *mixed;  // (rows, 3 * heads * head_size): queries, keys, values; (rows, heads * head_size)
  int16_t* activated;      // (rows of a slice, mlp)
  int32_t *query_scales, *key_scales, *key_sums;     // (images, heads, tokens filled up to panels)
  int32_t *value_scales, *value_means, *value_sums;  // (images, heads), and twice times columns filled up to panels
};

// What a panel has of one group of inputs.
struct Group {
  float scale[PANEL], zero[PANEL];
  float offset[PANEL];  // what its sums have too much
  int32_t code_sums[PANEL];
  struct Zeros {
    float zero[PANEL], zero_from_8[PANEL];
  } halves;  // see panels.h
};

// Memory of one thread.
struct ThreadWorkspace {
  float* row;             // ROW_COUNT rows of any layer
  float* values;          // rows of a tile x PANEL
  int32_t* accumulators;  // TILES_AT_ONCE buffers of the rows of a tile x PANEL
  uint8_t* panel[2];      // a panel or a piece of one, a byte or a bfloat16 for each code
  Group* groups;          // of a panel, see groups.h
  float* scores;          // rows of a tile x tokens, filled up to panels
  void* weights;          // rows of a tile x tokens, filled up to groups
  double* stages;         // STAGES seconds, or null
  double started;
};

// What one instruction set offers. enter() and leave() are called by each thread around everything else.
struct Kernels {
  const char* name;
  int64_t tile_rows, group;  // of a tile; bytes of a row that lie together
  bool even_tiles;           // whether all tiles should be nearly as large
  int32_t offset;            // of the bytes that integers become
  bool fast_halves;          // whether a product of bfloat16 is many times as fast as one of floats
  bool fast_floats;          // whether there is a product of floats of its own
  void (*enter)();
  void (*leave)();
  void (*norm)(const Norm& norm, const float* x, int64_t width, float* y);
  void (*activate)(int32_t activation, const float* x, int64_t count, float* y);
  // Rounds one row into row `row` of a tile of `rows` rows; scale and sums, of each group of inputs, are of the
  // integers; a scale of 1 and one sum of 0 are of bfloat16.
  void (*quantize)(const float* x, const Linear& grid, float* scratch, uint8_t* tile, int64_t row, int64_t rows,
                   float* scale, int32_t* sums);
  // Integer sums of a tile, (rows, PANEL), of codes that are a byte each, narrow ones from -15 to 15.
  void (*product)(const uint8_t* tile, const uint8_t* panel, int64_t rows, int64_t steps, bool narrow, int32_t* sums);
  // Panels first ... last - 1 for the tiles from `from` to `to`: out = y, activated if that is not -1, (+ residual).
  void (*linear)(const Linear& linear, const SharedWorkspace& shared, ThreadWorkspace& own, int64_t from, int64_t to,
                 int64_t first, int64_t last, int32_t activation, const float* residual, float* out);
  // Queries, keys and values of all rows of a chunk to where they are read; rows `row_stride` floats apart.
  void (*attention_pack)(const float* const* qkv, int64_t row_stride, const Block& block, const Call& call,
                         const SharedWorkspace& shared, const Crew& crew);
  void (*attend)(const Block& block, const Call& call, int64_t first_image, const SharedWorkspace& shared,
                 ThreadWorkspace& own, const Crew& crew);
  // The block for the images of a chunk, the first of which is `first_image`; `placed`: behind one of the same heads.
  void (*block)(const Block& block, const Call& call, int64_t first_image, const float* x, float* out,
                const SharedWorkspace& shared, ThreadWorkspace& own, const Crew& crew, int64_t slice, bool placed);
  // The model of integers for the images of a chunk, the first of which is `first_image`.
  void (*integers)(const IntegerModel& model, int64_t first_image, const uint8_t* pixels, int32_t* logits,
                   const SharedWorkspace& shared, ThreadWorkspace& own, const Crew& crew, int64_t slice);
  void (*integer_norm)(const IntegerNorm& norm, const int32_t* h, int64_t width, int32_t* to);
  bool (*round_pixels)(const float* x, int64_t count, double start, double step, uint8_t* pixels);
  // Patches of the images of a chunk: out (images, rows, columns, out).
  void (*patches)(const Patches& patches, const float* pixels, float* out, const SharedWorkspace& shared,
                  ThreadWorkspace& own, const Crew& crew);
};
