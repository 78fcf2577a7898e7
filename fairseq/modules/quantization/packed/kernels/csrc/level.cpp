// The kernels for one instruction set, LEVEL; setup.py has the flags that it is compiled with.
#define TEXT_OF(name) #name
#define TEXT(name) TEXT_OF(name)
#define JOIN_OF(one, other) one##other
#define JOIN(one, other) JOIN_OF(one, other)
// clang-format off
#define HEADER TEXT(isa/LEVEL.h)
// clang-format on

#include HEADER

#include "block.h"
#include "integer_block.h"
#include "patches.h"

namespace {
void product(const uint8_t* tile, const uint8_t* panel, int64_t rows, int64_t steps, bool narrow, int32_t* sums) {
  product_of<Isa>(narrow, tile, panel, rows, steps, sums, false, [] {});
}
}  // namespace

extern const Kernels JOIN(kernels_, LEVEL) = {
    TEXT(LEVEL),    Isa::ROWS,  Isa::GROUP, Isa::EVEN_TILES, Isa::OFFSET,  Isa::FAST_HALVES, Isa::FAST_FLOATS,
    Isa::enter,     Isa::leave, norm,       activate,        quantize,     product,          linear,
    attention_pack, attend,     block,      integers,        integer_norm, round_pixels,     patches};
