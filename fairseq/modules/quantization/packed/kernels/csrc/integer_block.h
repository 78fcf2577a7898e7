// A Vision Transformer on integers alone, for the images of a chunk; see docs/integer_only.rst for its widths.
//
// Queries, keys and values of attention are bytes:
// queries  [head][image][tile of an image's tokens], as the rows of a product: a group of each row, then the next
// keys     [image][head][32 tokens][4 columns][32][4], the tokens filled up to 32, the columns to 16
// values   [image][head][32 columns][4 tokens][32][4], the columns filled up to 32, the tokens to 16
#pragma once

#include "api.h"
#include "integers.h"

namespace {  // each instruction set has its own

template <typename Epilogue>
static inline void run(const IntegerLinear& layer, const SharedWorkspace& shared, ThreadWorkspace& own,
                       const Crew& crew, int64_t from, int64_t to, const Linear* coming, const Epilogue& epilogue) {
  const Share panels(panel_count(layer), crew);
  const int64_t first = coming ? Share(panel_count(*coming), crew).first : 0;
  const Rounded rows = {shared.integers, row_bytes(layer, Isa::GROUP), nullptr, shared.sums};
  multiply_in<InBytes>(layer, rows, {shared.tiles, from, to, panels.first, panels.last}, coming, first, own, epilogue);
  wait(crew, own);
}

// Rounds the member's rows of the tiles [from, to) to bytes: give(row, scratch) says which integers.
template <typename Give>
static inline void bytes_of_rows(const Linear& layer, const Rows& how, const SharedWorkspace& shared,
                                 ThreadWorkspace& own, const Crew& crew, int64_t from, int64_t to, Stage stage,
                                 Give give) {
  const Share tiles(to - from, crew);
  const int64_t stride = row_bytes(layer, Isa::GROUP);
  for (int64_t t = from + tiles.first; t < from + tiles.last; t++) {
    const Tile& tile = shared.tiles[t];
    for (int64_t i = 0; i < tile.rows; i++)
      shared.sums[tile.row + i] = integer_row(how, give(tile.row + i, (int16_t*)own.row), layer.in,
                                              shared.integers + tile.row * stride, i, tile.rows);
  }
  lap(own, stage);
  wait(crew, own);
}

static inline void normed_bytes(const Linear& layer, const IntegerNorm& norm, const Rows& how, int64_t width,
                                const SharedWorkspace& shared, ThreadWorkspace& own, const Crew& crew, int64_t from,
                                int64_t to) {
  bytes_of_rows(layer, how, shared, own, crew, from, to, STAGE_NORM, [&](int64_t row, int16_t* scratch) {
    integer_norm(norm, shared.stream + row * width, width, scratch);
    return scratch;
  });
}

// Where attention finds the bytes of a head of an image, and what belongs to them.
struct ByteHeads {
  const SharedWorkspace& shared;
  int64_t heads, size, images, tokens, padded_tokens, padded_size;
  int64_t row, key_panels, key_steps, value_panels, value_steps;
  ByteHeads(const IntegerModel& model, const SharedWorkspace& shared)
      : shared(shared), heads(model.heads), size(model.head_size), images(shared.images), tokens(model.tokens),
        padded_tokens(round_up(tokens, PANEL)), padded_size(round_up(size, PANEL)), row(round_up(size, Isa::GROUP)),
        key_panels(divide_up(tokens, PANEL)), key_steps(steps_of(size)), value_panels(divide_up(size, PANEL)),
        value_steps(steps_of(tokens)) {}
  int64_t at(int64_t image, int64_t head) const { return image * heads + head; }
  uint8_t* query(int64_t image, int64_t head, int64_t token) const {
    return (uint8_t*)shared.queries + ((head * images + image) * tokens + token) * row;
  }
  uint8_t* key(int64_t image, int64_t head) const {
    return (uint8_t*)shared.keys + at(image, head) * key_panels * key_steps * PANEL * 4;
  }
  uint8_t* value(int64_t image, int64_t head) const {
    return (uint8_t*)shared.values + at(image, head) * value_panels * value_steps * PANEL * 4;
  }
  int32_t* query_scales(int64_t image, int64_t head) const {
    return shared.query_scales + at(image, head) * padded_tokens;
  }
  int32_t* key_scales(int64_t image, int64_t head) const { return shared.key_scales + at(image, head) * padded_tokens; }
  int32_t* key_sums(int64_t image, int64_t head) const { return shared.key_sums + at(image, head) * padded_tokens; }
  int32_t& value_scale(int64_t image, int64_t head) const { return shared.value_scales[at(image, head)]; }
  int32_t* value_means(int64_t image, int64_t head) const { return shared.value_means + at(image, head) * padded_size; }
  int32_t* value_sums(int64_t image, int64_t head) const { return shared.value_sums + at(image, head) * padded_size; }
  int64_t tile_rows(int64_t first) const { return least(Isa::ROWS, tokens - first); }
};

const int32_t STATIC_KEY_SCALE = 1 << 14;  // stands for 1

// Bytes of queries and keys of a head, and their scales.
static inline void pack_queries_and_keys(const IntegerAttention& attention, const ByteHeads& heads, int64_t image,
                                         int64_t head, const int16_t* parts, int64_t stride) {
  const Rows how = {nullptr, nullptr, nullptr, attention.dynamic ? ROWS_SIGNED : ROWS_BYTES, 0, nullptr};
  const int64_t multiplier = attention.multiplier[head], inner = heads.heads * heads.size;
  for (int64_t token = 0; token < heads.tokens; token++, parts += stride) {
    for (int64_t part = 0; part < 3; part++)  // written by another core, and a page further each
      for (int64_t column = 0; column < heads.size; column += ALIGNMENT / 2)
        __builtin_prefetch(parts + 12 * stride + part * inner + column);
    const int64_t first = token / Isa::ROWS * Isa::ROWS, rows = heads.tile_rows(first);
    const int64_t m = integer_row(how, parts, heads.size, heads.query(image, head, first), token - first, rows);
    heads.query_scales(image, head)[token] =
        (int32_t)(attention.dynamic ? (m * multiplier + (1 << 15)) >> 16 : multiplier);
    uint32_t* const to = (uint32_t*)heads.key(image, head) + token / PANEL * heads.key_steps * PANEL + token % PANEL;
    Pairs16 sums = {};  // of at most 256 columns
    const int32_t own =
        integer_row(how, parts + inner, heads.size, [&](int64_t i, Pairs16 bytes) {  // zeros become zeros
      sums += bytes;
      uint32_t fours[2 * LANES / 4];
      store((uint8_t*)fours, low_bytes(bytes), All());
      for (int64_t step = 0; step < least(2 * LANES / 4, heads.key_steps - i / 4); step++)
        to[(i / 4 + step) * PANEL] = fours[step];
    });
    for (int64_t step = divide_up(heads.size, 2 * LANES) * 2 * LANES / 4; step < heads.key_steps; step++)
      to[step * PANEL] = 0;
    heads.key_scales(image, head)[token] = attention.dynamic ? own : STATIC_KEY_SCALE;
    heads.key_sums(image, head)[token] = Isa::OFFSET * sum(sums);
  }
  for (int64_t token = heads.tokens; token < heads.padded_tokens; token++)
    heads.key_sums(image, head)[token] = heads.key_scales(image, head)[token] = 0;
}

// Bytes of the values of a head, with one scale, their sums and means by column.
static inline void pack_values(const IntegerAttention& attention, const ByteHeads& heads, int64_t image, int64_t head,
                               const int16_t* values, int64_t stride) {
  const int64_t lanes = 2 * LANES, tokens = heads.tokens;
  int32_t m = 1;
  if (attention.dynamic) {
    Extent extent;
    for (int64_t token = 0; token < tokens; token++) extent.take(values + token * stride, heads.size);
    m = (int32_t)most(1, extent.magnitude());
  }
  heads.value_scale(image, head) = m;
  const ToBytes to_bytes(m, true);
  for (int64_t column = 0; column < heads.padded_size; column += lanes) {
    uint8_t* const to = heads.value(image, head) + (column / PANEL * heads.value_steps * PANEL + column % PANEL) * 4;
    const int64_t left = least(lanes, heads.size - column);
    Ints even = {}, odd = {};  // sums
    for (int64_t step = 0; step < heads.value_steps; step++) {
      Pairs16 four[4] = {};
      for (int64_t k = 0; k < least(4, tokens - 4 * step); k++) {
        if (left <= 0) continue;
        const int16_t* from = values + (4 * step + k) * stride + column;
        Pairs16 x = {};
        if (left == lanes) x = load<Pairs16>(from);
        else memcpy(&x, from, left * sizeof(*from));
        four[k] = attention.dynamic ? to_bytes(x) : x;
      }
      const Pairs16 sums = four[0] + four[1] + four[2] + four[3];
      even += even_pairs(sums);
      odd += odd_pairs(sums);
      const Pairs16 first = (four[0] & 255) | four[1] << 8, second = (four[2] & 255) | four[3] << 8;
      store_fours(first, second, to + step * PANEL * 4);
    }
    int32_t* const sums = heads.value_sums(image, head) + column;
    for (int64_t j = 0; j < LANES; j++) {
      sums[2 * j] = even[j];
      sums[2 * j + 1] = odd[j];
    }
    for (int64_t j = 0; j < lanes; j++)
      heads.value_means(image, head)[column + j] = (int32_t)divide_down((int64_t)sums[j] * 512 + tokens, 2 * tokens);
  }
}

const int32_t SCORE_LIMIT = (1 << 30) - 1, ONE = 1 << 15, SLOPE = 22023, SQUARE = 5639;

// 255 * 2^(-d / 2^15) in units of 2^-15, d >= 0.
static inline Ints integer_exp2(Ints d) {
  d = smaller(d, ints(24 << 15));
  const Ints f = d & (ONE - 1);
  const Ints slope = SLOPE - ((times_shorts(f, ints(SQUARE)) + (1 << 14)) >> 15);
  const Ints power = ONE - ((times_shorts(f, slope) + (1 << 14)) >> 15);
  return (power * 255) >> (d >> 15);
}

// The scores of a tile, and the largest of each row.
static inline void integer_scores(const IntegerAttention& attention, const ByteHeads& heads, int64_t image,
                                  int64_t head, int64_t first, int64_t rows, ThreadWorkspace& own, Ints* highest) {
  int32_t* const sums = own.accumulators;
  const int64_t stride = heads.padded_tokens;
  const int32_t shift = attention.shift[head], lift = attention.lift;
  const Longs half = longs((int64_t)1 << (31 + shift));
  for (int64_t i = 0; i < rows; i++) highest[i] = ints(-SCORE_LIMIT - 1);
  for (int64_t panel = 0; panel < heads.key_panels; panel++) {
    Isa::product(heads.query(image, head, first), heads.key(image, head) + panel * heads.key_steps * PANEL * 4, rows,
                 heads.key_steps, sums);
    for (int64_t j = 0; j < PANEL; j += LANES) {
      const int64_t token = panel * PANEL + j;
      const Ints scales = load<Ints>(heads.key_scales(image, head) + token),
                 corrections = load<Ints>(heads.key_sums(image, head) + token);
      for (int64_t i = 0; i < rows; i++) {
        const Ints s = (load<Ints>(sums + PANEL * i + j) - corrections) << lift;
        const Ints both = scales * heads.query_scales(image, head)[first + i];
        Ints u = high_halves(times((Longs)s, (Longs)both) + half, times(odd_lanes(s), odd_lanes(both)) + half) >> shift;
        u = between(u, -SCORE_LIMIT, SCORE_LIMIT);
        if (token + LANES > heads.tokens)
          u = lane_numbers() < (int32_t)(heads.tokens - token) ? u : ints(-SCORE_LIMIT - 1);
        highest[i] = larger(highest[i], u);
        store((int32_t*)own.scores + i * stride + token, u);
      }
    }
  }
}

// Bytes of exponentials of a row to row `row` of a tile; their sum before rounding and after it.
struct Exponentials {
  int64_t total, rounded;
};
static inline Exponentials integer_exponentials(const int32_t* scores, int64_t stride, int64_t bytes, int32_t highest,
                                                uint8_t* tile, int64_t row, int64_t rows) {
  const int64_t few = 128 * LANES;  // whose sums, by lane, fit 32 bits
  uint8_t* const to = tile + Isa::GROUP * row;
  Exponentials result = {};
  for (int64_t first = 0; first < stride; first += few) {
    Ints total = {}, rounded = {};
    for (int64_t j = first; j < least(first + few, stride); j += LANES) {
      const Ints x = integer_exp2(highest - load<Ints>(scores + j)), e = (x + (1 << 14)) >> 15;
      total += x;
      rounded += e;
      put(e - 128, to, rows, j, All());
    }
    result.total += total_of(total);
    result.rounded += total_of(rounded);
  }
  for (int64_t j = stride; j < bytes; j += LANES) put(ints(-128), to, rows, j, All());
  return result;
}

// mixed (rows, heads * size) of the member's share of heads and tiles.
static void integer_attend(const IntegerAttention& attention, const ByteHeads& heads, const SharedWorkspace& shared,
                           ThreadWorkspace& own, const Crew& crew) {
  const int64_t tiles = divide_up(heads.tokens, Isa::ROWS), inner = heads.heads * heads.size,
                stride = heads.padded_tokens;
  const Share share(heads.images * heads.heads * tiles, crew);
  uint8_t* const weights = (uint8_t*)own.weights;
  const int32_t limit = 127 << 12;
  for (int64_t item = share.first; item < share.last; item++) {
    const int64_t image = item / tiles / heads.heads, head = item / tiles % heads.heads;
    const int64_t first = item % tiles * Isa::ROWS, rows = heads.tile_rows(first);
    Ints highest[Isa::ROWS];
    integer_scores(attention, heads, image, head, first, rows, own, highest);
    int64_t rest[Isa::ROWS], reciprocal[Isa::ROWS];
    for (int64_t i = 0; i < rows; i++) {
      const Exponentials sums =
          integer_exponentials((const int32_t*)own.scores + i * stride, stride, round_up(stride, Isa::GROUP),
                               largest(highest[i]), weights, i, rows);
      rest[i] = sums.total - (sums.rounded << 15);
      reciprocal[i] = ((int64_t)1 << 53) / sums.total;
    }
    for (int64_t panel = 0; panel < heads.value_panels; panel++) {
      int32_t* const products = own.accumulators;
      Isa::product(weights, heads.value(image, head) + panel * heads.value_steps * PANEL * 4, rows, heads.value_steps,
                   products);
      for (int64_t j = 0; j < PANEL; j += LANES) {
        const int64_t column = panel * PANEL + j, left = heads.size - column;
        if (left <= 0) break;
        const Ints corrections = (128 - Isa::OFFSET) * load<Ints>(heads.value_sums(image, head) + column);
        const Ints means = load<Ints>(heads.value_means(image, head) + column);
        const Requantized output(attention.output, head * heads.size + column);
        const Longs mean_even = (Longs)means, mean_odd = odd_lanes(means);
        for (int64_t i = 0; i < rows; i++) {
          const Ints e = load<Ints>(products + PANEL * i + j) + corrections;
          const Longs r = longs(reciprocal[i]), taken = longs(rest[i]), unit = longs(1 << 15);
          const auto divided = [&](Longs sums, Longs mean) {
            const Longs p = times(sums, unit) + shift_right(times(mean, taken) + 128, 8);
            return times_words(p, r) + (Longs)((LongWords)times((Longs)((LongWords)p >> 32), r) << 32) +
                   ((int64_t)1 << 40);
          };
          const Ints y =
              between(high_halves(divided((Longs)e, mean_even), divided(odd_lanes(e), mean_odd)) >> 9, -limit, limit);
          int16_t* const to = shared.mixed + (image * heads.tokens + first + i) * inner + head * heads.size + column;
          store(to, narrow(output(y, heads.value_scale(image, head))), left);
        }
      }
    }
  }
  lap(own, STAGE_ATTENTION);
  wait(crew, own);
}

static void integer_block(const IntegerModel& model, const IntegerBlock& block, const IntegerLinear* following,
                          const SharedWorkspace& shared, ThreadWorkspace& own, const Crew& crew, int64_t slice) {
  const int64_t width = model.width, inner = model.heads * model.head_size, tiles = shared.tile_count;
  normed_bytes(block.query, block.norm1, block.rows1, width, shared, own, crew, 0, tiles);
  const IntegerLinear* const linears[] = {&block.query, &block.key, &block.value, &block.output};
  for (int part = 0; part < 3; part++)
    run(*linears[part], shared, own, crew, 0, tiles, linears[part + 1],
        IntegerRows<int16_t>{shared.parts + part * inner, 3 * inner, inner});
  const ByteHeads heads(model, shared);
  const Share mine(heads.images * heads.heads, crew);
  for (int64_t item = mine.first; item < mine.last; item++) {
    const int64_t image = item / heads.heads, head = item % heads.heads;
    const int16_t* const parts = shared.parts + image * heads.tokens * 3 * inner + head * heads.size;
    pack_queries_and_keys(block.attention, heads, image, head, parts, 3 * inner);
    pack_values(block.attention, heads, image, head, parts + 2 * inner, 3 * inner);
  }
  lap(own, STAGE_QUANTIZE);
  wait(crew, own);
  integer_attend(block.attention, heads, shared, own, crew);
  bytes_of_rows(block.output, block.attended_rows, shared, own, crew, 0, tiles, STAGE_QUANTIZE,
                [&](int64_t row, int16_t*) { return shared.mixed + row * inner; });
  run(block.output, shared, own, crew, 0, tiles, &block.fc1, IntegerAdded{shared.stream, width});
  const int64_t slices = divide_up(tiles, most(1, slice / Isa::ROWS));
  for (int64_t s = 0; s < slices; s++) {
    const int64_t from = tiles * s / slices, to = tiles * (s + 1) / slices, mlp = model.mlp;
    int16_t* const activated =
        shared.activated - shared.tiles[from].row * mlp;  // so that rows count from the first of the chunk
    normed_bytes(block.fc1, block.norm2, block.rows2, width, shared, own, crew, from, to);
    run(block.fc1, shared, own, crew, from, to, &block.fc2,
        IntegerActivated{block.lines, block.activation, block.activation32, activated, mlp, mlp});
    bytes_of_rows(block.fc2, block.hidden_rows, shared, own, crew, from, to, STAGE_QUANTIZE,
                  [&](int64_t row, int16_t*) { return activated + row * mlp; });
    run(block.fc2, shared, own, crew, from, to, s + 1 < slices ? &block.fc1 : following,
        IntegerAdded{shared.stream, width});
  }
}

// Bytes of the patches of the member's rows; the first tokens, which are none, are rows of zeros.
static inline void cut_patches(const IntegerModel& model, const uint8_t* pixels, const SharedWorkspace& shared,
                               const Crew& crew) {
  const int64_t columns = model.picture_width / model.patch_width,
                count = model.picture_height / model.patch_height * columns;
  const int64_t picture = model.channels * model.picture_height * model.picture_width,
                stride = row_bytes(model.patches, Isa::GROUP);
  const Share tiles(shared.tile_count, crew);
  for (int64_t t = tiles.first; t < tiles.last; t++) {
    const Tile& tile = shared.tiles[t];
    for (int64_t i = 0; i < tile.rows; i++) {
      const Place at = shared.places[tile.row + i];
      const int64_t patch = at.token - (model.tokens - count);
      uint8_t* const to = shared.integers + tile.row * stride + Isa::GROUP * i;
      int64_t k = 0;
      const auto next = [&](uint8_t byte) {
        to[k / Isa::GROUP * Isa::GROUP * tile.rows + k % Isa::GROUP] = (uint8_t)(byte - 128 + Isa::OFFSET);
        k++;
      };
      shared.sums[tile.row + i] = 1;
      const uint8_t* const corner = pixels + at.image * picture +
                                    patch / columns * model.patch_height * model.picture_width +
                                    patch % columns * model.patch_width;
      for (int64_t c = 0; c < model.channels; c++)
        for (int64_t y = 0; y < model.patch_height; y++)
          for (int64_t x = 0; x < model.patch_width; x++)
            next(patch < 0 ? 128 : corner[(c * model.picture_height + y) * model.picture_width + x]);
    }
  }
}

// The constants of each row, and of a patch's what it is embedded to.
struct Embedded {
  const IntegerModel& model;
  const SharedWorkspace& shared;
  int64_t first;  // token that is a patch
  struct At {
    const Embedded* of;
    int64_t column;
    void operator()(int64_t row, Ints y) const {
      const int64_t token = of->shared.places[row].token, left = of->model.width - column;
      if (left <= 0) return;
      const Ints constants = load<Ints>(of->model.constants + token * of->model.width + column, left);
      const Ints sum = token < of->first ? constants : between(constants + y, -STREAM_LIMIT, STREAM_LIMIT - 1);
      store(of->shared.stream + row * of->model.width + column, sum, left);
    }
  };
  At at(int64_t column) const { return {this, column}; }
};

// (x - start) / step in double, rounded half to even, 0 to 255: the one step that is not of integers. False of NaN or
// Inf.
static bool round_pixels(const float* x, int64_t count, double start, double step, uint8_t* pixels) {
  const double rounder = 6755399441055744.0, largest = 3.4028234663852886e38;  // 1.5 * 2^52; of float
  int wrong = 0;
  for (int64_t i = 0; i < count; i++) {
    const double value = x[i], size = value < 0 ? -value : value;
    wrong |= !(size <= largest);
    double level = (value - start) / step;
    level = level > 0.0 ? level : 0.0;
    level = level < 255.0 ? level : 255.0;
    pixels[i] = (uint8_t)(int32_t)((level + rounder) - rounder);
  }
  return !wrong;
}

static void integers(const IntegerModel& model, int64_t first_image, const uint8_t* pixels, int32_t* logits,
                     const SharedWorkspace& shared, ThreadWorkspace& own, const Crew& crew, int64_t slice) {
  const int64_t picture = model.channels * model.picture_height * model.picture_width, classes = model.classifier.out;
  const int64_t patches = model.picture_height / model.patch_height * (model.picture_width / model.patch_width);
  cut_patches(model, pixels + first_image * picture, shared, crew);
  lap(own, STAGE_QUANTIZE);
  wait(crew, own);
  run(model.patches, shared, own, crew, 0, shared.tile_count, &model.blocks[0]->query,
      Embedded{model, shared, model.tokens - patches});
  const Share mine(shared.images * model.tokens, crew);
  if (model.before) {
    for (int64_t row = mine.first; row < mine.last; row++) {
      int32_t* const h = shared.stream + row * model.width;
      integer_norm(*model.before, h, model.width, h);
    }
    lap(own, STAGE_NORM);
    wait(crew, own);
  }
  for (int64_t b = 0; b < model.block_count; b++) {
    const IntegerLinear* following = b + 1 < model.block_count ? &model.blocks[b + 1]->query
                                     : classes                 ? &model.classifier
                                                               : nullptr;
    integer_block(model, *model.blocks[b], following, shared, own, crew, slice);
  }
  if (!classes) {
    int32_t* const to = logits + first_image * model.tokens * model.width;
    for (int64_t i = mine.first * model.width; i < mine.last * model.width; i++) to[i] = shared.stream[i];
    wait(crew, own);
    return;
  }
  SharedWorkspace head = shared;  // the first tokens are the rows of these tiles
  Tile tiles[TILES_AT_ONCE];
  for (int64_t first = 0; first < shared.images; first += TILES_AT_ONCE * Isa::ROWS) {
    const int64_t rows = least(TILES_AT_ONCE * Isa::ROWS, shared.images - first);
    head.tile_count = divide_up(rows, Isa::ROWS);
    head.tiles = tiles;
    for (int64_t t = 0; t < head.tile_count; t++)
      tiles[t] = {(int32_t)(Isa::ROWS * t), (int32_t)least(Isa::ROWS, rows - Isa::ROWS * t)};
    bytes_of_rows(model.classifier, model.rows, head, own, crew, 0, head.tile_count, STAGE_NORM,
                  [&](int64_t row, int16_t* scratch) {
      integer_norm(model.norm, shared.stream + (first + row) * model.tokens * model.width, model.width, scratch);
      return scratch;
    });
    run(model.classifier, head, own, crew, 0, head.tile_count, nullptr,
        IntegerRows<int32_t>{logits + (first_image + first) * classes, classes, classes});
  }
}

}  // namespace
