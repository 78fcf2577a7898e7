// An encoder block for the rows of a chunk. A crew shares rows where rows are alone, panels where they are multiplied,
// and heads in attention; its members wait for each other in between.
#pragma once

#include "api.h"
#include "attention.h"
#include "gemm.h"
#include "rounding.h"
#include "rows.h"

namespace {  // each instruction set has its own

static inline Rounded rounded_of(const SharedWorkspace& shared, const Linear& layer) {
  return {shared.integers, row_bytes(layer, Isa::GROUP), shared.scales, shared.sums};
}

// Norms and rounds `count` rows of a tile, from row i on.
template <int count>
static inline void quantize_normed_rows(const Linear& linear, const Norm& before, const float* const* rows,
                                        float* scratch, uint8_t* tile, int64_t i, int64_t tile_rows, float* scales,
                                        int32_t* sums) {
  const float* x[count];
  float* normed[count];
  for (int r = 0; r < count; r++) {
    x[r] = rows[r];
    normed[r] = scratch + r * round_up(linear.in, LANES);
  }
  if (before.kind != NORM_NONE) {
    norm_rows(before, x, linear.in, normed);
    for (int r = 0; r < count; r++) x[r] = normed[r];
  }
  quantize_together(x, linear, tile, i, tile_rows, scales, sums);
}

// Rounds the member's rows of the tiles [from, to), normed before: source(row) says which numbers; zeros for null.
template <typename Source>
static inline void quantize_rows(const Linear& linear, const Norm& before, const SharedWorkspace& shared,
                                 ThreadWorkspace& own, const Crew& crew, int64_t from, int64_t to, Source source) {
  const Share tiles(to - from, crew);
  const int64_t stride = row_bytes(linear, Isa::GROUP), groups = groups_of(linear);
  const bool may = rounds_together(linear);
  for (int64_t t = from + tiles.first; t < from + tiles.last; t++) {
    const Tile& tile = shared.tiles[t];
    uint8_t* const integers = shared.integers + tile.row * stride;
    for (int64_t i = 0, count; i < tile.rows; i += count) {
      count = may ? together(tile.rows - i) : 1;
      float* const scales = shared.scales + tile.row + i;
      int32_t* const sums = shared.sums + (tile.row + i) * groups;
      const float* x[MOST_TOGETHER];
      bool all = true;
      for (int64_t r = 0; r < count; r++) all &= (x[r] = source(tile.row + i + r)) != nullptr;
      if constexpr (LANES == 16) {
        if (all && count == 5) {
          quantize_normed_rows<5>(linear, before, x, own.row, integers, i, tile.rows, scales, sums);
          continue;
        }
        if (all && count == 4) {
          quantize_normed_rows<4>(linear, before, x, own.row, integers, i, tile.rows, scales, sums);
          continue;
        }
      }
      for (int64_t r = 0; r < count; r++) {
        const float* numbers = x[r];
        if (!numbers) numbers = (const float*)memset(own.row, 0, linear.in * sizeof(float));
        else if (before.kind != NORM_NONE) norm(before, x[r], linear.in, own.row), numbers = own.row;
        quantize(numbers, linear, own.row, integers, i + r, tile.rows, scales + r, sums + r * groups);
      }
    }
  }
}

// The same of the hidden states `x` that stand there; zeros for -1.
static inline void quantize_normed(const Linear& linear, const Norm& before, const float* x, int64_t width,
                                   const int32_t* rows, const SharedWorkspace& shared, ThreadWorkspace& own,
                                   const Crew& crew, int64_t from, int64_t to) {
  quantize_rows(linear, before, shared, own, crew, from, to, [&](int64_t row) -> const float* {
    const int64_t at = rows ? rows[row] : row;
    return at < 0 ? nullptr : x + at * width;
  });
  lap(own, STAGE_NORM);
  wait(crew, own);
}

// One layer for the tiles [from, to), whose columns the crew shares.
template <typename Epilogue>
static inline void run(const Linear& layer, const SharedWorkspace& shared, ThreadWorkspace& own, const Crew& crew,
                       int64_t from, int64_t to, const Linear* coming, const Epilogue& epilogue) {
  const Share panels(panel_count(layer), crew);
  const int64_t first = coming ? Share(panel_count(*coming), crew).first : 0;
  multiply(layer, rounded_of(shared, layer), {shared.tiles, from, to, panels.first, panels.last}, coming, first, own,
           epilogue);
}

// out = residual + scale * norm(added), of one row.
static inline void add_normed(const Norm& post, const float* scale, int64_t width, const float* added, float* scratch,
                              const float* residual, float* out) {
  norm(post, added, width, scratch);
  each(width, [&](int64_t i, auto left) {
    Floats y = load<Floats>(scratch + i, left);
    if (scale) y = y * load<Floats>(scale + i, left);
    store(out + i, load<Floats>(residual + i, left) + y, left);
  });
}

// A branch's last layer for the tiles [from, to): out = residual + scale * post(layer), `rows` says where.
static void add_branch(const Linear& layer, const Linear* coming, const Norm& post, const float* scale,
                       const float* residual, float* out, const int32_t* rows, const SharedWorkspace& shared,
                       ThreadWorkspace& own, const Crew& crew, int64_t from, int64_t to) {
  const int64_t width = layer.out;
  if (post.kind == NORM_NONE) {
    run(layer, shared, own, crew, from, to, coming, Added{residual, scale, out, width, rows});
    wait(crew, own);
    return;
  }
  run(layer, shared, own, crew, from, to, coming, ToRows<AsItIs>{shared.added, width, width, {}});
  wait(crew, own);
  const Share share(to - from, crew);
  for (int64_t t = from + share.first; t < from + share.last; t++) {
    for (int64_t row = shared.tiles[t].row; row < shared.tiles[t].row + shared.tiles[t].rows; row++) {
      const int64_t at = rows ? rows[row] : row;
      if (at >= 0)
        add_normed(post, scale, width, shared.added + row * width, own.row, residual + at * width, out + at * width);
    }
  }
  lap(own, STAGE_NORM);
  wait(crew, own);
}

// Queries, keys and values of the normed rows, to where attention reads them.
static void project(const Block& block, const Call& call, const SharedWorkspace& shared, ThreadWorkspace& own,
                    const Crew& crew) {
  const Heads heads(block, call, shared);
  const Linear* linears[] = {&block.query, &block.key, &block.value};
  const int64_t tiles = shared.tile_count, inner = heads.heads * heads.size;
  const bool turned = block.query_norm.kind != NORM_NONE || block.key_norm.kind != NORM_NONE || call.cosines;
  if (turned && block.projections == 1) {
    run(block.query, shared, own, crew, 0, tiles, &block.output,
        ToRows<AsItIs>{shared.projected, 3 * inner, 3 * inner, {}});
  } else if (block.projections == 1) {
    run(block.query, shared, own, crew, 0, tiles, &block.output, Placed{QUERY, true, heads, shared});
  } else {
    for (int part = QUERY; part <= VALUE; part++) {
      const Linear* coming = part < VALUE ? linears[part + 1] : &block.output;
      if (turned && part < VALUE)
        run(*linears[part], shared, own, crew, 0, tiles, coming,
            ToRows<AsItIs>{shared.projected + part * inner, 3 * inner, inner, {}});
      else run(*linears[part], shared, own, crew, 0, tiles, coming, Placed{(Part)part, false, heads, shared});
    }
  }
  wait(crew, own);
  if (!turned) return;
  const Share rows = rows_of_pairs(shared, crew);
  for (int64_t row = rows.first; row < rows.last; row++) {
    float* projected = shared.projected + row * 3 * inner;
    turn(block.query_norm, call, heads, shared.places[row].token, projected, own.row);
    turn(block.key_norm, call, heads, shared.places[row].token, projected + inner, own.row);
  }
  for (int part = QUERY; part <= (block.projections == 1 ? VALUE : KEY); part++)
    pack_part((Part)part, heads, shared, shared.projected + part * inner, 3 * inner, rows);
  lap(own, STAGE_ATTENTION);
  wait(crew, own);
}

// The MLP of the tiles [from, to): out = out + MLP(norm2(out)).
static void feed_forward(const Block& block, const Call& call, int64_t first_row, int64_t from, int64_t to, float* out,
                         const SharedWorkspace& shared, ThreadWorkspace& own, const Crew& crew) {
  const int64_t width = block.width, mlp = block.mlp, stride = block.fc1.out, slice_row = shared.tiles[from].row;
  const int32_t* const rows = call.rows ? call.rows + first_row : nullptr;
  float* const kept = rows ? out : out + first_row * width;  // of the rows of this chunk
  quantize_normed(block.fc1, block.norm2, kept, width, rows, shared, own, crew, from, to);
  float* const hidden = shared.hidden - slice_row * stride;  // so that rows count from the first of the chunk
  if (block.gating == GATING_LAYER) {
    with_activation(block.activation, [&](auto activate) {
      run(block.gate, shared, own, crew, from, to, &block.fc1,
          ToRows<decltype(activate)>{hidden, stride, stride, activate});
    });
    run(block.fc1, shared, own, crew, from, to, &block.fc2, Multiplied{hidden, stride, stride});
  } else {
    with_activation(block.gating == GATING_NONE ? block.activation : -1, [&](auto activate) {
      run(block.fc1, shared, own, crew, from, to, &block.fc2,
          ToRows<decltype(activate)>{hidden, stride, stride, activate});
    });
  }
  wait(crew, own);
  quantize_rows(block.fc2, block.hidden_norm, shared, own, crew, from, to, [&](int64_t row) -> const float* {
    float* from_row = hidden + row * stride;
    if (block.gating == GATING_HALVES) {
      activate(block.activation, from_row, mlp, from_row);
      each(mlp, [&](int64_t i, auto left) {
        store(from_row + i, load<Floats>(from_row + i, left) * load<Floats>(from_row + mlp + i, left), left);
      });
    }
    return from_row;
  });
  lap(own, STAGE_QUANTIZE);
  wait(crew, own);
  add_branch(block.fc2, nullptr, block.post2, block.scale2, kept, kept, rows, shared, own, crew, from, to);
}

static void block(const Block& block, const Call& call, int64_t first_image, const float* x, float* out,
                  const SharedWorkspace& shared, ThreadWorkspace& own, const Crew& crew, int64_t slice, bool placed) {
  const int64_t width = block.width, inner = block.heads * block.head_size, first_row = first_image * call.tokens;
  const int32_t* const rows = call.rows ? call.rows + first_row : nullptr;
  const float* const from = rows ? x : x + first_row * width;  // of the rows of this chunk
  float* const to = rows ? out : out + first_row * width;
  if (!placed) prepare_places(Heads(block, call, shared), shared, rows_of_pairs(shared, crew));
  quantize_normed(block.query, block.norm1, from, width, rows, shared, own, crew, 0, shared.tile_count);
  project(block, call, shared, own, crew);
  attend(block, call, first_image, shared, own, crew);
  lap(own, STAGE_ATTENTION);
  wait(crew, own);
  quantize_rows(block.output, block.attended_norm, shared, own, crew, 0, shared.tile_count,
                [&](int64_t row) -> const float* { return shared.attended + row * inner; });
  lap(own, STAGE_QUANTIZE);
  wait(crew, own);
  add_branch(block.output, &block.fc1, block.post1, block.scale1, from, to, rows, shared, own, crew, 0,
             shared.tile_count);
  const int64_t slices = divide_up(shared.tile_count, most(1, slice / Isa::ROWS));
  for (int64_t s = 0; s < slices; s++)
    feed_forward(block, call, first_row, shared.tile_count * s / slices, shared.tile_count * (s + 1) / slices, out,
                 shared, own, crew);
}

}  // namespace
