// The functions that Python calls: choose the instruction set, lay out memory, share the images and rows among threads.
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <atomic>
#include <new>

#include "api.h"
#include "isa/processor.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else  // nothing is watched
#define ASAN_POISON_MEMORY_REGION(from, count) (void)0
#define ASAN_UNPOISON_MEMORY_REGION(from, count) (void)0
#endif

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num() { return 0; }
static int omp_get_num_threads() { return 1; }
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

// LEVELS(X) is X(portable) X(avx2) ...: the instruction sets that this library was compiled for, see setup.py.
#define DECLARE(level) extern const Kernels kernels_##level;
LEVELS(DECLARE)
#undef DECLARE

static const struct {
  const Kernels* kernels;
  bool (*supported)();
} levels[] = {
#define ENTRY(level) {&kernels_##level, has_##level},
    LEVELS(ENTRY)
#undef ENTRY
};
const int LEVEL_COUNT = sizeof(levels) / sizeof(levels[0]);

extern "C" double fairseq_seconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec + 1e-9 * now.tv_nsec;
}

// A child process has none of the threads of OpenMP's pool, and would wait for them for ever.
static bool forked = false;
static void in_child() { forked = true; }
__attribute__((constructor)) static void at_load() { pthread_atfork(nullptr, nullptr, in_child); }

const int MOST_THREADS = 1024;
static int threads_for(int wanted) { return forked || wanted < 1 ? 1 : (int)least(wanted, MOST_THREADS); }

struct alignas(ALIGNMENT) Barrier {
  std::atomic<int> arrived{0}, phase{0};
};

extern "C" void fairseq_wait(Barrier* barrier, int members) {
  const int phase = barrier->phase.load(std::memory_order_acquire);
  if (barrier->arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == members) {
    barrier->arrived.store(0, std::memory_order_relaxed);
    barrier->phase.store(phase + 1, std::memory_order_release);
    return;
  }
  const int patience = 20000;  // then others may have the processor
  for (int spins = 0; barrier->phase.load(std::memory_order_acquire) == phase; spins++) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
    if (spins > patience) sched_yield();
  }
}

// Memory that a calling thread keeps for its next call, given back when the thread ends.
class Arena {
 public:
  ~Arena() { clear(); }
  uint8_t* reserve(size_t wanted) {
    ASAN_UNPOISON_MEMORY_REGION(memory, size);
    if (wanted > size) {
      clear();
      if (posix_memalign((void**)&memory, 4096, wanted)) memory = nullptr;
      size = memory ? wanted : 0;
    }
    return memory;
  }

 private:
  void clear() {
    ASAN_UNPOISON_MEMORY_REGION(memory, size);
    free(memory);
    memory = nullptr;
    size = 0;
  }
  uint8_t* memory = nullptr;
  size_t size = 0;
};
static thread_local Arena arena;

// Lays out arrays one after the other, with a gap that belongs to none: in a first pass without memory, to add up
// sizes.
struct Layout {
  uint8_t* memory;
  size_t used;
  template <typename Type>
  void take(Type*& pointer, int64_t count) {
    const size_t bytes = count * sizeof(Type), step = round_up(bytes, ALIGNMENT) + ALIGNMENT;
    pointer = memory ? (Type*)(memory + used) : nullptr;
    if (memory) ASAN_POISON_MEMORY_REGION(memory + used + bytes, step - bytes);
    used += step;
  }
  void take_bytes(void*& pointer, int64_t bytes) {
    uint8_t* array;
    take(array, bytes);
    pointer = array;
  }
};

struct Sizes {
  int64_t images, tokens;    // of a chunk
  int64_t longest;           // row or reduction of any layer, in numbers or in bytes of what it is rounded to
  int64_t groups;            // of inputs of any layer; 0 or 1 where there are none
  int64_t heads, head_size;  // 0 without attention
  int64_t projected, added;  // floats of a row, 0 where they are not kept
  int64_t slice, hidden;     // rows and floats of a row, 0 without an MLP
  bool exact;                // whether attention is of floats
  int64_t stream, mlp;       // integers of a row, 0 for models of floats
  int crews, threads;
};

static void lay_out(Layout& layout, const Kernels& kernels, const Sizes& sizes, SharedWorkspace& shared) {
  const int64_t rows = sizes.images * sizes.tokens, halves = kernels.group / 2;
  const int64_t numbers = round_up(sizes.head_size, sizes.stream ? kernels.group : halves);
  const int64_t panels = divide_up(sizes.head_size, PANEL), tokens = round_up(round_up(sizes.tokens, PANEL), halves);
  const int64_t behind = kernels.tile_rows * kernels.group;  // what is read with the last rows
  layout.take(shared.tiles, divide_up(rows, kernels.tile_rows));
  layout.take(shared.places, rows);
  layout.take(shared.slots, sizes.stream ? 0 : rows);
  layout.take(shared.integers, rows * round_up(sizes.longest, kernels.group) + behind);
  layout.take(shared.scales, rows);
  layout.take(shared.sums, rows * most(1, sizes.groups));
  const int64_t bytes = sizes.stream ? 1 : sizes.exact ? 4 : 2;
  layout.take_bytes(shared.queries, sizes.heads * rows * numbers * bytes + behind);
  layout.take_bytes(shared.keys, sizes.images * sizes.heads * tokens * numbers * bytes);
  layout.take_bytes(shared.values, sizes.images * sizes.heads * panels * PANEL * tokens * bytes);
  if (sizes.stream) {
    const int64_t inner = sizes.heads * sizes.head_size, of_images = sizes.images * sizes.heads;
    const int64_t of_tokens = of_images * round_up(sizes.tokens, PANEL), of_columns = of_images * panels * PANEL;
    layout.take(shared.stream, rows * sizes.stream);
    layout.take(shared.parts, rows * 3 * inner);
    layout.take(shared.mixed, rows * inner);
    layout.take(shared.activated, sizes.slice * sizes.mlp);
    layout.take(shared.query_scales, of_tokens);
    layout.take(shared.key_scales, of_tokens);
    layout.take(shared.key_sums, of_tokens);
    layout.take(shared.value_means, of_columns);
    layout.take(shared.value_sums, of_columns);
    layout.take(shared.value_scales, of_images);
    return;
  }
  layout.take(shared.projected, rows * sizes.projected);
  layout.take(shared.attended, rows * sizes.heads * sizes.head_size);
  layout.take(shared.added, rows * sizes.added);
  layout.take(shared.hidden, sizes.slice * sizes.hidden);
}

static void lay_out(Layout& layout, const Kernels& kernels, const Sizes& sizes, ThreadWorkspace& own) {
  const int64_t tile = kernels.tile_rows,
                tokens = sizes.heads ? round_up(round_up(sizes.tokens, PANEL), kernels.group / 2) : 0;
  layout.take(own.row, ROW_COUNT * sizes.longest + ALIGNMENT);
  layout.take(own.values, tile * PANEL);
  layout.take(own.accumulators, TILES_AT_ONCE * tile * PANEL);
  for (auto& panel : own.panel) layout.take(panel, steps_of(sizes.longest) * 4 * PANEL);
  layout.take(own.groups, sizes.groups);
  layout.take(own.scores, tile * tokens);
  layout.take_bytes(own.weights, tile * tokens * sizeof(float) + tile * kernels.group);
  layout.take(own.stages, STAGES);
}

// The memory of a call: a workspace for each crew and each thread. OpenMP may start fewer threads than there are.
class Workspaces {
 public:
  SharedWorkspace* shared = nullptr;
  ThreadWorkspace* own = nullptr;
  Barrier* barriers = nullptr;

  Workspaces(const Kernels& kernels, const Sizes& sizes) {
    Layout layout = {nullptr, 0};
    everything(layout, kernels, sizes);
    layout = {arena.reserve(layout.used), 0};
    if (!layout.memory) return;
    everything(layout, kernels, sizes);
    ready = true;
  }
  bool ready = false;

 private:
  void everything(Layout& layout, const Kernels& kernels, const Sizes& sizes) {
    layout.take(shared, sizes.crews);
    layout.take(own, sizes.threads);
    layout.take(barriers, sizes.crews);
    SharedWorkspace a;
    ThreadWorkspace b;
    for (int crew = 0; crew < sizes.crews; crew++) lay_out(layout, kernels, sizes, layout.memory ? shared[crew] : a);
    for (int thread = 0; thread < sizes.threads; thread++)
      lay_out(layout, kernels, sizes, layout.memory ? own[thread] : b);
    if (layout.memory)
      for (int crew = 0; crew < sizes.crews; crew++) new (&barriers[crew]) Barrier;
  }
};

// The tiles and places of a chunk of images.
static void cut(SharedWorkspace& shared, const Kernels& kernels, int64_t images, int64_t tokens) {
  shared.images = images;
  shared.tokens = tokens;
  shared.rows = images * tokens;
  shared.tile_count = divide_up(shared.rows, kernels.tile_rows);
  for (int64_t t = 0; t < shared.tile_count; t++) {
    const int64_t row = kernels.even_tiles ? shared.rows * t / shared.tile_count : kernels.tile_rows * t;
    const int64_t next = kernels.even_tiles ? shared.rows * (t + 1) / shared.tile_count : row + kernels.tile_rows;
    shared.tiles[t] = {(int32_t)row, (int32_t)(least(next, shared.rows) - row)};
  }
  for (int64_t row = 0; row < shared.rows; row++)
    shared.places[row] = {(int32_t)(row / tokens), (int32_t)(row % tokens)};
}

static void start(ThreadWorkspace& own, bool timed) {
  if (!timed) {
    own.stages = nullptr;
    return;
  }
  memset(own.stages, 0, STAGES * sizeof(double));
  own.started = fairseq_seconds();
}

static void add_stages(double* stages, const ThreadWorkspace* own, int threads) {
  if (!stages) return;
  for (int thread = 0; thread < threads; thread++)
    for (int stage = 0; stage < STAGES; stage++) stages[stage] += own[thread].stages[stage];
}

// Shares images among threads: as many as all threads can have the same number of are taken alone, `at_once` in a
// chunk; what is left over is shared by crews, an image for each. visit(first image, workspace, thread's, crew) runs on
// all members of a crew. Whoever computes an image, and with whom, does not change its bits. 0, or 1 without memory.
template <typename Visit>
static int for_images(const Kernels& kernels, Sizes sizes, int64_t images, int64_t at_once, int wanted, double* stages,
                      Visit visit) {
  const int threads = threads_for(wanted);
  sizes.images = most(1, least(at_once, images / threads));
  sizes.threads = sizes.crews = threads;
  const Workspaces work(kernels, sizes);
  if (!work.ready) return 1;
  int used = threads;
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num(), count = omp_get_num_threads();
    ThreadWorkspace& own = work.own[thread];
    start(own, stages != nullptr);
    if (thread == 0) used = count;
    kernels.enter();
    const int64_t alone = images / count, left = images % count;
    for (int64_t done = 0; done < alone; done += sizes.images) {
      cut(work.shared[thread], kernels, least(sizes.images, alone - done), sizes.tokens);
      visit(thread * alone + done, work.shared[thread], own, Crew{0, 1, nullptr});
    }
    if (left) {
      int64_t crew = thread * left / count;
      while ((crew + 1) * count / left <= thread) crew++;
      const int first = (int)(crew * count / left), members = (int)((crew + 1) * count / left) - first;
      const Crew mine = {thread - first, members, &work.barriers[first]};
      if (members > 1) fairseq_wait(mine.barrier, members);  // the workspace is its first member's
      if (thread == first) cut(work.shared[first], kernels, 1, sizes.tokens);
      if (members > 1) fairseq_wait(mine.barrier, members);
      visit(count * alone + crew, work.shared[first], own, mine);
    }
    kernels.leave();
  }
  add_stages(stages, work.own, used);
  return 0;
}

static const Kernels& kernels_of(int level) { return *levels[level].kernels; }

// The name of a level, or null beyond the last one: in the order of LEVELS, the slowest first.
EXPORT const char* fairseq_level_name(int level) {
  return level >= 0 && level < LEVEL_COUNT ? levels[level].kernels->name : nullptr;
}

// Whether this processor runs a level.
EXPORT int fairseq_supports(int level) { return levels[level].supported(); }

// Whether products of bfloat16 are many times as fast as those of floats.
EXPORT int fairseq_fast_halves(int level) { return kernels_of(level).fast_halves; }

// Whether a level has a product of floats of its own.
EXPORT int fairseq_fast_floats(int level) { return kernels_of(level).fast_floats; }

// The size of struct Linear (0), Block (1), Call (2), Patches (3), IntegerBlock (4) or IntegerModel (5), for a check of
// their description elsewhere.
EXPORT int fairseq_size(int which) {
  const size_t sizes[] = {sizeof(Linear),  sizeof(Block),        sizeof(Call),
                          sizeof(Patches), sizeof(IntegerBlock), sizeof(IntegerModel)};
  return (int)sizes[which];
}

EXPORT int fairseq_activate(int level, int activation, const float* x, int64_t count, float* y) {
  kernels_of(level).activate(activation, x, count, y);
  return 0;
}

EXPORT int fairseq_norm(int level, const Norm* norm, const float* x, int64_t rows, int64_t width, float* y) {
  for (int64_t row = 0; row < rows; row++) kernels_of(level).norm(*norm, x + row * width, width, y + row * width);
  return 0;
}

// The integers of rows, int8 (rows, in), their scales, and their sums, (rows, groups). 0, or 1 if there is no memory.
EXPORT int fairseq_quantize(int level, const Linear* grid, const float* x, int64_t rows, int8_t* q, float* scales,
                            int32_t* sums) {
  const Kernels& kernels = kernels_of(level);
  Sizes sizes = {};
  sizes.images = sizes.tokens = sizes.threads = sizes.crews = 1;
  sizes.longest = row_bytes(*grid, kernels.group);
  const Workspaces work(kernels, sizes);
  if (!work.ready) return 1;
  uint8_t* integers = work.shared->integers;
  for (int64_t row = 0; row < rows; row++) {
    kernels.quantize(x + row * grid->in, *grid, work.own->row, integers, 0, 1, scales + row,
                     sums + row * groups_of(*grid));
    for (int64_t k = 0; k < grid->in; k++) q[row * grid->in + k] = (int8_t)(uint8_t)(integers[k] - kernels.offset);
  }
  return 0;
}

// Rows rounded to so many bits, with a scale each, and back: float (rows, width). A row with NaN or Inf becomes NaN. 0,
// or 1 if there is no memory.
EXPORT int fairseq_round_tokens(int level, int bits, const float* x, int64_t rows, int64_t width, float* out,
                                int wanted) {
  const Kernels& kernels = kernels_of(level);
  Linear grid = {};
  grid.in = width;
  grid.input_bits = bits;
  Sizes sizes = {};
  sizes.images = sizes.tokens = 1;
  sizes.threads = sizes.crews = (int)least(threads_for(wanted), most(1, rows));
  sizes.longest = row_bytes(grid, kernels.group);
  const Workspaces work(kernels, sizes);
  if (!work.ready) return 1;
#pragma omp parallel for num_threads(sizes.threads) schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    const int thread = omp_get_thread_num();
    uint8_t* integers = work.shared[thread].integers;
    float scale, *to = out + row * width;
    int32_t sum;
    kernels.quantize(x + row * width, grid, work.own[thread].row, integers, 0, 1, &scale, &sum);
    const float real = scale - scale == 0.0f ? scale : __builtin_nanf("");
    for (int64_t k = 0; k < width; k++) {
      const int8_t q = (int8_t)(uint8_t)(integers[k] - kernels.offset);
      to[k] = __builtin_copysignf(q * real, x[row * width + k]);  // a zero has the sign of what it was
    }
  }
  return 0;
}

// Sums of products of int8 (rows, in) and the codes: int32 (rows, out). 0, or 1 if there is no memory.
EXPORT int fairseq_product(int level, const Linear* linear, const int8_t* q, int64_t rows, int32_t* out) {
  const Kernels& kernels = kernels_of(level);
  Sizes sizes = {};
  sizes.images = sizes.threads = sizes.crews = 1;
  sizes.tokens = rows;
  sizes.longest = linear->in;
  const Workspaces work(kernels, sizes);
  if (!work.ready) return 1;
  SharedWorkspace& shared = work.shared[0];
  cut(shared, kernels, 1, rows);
  const int64_t steps = steps_of(linear->in), group = kernels.group, stride = round_up(linear->in, group);
  kernels.enter();
  for (int64_t t = 0; t < shared.tile_count; t++) {
    const Tile& tile = shared.tiles[t];
    uint8_t* integers = shared.integers + tile.row * stride;
    for (int64_t i = 0; i < tile.rows; i++)
      for (int64_t k = 0; k < stride; k++)
        integers[(k / group * tile.rows + i) * group + k % group] =
            k < linear->in ? (uint8_t)(q[(tile.row + i) * linear->in + k] + kernels.offset) : 0;
    for (int64_t panel = 0; panel < panel_count(*linear); panel++) {
      const uint8_t* codes = linear->panels + panel * panel_bytes(*linear);
      if (linear->narrow) {
        for (int64_t step = 0; step < steps; step++) {
          for (int64_t j = 0; j < 64; j++) {
            work.own->panel[0][step * 128 + j] = codes[step * 64 + j] & 15;
            work.own->panel[0][step * 128 + 64 + j] = codes[step * 64 + j] >> 4;
          }
        }
        codes = work.own->panel[0];
      }
      int32_t sums[PANEL] = {};
      for (int64_t k = 0; k < steps; k++)
        for (int64_t j = 0; j < PANEL * 4; j++) sums[j / 4] += (int8_t)codes[k * PANEL * 4 + j];
      kernels.product(integers, codes, tile.rows, steps, linear->narrow, work.own->accumulators);
      for (int64_t i = 0; i < tile.rows; i++)
        for (int64_t j = 0; j < PANEL && panel * PANEL + j < linear->out; j++)
          out[(tile.row + i) * linear->out + panel * PANEL + j] =
              work.own->accumulators[i * PANEL + j] - kernels.offset * sums[j];
    }
  }
  kernels.leave();
  return 0;
}

// y = x @ W.T + bias, an activation of it (-1 for none), or residual + it: (rows, in) -> (rows, out). 0, or 1 if there
// is no memory.
EXPORT int fairseq_linear(int level, const Linear* linear, const float* x, int64_t rows, int activation,
                          const float* residual, float* out, int wanted, double* stages) {
  const Kernels& kernels = kernels_of(level);
  const int64_t panels = panel_count(*linear), tiles = divide_up(rows, kernels.tile_rows);
  int threads = threads_for(wanted);
  const int64_t tile_group = most(1, 128 / kernels.tile_rows);  // whose integers stay in the cache while panels pass
  const int64_t tile_groups = divide_up(tiles, tile_group);
  // Whole rows of output where there are rows enough for all threads, or else some panels.
  const int64_t panel_group = tile_groups >= 3 * threads ? panels : most(1, divide_up(panels, 2 * threads));
  const int64_t panel_groups = divide_up(panels, panel_group);
  threads = (int)least(threads, tile_groups * panel_groups);
  Sizes sizes = {};
  sizes.images = sizes.crews = 1;
  sizes.tokens = rows;
  sizes.threads = threads;
  sizes.longest = row_bytes(*linear, kernels.group);
  sizes.groups = groups_of(*linear);
  const Workspaces work(kernels, sizes);
  if (!work.ready) return 1;
  SharedWorkspace& shared = work.shared[0];
  cut(shared, kernels, 1, rows);
  const int64_t stride = row_bytes(*linear, kernels.group);
  int used = threads;
#pragma omp parallel num_threads(threads)
  {
    ThreadWorkspace& own = work.own[omp_get_thread_num()];
    start(own, stages != nullptr);
    kernels.enter();
    const auto lap = [&](Stage stage) {
      if (!own.stages) return;
      const double now = fairseq_seconds();
      own.stages[stage] += now - own.started;
      own.started = now;
    };
#pragma omp single
    used = omp_get_num_threads();
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tiles; t++) {
      const Tile& tile = shared.tiles[t];
      for (int64_t i = 0; i < tile.rows; i++)
        kernels.quantize(x + (tile.row + i) * linear->in, *linear, own.row, shared.integers + tile.row * stride, i,
                         tile.rows, shared.scales + tile.row + i, shared.sums + (tile.row + i) * groups_of(*linear));
      lap(STAGE_QUANTIZE);
    }
    lap(STAGE_WAIT);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tile_groups * panel_groups; task++) {
      const int64_t tile = task / panel_groups * tile_group, panel = task % panel_groups * panel_group;
      kernels.linear(*linear, shared, own, tile, least(tile + tile_group, tiles), panel,
                     least(panel + panel_group, panels), activation, residual, out);
    }
    lap(STAGE_WAIT);
    kernels.leave();
  }
  add_stages(stages, work.own, used);
  return 0;
}

// softmax(scaling * q @ k.T + bias + mask) @ v per head, as block and call say: float (images, tokens, heads * size),
// rows of the three `stride` floats apart. 0, or 1 if there is no memory.
EXPORT int fairseq_attention(int level, const Block* block, const Call* call, const float* query, const float* key,
                             const float* value, int64_t stride, float* out, int threads) {
  const Kernels& kernels = kernels_of(level);
  Sizes sizes = {};
  sizes.tokens = call->tokens;
  sizes.heads = block->heads;
  sizes.head_size = block->head_size;
  sizes.exact = call->exact;
  const int64_t width = block->heads * block->head_size;
  return for_images(kernels, sizes, call->images, 1, threads, nullptr,
                    [&](int64_t image, const SharedWorkspace& shared, ThreadWorkspace& own, const Crew& crew) {
    const int64_t row = image * call->tokens;
    const float* qkv[] = {query + row * stride, key + row * stride, value + row * stride};
    SharedWorkspace ours = shared;
    ours.attended = out + row * width;
    kernels.attention_pack(qkv, stride, *block, *call, ours, crew);
    if (crew.members > 1) fairseq_wait(crew.barrier, crew.members);
    kernels.attend(*block, *call, image, ours, own, crew);
    if (crew.members > 1) fairseq_wait(crew.barrier, crew.members);
  });
}

// The logits' integers of a model of integers alone: uint8 (images, channels, height, width) -> int32 (images,
// classes), or the residual stream, (images, tokens, width), if it has no classifier; at_once rows in a chunk, `slice`
// of them at a time in an MLP. 0, or 1 if there is no memory.
EXPORT int fairseq_integers(int level, const IntegerModel* model, const uint8_t* pixels, int64_t images,
                            int32_t* logits, int threads, int64_t at_once, int64_t slice, double* stages) {
  const Kernels& kernels = kernels_of(level);
  Sizes sizes = {};
  sizes.tokens = model->tokens;
  sizes.heads = model->heads;
  sizes.head_size = model->head_size;
  sizes.stream = model->width;
  sizes.mlp = model->mlp;
  sizes.slice = slice = round_up(most(slice, 1), kernels.tile_rows);
  sizes.longest = most(model->patches.in, model->classifier.in);
  for (int64_t b = 0; b < model->block_count; b++) {
    const IntegerBlock& block = *model->blocks[b];
    const Linear* const linears[] = {&block.query, &block.key, &block.value, &block.output, &block.fc1, &block.fc2};
    for (const Linear* linear : linears) sizes.longest = most(sizes.longest, linear->in);
  }
  sizes.longest = most(sizes.longest, most(sizes.stream, sizes.mlp));
  return for_images(kernels, sizes, images, most(1, at_once / model->tokens), threads, stages,
                    [&](int64_t image, const SharedWorkspace& shared, ThreadWorkspace& own, const Crew& crew) {
    kernels.integers(*model, image, pixels, logits, shared, own, crew, slice);
  });
}

// LayerNorm of rows of integers of 22 bits: int32 (rows, width) -> the same, of up to 24 bits.
EXPORT void fairseq_integer_norm(int level, const IntegerNorm* norm, const int32_t* h, int64_t rows, int64_t width,
                                 int32_t* to, int threads) {
  const Kernels& kernels = kernels_of(level);
#pragma omp parallel for num_threads(threads_for(threads))
  for (int64_t row = 0; row < rows; row++) kernels.integer_norm(*norm, h + row * width, width, to + row * width);
}

// (x - start) / step of each channel as bytes, rounded half to even: float (images, channels, count) -> uint8, the
// same. 0, or 2 where a number is NaN or Inf.
EXPORT int fairseq_round_pixels(int level, const float* x, int64_t images, int64_t channels, int64_t count,
                                const double* start, const double* step, uint8_t* pixels, int threads) {
  const Kernels& kernels = kernels_of(level);
  int wrong = 0;
#pragma omp parallel for num_threads(threads_for(threads)) reduction(| : wrong)
  for (int64_t plane = 0; plane < images * channels; plane++) {
    const int64_t c = plane % channels;
    wrong |= !kernels.round_pixels(x + plane * count, count, start[c], step[c], pixels + plane * count);
  }
  return wrong ? 2 : 0;
}

// A convolution over patches that do not overlap, see Patches. 0, or 1 if there is no memory.
EXPORT int fairseq_patches(int level, const Patches* patches, const float* pixels, int64_t images, float* out,
                           int threads) {
  const Kernels& kernels = kernels_of(level);
  const int64_t inputs = patches->channels * patches->patch_height * patches->patch_width;
  Sizes sizes = {};
  sizes.tokens = (patches->height / patches->patch_height) * (patches->width / patches->patch_width);
  sizes.longest = 3 * sizeof(uint16_t) * round_up(inputs, PATCH_STEP);  // bytes of a row
  return for_images(kernels, sizes, images, 1, threads, nullptr,
                    [&](int64_t image, const SharedWorkspace& shared, ThreadWorkspace& own, const Crew& crew) {
    const int64_t picture = patches->channels * patches->height * patches->width;
    kernels.patches(*patches, pixels + image * picture, out + image * sizes.tokens * patches->out, shared, own, crew);
  });
}

// Encoder blocks one after the other, for the same images: float (row_count, width) -> the same, the output of each to
// a place of its own; at_once rows in a chunk, `slice` of them at a time in an MLP. Each block has its call; more than
// one have no rows of their own. 0, or 1 if there is no memory.
EXPORT int fairseq_blocks(int level, const Block* const* blocks, const Call* const* calls, int64_t count,
                          const float* x, float* const* outs, int threads, int64_t at_once, int64_t slice,
                          double* stages) {
  const Kernels& kernels = kernels_of(level);
  const Call& first = *calls[0];
  Sizes sizes = {};
  sizes.tokens = first.tokens;
  slice = round_up(most(slice, 1), kernels.tile_rows);
  sizes.slice = slice;
  sizes.exact = first.exact;
  for (int64_t b = 0; b < count; b++) {
    const Block& block = *blocks[b];
    const int64_t inner = block.heads * block.head_size;
    const bool turned = block.query_norm.kind != NORM_NONE || block.key_norm.kind != NORM_NONE || calls[b]->cosines;
    sizes.heads = most(sizes.heads, block.heads);
    sizes.head_size = most(sizes.head_size, block.head_size);
    sizes.longest = most(sizes.longest, most(most(block.width, inner), most(block.mlp, block.head_size)));
    const Linear* const linears[] = {&block.query, &block.key,  &block.value, &block.output,
                                     &block.fc1,   &block.gate, &block.fc2};
    for (const Linear* linear : linears) {
      sizes.longest = most(sizes.longest, row_bytes(*linear, kernels.group));
      sizes.groups = most(sizes.groups, groups_of(*linear));
    }
    sizes.hidden = most(sizes.hidden, block.fc1.out);
    if (turned) sizes.projected = most(sizes.projected, 3 * inner);
    if (block.post1.kind != NORM_NONE || block.post2.kind != NORM_NONE) sizes.added = most(sizes.added, block.width);
  }
  return for_images(kernels, sizes, first.images, most(1, at_once / first.tokens), threads, stages,
                    [&](int64_t image, const SharedWorkspace& shared, ThreadWorkspace& own, const Crew& crew) {
    for (int64_t b = 0; b < count; b++) {
      const bool placed =
          b && blocks[b]->heads == blocks[b - 1]->heads && blocks[b]->head_size == blocks[b - 1]->head_size;
      kernels.block(*blocks[b], *calls[b], image, b ? outs[b - 1] : x, outs[b], shared, own, crew, slice, placed);
    }
  });
}
