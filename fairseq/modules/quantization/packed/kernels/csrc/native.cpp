// The functions that Python calls: choose the instruction set, lay out memory, share the rows among threads.
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "api.h"

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

extern const Kernels kernels_portable, kernels_avx2, kernels_avxvnni, kernels_avx512vnni, kernels_avx512bf16;

static bool supports(int level) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
  switch (level) {
    case 1: return avx2;
    case 2: return avx2 && __builtin_cpu_supports("avxvnni");
    case 3: return avx512;
    case 4: return avx512 && __builtin_cpu_supports("avx512bf16");
  }
#endif
  return level == 0;
}

static const Kernels* kernels_of(int level) {
  if (!supports(level)) return nullptr;
  switch (level) {  // those that the compiler knew, see setup.py
#ifdef WITH_avx2
    case 1: return &kernels_avx2;
#endif
#ifdef WITH_avxvnni
    case 2: return &kernels_avxvnni;
#endif
#ifdef WITH_avx512vnni
    case 3: return &kernels_avx512vnni;
#endif
#ifdef WITH_avx512bf16
    case 4: return &kernels_avx512bf16;
#endif
  }
  return level == 0 ? &kernels_portable : nullptr;
}

const int LEVELS = 5;

extern "C" double fairseq_seconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec + 1e-9 * now.tv_nsec;
}

// A child process has none of the threads of OpenMP's pool, and would wait for them for ever.
static bool forked = false;
static void in_child() { forked = true; }
__attribute__((constructor)) static void at_load() { pthread_atfork(nullptr, nullptr, in_child); }

static int threads_for(int wanted) { return forked || wanted < 1 ? 1 : wanted; }

// Memory that a calling thread keeps for its next call, given back when the thread ends.
struct Arena {
  uint8_t* memory = nullptr;
  size_t size = 0;
  ~Arena() {
    ASAN_UNPOISON_MEMORY_REGION(memory, size);
    free(memory);
  }
  bool reserve(size_t wanted) {
    ASAN_UNPOISON_MEMORY_REGION(memory, size);
    if (wanted <= size) return true;
    free(memory);
    size = 0;
    if (posix_memalign((void**)&memory, 4096, wanted)) memory = nullptr;
    if (memory) size = wanted;
    return memory != nullptr;
  }
};
static thread_local Arena arena;

// Lays out arrays one after the other, with a gap that belongs to none: in a first pass without memory, to add up sizes.
struct Layout {
  uint8_t* memory;
  size_t used;
  template <typename Type>
  void take(Type*& pointer, int64_t count) {
    const size_t bytes = count * sizeof(Type), step = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT + ALIGNMENT;
    pointer = memory ? (Type*)(memory + used) : nullptr;
    if (memory) ASAN_POISON_MEMORY_REGION(memory + used + bytes, step - bytes);
    used += step;
  }
};

static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t padded(int64_t in) { return steps_of(in) * 4; }

struct Sizes {
  int64_t rows, images, tokens;        // of the call
  int64_t width;                       // of the rows that become shared integers
  int64_t longest;                     // row or reduction of any layer
  int64_t heads, head_size;            // 0 without attention
  int64_t slice, mlp;                  // 0 without an MLP
  int threads;
};

// Lays out everything in `layout`; without memory only its size.
static void lay_out(Layout& layout, const Sizes& sizes, SharedWorkspace& shared, ThreadWorkspace* own) {
  const int64_t numbers = divide_up(sizes.head_size, GROUP / 2) * GROUP / 2, panels = divide_up(sizes.head_size, PANEL);
  const int64_t key_panels = divide_up(sizes.tokens, PANEL);
  shared.rows = sizes.rows;
  shared.tokens = sizes.tokens;
  shared.stride = padded(sizes.width);
  layout.take(shared.integers, sizes.rows * shared.stride);
  layout.take(shared.scales, sizes.rows);
  layout.take(shared.sums, sizes.rows);
  layout.take(shared.queries, sizes.heads * sizes.rows * numbers);
  layout.take(shared.keys, sizes.images * sizes.heads * key_panels * numbers * PANEL);
  layout.take(shared.values, sizes.images * sizes.heads * panels * key_panels * PANEL * PANEL);
  layout.take(shared.attended, sizes.rows * sizes.heads * sizes.head_size);
  for (int thread = 0; thread < sizes.threads; thread++) {
    ThreadWorkspace& mine = own[thread];
    layout.take(mine.tiles, divide_up(sizes.rows, TILE) + sizes.images + 1);  // OpenMP may start fewer threads
    layout.take(mine.row, sizes.longest + ALIGNMENT);
    layout.take(mine.values, TILE * PANEL);
    layout.take(mine.accumulators, TILE * PANEL);
    layout.take(mine.panel, padded(sizes.longest) * PANEL);
    layout.take(mine.scores, sizes.heads ? TILE * key_panels * PANEL : 0);
    layout.take(mine.weights, sizes.heads ? TILE * key_panels * PANEL : 0);
    layout.take(mine.hidden, sizes.slice * sizes.mlp);
    layout.take(mine.hidden_integers, sizes.slice * padded(sizes.mlp));
    layout.take(mine.hidden_scales, sizes.slice);
    layout.take(mine.hidden_sums, sizes.slice);
    layout.take(mine.stages, STAGES);
  }
}

static bool prepare(const Sizes& sizes, SharedWorkspace& shared, ThreadWorkspace* own) {
  Layout layout = {nullptr, 0};
  lay_out(layout, sizes, shared, own);
  if (!arena.reserve(layout.used)) return false;
  layout = {arena.memory, 0};
  lay_out(layout, sizes, shared, own);
  return true;
}

// The rows first ... last - 1 of images of `tokens` rows, cut into tiles of one image, of sizes as equal as they can be.
static void cut(int64_t first, int64_t last, int64_t tokens, ThreadWorkspace& own) {
  own.tile_count = 0;
  while (first < last) {
    const int64_t image = first / tokens, end = (image + 1) * tokens < last ? (image + 1) * tokens : last;
    const int64_t count = divide_up(end - first, TILE);
    for (int64_t t = 0; t < count; t++) {
      const int64_t rows = (end - first) / (count - t);
      own.tiles[own.tile_count++] = {first, image, first % tokens, (int32_t)rows};
      first += rows;
    }
  }
}

// Where the rows of a thread begin: on an even token, since two of them share the words of a value.
static int64_t begin(int64_t rows, int64_t tokens, int thread, int threads) {
  const int64_t row = rows * thread / threads;
  return row - row % tokens % 2;
}

static void start(ThreadWorkspace& own, bool timed) {
  if (!timed) {
    own.stages = nullptr;
    return;
  }
  memset(own.stages, 0, STAGES * sizeof(double));
  own.started = fairseq_seconds();
}

static void wait_is_over(ThreadWorkspace& own) {
  if (!own.stages) return;
  const double now = fairseq_seconds();
  own.stages[STAGE_WAIT] += now - own.started;
  own.started = now;
}

static void add_stages(double* stages, const ThreadWorkspace* own, int threads) {
  if (!stages) return;
  for (int thread = 0; thread < threads; thread++)
    for (int stage = 0; stage < STAGES; stage++) stages[stage] += own[thread].stages[stage];
}

const int MOST_THREADS = 1024;

// Bit n: whether this processor runs level n (portable, avx2, avxvnni, avx512vnni, avx512bf16).
EXPORT int fairseq_levels() {
  int result = 0;
  for (int level = 0; level < LEVELS; level++) result |= (kernels_of(level) != nullptr) << level;
  return result;
}

// The size of struct Linear (0) or Block (1), for a check of their description elsewhere.
EXPORT int fairseq_size(int which) { return which ? (int)sizeof(Block) : (int)sizeof(Linear); }

EXPORT void fairseq_gelu(int level, const float* x, int64_t count, float* y) { kernels_of(level)->gelu(x, count, y); }

EXPORT void fairseq_layer_norm(int level, const float* x, int64_t rows, int64_t width, const float* weight,
                               const float* bias, float epsilon, float* y) {
  for (int64_t row = 0; row < rows; row++)
    kernels_of(level)->layer_norm(x + row * width, width, weight, bias, epsilon, y + row * width);
}

// The integers of rows, int8 (rows, in), their scales and sums. 0, or 1 if there is no memory.
EXPORT int fairseq_quantize(int level, const Linear* grid, const float* x, int64_t rows, int8_t* q, float* scales,
                            int32_t* sums) {
  Sizes sizes = {};
  sizes.rows = sizes.threads = 1;
  sizes.width = sizes.longest = grid->in;
  SharedWorkspace shared;
  ThreadWorkspace own;
  if (!prepare(sizes, shared, &own)) return 1;
  for (int64_t row = 0; row < rows; row++) {
    kernels_of(level)->quantize(x + row * grid->in, *grid, own.row, shared.integers, 0, 1, scales + row, sums + row);
    for (int64_t k = 0; k < grid->in; k++) q[row * grid->in + k] = (int8_t)(shared.integers[k] ^ 0x80);
  }
  return 0;
}

// Sums of products of int8 (rows, in) and the codes: int32 (rows, out). 0, or 1 if there is no memory.
EXPORT int fairseq_product(int level, const Linear* linear, const int8_t* q, int64_t rows, int32_t* out) {
  Sizes sizes = {};
  sizes.rows = rows;
  sizes.threads = 1;
  sizes.width = sizes.longest = linear->in;
  sizes.tokens = rows;
  sizes.images = 1;
  SharedWorkspace shared;
  ThreadWorkspace own;
  if (!prepare(sizes, shared, &own)) return 1;
  cut(0, rows, rows, own);
  const int64_t steps = padded(linear->in) / 4;
  for (int64_t t = 0; t < own.tile_count; t++) {
    const Tile& tile = own.tiles[t];
    uint8_t* integers = shared.integers + tile.row * shared.stride;
    for (int64_t i = 0; i < tile.rows; i++)
      for (int64_t k = 0; k < steps * 4; k++)
        integers[(k / GROUP * tile.rows + i) * GROUP + k % GROUP] = k < linear->in ? q[(tile.row + i) * linear->in + k] ^ 0x80 : 0;
    for (int64_t panel = 0; panel * PANEL < linear->out; panel++) {
      const uint8_t* codes = linear->panels + panel * steps * 4 * PANEL / (linear->narrow ? 2 : 1);
      if (linear->narrow) {
        for (int64_t step = 0; step < steps; step++) {
          for (int64_t j = 0; j < 64; j++) {
            own.panel[step * 128 + j] = codes[step * 64 + j] & 15;
            own.panel[step * 128 + 64 + j] = codes[step * 64 + j] >> 4;
          }
        }
        codes = own.panel;
      }
      int32_t sums[PANEL] = {};
      for (int64_t k = 0; k < steps; k++)
        for (int64_t j = 0; j < PANEL * 4; j++) sums[j / 4] += (int8_t)codes[k * PANEL * 4 + j];
      kernels_of(level)->product(integers, codes, tile.rows, steps, own.accumulators);
      for (int64_t i = 0; i < tile.rows; i++)
        for (int64_t j = 0; j < PANEL && panel * PANEL + j < linear->out; j++)
          out[(tile.row + i) * linear->out + panel * PANEL + j] = own.accumulators[i * PANEL + j] - 128 * sums[j];
    }
  }
  return 0;
}

// y = x @ W.T + bias, GELU of it, or residual + it: (rows, in) -> (rows, out). 0, or 1 if there is no memory.
EXPORT int fairseq_linear(int level, const Linear* linear, const float* x, int64_t rows, int gelu, const float* residual,
                          float* out, int threads, double* stages) {
  const Kernels& kernels = *kernels_of(level);
  const int64_t panels = divide_up(linear->out, PANEL), tiles = divide_up(rows, TILE);
  threads = threads_for(threads > MOST_THREADS ? MOST_THREADS : threads);
  const int64_t tile_group = 8;  // whose integers stay in the cache while panels pass
  const int64_t tile_groups = divide_up(tiles, tile_group);
  // Whole rows of output where there are rows enough for all threads, or else some panels.
  const int64_t panel_group = tile_groups >= 3 * threads ? panels : most(1, divide_up(panels, 2 * threads));
  const int64_t panel_groups = divide_up(panels, panel_group);
  if (tile_groups * panel_groups < threads) threads = (int)(tile_groups * panel_groups);
  Sizes sizes = {};
  sizes.rows = sizes.tokens = rows;
  sizes.images = 1;
  sizes.threads = threads;
  sizes.width = sizes.longest = linear->in;
  SharedWorkspace shared;
  ThreadWorkspace* own = (ThreadWorkspace*)calloc(threads, sizeof(ThreadWorkspace));
  if (!own || !prepare(sizes, shared, own)) {
    free(own);
    return 1;
  }
  // All tiles, of which each task takes some.
  ThreadWorkspace whole = own[0];
  whole.tiles = (Tile*)malloc((tiles + 1) * sizeof(Tile));
  if (!whole.tiles) {
    free(own);
    return 1;
  }
  cut(0, rows, rows, whole);
  int used = threads;
#pragma omp parallel num_threads(threads)
  {
    ThreadWorkspace mine = own[omp_get_thread_num()];
    start(mine, stages != nullptr);
#pragma omp single
    used = omp_get_num_threads();
#pragma omp for schedule(static)
    for (int64_t t = 0; t < whole.tile_count; t++) {
      const Tile& tile = whole.tiles[t];
      for (int64_t i = 0; i < tile.rows; i++)
        kernels.quantize(x + (tile.row + i) * linear->in, *linear, mine.row,
                         shared.integers + tile.row * shared.stride, i, tile.rows, shared.scales + tile.row + i,
                         shared.sums + tile.row + i);
      if (mine.stages) {
        const double now = fairseq_seconds();
        mine.stages[STAGE_QUANTIZE] += now - mine.started;
        mine.started = now;
      }
    }
    wait_is_over(mine);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tile_groups * panel_groups; task++) {
      const int64_t tile = task / panel_groups * tile_group, panel = task % panel_groups * panel_group;
      mine.tiles = whole.tiles + tile;
      mine.tile_count = tile + tile_group < whole.tile_count ? tile_group : whole.tile_count - tile;
      kernels.linear(*linear, shared, mine, panel, panel + panel_group < panels ? panel + panel_group : panels, gelu,
                     residual, out);
    }
    wait_is_over(mine);
  }
  add_stages(stages, own, used);
  free(whole.tiles);
  free(own);
  return 0;
}

// Images are taken `threads` at a time; their rows, and not heads or columns, are shared among the threads, so that a
// thread waits for others once: for the keys and values of its image.
static int64_t images_at_once(int64_t images, int threads) { return images < threads ? images : threads; }

// softmax(scaling * q @ k.T) @ v per head: float (images, tokens, heads * size), rows `stride` floats apart.
EXPORT int fairseq_attention(int level, const float* query, const float* key, const float* value, int64_t stride,
                             int64_t images, int64_t tokens, int64_t heads, int64_t size, float scaling, float* out,
                             int threads) {
  const Kernels& kernels = *kernels_of(level);
  threads = threads_for(threads > MOST_THREADS ? MOST_THREADS : threads);
  Sizes sizes = {};
  sizes.images = images_at_once(images, threads);
  sizes.tokens = tokens;
  sizes.rows = sizes.images * tokens;
  sizes.heads = heads;
  sizes.head_size = size;
  sizes.threads = threads;
  SharedWorkspace shared;
  ThreadWorkspace* own = (ThreadWorkspace*)calloc(threads, sizeof(ThreadWorkspace));
  if (!own || !prepare(sizes, shared, own)) {
    free(own);
    return 1;
  }
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num(), count = omp_get_num_threads();
    ThreadWorkspace& mine = own[thread];
    mine.stages = nullptr;
    SharedWorkspace ours = shared;
    for (int64_t image = 0; image < images; image += sizes.images) {
      const int64_t now = images - image < sizes.images ? images - image : sizes.images, rows = now * tokens;
      const float* qkv[] = {query + image * tokens * stride, key + image * tokens * stride,
                            value + image * tokens * stride};
      cut(begin(rows, tokens, thread, count), begin(rows, tokens, thread + 1, count), tokens, mine);
      if (thread == count - 1) cut(begin(rows, tokens, thread, count), rows, tokens, mine);
      ours.attended = out + image * tokens * heads * size;
      kernels.attention_pack(qkv, stride, heads, size, ours, mine);
#pragma omp barrier
      kernels.attend(heads, size, scaling, ours, mine);
#pragma omp barrier
    }
  }
  free(own);
  return 0;
}

// One encoder block: float (images, tokens, width) -> the same. 0, or 1 if there is no memory.
EXPORT int fairseq_block(int level, const Block* block, const float* x, int64_t images, int64_t tokens, float* out,
                         int threads, int64_t slice, double* stages) {
  const Kernels& kernels = *kernels_of(level);
  threads = threads_for(threads > MOST_THREADS ? MOST_THREADS : threads);
  Sizes sizes = {};
  sizes.images = images_at_once(images, threads);
  sizes.tokens = tokens;
  sizes.rows = sizes.images * tokens;
  sizes.heads = block->heads;
  sizes.head_size = block->head_size;
  sizes.width = most(block->width, block->output.in);
  sizes.longest = most(sizes.width, block->mlp);
  sizes.slice = most(slice, TILE);
  sizes.mlp = block->mlp;
  sizes.threads = threads;
  SharedWorkspace shared;
  ThreadWorkspace* own = (ThreadWorkspace*)calloc(threads, sizeof(ThreadWorkspace));
  if (!own || !prepare(sizes, shared, own)) {
    free(own);
    return 1;
  }
  int used = threads;
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num(), count = omp_get_num_threads();
    ThreadWorkspace& mine = own[thread];
    start(mine, stages != nullptr);
    if (thread == 0) used = count;
    for (int64_t image = 0; image < images; image += sizes.images) {
      const int64_t now = images - image < sizes.images ? images - image : sizes.images, rows = now * tokens;
      const int64_t first = begin(rows, tokens, thread, count);
      cut(first, thread == count - 1 ? rows : begin(rows, tokens, thread + 1, count), tokens, mine);
      const float* from = x + image * tokens * block->width;
      kernels.before_attention(*block, from, shared, mine);
#pragma omp barrier
      wait_is_over(mine);
      kernels.after_attention(*block, from, shared, mine, sizes.slice, out + image * tokens * block->width);
#pragma omp barrier
      wait_is_over(mine);
    }
  }
  add_stages(stages, own, used);
  free(own);
  return 0;
}
