// AVX2: products of bytes by way of 16 bits, which its own instruction for bytes saturates at.
#pragma once

#include "registers.h"

namespace {

struct Isa : ByLanes<Isa> {
  static inline Ints dot4(const uint8_t* x, const uint8_t* weights, Ints sums) {
    int32_t four;
    memcpy(&four, x, 4);
    const __m256i wide = _mm256_cvtepu8_epi16(_mm_set1_epi32(four));
    const __m256i low = _mm256_madd_epi16(wide, _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)weights)));
    const __m256i high = _mm256_madd_epi16(wide, _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(weights + 16))));
    return sums + (Ints)_mm256_permute4x64_epi64(_mm256_hadd_epi32(low, high), 0xd8);
  }
};

}  // namespace
