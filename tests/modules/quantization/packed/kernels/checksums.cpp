// Prints a checksum of what each native function gives for inputs that are made here, then the levels that ran, and
// fails where a level differs from the portable one. The checksums are the same on every processor. Linked with a
// library that setup.py has built; without Python, so that it runs for a processor that is only emulated.
#include <stdio.h>
#include <string.h>

#include <map>
#include <string>
#include <vector>

#include "api.h"

extern "C" {
const char* fairseq_level_name(int level);
int fairseq_supports(int level);
int fairseq_activate(int level, int activation, const float* x, int64_t count, float* y);
int fairseq_norm(int level, const Norm* norm, const float* x, int64_t rows, int64_t width, float* y);
int fairseq_quantize(int level, const Linear* grid, const float* x, int64_t rows, int8_t* q, float* scales,
                     int32_t* sums);
int fairseq_round_tokens(int level, int bits, const float* x, int64_t rows, int64_t width, float* out, int threads);
int fairseq_product(int level, const Linear* linear, const int8_t* q, int64_t rows, int32_t* out);
int fairseq_linear(int level, const Linear* linear, const float* x, int64_t rows, int activation, const float* residual,
                   float* out, int threads, double* stages);
int fairseq_attention(int level, const Block* block, const Call* call, const float* query, const float* key,
                      const float* value, int64_t stride, float* out, int threads);
int fairseq_blocks(int level, const Block* const* blocks, const Call* const* calls, int64_t count, const float* x,
                   float* const* outs, int threads, int64_t at_once, int64_t slice, double* stages);
int fairseq_integers(int level, const IntegerModel* model, const uint8_t* pixels, int64_t images, int32_t* logits,
                     int threads, int64_t at_once, int64_t slice, double* stages);
int fairseq_round_pixels(int level, const float* x, int64_t images, int64_t channels, int64_t count,
                         const double* start, const double* step, uint8_t* pixels, int threads);
}

namespace {

typedef std::vector<float> Reals;
const char* const ACTIVATIONS[] = {"gelu", "gelu_tanh", "gelu_quick", "silu", "relu"};

uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// FNV-1a over 32-bit words; processors differ in the sign of a NaN that they make, and it is counted as one.
struct Checksum {
  uint64_t value = 0xcbf29ce484222325u;
  void add(uint32_t word) { value = (value ^ word) * 0x100000001b3u; }
  void add(const Reals& numbers) {
    for (float number : numbers) add(number != number ? 0x7fc00000u : bits_of(number));
  }
  template <typename Integer>
  void add(const std::vector<Integer>& numbers) {
    for (Integer number : numbers) add((uint32_t)(int32_t)number);
  }
};

struct Random {
  uint64_t state;
  uint32_t next() { return (uint32_t)((state = state * 6364136223846793005u + 1442695040888963407u) >> 33); }
  int64_t below(int64_t count) { return next() % count; }
  float real() { return ((int32_t)(next() & 0xffffff) - 0x800000) * (1.0f / (1 << 22)); }  // exact, in [-2, 2)
  Reals reals(int64_t count, float by = 1.0f) {
    Reals numbers(count);
    for (float& number : numbers) number = real() * by * (below(16) ? 1.0f : 6.0f);
    return numbers;
  }
  Reals positive(int64_t count, float by) {
    Reals numbers(count);
    for (float& number : numbers) number = (real() + 2.5f) * by;
    return numbers;
  }
};

// The tensors of a Linear with random codes; `extreme`: the largest magnitudes that there are; `group`: inputs that
// share a scale, 0 for all.
struct Layer {
  std::vector<uint8_t> panels, zero;
  std::vector<int32_t> sums;
  Reals scale, bias, factor;
  Linear linear = {};
  Layer(Random& random, int64_t in, int64_t out, bool narrow, bool factored = false, bool one_scale = false,
        bool extreme = false, int64_t group = 0)
      : bias(random.reals(out)) {
    linear.in = in;
    linear.out = out;
    linear.narrow = narrow;
    linear.input_bits = 8;
    linear.group_size = group;
    const int64_t groups = groups_of(linear);
    sums.resize(out * groups);
    scale = random.positive(one_scale ? 1 : out * groups, 0.004f);
    panels.resize(panel_bytes(linear) * panel_count(linear));
    for (int64_t n = 0; n < out; n++)
      for (int64_t k = 0; k < in; k++) {
        const int code = narrow ? (extreme ? 15 : random.below(16)) : extreme ? -128 : random.below(256) - 128;
        sums[n * groups + (group ? k / group : 0)] += code;
        const int64_t step = n / PANEL * steps_of(in) + k / 4, half = PANEL / 2, j = n % PANEL;
        if (narrow) panels[(step * half + j % half) * 4 + k % 4] |= code << (j < half ? 0 : 4);
        else panels[(step * PANEL + j) * 4 + k % 4] = (uint8_t)code;
      }
    for (size_t s = 0; s < scale.size(); s++) zero.push_back(random.below(narrow ? 16 : 256));
    if (factored) factor = random.positive(in, 0.5f);
    linear.panels = panels.data();
    linear.sums = narrow ? nullptr : sums.data();
    linear.scale = scale.data();
    linear.zero = zero.data();
    linear.zero_offset = narrow ? 0 : 128;
    linear.scale_step = one_scale ? 0 : (int32_t)groups;
    linear.bias = bias.data();
    linear.factor = factored ? factor.data() : nullptr;
  }
  // Codes of a byte each become -15 to 15.
  void make_small() {
    for (auto& sum : sums) sum = 0;
    for (int64_t i = 0; i < (int64_t)panels.size(); i++) {
      panels[i] = (uint8_t)((int8_t)panels[i] % 16);
      const int64_t n = i / (steps_of(linear.in) * 4 * PANEL) * PANEL + i / 4 % PANEL;
      if (n < linear.out) sums[n] += (int8_t)panels[i];
    }
  }
};

struct Outcome {
  std::map<std::string, uint64_t> checksums;
  int failures = 0;
  template <typename... Arrays>
  void add(const std::string& name, const Arrays&... arrays) {
    Checksum sum;
    sum.value ^= checksums[name];  // of the case before
    (sum.add(arrays), ...);
    checksums[name] = sum.value;
  }
};

// Numbers of every magnitude, with both zeros, what is subnormal, the largest, infinity and NaN.
Reals magnitudes() {
  Reals numbers = {0.0f, -0.0f, __builtin_inff(), -__builtin_inff(), __builtin_nanf("")};
  for (uint32_t bits = 1; bits < 0x7f800000; bits += 1234577) {
    numbers.push_back(from_bits(bits));
    numbers.push_back(-from_bits(bits));
  }
  for (int i = -6000; i <= 6000; i++) numbers.push_back(i * 0.0017f);
  return numbers;
}

void activations(int level, Outcome& outcome) {
  const Reals x = magnitudes();
  Reals y(x.size());
  for (int activation = GELU; activation <= RELU; activation++) {
    outcome.failures += fairseq_activate(level, activation, x.data(), x.size(), y.data());
    outcome.add(std::string("activate ") + ACTIVATIONS[activation], y);
  }
}

void norms(int level, Outcome& outcome) {
  const char* const names[] = {"none", "layer", "rms", "l2"};
  Random random = {1};
  for (int64_t width : {1, 7, 64, 65, 100, 192, 771}) {
    const Reals x = random.reals(5 * width), weight = random.positive(width, 0.3f), bias = random.reals(width);
    Reals y(x.size());
    for (int kind = NORM_NONE; kind <= NORM_L2; kind++) {
      const Norm norm = {kind % 2 ? weight.data() : nullptr, kind % 2 ? bias.data() : nullptr, 1e-6f, kind};
      outcome.failures += fairseq_norm(level, &norm, x.data(), 5, width, y.data());
      outcome.add(std::string("norm ") + names[kind], y);
    }
  }
}

const int64_t SHAPES[][3] = {{1, 1, 1}, {5, 16, 32}, {13, 70, 40}, {29, 100, 97}, {70, 768, 65}};  // rows, in, out

void layers(int level, Outcome& outcome) {
  Random random = {2};
  for (const auto& [rows, in, out] : SHAPES) {
    for (int variant = 0; variant < 8; variant++) {
      const bool narrow = variant & 1, extreme = variant == 6 || variant == 7;
      Layer layer(random, in, out, narrow, variant & 2, variant == 4 || variant == 5, extreme);
      std::vector<int8_t> q(rows * in);
      for (auto& number : q) number = extreme ? -128 : random.below(256) - 128;
      std::vector<int32_t> products(rows * out), sums(rows);
      outcome.failures += fairseq_product(level, &layer.linear, q.data(), rows, products.data());
      outcome.add(narrow ? "product 4-bit" : "product 8-bit", products);

      Reals x = random.reals(rows * in), y(rows * out), scales(rows);
      const Reals residual = random.reals(rows * out);
      for (int64_t i = 0; i < in; i++)
        x[i] *= variant == 3 ? 0.0f : variant == 4 ? 1e-38f : variant == 5 ? 1e37f : 1.0f;
      if (extreme) {
        layer.linear.input_scale = 0.013f;
        layer.linear.input_zero = -5;
      }
      outcome.failures += fairseq_quantize(level, &layer.linear, x.data(), rows, q.data(), scales.data(), sums.data());
      outcome.add("quantize", q, scales, sums);
      for (int activation = -1; activation <= RELU; activation++) {
        outcome.failures +=
            fairseq_linear(level, &layer.linear, x.data(), rows, activation, nullptr, y.data(), 1, nullptr);
        outcome.add(std::string("linear ") + (activation < 0 ? "alone" : ACTIVATIONS[activation]), y);
      }
      x[0] = __builtin_nanf("");  // its row comes out as NaN, the others as they are
      outcome.failures +=
          fairseq_linear(level, &layer.linear, x.data(), rows, -1, residual.data(), y.data(), 2, nullptr);
      outcome.add("linear residual", y);
    }
  }
}

// Layers with groups of inputs, of integers of few bits or of bfloat16.
void groups(int level, bool halves, Outcome& outcome) {
  Random random = {6};
  for (const auto& [rows, in, out] : SHAPES) {
    for (int64_t group : {0, 32, 48, 112, 128}) {
      if (halves && (group == 0 || group % 32)) continue;
      for (int variant = 0; variant < 8; variant++) {
        Layer layer(random, in, out, variant & 1, variant & 2, false, variant > 5, group);
        layer.linear.halves = halves;
        layer.linear.input_bits = halves ? 8 : 2 + (int)(group + variant) % 7;
        if (!halves && variant % 4 == 3) layer.linear.input_scale = 0.3f, layer.linear.input_zero = -1;
        Reals x = random.reals(rows * in), y(rows * out), scales(rows);
        for (int64_t i = 0; i < in && !halves; i++) x[i] *= variant == 4 ? 1e-38f : variant == 5 ? 1e37f : 1.0f;
        std::vector<int8_t> q(rows * in);
        std::vector<int32_t> sums(rows * groups_of(layer.linear));
        if (!halves) {
          outcome.failures +=
              fairseq_quantize(level, &layer.linear, x.data(), rows, q.data(), scales.data(), sums.data());
          outcome.add("quantize, few bits", q, scales, sums);
          Reals back(rows * in);
          outcome.failures +=
              fairseq_round_tokens(level, layer.linear.input_bits, x.data(), rows, in, back.data(), 1 + variant % 2);
          outcome.add("round tokens", back);
        }
        const char* const name = halves ? "weight-only, groups" : group ? "groups" : "few bits";
        outcome.failures += fairseq_linear(level, &layer.linear, x.data(), rows, -1, nullptr, y.data(), 1, nullptr);
        outcome.add(name, y);
        x[0] = __builtin_nanf("");  // its row comes out as NaN, the others as they are
        outcome.failures += fairseq_linear(level, &layer.linear, x.data(), rows, GELU, nullptr, y.data(), 2, nullptr);
        outcome.add(std::string(name) + ", a NaN", y);
      }
    }
  }
}

// Layers that round their input to bfloat16.
void weight_only(int level, Outcome& outcome) {
  Random random = {5};
  for (const auto& [rows, in, out] : SHAPES) {
    for (int variant = 0; variant < 4; variant++) {
      Layer layer(random, in, out, variant & 1, variant & 2, variant == 3);
      layer.linear.halves = 1;
      Reals x = random.reals(rows * in), y(rows * out);
      const Reals residual = random.reals(rows * out);
      outcome.failures += fairseq_linear(level, &layer.linear, x.data(), rows, -1, nullptr, y.data(), 1, nullptr);
      outcome.add(variant & 1 ? "weight-only 4-bit" : "weight-only 8-bit", y);
      x[0] = __builtin_nanf("");
      outcome.failures +=
          fairseq_linear(level, &layer.linear, x.data(), rows, GELU, residual.data(), y.data(), 2, nullptr);
      outcome.add("weight-only residual", y);
    }
  }
}

void attentions(int level, Outcome& outcome) {
  Random random = {3};
  const int64_t sizes[][4] = {{1, 1, 1, 1}, {3, 35, 2, 20}, {2, 50, 3, 64}, {1, 197, 2, 33}};
  for (const auto& [images, tokens, heads, size] : sizes) {
    const int64_t count = images * tokens * heads * size;
    const Reals query = random.reals(count), key = random.reals(count), value = random.reals(count);
    const Reals bias = random.reals(heads * tokens * tokens), mask = random.reals(2 * tokens * tokens);
    const Reals head_scale = random.positive(heads, 0.2f);
    Reals y(count);
    for (int shifted = 0; shifted < 2; shifted++) {
      Block block = {};
      block.heads = heads;
      block.head_size = size;
      block.scaling = 0.17f;
      Call call = {};
      call.images = images, call.tokens = tokens, call.row_count = images * tokens;
      if (shifted) {
        block.head_scale = head_scale.data();
        call.bias = bias.data();
        call.mask = mask.data();
        call.masks = 2;
      }
      outcome.failures +=
          fairseq_attention(level, &block, &call, query.data(), key.data(), value.data(), heads * size, y.data(), 2);
      outcome.add("attention", y);
    }
  }
}

// The parts of a block, in four kinds: as in ViT; fused, rotated and gated; windows with norms behind the layers; as in
// ViT, with groups of inputs that have 4 bits.
struct BlockParts {
  static const int64_t width = 56, heads = 3, size = 24, mlp = 100;
  std::vector<Layer> layers;
  Reals weight, bias, small;
  Block block = {};
  BlockParts(Random& random, int kind)
      : weight(random.positive(mlp, 0.3f)), bias(random.reals(mlp, 0.2f)), small(random.positive(width, 0.1f)) {
    const int64_t inner = heads * size;
    const bool fused = kind == 1, narrow = kind == 2;
    const int64_t sizes[][2] = {{width, fused ? 3 * inner : inner}, {width, inner}, {width, inner}, {inner, width},
                                {width, fused ? 2 * mlp : mlp},     {width, mlp},   {mlp, width}};
    for (const auto& [in, out] : sizes)
      layers.emplace_back(random, in, out, narrow, kind == 0, false, false, kind == 3 ? 32 : 0);
    if (kind == 3)
      for (Layer& layer : layers) layer.linear.input_bits = 4;
    Linear* const linears[] = {&block.query, &block.key,  &block.value, &block.output,
                               &block.fc1,   &block.gate, &block.fc2};
    for (int i = 0; i < 7; i++) *linears[i] = layers[i].linear;
    const auto norm = [&](NormKind kind) { return Norm{weight.data(), bias.data(), 1e-5f, kind}; };
    const bool behind = kind == 2;
    (behind ? block.post1 : block.norm1) = (behind ? block.post2 : block.norm2) =
        norm(kind == 1 ? NORM_RMS : NORM_LAYER);
    if (kind == 1) block.query_norm = block.key_norm = block.hidden_norm = norm(NORM_LAYER);
    if (kind == 2) block.query_norm = block.key_norm = {nullptr, nullptr, 1e-12f, NORM_L2};
    if (kind == 2) block.head_scale = weight.data();
    if (kind == 1) block.scale1 = block.scale2 = small.data();
    block.scaling = 0.2f;
    block.projections = fused ? 1 : 3;
    block.activation = kind % 3 == 0 ? GELU : kind == 1 ? SILU : GELU_TANH;
    block.gating = kind % 3 == 0 ? GATING_NONE : kind == 1 ? GATING_HALVES : GATING_LAYER;
    block.width = width;
    block.heads = heads;
    block.head_size = size;
    block.mlp = mlp;
  }
};

void blocks(int level, Outcome& outcome) {
  const int64_t images = 5, tokens = 37, rows = images * tokens, width = BlockParts::width;
  Random random = {4};
  for (int kind = 0; kind < 4; kind++) {
    const BlockParts parts(random, kind), others(random, kind);
    const Block* const both[] = {&parts.block, &others.block};
    const Reals cosines = random.reals(tokens * BlockParts::size), sines = random.reals(tokens * BlockParts::size);
    const Reals bias = random.reals(BlockParts::heads * tokens * tokens), mask = random.reals(2 * tokens * tokens);
    std::vector<int32_t> places(rows);  // two rows stand nowhere, the others in an order of their own
    for (int64_t row = 0; row < rows; row++) places[row] = row < 2 ? -1 : (int32_t)(row * 2 % rows);
    Call call = {};
    call.images = images, call.tokens = tokens, call.row_count = rows;
    if (kind == 1) call.cosines = cosines.data(), call.sines = sines.data();
    if (kind == 2) call.rows = places.data(), call.bias = bias.data(), call.mask = mask.data(), call.masks = 2;
    const Reals x = random.reals(rows * width);
    for (int threads : {1, 3}) {
      Reals between = x, y = x;  // where no row stands
      const Call* const calls[] = {&call, &call};
      float* const outs[] = {between.data(), y.data()};
      if (kind == 2) {  // each image reads what others have written
        outcome.failures += fairseq_blocks(level, both, calls, 1, x.data(), outs, threads, 64, 24, nullptr);
        outcome.failures +=
            fairseq_blocks(level, both + 1, calls, 1, between.data(), outs + 1, threads, 64, 24, nullptr);
      } else {
        outcome.failures += fairseq_blocks(level, both, calls, 2, x.data(), outs, threads, 64, 24, nullptr);
      }
      Checksum sum;
      sum.add(between);
      sum.add(y);
      uint64_t& kept = outcome.checksums["blocks " + std::to_string(kind)];
      if (threads == 1) kept = sum.value;
      else if (kept != sum.value)
        outcome.failures++, fprintf(stderr, "%s: blocks depend on threads\n", fairseq_level_name(level));
    }
  }
}

// Constants of a requantization that takes integers up to 2^bits, of rows with scales or without, to about 2^to.
struct Constants {
  std::vector<int32_t> multiplier, shift;
  std::vector<int64_t> offset;
  Requantize requantize = {};
  Constants(Random& random, int64_t columns, int bits, bool scaled, int to, int width) {
    const int scale_bits = scaled ? 15 : 0, lift = bits < 24 ? 24 - bits : 0;
    for (int64_t c = 0; c < round_up(columns, PANEL); c++) {
      const bool filled = c < columns;
      multiplier.push_back(filled ? (int32_t)(32768 + random.below(32767)) * (random.below(2) ? 1 : -1) : 0);
      const int64_t places = bits + scale_bits + 16 + lift - to;
      shift.push_back(filled ? (int32_t)(places > 32 ? places - 32 : 0) : 0);
      const int64_t half = (int64_t)1 << (31 + shift.back());
      offset.push_back(filled ? half + ((int64_t)random.below(2001) - 1000) * (half >> 9) : 0);
    }
    requantize.multiplier = multiplier.data();
    requantize.shift = shift.data();
    requantize.offset = offset.data();
    requantize.lift = lift;
    requantize.low = -(1 << (width - 1));
    requantize.high = (1 << (width - 1)) - 1;
  }
};

// A model of integers alone, of two blocks; static ones have bytes without scales, some of which are of one column.
struct IntegerParts {
  static const int64_t width = 40, heads = 2, size = 20, mlp = 100, tokens = 26, classes = 9, spread = 3;
  std::vector<Layer> layers;
  std::vector<Constants> constants;
  std::vector<int16_t> values, gains;
  std::vector<int32_t> lines, multiplier32, offset32, shift32, multiplier, shift0, positions, columns, added, shift,
      alone, multipliers, shifts;
  std::vector<int64_t> offset;
  IntegerBlock block = {}, other = {};
  const IntegerBlock* blocks[2] = {&block, &other};
  IntegerModel model = {};
  IntegerParts(Random& random, bool dynamic, bool small) {
    layers.reserve(32);
    constants.reserve(64);
    const int narrow = dynamic ? 16 : 8;
    const auto requantize = [&](int64_t count, int bits, bool scaled, int to, int bits_of_result) {
      constants.emplace_back(random, count, bits, scaled, to, bits_of_result);
      return constants.back().requantize;
    };
    const auto linear = [&](int64_t in, int64_t out, bool scaled, int to, int bits, int32_t centre) {
      layers.emplace_back(random, in, out, false);
      IntegerLinear layer = {};
      layer.small = small;
      if (small) layers.back().make_small();
      (Linear&)layer = layers.back().linear;
      layer.output = requantize(out, 18, scaled, to, bits);
      layer.centre = centre;
      return layer;
    };
    for (int i = 0; i < 256; i++) {
      values.push_back((int16_t)(i ? random.below(8000) : 0));
      gains.push_back((int16_t)(random.below(400) - 200));
      lines.push_back((int32_t)((uint16_t)values.back() | (uint32_t)gains.back() << 16));
    }
    for (int64_t i = 0; i < divide_up(mlp, PANEL) * PANEL + PANEL; i++) {  // the same in 32 bits and in 64
      shift32.push_back((int32_t)(17 + random.below(4)));
      multiplier32.push_back((int32_t)(32768 + random.below(32768)));
      offset32.push_back((int32_t)(random.below(1 << 20) - (1 << 19)));
      multiplier.push_back(multiplier32.back() << (32 - shift32.back()));
      offset.push_back((int64_t)offset32.back() * ((int64_t)1 << (32 - shift32.back())));
      shift0.push_back(0);
    }
    for (int64_t i = 0; i < tokens * width; i++) positions.push_back((int32_t)random.below(1 << 20) - (1 << 19));
    for (int64_t i = 0; i < width + spread; i++) {
      columns.push_back((int32_t)(i < width ? i : 5));
      added.push_back((int32_t)(i < width ? i == 5 ? 3 : 0 : i - width));
      shift.push_back(i == 5 || i >= width ? 2 : 0);
      alone.push_back((int32_t)(i < 5 ? 5 - i : i > 5 && i < width ? width - i : 0));
    }
    for (int64_t head = 0; head < heads; head++) {
      multipliers.push_back((int32_t)(40000 + random.below(20000)));
      shifts.push_back(dynamic ? 4 : 0);
    }
    const Rows plain = {nullptr, nullptr, nullptr, dynamic ? ROWS_SIGNED : ROWS_BYTES, 0, nullptr};
    const Rows several = {columns.data(), added.data(), shift.data(), ROWS_BYTES, -7, alone.data()};
    const int64_t inputs = dynamic ? width : width + spread;
    for (IntegerBlock* one : {&block, &other}) {
      one->norm1 = {requantize(width, 24, false, dynamic ? 14 : 9, 16), 1000};
      one->norm2 = {requantize(width, 24, false, dynamic ? 14 : 6, narrow), 1};
      one->rows1 = dynamic ? plain : several;
      one->rows2 = one->attended_rows = one->hidden_rows = plain;
      if (dynamic) one->hidden_rows.kind = ROWS_UNSIGNED;
      one->query = linear(inputs, heads * size, dynamic, narrow - 1, narrow, 0);
      one->key = linear(inputs, heads * size, dynamic, narrow - 1, narrow, 0);
      one->value = linear(inputs, heads * size, dynamic, narrow - 1, narrow, 0);
      one->output = linear(heads * size, width, dynamic, 18, 22, 0);
      one->fc1 = linear(width, mlp, dynamic, 15, 24, 0);
      one->fc2 = linear(mlp, width, dynamic, 18, 22, dynamic ? 128 : 0);
      one->attention = {multipliers.data(), shifts.data(), requantize(heads * size, 19, dynamic, narrow - 1, narrow),
                        10, dynamic};
      one->lines = {lines.data(), values.data(), gains.data()};
      one->activation = {multiplier.data(),    shift0.data(),          offset.data(), 0,
                         -(1 << (narrow - 1)), (1 << (narrow - 1)) - 1};
      if (one == &block)
        one->activation32 = {multiplier32.data(), offset32.data(), shift32.data(), one->activation.low,
                             one->activation.high};
    }
    model.patches = linear(3 * 16, width, false, 18, 22, 0);
    model.classifier = linear(width, classes, dynamic, 20, 24, 0);
    model.constants = positions.data();
    model.blocks = blocks;
    model.block_count = 2;
    model.channels = 3;
    model.picture_height = model.picture_width = 20;
    model.patch_height = model.patch_width = 4;
    model.tokens = tokens;
    model.width = width;
    model.heads = heads;
    model.head_size = size;
    model.mlp = mlp;
    model.norm = {requantize(width, 24, false, dynamic ? 14 : 6, narrow), 77};
    model.rows = plain;
  }
};

void integers(int level, Outcome& outcome) {
  const int64_t images = 5, picture = 3 * 20 * 20;
  Random random = {6};
  for (int variant = 0; variant < 4; variant++) {
    const bool dynamic = variant & 1, small = variant & 2;
    const IntegerParts parts(random, dynamic, small);
    std::vector<uint8_t> pixels(images * picture);
    for (auto& pixel : pixels) pixel = (uint8_t)random.below(256);
    for (int threads : {1, 3}) {
      std::vector<int32_t> logits(images * IntegerParts::classes);
      outcome.failures +=
          fairseq_integers(level, &parts.model, pixels.data(), images, logits.data(), threads, 64, 24, nullptr);
      Checksum sum;
      sum.add(logits);
      uint64_t& kept =
          outcome.checksums[std::string("integers, ") + (dynamic ? "dynamic" : "static") + (small ? ", small" : "")];
      if (threads == 1) kept = sum.value;
      else if (kept != sum.value)
        outcome.failures++, fprintf(stderr, "%s: integers depend on threads\n", fairseq_level_name(level));
    }
  }
  const Reals x = random.reals(2 * 3 * 101);
  const double start[] = {-1.9, 0.0, -0.3}, step[] = {0.017, 0.015625, 1.0};
  std::vector<uint8_t> pixels(x.size());
  outcome.failures += fairseq_round_pixels(level, x.data(), 2, 3, 101, start, step, pixels.data(), 2);
  outcome.add("round pixels", pixels);
}

Outcome outcome_of(int level) {
  Outcome outcome;
  activations(level, outcome);
  norms(level, outcome);
  layers(level, outcome);
  groups(level, false, outcome);
  integers(level, outcome);
  const std::string name = fairseq_level_name(level);
  if (name == "avx512bf16" || name == "amx")
    return outcome;  // their products of bfloat16 are summed in an order of their own
  weight_only(level, outcome);
  groups(level, true, outcome);
  attentions(level, outcome);
  blocks(level, outcome);
  return outcome;
}

}  // namespace

int main() {
  int portable = 0;
  while (strcmp(fairseq_level_name(portable), "portable")) portable++;
  const Outcome expected = outcome_of(portable);
  for (const auto& [name, sum] : expected.checksums) printf("%016llx %s\n", (unsigned long long)sum, name.c_str());
  int failures = expected.failures;
  std::string ran;
  for (int level = 0; fairseq_level_name(level); level++) {
    if (!fairseq_supports(level)) continue;
    ran += std::string(" ") + fairseq_level_name(level);
    const Outcome outcome = outcome_of(level);
    failures += outcome.failures;
    for (const auto& [name, sum] : outcome.checksums)
      if (sum != expected.checksums.at(name))
        failures++, fprintf(stderr, "%s differs in %s\n", fairseq_level_name(level), name.c_str());
  }
  printf("levels%s\n", ran.c_str());
  return failures != 0;
}
