/* A Vision Transformer on integers alone: pixels in, the integers of the logits out.

       cc -std=c99 -O3 -o integer_vit integer_vit.c
       ./integer_vit model.bin picture.raw

   C99 and nothing else: no floating-point number, no allocation, and of the library only files and messages. "model.h"
   and "model.bin" are what `fairseq-vit export MODEL model.bin --format c` writes: sizes and the constants of the
   arithmetic, and the numbers of the model. A picture is height * width bytes of red, then of green, then of blue; a
   file may hold several. Each picture's logits are printed on a line. Without a picture, the program runs those in
   model.bin and compares their logits with the ones that the model gave.

   The arithmetic, its widths and its bounds are in docs/integer_only.rst: no sum here reaches 2**62. */

#include "read_model.h"

#define HEAD (SIZE / HEADS)
#define COLUMNS (WIDTH / PATCH_WIDTH)
#define PATCHES (HEIGHT / PATCH_HEIGHT * COLUMNS)

/* ---- Numbers ---------------------------------------------------------------------------------------------------- */

static int64_t shift_right(int64_t x, int n) /* floor(x / 2**n): C leaves open what >> does to negative numbers */
{ return x < 0 ? ~(~x >> n) : x >> n; }

static int64_t round_shift(int64_t x, int n) /* floor(x / 2**n + 1/2) */
{ return shift_right(x + (((int64_t)1 << n) >> 1), n); }

static int64_t floor_div(int64_t a, int64_t b) /* b > 0 */
{ return a / b - (a % b < 0); }

static int64_t clamp(int64_t x, int64_t low, int64_t high)
{ return x < low ? low : x > high ? high : x; }

static int64_t clamp_bits(int64_t x, int bits)
{
    int64_t half = (int64_t)1 << (bits - 1);
    return clamp(x, -half, half - 1);
}

static int64_t square_root(int64_t n) /* floor, of n below 2**62 */
{
    int64_t root = 0;
    for (int64_t bit = (int64_t)1 << 30; bit > 0; bit >>= 1)
        if ((root + bit) * (root + bit) <= n) root += bit;
    return root;
}

static int64_t requantize(const Requantize *r, int64_t value, int i)
{
    int64_t sum = value * int32_at(r->multiplier, i) + int64_at(r->offset, i);
    return clamp_bits(round_shift(sum, r->shift[i]), r->bits);
}

/* ---- Layers ------------------------------------------------------------------------------------------------------ */

static void linear(const Linear *l, const int16_t *q, int64_t m, int32_t *out)
{
    for (int o = 0; o < l->outputs; o++) {
        const int8_t *w = l->weight + (size_t)o * l->inputs;
        int32_t sum = 0;
        for (int i = 0; i < l->inputs; i++) sum += q[i] * w[i];
        out[o] = (int32_t)requantize(&l->output, sum * m, o);
    }
}

/* Bytes of 16-bit integers, and the largest of these, which gives their scale. What has 8 bits is bytes already.
   Entries of a row lie side by side, rows `step` apart; all of them get one scale. */
static int64_t to_bytes(const int32_t *z, int rows, int count, int step, int is_unsigned, int16_t *q)
{
    int64_t largest = 1;
    int n = is_unsigned ? UNSIGNED_SHIFT : SIGNED_SHIFT;
    for (int row = 0; DYNAMIC && row < rows; row++)
        for (int i = row * step; i < row * step + count; i++) {
            int64_t magnitude = z[i] >= 0 ? z[i] : is_unsigned ? 0 : -(int64_t)z[i];
            if (magnitude > largest) largest = magnitude;
        }
    int64_t reciprocal = ((int64_t)(is_unsigned ? 255 : 127) << n) / largest;
    for (int row = 0; row < rows; row++)
        for (int i = row * step; i < row * step + count; i++) {
            int64_t value = is_unsigned && z[i] < 0 ? 0 : z[i];
            q[i] = (int16_t)(DYNAMIC ? round_shift(value * reciprocal, n) : value);
        }
    return largest;
}

static void read_and_multiply(const Linear *l, const int32_t *z, int is_unsigned, int32_t *out)
{
    static int16_t q[MOST_INPUTS];
    int64_t m = to_bytes(z, 1, l->inputs, 0, is_unsigned, q);
    linear(l, q, m, out);
}

static void result(const Result *r, const int64_t *values, int count, int32_t *out)
{
    static int32_t wide[MOST_INPUTS];
    int32_t *z = r->columns ? wide : out;
    for (int i = 0; i < count; i++) z[i] = (int32_t)requantize(&r->requantize, values[i], i);
    for (int i = 0; r->columns && i < r->inputs; i++) { /* the bytes of a column add up to it */
        int64_t part = shift_right((int64_t)z[int32_at(r->columns, i)] + int32_at(r->added, i), r->spread[i]);
        out[i] = (int32_t)clamp(part + r->zero, -128, 127);
    }
}

static void norm(const Norm *n, const int32_t *h, int32_t *out)
{
    static int64_t d[SIZE];
    int64_t sum = 0, v = n->eps;
    int j = 0;
    for (int i = 0; i < SIZE; i++) sum += h[i];
    int64_t mean = floor_div(2 * sum + SIZE, 2 * SIZE);
    for (int i = 0; i < SIZE; i++) {
        d[i] = h[i] - mean;
        v += d[i] * d[i];
    }
    for (; v < (int64_t)1 << 60; v *= 4) j++;
    int64_t reciprocal = (((int64_t)1 << 61) - 1) / square_root(v);
    for (int i = 0; i < SIZE; i++) d[i] = round_shift(d[i] * reciprocal, 61 - NORM_BITS - j);
    result(&n->output, d, SIZE, out);
}

static int64_t activation(Bytes entries, int64_t t) /* a table of lines; below it 0, above it t */
{
    int64_t reach = TABLE / 2 * 256, place = (t + reach) / 256, rest = (t + reach) % 256;
    if (t < -reach || t >= reach) return t < 0 ? 0 : t;
    return int32_at(entries, place) + round_shift(int32_at(entries, TABLE + place) * rest, 8);
}

static int64_t exponential(int64_t d) /* 255 * 2**(-d / 2**15) in units of 2**-15, for d >= 0 */
{
    int64_t one = 1 << FRACTION, z = clamp(d, 0, EXP_SMALLEST * one) / one, f = clamp(d, 0, EXP_SMALLEST * one) % one;
    int64_t slope = EXP_SLOPE - round_shift(EXP_SQUARE * f, FRACTION);
    return (255 * (one - round_shift(slope * f, FRACTION))) >> z;
}

/* ---- Blocks ------------------------------------------------------------------------------------------------------ */

static int32_t stream[TOKENS * SIZE], projected[3][TOKENS * SIZE], given[MOST_INPUTS], branch[SIZE];
static int16_t query[TOKENS * SIZE], key[TOKENS * SIZE], value[TOKENS * SIZE];
static int64_t query_m[HEADS][TOKENS], key_m[HEADS][TOKENS], value_m[HEADS], mean[SIZE];

static void add(int32_t *h)
{
    for (int i = 0; i < SIZE; i++) h[i] = (int32_t)clamp_bits((int64_t)h[i] + branch[i], STREAM_BITS);
}

static void attend(const Block *b, int token, int head, int64_t *out) /* HEAD of them */
{
    static int64_t u[TOKENS];
    static int32_t e[TOKENS];
    int first = head * HEAD, shift = b->shift[head];
    int64_t row = int32_at(b->multiplier, head), most = -SCORE_LIMIT, total = 0, rest = 0;
    if (DYNAMIC) {
        row = round_shift(query_m[head][token] * row, ROW_SHIFT);
        shift -= ROW_SHIFT;
    }
    for (int t = 0; t < TOKENS; t++) {
        int32_t s = 0;
        for (int c = first; c < first + HEAD; c++) s += query[token * SIZE + c] * key[t * SIZE + c];
        u[t] = clamp(round_shift(s * key_m[head][t] * row, shift), -SCORE_LIMIT, SCORE_LIMIT);
        if (u[t] > most) most = u[t];
    }
    for (int t = 0; t < TOKENS; t++) {
        int64_t x = exponential(most - u[t]);
        e[t] = (int32_t)round_shift(x, FRACTION);
        total += x;
        rest += x - e[t] * ((int64_t)1 << FRACTION);
    }
    int64_t reciprocal = ((int64_t)1 << RECIPROCAL_SHIFT) / total;
    for (int c = first; c < first + HEAD; c++) {
        int32_t mixed = 0;
        for (int t = 0; t < TOKENS; t++) mixed += e[t] * value[t * SIZE + c];
        int64_t product = mixed * ((int64_t)1 << FRACTION) + round_shift(rest * mean[c], 8);
        int64_t y = round_shift(product * reciprocal, RECIPROCAL_SHIFT - MEAN_FRACTION);
        *out++ = clamp(y, -(127 << MEAN_FRACTION), 127 << MEAN_FRACTION) * value_m[head];
    }
}

static void attention(const Block *b)
{
    static int64_t mixed[SIZE];
    for (int t = 0; t < TOKENS * SIZE; t += SIZE) {
        norm(&b->norm1, stream + t, given);
        read_and_multiply(&b->query, given, 0, projected[0] + t);
        read_and_multiply(&b->key, given, 0, projected[1] + t);
        read_and_multiply(&b->value, given, 0, projected[2] + t);
    }
    for (int head = 0; head < HEADS; head++) {
        int first = head * HEAD;
        for (int t = 0; t < TOKENS; t++) {
            int place = t * SIZE + first;
            query_m[head][t] = to_bytes(projected[0] + place, 1, HEAD, 0, 0, query + place);
            key_m[head][t] = to_bytes(projected[1] + place, 1, HEAD, 0, 0, key + place);
        }
        value_m[head] = to_bytes(projected[2] + first, TOKENS, HEAD, SIZE, 0, value + first);
    }
    for (int c = 0; c < SIZE; c++) {
        int64_t sum = 0;
        for (int t = 0; t < TOKENS; t++) sum += value[t * SIZE + c];
        mean[c] = floor_div(512 * sum + TOKENS, 2 * TOKENS);
    }
    for (int t = 0; t < TOKENS; t++) {
        for (int head = 0; head < HEADS; head++) attend(b, t, head, mixed + head * HEAD);
        result(&b->attended, mixed, SIZE, given);
        read_and_multiply(&b->output, given, 0, branch);
        add(stream + t * SIZE);
    }
}

static void mlp(const Block *b, int32_t *h)
{
    static int32_t hidden[HIDDEN];
    static int64_t activated[HIDDEN];
    norm(&b->norm2, h, given);
    read_and_multiply(&b->fc1, given, 0, hidden);
    for (int i = 0; i < HIDDEN; i++) activated[i] = activation(b->entries, hidden[i]);
    result(&b->activated, activated, HIDDEN, given);
    read_and_multiply(&b->fc2, given, DYNAMIC, branch);
    add(h);
}

/* ---- The model --------------------------------------------------------------------------------------------------- */

static void embed(Bytes pixels)
{
    static int16_t patch[PATCH];
    for (int i = 0; i < TOKENS * SIZE; i++) stream[i] = int32_at(constants, i);
    for (int p = 0; p < PATCHES; p++) {
        int16_t *next = patch;
        for (int c = 0; c < CHANNELS; c++)
            for (int y = 0; y < PATCH_HEIGHT; y++)
                for (int x = 0; x < PATCH_WIDTH; x++) {
                    int line = c * HEIGHT + p / COLUMNS * PATCH_HEIGHT + y;
                    *next++ = (int16_t)(pixels[line * WIDTH + p % COLUMNS * PATCH_WIDTH + x] - 128);
                }
        linear(&patches, patch, 1, branch);
        add(stream + (TOKENS - PATCHES + p) * SIZE); /* the first tokens are constants alone */
    }
    for (int t = 0; BEFORE && t < TOKENS; t++) norm(&before, stream + t * SIZE, stream + t * SIZE);
}

static void read_tokens(const Readout *r, const int (*ranges)[2]) /* the means of tokens, normed before or after */
{
    static int64_t pooled[RANGES * SIZE];
    static int32_t h[SIZE];
    for (int i = 0; i < RANGES; i++) {
        int64_t count = ranges[i][1] - ranges[i][0], *sum = pooled + i * SIZE;
        for (int c = 0; c < SIZE; c++) sum[c] = 0;
        for (int t = ranges[i][0]; t < ranges[i][1]; t++) {
            if (NORM_FIRST) norm(&r->norm, stream + t * SIZE, h);
            for (int c = 0; c < SIZE; c++) sum[c] += NORM_FIRST ? h[c] : stream[t * SIZE + c];
        }
        for (int c = 0; c < SIZE; c++) sum[c] = floor_div(2 * sum[c] + count, 2 * count);
    }
    for (int c = 0; c < SIZE; c++) h[c] = (int32_t)pooled[c];
    if (NORM_LAST) norm(&r->norm, h, given);
    else result(&r->read, pooled, RANGES * SIZE, given);
}

static void logits_of(Bytes pixels, int32_t *logits) /* PIXELS of them -> CLASSES */
{
    static const int ranges[READOUTS][RANGES][2] = READ_TOKENS;
    static int32_t part[CLASSES];
    embed(pixels);
    for (int i = 0; i < BLOCKS; i++) {
        attention(&blocks[i]);
        for (int t = 0; t < TOKENS; t++) mlp(&blocks[i], stream + t * SIZE);
    }
    for (int c = 0; c < CLASSES; c++) logits[c] = 0;
    for (int i = 0; i < READOUTS; i++) { /* two heads: their mean, whose exponent is that of the sum */
        read_tokens(&readouts[i], ranges[i]);
        read_and_multiply(&readouts[i].linear, given, 0, part);
        for (int c = 0; c < CLASSES; c++) logits[c] += part[c];
    }
}

int main(int argc, char **argv)
{
    static unsigned char picture[PIXELS];
    static int32_t logits[CLASSES];
    if (argc < 2) fail("usage: integer_vit model.bin [picture.raw ...]");
    read_model(argv[1]);
    for (int i = 2; i < argc; i++) {
        size_t length, count = 0;
        FILE *f = fopen(argv[i], "rb");
        if (!f) fail("a picture cannot be opened");
        for (; (length = fread(picture, 1, PIXELS, f)) == PIXELS; count++) {
            logits_of(picture, logits);
            for (int c = 0; c < CLASSES; c++) printf("%" PRId32 "%c", logits[c], c + 1 < CLASSES ? ' ' : '\n');
        }
        fclose(f);
        if (length || !count) fail("a file of pictures must be channels * height * width bytes long, or times as long");
    }
    for (int i = 0; argc == 2 && i < check_count; i++) {
        logits_of(checks + (size_t)i * CHECK, logits);
        for (int c = 0; c < CLASSES; c++)
            if (logits[c] != int32_at(checks + (size_t)i * CHECK + PIXELS, c)) {
                printf("picture %d of those in the model gives other logits\n", i);
                return 1;
            }
    }
    if (argc == 2) printf("%d pictures in the model give the logits that it gave\n", check_count);
    return 0;
}
