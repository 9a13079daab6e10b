// A bucket's checksum: the sum of its 8-byte words, folded and each times an odd number of its place, modulo 2^64.
//
// Folding and an odd factor both have inverses, so that no single word can change unnoticed. Without folding, the highest bit
// would keep its place whatever the factor, and two flipped signs would cancel. A sum has no order, so that threads may add as
// they come.
#pragma once

#include <cstdint>

#include "numbers.h"

namespace grpo_fast {

constexpr uint64_t kChecksumPrime = 0x9e3779b97f4a7c15ull;

GRPO_INLINE uint64_t checksum_term(uint64_t word, int64_t place) {
  return (word ^ (word >> 32)) * ((2 * static_cast<uint64_t>(place) + 1) * kChecksumPrime);
}

}  // namespace grpo_fast
