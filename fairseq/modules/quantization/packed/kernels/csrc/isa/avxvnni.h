// AVX-VNNI: products of bytes in vectors of 8 lanes, on processors of Intel and AMD without AVX-512.
#pragma once

#include "registers.h"

namespace {

struct Isa : ByLanes<Isa> {
  static inline Ints dot4(const uint8_t* x, const uint8_t* weights, Ints sums) {
    int32_t four;
    memcpy(&four, x, 4);
    return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sums, _mm256_set1_epi32(four),
                                         _mm256_loadu_si256((const __m256i*)weights));
  }
};

}  // namespace
