// Any processor: what the compiler makes of plain C++.
#pragma once

#include "registers.h"

namespace {

struct Isa : ByLanes<Isa> {
  static inline Ints dot4(const uint8_t* x, const uint8_t* weights, Ints sums) {
    for (int lane = 0; lane < LANES; lane++)
      for (int k = 0; k < 4; k++) sums[lane] += x[k] * (int8_t)weights[4 * lane + k];
    return sums;
  }
};

}  // namespace
