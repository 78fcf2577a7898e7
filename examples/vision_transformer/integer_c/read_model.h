/* model.bin, read once and checked: every array is as long as model.h says, and every constant within its range.

   All integers are little-endian. The file begins with "IVIT", the version of the format, its length, and the CRC-32 of
   all that follows; then come arrays, each with the number of its entries before it, in the order of read_model. */

#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model.h"

#define PIXELS (CHANNELS * HEIGHT * WIDTH)
#define PATCH (CHANNELS * PATCH_HEIGHT * PATCH_WIDTH)
#define CHECK (PIXELS + 4 * CLASSES) /* a picture and its logits */

typedef const unsigned char *Bytes; /* integers as they lie in the file, at any address */

typedef struct {
    Bytes multiplier, shift, offset;
    int bits;
} Requantize;
typedef struct {
    Requantize requantize;
    int inputs, zero;
    Bytes columns, added, spread;
} Result; /* what layers read */
typedef struct {
    int inputs, outputs;
    const int8_t *weight;
    Requantize output;
} Linear;
typedef struct {
    int64_t eps;
    Result output;
} Norm;
typedef struct {
    Norm norm1, norm2;
    Linear query, key, value, output, fc1, fc2;
    Bytes multiplier, shift, entries;
    Result attended, activated;
} Block;
typedef struct {
    Norm norm;
    Result read;
    Linear linear;
} Readout;

static unsigned char file[FILE_BYTES + 1];
static size_t at; /* what is read next */

static Bytes constants, checks;
static int check_count;
static Linear patches;
static Norm before;
static Block blocks[BLOCKS];
static Readout readouts[READOUTS];

static void fail(const char *sentence)
{
    fprintf(stderr, "error: %s\n", sentence);
    exit(2);
}

static uint32_t uint32_at(Bytes p, size_t i)
{
    p += 4 * i;
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static int32_t int32_at(Bytes p, size_t i) /* C leaves open what a cast of large unsigned integers gives */
{
    uint32_t u = uint32_at(p, i);
    return u <= INT32_MAX ? (int32_t)u : -(int32_t)(UINT32_MAX - u) - 1;
}

static int64_t int64_at(Bytes p, size_t i)
{
    uint64_t u = (uint64_t)uint32_at(p, 2 * i + 1) << 32 | uint32_at(p, 2 * i);
    return u <= INT64_MAX ? (int64_t)u : -(int64_t)(UINT64_MAX - u) - 1;
}

static Bytes take(size_t count, size_t size) /* an array of that many entries */
{
    if (FILE_BYTES - at < 4) fail("the model ends before its last array");
    if (uint32_at(file + at, 0) != count) fail("an array of the model is not as long as model.h says");
    at += 4;
    if ((FILE_BYTES - at) / size < count) fail("the model ends before its last array");
    at += count * size;
    return file + at - count * size;
}

static void check_range(Bytes p, size_t count, size_t size, int32_t low, int32_t high) /* of 1 or 4 bytes each */
{
    for (size_t i = 0; i < count; i++) {
        int32_t value = size == 1 ? p[i] : int32_at(p, i);
        if (value < low || value > high) fail("a constant of the model is out of its range");
    }
}

static Bytes take_within(size_t count, size_t size, int32_t low, int32_t high)
{
    Bytes p = take(count, size);
    check_range(p, count, size, low, high);
    return p;
}

static int take_int(int32_t low, int32_t high)
{ return (int)int32_at(take_within(1, 4, low, high), 0); }

static Requantize take_requantize(int count, int bits)
{
    Requantize r;
    r.multiplier = take_within(count, 4, -MOST_MULTIPLIER, MOST_MULTIPLIER);
    r.shift = take_within(count, 1, 0, MOST_SHIFT);
    r.offset = take(count, 8);
    r.bits = bits;
    for (int i = 0; i < count; i++)
        if (int64_at(r.offset, i) > MOST_OFFSET || int64_at(r.offset, i) < -MOST_OFFSET) fail("an offset is too large");
    return r;
}

static Result take_result(int count, int bits) /* as many bytes as columns, or more: then some columns are several */
{
    Result r = {{0, 0, 0, 0}, take_int(count, MOST_INPUTS), 0, 0, 0, 0};
    r.requantize = take_requantize(count, r.inputs > count ? 16 : bits);
    if (r.inputs > count) {
        r.zero = take_int(-128, 127);
        r.columns = take_within(r.inputs, 4, 0, count - 1);
        r.added = take_within(r.inputs, 4, 0, 1 << 16);
        r.spread = take_within(r.inputs, 1, 0, 16);
    }
    return r;
}

static Linear take_linear(int inputs, int outputs, int bits)
{
    Linear l = {inputs, outputs, (const int8_t *)take((size_t)inputs * outputs, 1), {0, 0, 0, 0}};
    l.output = take_requantize(outputs, bits);
    return l;
}

static Norm take_norm(int bits)
{
    Norm n = {int64_at(take(1, 8), 0), {{0, 0, 0, 0}, 0, 0, 0, 0, 0}};
    if (n.eps < 1 || n.eps > (int64_t)1 << 60) fail("an eps is out of its range");
    n.output = take_result(SIZE, bits);
    return n;
}

static void take_block(Block *b)
{
    b->norm1 = take_norm(READ_BITS);
    b->query = take_linear(b->norm1.output.inputs, SIZE, READ_BITS);
    b->key = take_linear(b->norm1.output.inputs, SIZE, READ_BITS);
    b->value = take_linear(b->norm1.output.inputs, SIZE, READ_BITS);
    b->multiplier = take_within(HEADS, 4, -MOST_MULTIPLIER, MOST_MULTIPLIER);
    b->shift = take_within(HEADS, 1, DYNAMIC ? ROW_SHIFT : 0, MOST_SHIFT);
    b->attended = take_result(SIZE, READ_BITS);
    b->output = take_linear(b->attended.inputs, SIZE, STREAM_BITS);
    b->norm2 = take_norm(READ_BITS);
    b->fc1 = take_linear(b->norm2.output.inputs, HIDDEN, ACTIVATION_BITS);
    b->entries = take_within(2 * TABLE, 4, -32768, 32767);
    b->activated = take_result(HIDDEN, READ_BITS);
    b->fc2 = take_linear(b->activated.inputs, SIZE, STREAM_BITS);
}

static void read_model(const char *path)
{
    static const int32_t sizes[] = {MODEL_SIZES};
    uint32_t crc = UINT32_MAX; /* CRC-32, as zip has it */
    FILE *f = fopen(path, "rb");
    if (!f) fail("the model cannot be opened");
    size_t length = fread(file, 1, sizeof file, f);
    fclose(f);
    if (length < 16 || memcmp(file, "IVIT", 4)) fail("the model is no file that fairseq-vit export --format c wrote");
    if (uint32_at(file, 1) != FILE_VERSION) fail("the model is of another version of the format than model.h");
    if (length != FILE_BYTES || uint32_at(file, 2) != FILE_BYTES) fail("the model is not as long as model.h says");
    for (size_t i = 16; i < length; i++) {
        crc ^= file[i];
        for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320u : 0);
    }
    if ((crc ^ UINT32_MAX) != uint32_at(file, 3))
        fail("the model is damaged: its checksum is not the one that was written");
    at = 16;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (take_int(INT32_MIN, INT32_MAX) != sizes[i]) fail("the model has other sizes than model.h");
    constants = take_within(TOKENS * SIZE, 4, -(1 << (STREAM_BITS - 1)), (1 << (STREAM_BITS - 1)) - 1);
    patches = take_linear(PATCH, SIZE, STREAM_BITS);
    if (BEFORE) before = take_norm(STREAM_BITS);
    for (int i = 0; i < BLOCKS; i++) take_block(&blocks[i]);
    for (int i = 0; i < READOUTS; i++) {
        Readout *r = &readouts[i];
        if (NORM_FIRST || NORM_LAST) r->norm = take_norm(NORM_LAST ? READ_BITS : LOGIT_BITS);
        if (!NORM_LAST) r->read = take_result(RANGES * SIZE, READ_BITS);
        r->linear = take_linear(NORM_LAST ? r->norm.output.inputs : r->read.inputs, CLASSES, LOGIT_BITS);
    }
    check_count = take_int(0, MOST_CHECKS);
    checks = take((size_t)check_count * CHECK, 1);
    if (at != FILE_BYTES) fail("the model goes on behind its last array");
}
